//! The rules: what goes wrong, and when.
//!
//! ```text
//! RULES = RULE { ";" RULE }
//! RULE  = KIND { "+" KIND } { ":" WORD }
//! KIND  = read | write | flush | discard | zero | any
//! ```
//!
//! A word is a condition or an effect. Sizes are written as `512`, `4K`, `1MiB`; times as `20us`, `50ms`, `2s`.
//!
//! | condition | the rule fires for an operation of its kinds that |
//! | --- | --- |
//! | `at=FIRST+LENGTH` | touches these bytes (a flush touches none) |
//! | `range=FROM-TO` | touches these bytes, without `TO` |
//! | `nth=N` | is the Nth of those that touch them |
//! | `every=N` | is the Nth, 2Nth, … |
//! | `after=N` | comes after the Nth |
//! | `times=N` | comes before the rule has fired N times |
//! | `chance=N/M`, `chance=N%` | the seed's numbers choose |
//!
//! All conditions must hold. A rule without any fires for each operation of its kinds.
//!
//! | effect | the operation |
//! | --- | --- |
//! | `error=io` (`no-space`, `read-only`, `unsupported`, `out-of-range`) | fails without reaching the lower store; a flush also loses what was held |
//! | `delay=TIME` | takes longer; operations of one batch wait together |
//! | `flip=N` | (read, write) moves other data: N bits are the other way, in the bytes that the rule is for |
//! | `drop` | (write) is held in a volatile cache, where reads find it, until a flush; 64 MiB at most, then all of it goes down |
//! | `lose` | (not read) is reported as done and never was |
//! | `torn=BYTES` | (write) writes its first bytes only, in whole blocks; with `error`, it is reported as failed |
//! | `cut` | fails, and so does every later one: the power is gone, and so is what was held. With `cut=some`, each held block is kept or gone, as the seed's numbers choose |
//!
//! Where several rules fire for one operation, delays add up and bits flip for each; of errors and of what becomes of a write, the first in the order of the rules counts.

use tenon_sdk::store::{Config, Error, Operation, Result, StoreError};

/// What operations a rule is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Kinds(u8);

impl Kinds {
    const READ: u8 = 1;
    const WRITE: u8 = 2;
    const FLUSH: u8 = 4;
    const DISCARD: u8 = 8;
    const ZERO: u8 = 16;

    fn of(operation: &Operation) -> u8 {
        match operation {
            Operation::Read { .. } => Self::READ,
            Operation::Write { .. } => Self::WRITE,
            Operation::Flush => Self::FLUSH,
            Operation::Discard { .. } => Self::DISCARD,
            Operation::WriteZeroes { .. } => Self::ZERO,
        }
    }

    fn parse(text: &str) -> Result<Self> {
        text.split('+').try_fold(Self(0), |kinds, word| {
            Ok(Self(
                kinds.0
                    | match word.trim() {
                        "read" => Self::READ,
                        "write" => Self::WRITE,
                        "flush" => Self::FLUSH,
                        "discard" => Self::DISCARD,
                        "zero" => Self::ZERO,
                        "any" => 31,
                        other => {
                            return Err(Error::Invalid(format!(
                                "`{other}` is no kind of operation; there are read, write, flush, discard, zero and any"
                            )));
                        }
                    },
            ))
        })
    }

    fn only(self, kinds: u8) -> bool {
        self.0 & !kinds == 0
    }
}

/// What becomes of an operation that does not simply pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It is held until a flush.
    Dropped,
    /// It is not carried out.
    Lost,
    /// Its first bytes are carried out.
    Torn(u64),
    /// The power goes.
    Cut {
        /// Held blocks are kept by chance.
        some: bool,
    },
}

/// Bits that flip in the data of an operation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Flip {
    /// How many.
    pub bits: u32,
    /// The first byte of the store that may be hit.
    pub from: u64,
    /// The byte behind the last.
    pub to: u64,
    /// Where their places come from.
    pub numbers: Numbers,
}

/// What happens to one operation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    /// It fails so.
    pub error: Option<StoreError>,
    /// It waits so many nanoseconds.
    pub delay: u64,
    /// Its data changes so.
    pub flips: Vec<Flip>,
    /// It does not simply pass.
    pub fate: Option<Fate>,
    /// How many rules fired.
    pub fired: u64,
}

