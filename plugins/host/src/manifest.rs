//! `plugin.toml`: what a plugin says about itself, and the settings that it takes.
//!
//! Reading one never trusts it: names, versions and sizes are checked here, and what a plugin asks for beyond the host's
//! maximum is cut to it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;

use crate::files::quoted;

/// The version of the contract that this host offers.
pub const HOST_API: Version = Version { major: 0, minor: 1, patch: 0 };

/// The most memory that a device's instance gets, whatever its manifest asks for.
const DEVICE_MEMORY: u64 = 256 << 20;
/// The most memory that a personality gets: it may hold an unpacked kernel.
const PERSONALITY_MEMORY: u64 = 1 << 30;
/// The most memory that a store gets: it may keep blocks in it.
const STORE_MEMORY: u64 = 1 << 30;
/// The longest deadline of one call into a store, without the time that it waits.
const STORE_DEADLINE: u64 = 60_000;
/// The longest deadline of one call into a device.
const DEVICE_DEADLINE: u64 = 10_000;
/// The longest deadline of a personality's `load`.
const PERSONALITY_DEADLINE: u64 = 60_000;

/// A version: three numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Raised when users must change.
    pub major: u32,
    /// Raised when users must change, as long as `major` is 0; otherwise when something was added.
    pub minor: u32,
    /// Raised when something was added, as long as `major` is 0; otherwise when something was mended.
    pub patch: u32,
}

impl Version {
    /// Whether a host that offers `self` runs what was built for `other`: same line of compatibility, as in semantic versioning.
    #[must_use]
    pub fn runs(self, other: Self) -> bool {
        self.major == other.major && (self.major > 0 || self.minor == other.minor)
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

impl FromStr for Version {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<u32>> = text
            .split('.')
            .map(|n| n.bytes().all(|b| b.is_ascii_digit()).then(|| n.parse().ok()).flatten())
            .collect();
        match numbers.as_deref() {
            Some(&[major, minor, patch]) => Ok(Self { major, minor, patch }),
            _ => Err(format!("`{text}` is not a version; write three numbers, such as `0.1.0`")),
        }
    }
}

impl<'de> Deserialize<'de> for Version {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

/// What a plugin is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A device: of registers, or fed by virtqueues.
    Device,
    /// A guest-OS personality.
    Personality,
    /// A backing store.
    Store,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Device => "device",
            Self::Personality => "personality",
            Self::Store => "store",
        })
    }
}

impl Kind {
    /// The interfaces that a plugin of this kind may ask for: each is one permission.
    #[must_use]
    pub fn permissions(self) -> &'static [&'static str] {
        match self {
            Self::Device => &[
                "log",
                "time",
                "wall-clock",
                "interrupts",
                "channels",
                "machine-control",
                "requests",
                "stores",
                "ports",
                "sockets",
                "entropy",
                "guest-pages",
                "folders",
            ],
            Self::Store => &["log", "time", "entropy", "lower-stores", "connections"],
            Self::Personality => &["log", "images", "guest-memory"],
        }
    }
}

/// What the host does when an instance ends by a trap, a missed deadline or a limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailurePolicy {
    /// Makes a new instance with the state of the old one.
    #[default]
    Reload,
    /// Marks the device failed at once.
    Fail,
}

/// How much an instance may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Linear memory in bytes.
    pub memory: u64,
    /// How long one call may take.
    pub deadline: Duration,
}

/// The type of a setting's value.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum SettingType {
    /// A number of 64 bits: decimal, or hexadecimal after `0x`.
    Integer,
    /// A number of bytes with an optional unit, such as `64 KiB` or `16M`.
    Size,
    /// Any text.
    String,
    /// `true`, `yes`, `on`, `1`, or `false`, `no`, `off`, `0`.
    Boolean,
    /// One of the words in `choices`.
    Choice,
}

/// A setting that a plugin takes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingSchema {
    /// The type of the value.
    pub r#type: SettingType,
    /// The value where none is given; without one the setting may be left out and the plugin decides.
    pub default: Option<String>,
    /// What it is, for people.
    pub help: String,
    /// For [`SettingType::Choice`]: the words.
    pub choices: Vec<String>,
}

/// A `plugin.toml`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// The name by which the plugin is asked for.
    pub id: String,
    /// The plugin's own version.
    pub version: Version,
    /// What it is for.
    pub kind: Kind,
    /// The version of the contract that it was built for.
    pub api: Version,
    /// What it does, in one line.
    pub summary: String,
    /// What to do when it fails.
    pub failure: FailurePolicy,
    /// The interfaces that it may import.
    pub permissions: BTreeSet<String>,
    /// What an instance may use; already cut to the host's maximum.
    pub limits: Limits,
    /// The schema of the states that it saves.
    pub schema: u32,
    /// The settings that it takes, by key.
    pub config: BTreeMap<String, SettingSchema>,
}

