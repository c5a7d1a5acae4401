//! Backing store: one lower store, with faults by [rule](mod@rules). For tests, and an example of a store that stands on another.
//!
//! ```text
//! fault:file:disk.img,rules=read:every=100:error=io;write:drop;flush:nth=3:error=io
//! ```
//!
//! The same seed, rules and operations give the same faults, also over a restart of the plugin. How often each rule fired is said in the log when the store is closed, so
//! that a test can show that its fault was there.
//!
//! What passes, passes as it came: a batch in which no rule fires is one batch for the lower store. The store keeps the contract of its own accord: a flush that
//! has lost what was [held] fails, and so do later ones until that was written again.

pub mod held;
pub mod rules;

use tenon_sdk::store::{
    Config, Decoder, Encoder, Error, Lower, Operation, Result, Store, StoreError, StoreInfo, info, wait,
};

use crate::held::Held;
use crate::rules::{Fate, Flip, Numbers, Rule, Verdict};

/// The longest that the host waits at once.
const WAIT: u64 = 10_000_000_000;

/// A store with faults.
pub struct Fault {
    lower: Lower,
    rules: Vec<Rule>,
    held: Held,
    /// Where `cut=some` takes its numbers from.
    numbers: Numbers,
    /// The power is gone.
    cut: bool,
    report: u64,
    fired: u64,
}

tenon_sdk::export_store!(Fault);

/// What becomes of an operation of a batch.
enum Step {
    /// It has ended.
    Ended(Result<(), StoreError>),
    /// The lower store does it.
    Passed {
        position: u64,
        /// What is held of the bytes that it reads.
        held: Vec<(usize, Vec<u8>)>,
        flips: Vec<Flip>,
        /// It is reported as failed all the same.
        error: Option<StoreError>,
    },
}

impl Store for Fault {
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let Ok([lower]) = <[Lower; 1]>::try_from(lower) else {
            return Err(Error::Invalid("fault stands on one lower store: fault:STORE:PLACE".into()));
        };
        let seed = config.number("seed")?.unwrap_or(1);
        let info = lower.info();
        let store = Self {
            rules: rules::parse(config.text("rules").unwrap_or_default(), seed)?,
            held: Held::new(info.block_size),
            numbers: Numbers::new(seed),
            cut: false,
            report: config.number("report")?.unwrap_or(0),
            fired: 0,
            lower,
        };
        Ok((store, info))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let bytes = self.one(Operation::Read { position, length: into.len() as u64 })?;
        if bytes.len() != into.len() {
            return Err(StoreError::Io);
        }
        into.copy_from_slice(&bytes);
        Ok(())
    }

    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        self.one(Operation::Write { position, data: bytes.to_vec() }).map(drop)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.one(Operation::Flush).map(drop)
    }

    fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.one(Operation::Discard { position, length }).map(drop)
    }

    fn write_zeroes(&mut self, position: u64, length: u64, unmap: bool) -> Result<(), StoreError> {
        self.one(Operation::WriteZeroes { position, length, unmap }).map(drop)
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut batch = Vec::with_capacity(operations.len());
        let (mut delay, mut fired) = (0, 0);
        let steps: Vec<Step> = operations
            .into_iter()
            .map(|operation| {
                if self.cut {
                    return Step::Ended(Err(StoreError::Io));
                }
                let verdict = rules::judge(&mut self.rules, &operation);
                delay = verdict.delay.max(delay);
                fired += verdict.fired;
                self.plan(operation, verdict, &mut batch)
            })
            .collect();
        while delay > 0 {
            wait(delay.min(WAIT));
            delay = delay.saturating_sub(WAIT);
        }
        let mut outcomes = self.lower.submit(&batch).into_iter();
        let outcomes = steps
            .into_iter()
            .map(|step| match step {
                Step::Ended(result) => result.map(|()| Vec::new()),
                Step::Passed { position, held, flips, error } => {
                    let mut data = outcomes.next().unwrap_or(Err(StoreError::Io))?;
                    for (at, block) in held {
                        if let Some(part) = data.get_mut(at..at + block.len()) {
                            part.copy_from_slice(&block);
                        }
                    }
                    flips.into_iter().for_each(|flip| flip.apply(position, &mut data));
                    error.map_or(Ok(data), Err)
                }
            })
            .collect();
        self.count(fired);
        outcomes
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        if self.cut {
            return Err(StoreError::Io.into());
        }
        self.lower.resize(size)?;
        self.held.truncate(size);
        Ok(self.lower.info())
    }

    /// Makes durable what is held, as in good order. Who wants it lost has the power cut, or ends the process.
    fn close(&mut self) -> Result<()> {
        for rule in &self.rules {
            info!("rule `{}` fired {} times in {} operations", rule.text, rule.fired, rule.seen);
        }
        if self.cut {
            return Ok(());
        }
        if self.held.has_lost() {
            return Err(StoreError::Io.into());
        }
        self.put_down()?;
        Ok(self.lower.flush()?)
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u32(u32::try_from(self.rules.len()).unwrap_or(u32::MAX));
        for rule in &self.rules {
            state.u64(rule.seen).u64(rule.fired).u64(rule.numbers.0);
        }
        state.u64(self.numbers.0).bool(self.cut).u64(self.fired);
        self.held.save(state);
        Ok(())
    }

    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let count = state.u32()?;
        if usize::try_from(count) != Ok(self.rules.len()) {
            return Err(Error::Other(format!("it is of {count} rules, and there are {}", self.rules.len())));
        }
        for rule in &mut self.rules {
            (rule.seen, rule.fired, rule.numbers.0) = (state.u64()?, state.u64()?, state.u64()?);
        }
        (self.numbers.0, self.cut, self.fired) = (state.u64()?, state.bool()?, state.u64()?);
        self.held.restore(state)
    }
}