/// A rule, with what it has seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    /// As it was written.
    pub text: String,
    kinds: Kinds,
    bytes: Option<(u64, u64)>,
    nth: Option<u64>,
    every: Option<u64>,
    after: u64,
    times: u64,
    chance: Option<(u64, u64)>,
    error: Option<StoreError>,
    delay: u64,
    flip: u32,
    fate: Option<Fate>,
    /// Operations of its kinds that touched its bytes.
    pub seen: u64,
    /// How often it fired.
    pub fired: u64,
    /// Where its chances come from.
    pub numbers: Numbers,
}

/// Reads rules. Each has numbers of its own, so that another rule beside it does not change what it does.
///
/// # Errors
/// One is not as the grammar has it; the text names the rule, what is wrong and what would be right.
pub fn parse(text: &str, seed: u64) -> Result<Vec<Rule>> {
    let rules = text.split(';').map(str::trim).filter(|rule| !rule.is_empty());
    rules
        .zip(1_u64..)
        .map(|(text, number)| {
            let numbers = Numbers::new(seed.wrapping_mul(0x1_0000_0001).wrapping_add(number));
            Rule::parse(text, numbers).map_err(|error| match error {
                Error::Invalid(what) => Error::Invalid(format!("`rules`, rule {number} (`{text}`): {what}")),
                other => other,
            })
        })
        .collect()
}

impl Rule {
    fn parse(text: &str, numbers: Numbers) -> Result<Self> {
        let mut words = text.split(':').map(str::trim);
        let kinds = Kinds::parse(words.next().unwrap_or_default())?;
        let mut rule = Self {
            text: text.to_owned(),
            kinds,
            bytes: None,
            nth: None,
            every: None,
            after: 0,
            times: u64::MAX,
            chance: None,
            error: None,
            delay: 0,
            flip: 0,
            fate: None,
            seen: 0,
            fired: 0,
            numbers,
        };
        for word in words {
            let (name, value) = word.split_once('=').unwrap_or((word, ""));
            rule.word(name, value)?;
        }
        if rule.error.is_none() && rule.delay == 0 && rule.flip == 0 && rule.fate.is_none() {
            return Err(Error::Invalid(
                "it has no effect; there are error, delay, flip, drop, lose, torn and cut".into(),
            ));
        }
        let fits = match rule.fate {
            Some(Fate::Dropped | Fate::Torn(_)) => kinds.only(Kinds::WRITE),
            Some(Fate::Lost) => kinds.only(!Kinds::READ),
            Some(Fate::Cut { .. }) | None => true,
        };
        if !fits || (rule.flip > 0 && !kinds.only(Kinds::READ | Kinds::WRITE)) {
            return Err(Error::Invalid(
                "its effect does not fit its kinds: drop and torn are for write, flip for read and write, lose for all but read".into(),
            ));
        }
        Ok(rule)
    }

    fn word(&mut self, name: &str, value: &str) -> Result<()> {
        let wrong = |right: &str| Error::Invalid(format!("`{name}={value}`: give {right}"));
        let setting = || Config::new([(name, value)]);
        let size = |text: &str| Config::new([(name, text.trim())]).size(name).map(Option::unwrap_or_default);
        let count = || setting().number_in(name, 1..=u64::MAX).map(Option::unwrap_or_default);
        match (name, value) {
            ("at", _) => {
                let (first, length) =
                    value.split_once('+').ok_or_else(|| wrong("FIRST+LENGTH, such as at=1M+4K"))?;
                let (first, length) = (size(first)?, size(length)?);
                self.bytes = Some((first, first.checked_add(length).ok_or_else(|| wrong("fewer bytes"))?));
            }
            ("range", _) => {
                let (from, to) = value.split_once('-').ok_or_else(|| wrong("FROM-TO, such as range=0-1M"))?;
                self.bytes = Some((size(from)?, size(to)?));
            }
            ("nth", _) => self.nth = Some(count()?),
            ("every", _) => self.every = Some(count()?),
            ("after", _) => self.after = count()?,
            ("times", _) => self.times = count()?,
            ("chance", _) => {
                let parts =
                    value.strip_suffix('%').map(|percent| (percent, "100")).or_else(|| value.split_once('/'));
                let parts = parts.and_then(|(n, m)| Some((n.trim().parse().ok()?, m.trim().parse().ok()?)));
                let parts = parts.filter(|(n, m): &(u64, u64)| *m > 0 && n <= m);
                self.chance =
                    Some(parts.ok_or_else(|| wrong("a part of 1, such as chance=5% or chance=1/1000"))?);
            }
            ("error", _) => {
                let choices = [
                    ("io", StoreError::Io),
                    ("no-space", StoreError::NoSpace),
                    ("read-only", StoreError::ReadOnly),
                    ("unsupported", StoreError::Unsupported),
                    ("out-of-range", StoreError::OutOfRange),
                ];
                self.error = setting().choice(name, &choices)?;
            }
            ("delay", _) => {
                const UNITS: [(&str, u64); 4] =
                    [("ns", 1), ("us", 1000), ("ms", 1_000_000), ("s", 1_000_000_000)];
                let time = UNITS.iter().find_map(|(unit, scale)| {
                    value.strip_suffix(unit)?.trim().parse::<u64>().ok()?.checked_mul(*scale)
                });
                self.delay =
                    time.filter(|time| *time > 0).ok_or_else(|| wrong("a time, such as 20us, 50ms or 2s"))?;
            }
            ("flip", _) => self.flip = setting().number_in(name, 1..=1_u32 << 20)?.unwrap_or_default(),
            ("drop", "") => self.become_of(Fate::Dropped)?,
            ("lose", "") => self.become_of(Fate::Lost)?,
            ("torn", _) => self.become_of(Fate::Torn(size(value)?))?,
            ("cut", "") => self.become_of(Fate::Cut { some: false })?,
            ("cut", "some") => self.become_of(Fate::Cut { some: true })?,
            _ => {
                return Err(Error::Invalid(format!(
                    "`{name}` with `{value}` is neither a condition (at, range, nth, every, after, times, chance) nor an effect (error, delay, flip, drop, lose, torn, cut)"
                )));
            }
        }
        match self.bytes {
            Some((from, to)) if from >= to => Err(wrong("a range that is not empty")),
            _ => Ok(()),
        }
    }