/// A `plugin.toml` that cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{origin}: {what}")]
pub struct ManifestError {
    /// Where it was read.
    pub origin: String,
    /// What is wrong, with the line where that is known.
    pub what: String,
}

/// A setting that cannot be taken.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingError {
    /// The plugin does not know the key.
    #[error("`{plugin}` has no setting `{key}`; {known}")]
    UnknownKey {
        /// The plugin's id.
        plugin: String,
        /// The key.
        key: String,
        /// The keys that it has, as a sentence.
        known: String,
    },
    /// The value is not of the setting's type.
    #[error("`{plugin}`: `{key}={value}`: {wrong}; {known}")]
    Value {
        /// The plugin's id.
        plugin: String,
        /// The key.
        key: String,
        /// The value, cut if it is long.
        value: String,
        /// What is wrong and what would be right.
        wrong: String,
        /// The keys that it has, as a sentence.
        known: String,
    },
    /// The key was given twice.
    #[error("`{plugin}`: the setting `{key}` is given twice")]
    Twice {
        /// The plugin's id.
        plugin: String,
        /// The key.
        key: String,
    },
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct Raw {
    id: String,
    version: Version,
    kind: Kind,
    api: Version,
    #[serde(default)]
    summary: String,
    #[serde(default)]
    failure: FailurePolicy,
    #[serde(default)]
    permissions: RawPermissions,
    #[serde(default)]
    limits: RawLimits,
    state: Option<RawState>,
    #[serde(default)]
    config: BTreeMap<String, RawSetting>,
}

