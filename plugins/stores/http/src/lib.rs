//! Backing store: an image on an HTTP server, read-only.
//!
//! The image is fetched in pieces of 64 KiB, each when it is read first, by requests for ranges over one connection that is kept. Pieces that follow one another are fetched together, and a
//! reader that goes on is read ahead of. A cache keeps what was used last.
//!
//! - **The image never changes under a guest.** Every request names the version of the image that was there at first (its `ETag`, or when it was last changed), and every response is
//!   compared with it. When the image is another one, every read from then on fails, also after a restart of the store; data of two versions is never mixed. A server that names no
//!   version is believed as long as the length stays the same.
//! - **A broken connection is made anew**, and a server in trouble is asked again, waiting longer each time (`retries`). Then reads fail, and the next read tries again.
//! - A server that knows no ranges is refused when the store is opened.
//!
//! The length is rounded up to whole blocks; what lies behind the image's end is zeroes.

mod cache;
mod client;
pub mod response;
pub mod url;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use tenon_sdk::store::{
    Config, Decoder, Encoder, Error, Lower, MOST, Operation, Result, Store, StoreError, StoreInfo, error,
    warn,
};

use crate::cache::{Cache, PIECE};
use crate::client::{Client, Failure, VALIDATOR, Version};
use crate::url::Url;

const BLOCK: u32 = 512;
/// The largest cache.
const CACHE: u64 = 128 << 20;

/// An image on a server.
pub struct Http {
    client: Client,
    version: Version,
    cache: Cache,
    /// In pieces.
    read_ahead: u64,
    /// Where the last read ended: the next one that begins there goes on.
    end: u64,
    /// The image is another one now.
    changed: bool,
}

tenon_sdk::export_store!(Http);

impl Store for Http {
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        if !lower.is_empty() {
            return Err(Error::Invalid("http stands on no other store".into()));
        }
        let url = config
            .text("url")
            .ok_or_else(|| Config::missing("url", "http://HOST[:PORT]/PATH or https://…"))?;
        let url = Url::parse(url)?;
        let sized = |name: &str, default: u64, most: u64| match config.size(name)?.unwrap_or(default) {
            size if size <= most => Ok(size),
            size => Err(Error::Invalid(format!("`{name}` is {size}, but must be {most} at most"))),
        };
        let cache = sized("cache", 16 << 20, CACHE)?;
        let read_ahead = sized("read-ahead", 512 << 10, MOST)?.min(cache / 4) / PIECE;
        let retries = config.number_in("retries", 0..=100_u32)?.unwrap_or(6);

