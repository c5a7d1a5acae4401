//! A plugin's configuration: `key=value` settings, read with errors that name the key, what was wrong and what would be right.

use std::fmt::Display;
use std::ops::RangeInclusive;

use tenon_abi::DeviceError;

/// The settings of one instance. The host has checked them against the manifest and filled in its defaults; in a test, a key may be missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config(Vec<(String, String)>);

impl Config {
    /// These settings. A later setting of a key replaces an earlier one.
    pub fn new<K: Into<String>, V: Into<String>>(settings: impl IntoIterator<Item = (K, V)>) -> Self {
        Self(settings.into_iter().map(|(key, value)| (key.into(), value.into())).collect())
    }

    /// The settings, as given.
    pub fn settings(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// The value of `key` as text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&str> {
        self.0.iter().rev().find(|(k, _)| k == key).map(|(_, value)| value.as_str())
    }

    /// The value of `key` as an unsigned number that fits `T`: decimal, or hexadecimal behind `0x`, with `_` between digits where it helps.
    ///
    /// # Errors
    /// The value is none.
    pub fn number<T: TryFrom<u64>>(&self, key: &str) -> Result<Option<T>, DeviceError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        let most = u64::MAX >> (64 - 8 * size_of::<T>().min(8));
        parse_number(text).and_then(|value| T::try_from(value).ok()).map(Some).ok_or_else(|| {
            wrong(key, text, &format_args!("a number from 0 to {most}, such as 1016 or 0x3f8"))
        })
    }

    /// The value of `key` as a number in `range`. Otherwise as [`Config::number`].
    ///
    /// # Errors
    /// The value is none, or out of the range.
    pub fn number_in<T>(&self, key: &str, range: RangeInclusive<T>) -> Result<Option<T>, DeviceError>
    where
        T: TryFrom<u64> + PartialOrd + Display,
    {
        let Some(text) = self.text(key) else { return Ok(None) };
        parse_number(text)
            .and_then(|value| T::try_from(value).ok())
            .filter(|value| range.contains(value))
            .map(Some)
            .ok_or_else(|| {
                wrong(key, text, &format_args!("a number from {} to {}", range.start(), range.end()))
            })
    }

    /// The value of `key` as a number of bytes: a number, or one with the unit `KiB`, `MiB`, `GiB` or `K`, `M`, `G` (all powers of 1024).
    ///
    /// # Errors
    /// The value is none, or is over 2^64.
    pub fn size(&self, key: &str) -> Result<Option<u64>, DeviceError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        parse_size(text).map(Some).ok_or_else(|| wrong(key, text, &"a size such as 4096, 64KiB or 16 MiB"))
    }

    /// The value of `key` as a yes or no: `true`, `yes`, `on`, `1` or `false`, `no`, `off`, `0`.
    ///
    /// # Errors
    /// The value is none of these.
    pub fn boolean(&self, key: &str) -> Result<Option<bool>, DeviceError> {
        match self.text(key) {
            None => Ok(None),
            Some("true" | "yes" | "on" | "1") => Ok(Some(true)),
            Some("false" | "no" | "off" | "0") => Ok(Some(false)),
            Some(text) => Err(wrong(key, text, &"true or false")),
        }
    }

    /// The value of `key` as one of the named choices.
    ///
    /// # Errors
    /// The value is none of the names.
    pub fn choice<T: Clone>(&self, key: &str, choices: &[(&str, T)]) -> Result<Option<T>, DeviceError> {
        let Some(text) = self.text(key) else { return Ok(None) };
        choices.iter().find(|(name, _)| *name == text).map(|(_, value)| Some(value.clone())).ok_or_else(
            || {
                let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
                wrong(key, text, &format_args!("one of {}", names.join(", ")))
            },
        )
    }

    /// The error for a setting that must be there and is not.
    #[must_use]
    pub fn missing(key: &str, right: &str) -> DeviceError {
        DeviceError::Invalid(format!("`{key}` is missing: give {right}"))
    }
}

/// The error for a setting whose value is wrong.
fn wrong(key: &str, value: &str, right: &dyn Display) -> DeviceError {
    DeviceError::Invalid(format!("`{key}` is `{value}`, but must be {right}"))
}

fn parse_number(text: &str) -> Option<u64> {
    let digits = text.trim().replace('_', "");
    match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        // `from_str_radix` takes a sign, which no setting has.
        Some(hex) if hex.starts_with(|c: char| c.is_ascii_hexdigit()) => u64::from_str_radix(hex, 16).ok(),
        None if digits.starts_with(|c: char| c.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    }
}

fn parse_size(text: &str) -> Option<u64> {
    const UNITS: [(&str, u32); 6] = [("KiB", 10), ("MiB", 20), ("GiB", 30), ("K", 10), ("M", 20), ("G", 30)];
    let text = text.trim();
    let (digits, shift) =
        UNITS.iter().find_map(|(unit, shift)| Some((text.strip_suffix(unit)?, *shift))).unwrap_or((text, 0));
    parse_number(digits)?.checked_mul(1 << shift)
}