#[derive(Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawPermissions {
    #[serde(default)]
    imports: Vec<String>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct RawLimits {
    memory: Option<String>,
    deadline_ms: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawState {
    schema: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSetting {
    r#type: SettingType,
    default: Option<Scalar>,
    #[serde(default)]
    help: String,
    #[serde(default)]
    choices: Vec<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Scalar {
    Boolean(bool),
    Integer(i64),
    Text(String),
}

impl Manifest {
    /// Reads a manifest. `origin` names it in errors.
    ///
    /// # Errors
    /// It is not TOML, has unknown or missing keys, or values that cannot be; the text names the line or the key.
    pub fn parse(origin: &str, text: &str) -> Result<Self, ManifestError> {
        Self::read(text).map_err(|what| ManifestError { origin: origin.to_owned(), what })
    }

    fn read(text: &str) -> Result<Self, String> {
        let raw: Raw = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
        if !is_name(&raw.id) {
            return Err(format!(
                "id `{}`: an id is 1 to 64 lower-case letters, digits and dashes, and begins with a letter",
                raw.id
            ));
        }
        for import in &raw.permissions.imports {
            if !raw.kind.permissions().contains(&import.as_str()) {
                return Err(format!(
                    "permissions.imports: a {} cannot be permitted `{import}`; there are `{}`",
                    raw.kind,
                    raw.kind.permissions().join("`, `")
                ));
            }
        }
        let (default, most, deadline, longest) = match raw.kind {
            Kind::Device => (16 << 20, DEVICE_MEMORY, 100, DEVICE_DEADLINE),
            Kind::Personality => {
                (PERSONALITY_MEMORY, PERSONALITY_MEMORY, PERSONALITY_DEADLINE, PERSONALITY_DEADLINE)
            }
            Kind::Store => (64 << 20, STORE_MEMORY, 1000, STORE_DEADLINE),
        };
        let memory = match &raw.limits.memory {
            Some(text) => parse_size(text).map_err(|wrong| format!("limits.memory: {wrong}"))?,
            None => default,
        };
        let deadline = raw.limits.deadline_ms.unwrap_or(deadline);
        if memory < 64 << 10 || deadline == 0 {
            return Err("limits: memory is at least 64 KiB and deadline-ms at least 1".into());
        }
        if matches!(raw.kind, Kind::Device | Kind::Store) && raw.state.is_none() {
            return Err(
                "a device or store needs `[state] schema = N`, the number of the layout of its saved state"
                    .into(),
            );
        }
        let mut manifest = Self {
            id: raw.id,
            version: raw.version,
            kind: raw.kind,
            api: raw.api,
            summary: raw.summary,
            failure: raw.failure,
            permissions: raw.permissions.imports.into_iter().collect(),
            limits: Limits {
                memory: memory.min(most),
                deadline: Duration::from_millis(deadline.min(longest)),
            },
            schema: raw.state.map_or(0, |state| state.schema),
            config: BTreeMap::new(),
        };
        for (key, setting) in raw.config {
            let schema = SettingSchema {
                r#type: setting.r#type,
                default: setting.default.map(|default| match default {
                    Scalar::Boolean(value) => value.to_string(),
                    Scalar::Integer(value) => value.to_string(),
                    Scalar::Text(value) => value,
                }),
                help: setting.help,
                choices: setting.choices,
            };
            if !is_name(&key) {
                return Err(format!("config.{key}: a key is made of lower-case letters, digits and dashes"));
            }
            if (schema.r#type == SettingType::Choice) == schema.choices.is_empty() {
                return Err(format!("config.{key}: `choices` belongs to type `choice`, and to it alone"));
            }
            if let Some(Err(wrong)) = schema.default.as_deref().map(|default| schema.check(default)) {
                return Err(format!("config.{key}.default: {wrong}"));
            }
            manifest.config.insert(key, schema);
        }
        Ok(manifest)
    }

    /// Checks settings against the schema and adds the defaults, in the order of the keys.
    ///
    /// # Errors
    /// A key is unknown or given twice, or a value is not of its type.
    pub fn settings(&self, given: &[(String, String)]) -> Result<Vec<(String, String)>, SettingError> {
        let mut taken: BTreeMap<&str, &str> = BTreeMap::new();
        for (key, value) in given {
            let schema = self.config.get(key).ok_or_else(|| SettingError::UnknownKey {
                plugin: self.id.clone(),
                key: quoted(key),
                known: self.known_keys(),
            })?;
            schema.check(value).map_err(|wrong| SettingError::Value {
                plugin: self.id.clone(),
                key: key.clone(),
                value: quoted(value),
                wrong,
                known: self.known_keys(),
            })?;
            if taken.insert(key, value).is_some() {
                return Err(SettingError::Twice { plugin: self.id.clone(), key: key.clone() });
            }
        }
        let all = self.config.iter().filter_map(|(key, schema)| {
            let value = taken.get(key.as_str()).copied().or(schema.default.as_deref())?;
            Some((key.clone(), value.to_owned()))
        });
        Ok(all.collect())
    }

    fn known_keys(&self) -> String {
        if self.config.is_empty() {
            return "it takes none".into();
        }
        format!("it takes `{}`", self.config.keys().map(String::as_str).collect::<Vec<_>>().join("`, `"))
    }
}

impl SettingSchema {
    fn check(&self, value: &str) -> Result<(), String> {
        match self.r#type {
            SettingType::Integer => parse_integer(value).map(drop),
            SettingType::Size => parse_size(value).map(drop),
            SettingType::String if value.len() > 4096 => Err("a text is at most 4096 bytes".into()),
            SettingType::String => Ok(()),
            SettingType::Boolean
                if matches!(value, "true" | "yes" | "on" | "1" | "false" | "no" | "off" | "0") =>
            {
                Ok(())
            }
            SettingType::Boolean => Err(format!("`{}` is neither `true` nor `false`", quoted(value))),
            SettingType::Choice if self.choices.iter().any(|choice| choice == value) => Ok(()),
            SettingType::Choice => {
                Err(format!("`{}` is none of `{}`", quoted(value), self.choices.join("`, `")))
            }
        }
    }
}

fn is_name(name: &str) -> bool {
    name.len() <= 64
        && name.starts_with(|c: char| c.is_ascii_lowercase())
        && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-')
}

/// A number of 64 bits: decimal, or hexadecimal after `0x`, with `_` between digits where it helps; a decimal one may be negative.
fn parse_integer(text: &str) -> Result<i128, String> {
    let plain: String = text.chars().filter(|c| *c != '_').collect();
    let digits = |text: &str, radix| {
        (!text.starts_with(['+', '-'])).then(|| u64::from_str_radix(text, radix).ok()).flatten()
    };
    let number = match (plain.strip_prefix("0x"), plain.strip_prefix('-')) {
        (Some(hex), _) => digits(hex, 16).map(i128::from),
        (None, Some(positive)) => {
            digits(positive, 10).map(|n| -i128::from(n)).filter(|n| *n >= i64::MIN.into())
        }
        (None, None) => digits(&plain, 10).map(i128::from),
    };
    number.ok_or_else(|| {
        format!("`{}` is not a number of 64 bits; write it as `1016` or `0x3f8`", quoted(text))
    })
}

/// A number of bytes with an optional unit: `K`, `KiB`, `M`, `MiB`, `G`, `GiB`, all of them powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (digits, unit) = text.split_at(split);
    let shift = match unit.trim() {
        "" | "B" => Some(0),
        "K" | "k" | "KiB" => Some(10),
        "M" | "MiB" => Some(20),
        "G" | "GiB" => Some(30),
        _ => None,
    };
    let size = digits.parse::<u64>().ok().zip(shift).and_then(|(n, shift)| n.checked_mul(1 << shift));
    size.ok_or_else(|| format!("`{}` is not a size; write it as `65536`, `64 KiB` or `16M`", quoted(text)))
}