    fn become_of(&mut self, fate: Fate) -> Result<()> {
        match self.fate.replace(fate) {
            None => Ok(()),
            Some(_) => {
                Err(Error::Invalid("only one of drop, lose, torn and cut can become of a write".into()))
            }
        }
    }

    /// Counts an operation and says whether the rule fires for it.
    fn fires(&mut self, operation: &Operation) -> bool {
        if self.kinds.0 & Kinds::of(operation) == 0 || !self.touched(operation) {
            return false;
        }
        self.seen += 1;
        let fires = self.nth.is_none_or(|n| self.seen == n)
            && self.every.is_none_or(|n| self.seen.is_multiple_of(n))
            && self.seen > self.after
            && self.fired < self.times
            && self.chance.is_none_or(|(n, m)| self.numbers.below(m) < n);
        self.fired += u64::from(fires);
        fires
    }

    fn touched(&self, operation: &Operation) -> bool {
        let (position, length) = extent(operation);
        self.bytes.is_none_or(|(from, to)| position < to && from < position.saturating_add(length))
    }
}

/// What the rules say of an operation.
pub fn judge(rules: &mut [Rule], operation: &Operation) -> Verdict {
    let mut verdict = Verdict::default();
    for rule in rules {
        if !rule.fires(operation) {
            continue;
        }
        verdict.fired += 1;
        verdict.delay = verdict.delay.saturating_add(rule.delay);
        verdict.error = verdict.error.or(rule.error);
        verdict.fate = verdict.fate.or(rule.fate);
        if rule.flip > 0 {
            let (from, to) = rule.bytes.unwrap_or((0, u64::MAX));
            let numbers = Numbers::new(rule.numbers.number());
            verdict.flips.push(Flip { bits: rule.flip, from, to, numbers });
        }
    }
    verdict
}

impl Flip {
    /// Flips bits in data that is at `position` of the store.
    pub fn apply(mut self, position: u64, data: &mut [u8]) {
        let end = position.saturating_add(data.len() as u64).min(self.to);
        let from = position.max(self.from);
        if from >= end {
            return;
        }
        for _ in 0..self.bits {
            let bit = self.numbers.below((end - from) * 8);
            if let Some(byte) =
                usize::try_from(from - position + bit / 8).ok().and_then(|at| data.get_mut(at))
            {
                *byte ^= 1 << (bit % 8);
            }
        }
    }
}

/// The first byte that an operation is about, and how many.
pub fn extent(operation: &Operation) -> (u64, u64) {
    match *operation {
        Operation::Read { position, length }
        | Operation::Discard { position, length }
        | Operation::WriteZeroes { position, length, .. } => (position, length),
        Operation::Write { position, ref data } => (position, data.len() as u64),
        Operation::Flush => (0, 0),
    }
}

/// Numbers that look random and are the same in every run: SplitMix64 (Steele, Lea, Flood 2014).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Numbers(pub u64);

impl Numbers {
    /// The numbers of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next number.
    pub fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// The next number, under `limit`.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.number() % limit.max(1)
    }
}