impl Fault {
    fn one(&mut self, operation: Operation) -> Result<Vec<u8>, StoreError> {
        self.submit(vec![operation]).pop().unwrap_or(Err(StoreError::Io))
    }

    /// Does with an operation what the rules say, and leaves to `batch` what the lower store is to do.
    fn plan(&mut self, mut operation: Operation, verdict: Verdict, batch: &mut Vec<Operation>) -> Step {
        let (position, length) = rules::extent(&operation);
        let Verdict { error, mut flips, fate, .. } = verdict;
        if let Operation::Write { data, .. } = &mut operation {
            flips.drain(..).for_each(|flip| flip.apply(position, data));
        }
        let torn = matches!(fate, Some(Fate::Torn(_)));
        match fate {
            Some(Fate::Cut { some }) => return Step::Ended(self.lose_power(some)),
            _ if error.is_some() && !torn => {
                if operation == Operation::Flush {
                    self.lose_held();
                }
                return Step::Ended(error.map_or(Ok(()), Err));
            }
            Some(Fate::Lost) => return Step::Ended(Ok(())),
            Some(Fate::Dropped) => {
                if let Operation::Write { data, .. } = operation {
                    let kept = if self.held.has_room(length) { Ok(()) } else { self.put_down() };
                    self.held.hold(position, &data);
                    return Step::Ended(kept);
                }
                return Step::Ended(Ok(()));
            }
            Some(Fate::Torn(bytes)) => {
                if let Operation::Write { data, .. } = &mut operation {
                    let whole = bytes - bytes % u64::from(self.lower.info().block_size);
                    data.truncate(usize::try_from(whole).unwrap_or(usize::MAX));
                    if data.is_empty() {
                        return Step::Ended(error.map_or(Ok(()), Err));
                    }
                }
            }
            None => {}
        }
        let held = match operation {
            Operation::Read { .. } => self.held.parts(position, length),
            Operation::Flush if self.held.has_lost() => return Step::Ended(Err(StoreError::Io)),
            Operation::Flush => match self.put_down() {
                Ok(()) => Vec::new(),
                Err(error) => return Step::Ended(Err(error)),
            },
            _ => {
                let (position, length) = rules::extent(&operation);
                self.held.supersede(position, length);
                Vec::new()
            }
        };
        batch.push(operation);
        Step::Passed { position, held, flips, error }
    }

    /// Writes down what is held.
    fn put_down(&mut self) -> Result<(), StoreError> {
        let writes = self.held.take();
        let mut result = Ok(());
        for some in writes.chunks(4) {
            for (outcome, write) in self.lower.submit(some).into_iter().zip(some) {
                if let Err(error) = outcome {
                    let (position, length) = rules::extent(write);
                    self.held.lose(position, length);
                    result = Err(error);
                }
            }
        }
        result
    }

    /// A flush fails, as a disk fails one that has forgotten what it was to make durable.
    fn lose_held(&mut self) {
        for write in self.held.take() {
            let (position, length) = rules::extent(&write);
            self.held.lose(position, length);
        }
    }

    fn lose_power(&mut self, some: bool) -> Result<(), StoreError> {
        if some {
            self.held.thin_out(&mut self.numbers);
            // Nobody hears whether it worked.
            let _ = self.put_down();
        }
        drop(self.held.take());
        self.cut = true;
        Err(StoreError::Io)
    }

    /// Says in the log what has fired, if that is due.
    fn count(&mut self, fired: u64) {
        let before = self.fired;
        self.fired += fired;
        if self.report > 0 && self.fired / self.report > before / self.report {
            for rule in &self.rules {
                info!("rule `{}` has fired {} times in {} operations", rule.text, rule.fired, rule.seen);
            }
        }
    }
}
