//! Images of any content in any mode. `cargo fuzz run flat_kernel` runs the same target.

use tenon_personality_flat::Flat;
use tenon_testkit::LoadBench;
use tenon_testkit::fuzz::{Input, Seen};

/// The bytes are a mode, options, and the image ([`Input::sparse`]).
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let (mode, more) = (input.u8(), input.u8());
    let mode = ["auto", "real", "protected", "long"][usize::from(mode % 4)];
    let mut bench = LoadBench::new([64, 1, 4200][usize::from(more % 3)] << 20)
        .option("mode", mode)
        .image("kernel", input.sparse());
    const ADDRESSES: [&str; 4] = ["0x7c00", "0x100000", "0xffffffff", "0xfffffffffffffff0"];
    if more & 0x10 != 0 {
        bench = bench.option("load", ADDRESSES[usize::from(more >> 6)]);
    }
    if more & 0x20 != 0 {
        bench = bench.option("entry", ADDRESSES[usize::from(more >> 6)]);
    }
    let what = match bench.load::<Flat>() {
        Ok(loaded) => {
            format!("loaded: {}", loaded.boot.summary.rsplit_once(" in ").map_or("", |(_, how)| how))
        }
        Err(error) => {
            let text = error.to_string();
            let words =
                text.split_whitespace().filter(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
            format!("refused: {}", words.take(7).collect::<Vec<_>>().join(" "))
        }
    };
    Seen::from([what])
}

#[test]
fn any_image_is_loaded_or_refused() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../fuzz/corpus/flat_kernel");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 2000, target);
    for mode in ["real", "protected", "long"] {
        assert!(report.count(&format!("loaded: {mode} mode")) > 20, "{mode} mode is hardly ever entered");
    }
    assert!(report.count("refused") > 100);
}
