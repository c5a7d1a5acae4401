//! The port, driven without a VM.

use hello_port::HelloPort;
use tenon_testkit::{Bench, conformance};

fn read_text(bench: &mut Bench<HelloPort>) -> String {
    std::iter::repeat_with(|| bench.read(0, 0, 1))
        .take_while(|byte| *byte != 0)
        .map(|byte| byte as u8 as char)
        .collect()
}

#[test]
fn does_what_every_host_relies_on() {
    conformance::<HelloPort>(&[]);
}

#[test]
fn says_its_text_and_says_it_again_after_a_write() {
    let mut bench = Bench::<HelloPort>::new(&[("text", "Hi")]).unwrap();
    assert_eq!(read_text(&mut bench), "Hi");
    assert_eq!(read_text(&mut bench), "");
    bench.write(0, 0, 1, 0);
    assert_eq!(read_text(&mut bench), "Hi");
}

#[test]
fn goes_on_in_the_middle_of_its_text_after_a_restart() {
    let mut bench = Bench::<HelloPort>::new(&[("text", "Hi")]).unwrap();
    assert_eq!(bench.read(0, 0, 1), b'H'.into());
    bench.round_trip();
    assert_eq!(read_text(&mut bench), "i");
}

#[test]
fn names_the_setting_that_is_wrong() {
    let error = Bench::<HelloPort>::new(&[("base", "70000")]).err().unwrap().to_string();
    assert_eq!(
        error,
        "invalid: `base` is `70000`, but must be a number from 0 to 65535, such as 1016 or 0x3f8"
    );
}
