//! Settings are read with errors that say what would be right, and states without trusting a byte.

use tenon_sdk::Config;
use tenon_sdk::device::{Decoder, Encoder, Error};

fn config(value: &str) -> Config {
    Config::new([("key", value)])
}

#[test]
fn numbers_are_decimal_or_hexadecimal_and_fit_their_type() {
    for (text, value) in
        [("1016", 1016u16), ("0x3f8", 0x3f8), ("0X3F8", 0x3f8), ("1_000", 1000), ("65535", 65535)]
    {
        assert_eq!(config(text).number("key"), Ok(Some(value)));
    }
    assert_eq!(config("0xffff_ffff_ffff_ffff").number("key"), Ok(Some(u64::MAX)));
    for text in ["", "x", "-1", "+1", "0x", "0x+1", "65536", "_", "0x_", "1.5", "99999999999999999999"] {
        let error = config(text).number::<u16>("key").unwrap_err().to_string();
        assert!(error.contains("`key`") && error.contains("65535"), "{text}: {error}");
    }
    assert_eq!(config("1").number::<u8>("other"), Ok(None));
    assert_eq!(config("8").number_in("key", 1..=8u8), Ok(Some(8)));
    let error = config("9").number_in("key", 1..=8u8).unwrap_err().to_string();
    assert_eq!(error, "invalid: `key` is `9`, but must be a number from 1 to 8");
}

#[test]
fn sizes_have_units_of_1024() {
    for (text, value) in
        [("4096", 4096), ("64KiB", 64 << 10), ("16 MiB", 16 << 20), ("2G", 2 << 30), ("0x10K", 16 << 10)]
    {
        assert_eq!(config(text).size("key"), Ok(Some(value)), "{text}");
    }
    for text in ["", "KiB", "1KB", "1 TiB", "-1", "99999999999GiB"] {
        assert!(config(text).size("key").is_err(), "{text}");
    }
}

#[test]
fn booleans_and_choices_name_what_would_be_right() {
    assert_eq!(
        (config("yes").boolean("key"), config("off").boolean("key")),
        (Ok(Some(true)), Ok(Some(false)))
    );
    assert!(config("maybe").boolean("key").unwrap_err().to_string().contains("true or false"));
    let choices = [("fast", 1), ("slow", 2)];
    assert_eq!(config("slow").choice("key", &choices), Ok(Some(2)));
    assert!(config("").choice("key", &choices).unwrap_err().to_string().contains("fast, slow"));
}

#[test]
fn a_state_comes_back_and_every_truncation_is_refused() {
    let mut state = Encoder::new();
    state
        .u8(1)
        .u16(2)
        .u32(3)
        .u64(4)
        .i64(-5)
        .bool(true)
        .option(None)
        .option(Some(6))
        .bytes(b"seven")
        .raw(&[8]);
    let bytes = state.into_bytes();
    let read = |bytes: &[u8]| -> Result<_, Error> {
        let mut state = Decoder::new(1, bytes);
        let numbers = (state.u8()?, state.u16()?, state.u32()?, state.u64()?, state.i64()?, state.bool()?);
        let rest = (state.option()?, state.option()?, state.bytes(5)?.to_vec(), state.array::<1>()?);
        state.finish()?;
        Ok((numbers, rest))
    };
    assert_eq!(read(&bytes), Ok(((1, 2, 3, 4, -5, true), (None, Some(6), b"seven".to_vec(), [8]))));
    for length in 0..bytes.len() {
        assert!(matches!(read(&bytes[..length]), Err(Error::Invalid(_))), "{length} bytes were accepted");
    }
    assert!(read(&[&bytes[..], &[0]].concat()).is_err());
}

#[test]
fn a_list_longer_than_allowed_or_than_the_state_is_refused() {
    let long = [&u32::MAX.to_le_bytes()[..], b"abc"].concat();
    assert!(Decoder::new(1, &long).bytes(usize::MAX).is_err());
    assert!(Decoder::new(1, &[2, 0, 0, 0, 1, 2]).bytes(1).is_err());
    assert!(Decoder::new(1, &[2]).bool().is_err());
}