        // Who opens a store does not want to wait long for a server that is not there.
        let mut client = Client::new(url, retries.min(2));
        let (piece, version) = client.fetch(0, PIECE, None).map_err(|failure| match failure {
            Failure::Passing(what) => Error::Other(what),
            Failure::Lasting(what) | Failure::Changed(what) => Error::Invalid(what),
        })?;
        client.retries = retries;
        if version.validator.is_none() {
            warn!(
                "the server does not name the image's version: a change that leaves its length alone goes unnoticed"
            );
        }
        let size = version.length.checked_next_multiple_of(BLOCK.into());
        let size = size.ok_or_else(|| Error::Invalid(format!("the image has {} bytes", version.length)))?;
        let mut store =
            Self { client, version, cache: Cache::new(cache), read_ahead, end: 0, changed: false };
        store.cache.put(0, piece.into());
        let info = StoreInfo {
            optimal_size: u32::try_from(PIECE).unwrap_or(BLOCK),
            read_only: true,
            ..StoreInfo::new(size)
        };
        Ok((store, info))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let operation = Operation::Read { position, length: into.len() as u64 };
        into.copy_from_slice(&self.submit(vec![operation]).pop().unwrap_or(Err(StoreError::Io))?);
        Ok(())
    }

    fn write(&mut self, _position: u64, _bytes: &[u8]) -> Result<(), StoreError> {
        Err(StoreError::ReadOnly)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        Ok(())
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut pieces = BTreeMap::new();
        let mut missing = BTreeSet::new();
        for operation in &operations {
            let Operation::Read { position, length } = *operation else { continue };
            let end = position.saturating_add(length);
            let goes_on = std::mem::replace(&mut self.end, end) == position;
            let wanted = self.pieces(position, end);
            let fetched = missing.len();
            for number in wanted.clone() {
                match self.cache.get(number) {
                    Some(piece) => drop(pieces.insert(number, piece)),
                    None => drop(missing.insert(number)),
                }
            }
            if goes_on && missing.len() > fetched {
                let ahead = self.pieces(end, end.saturating_add(self.read_ahead * PIECE));
                missing.extend(ahead.filter(|number| !self.cache.has(*number)));
            }
        }
        self.fetch(missing, &mut pieces);
        operations
            .into_iter()
            .map(|operation| match operation {
                Operation::Read { position, length } => {
                    let end = position.saturating_add(length);
                    let mut data = vec![0; usize::try_from(length).map_err(|_| StoreError::OutOfRange)?];
                    for number in self.pieces(position, end) {
                        let piece = pieces.get(&number).ok_or(StoreError::Io)?;
                        copy(piece, number * PIECE, &mut data, position);
                    }
                    Ok(data)
                }
                Operation::Flush => Ok(Vec::new()),
                _ => Err(StoreError::ReadOnly),
            })
            .collect()
    }

    fn save(&self, state: &mut Encoder) -> Result<()> {
        state.u64(self.version.length).bool(self.changed).bool(self.version.validator.is_some());
        state.bytes(self.version.validator.as_deref().unwrap_or_default().as_bytes());
        Ok(())
    }

    /// A store that is opened anew finds the image that is there now, which must be the one that the guest has seen.
    fn restore(&mut self, state: &mut Decoder<'_>) -> Result<()> {
        let (length, changed, named) = (state.u64()?, state.bool()?, state.bool()?);
        let name = String::from_utf8_lossy(state.bytes(VALIDATOR)?).into_owned();
        let before = Version { length, validator: named.then_some(name) };
        if changed || before != self.version {
            return Err(Error::Other("the image was changed on the server".into()));
        }
        Ok(())
    }
}

impl Http {
    /// The pieces of a range, as far as the image goes.
    fn pieces(&self, from: u64, to: u64) -> std::ops::Range<u64> {
        let to = to.min(self.version.length);
        from / PIECE..if from < to { to.div_ceil(PIECE) } else { 0 }
    }

    /// Fetches pieces, together where they lie together. Those that cannot be had are left out.
    fn fetch(&mut self, missing: BTreeSet<u64>, pieces: &mut BTreeMap<u64, Arc<[u8]>>) {
        let mut runs: Vec<std::ops::Range<u64>> = Vec::new();
        for number in missing {
            match runs.last_mut() {
                Some(run) if run.end == number && run.end - run.start < MOST / PIECE => run.end += 1,
                _ => runs.push(number..number + 1),
            }
        }
        for run in runs {
            if self.changed {
                return;
            }
            let (first, end) = (run.start * PIECE, (run.end * PIECE).min(self.version.length));
            match self.client.fetch(first, end - first, Some(&self.version)) {
                Ok((data, _)) => {
                    for (number, piece) in run.zip(data.chunks(usize::try_from(PIECE).unwrap_or(usize::MAX)))
                    {
                        let piece: Arc<[u8]> = piece.into();
                        self.cache.put(number, piece.clone());
                        pieces.insert(number, piece);
                    }
                }
                Err(Failure::Changed(what)) => {
                    self.changed = true;
                    error!(
                        "{what}; every read fails from here on, since what the guest has of it would not fit the rest"
                    );
                }
                Err(Failure::Passing(what) | Failure::Lasting(what)) => {
                    error!("{what}; the read has failed");
                    return;
                }
            }
        }
    }
}

/// Copies what `data`, which is at `position`, has of a piece, which is at `at`.
fn copy(piece: &[u8], at: u64, data: &mut [u8], position: u64) {
    let offset = |distance: u64| usize::try_from(distance).unwrap_or(usize::MAX);
    let from = piece.get(offset(position.saturating_sub(at))..).unwrap_or_default();
    let into = data.get_mut(offset(at.saturating_sub(position))..).unwrap_or_default();
    let length = from.len().min(into.len());
    into[..length].copy_from_slice(&from[..length]);
}
