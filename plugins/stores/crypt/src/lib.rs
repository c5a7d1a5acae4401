//! Backing store: encrypts what one lower store keeps, with AES-256-XTS.
//!
//! The data is encrypted under a random volume key, which stands in a [header] at the beginning of the lower store, wrapped by the administrator's key. That one can be changed
//! (`new-key`) without encrypting the data anew. A blank store is initialised only when `format=yes` says so.
//!
//! What it gives: whoever gets hold of the lower store, once, learns nothing of the data but how much there is. What it does not give: who may change the lower
//! store can put back older blocks or garble a data unit, and nobody notices; who sees it again and again learns which blocks were written. With `discard=yes`, also which are unused.
//!
//! The data unit is the lower store's block size when the store was initialised. Data unit n of the data is encrypted with the tweak n, as `aes-xts-plain64` of other systems does with
//! units of 512 bytes. A batch of operations stays one batch for the lower store.

pub mod header;
pub mod xts;

use tenon_sdk::store::{
    Config, Error, Lower, MOST, Operation, Result, Store, StoreError, StoreInfo, info, random, warn,
};

use crate::header::{COPIES, Copy, DATA, Header, Key, SIZE, Sealed, parse_key};
use crate::xts::Xts;

/// The most zeroes that are encrypted at once.
const ZEROES: u64 = 4 * MOST;

/// An encrypted store.
pub struct Crypt {
    lower: Lower,
    cipher: Xts,
    /// Bytes in a data unit.
    unit: u32,
    /// Where the data begins in the lower store.
    data: u64,
    discard: bool,
}

tenon_sdk::export_store!(Crypt);

/// What the lower store is asked for one operation.
enum Down {
    /// This many operations follow in the batch of the lower store: none or one.
    Passed,
    /// It is carried out after the batch, in pieces.
    Zeroes { position: u64, length: u64 },
    /// It cannot be.
    Refused(StoreError),
}

impl Store for Crypt {
    fn open(config: &Config, lower: Vec<Lower>) -> Result<(Self, StoreInfo)> {
        let Ok([lower]) = <[Lower; 1]>::try_from(lower) else {
            return Err(Error::Invalid("crypt stands on one lower store: crypt:STORE:PLACE".into()));
        };
        let setting = |name| config.text(name).map(|text| parse_key(name, text)).transpose();
        let Some(key) = setting("key")? else {
            return Err(Config::missing(
                "key",
                "64 bytes as 128 hexadecimal digits, or a file with them by `key-file=FILE`",
            ));
        };
        let new_key = setting("new-key")?;
        let format = config.boolean("format")?.unwrap_or(false);
        let discard = config.boolean("discard")?.unwrap_or(false);

        let header = unlock(&lower, &key, new_key.as_ref(), format)?;
        let store = Self {
            cipher: Xts::new(&header.volume),
            unit: header.unit,
            data: header.data,
            discard: discard && lower.info().discard,
            lower,
        };
        let info = store.info()?;
        Ok((store, info))
    }

    fn read(&mut self, position: u64, into: &mut [u8]) -> Result<(), StoreError> {
        let mut bytes = self.lower.read(self.below(position)?, into.len() as u64)?;
        self.decrypt(position, &mut bytes, into.len() as u64)?;
        into.copy_from_slice(&bytes);
        Ok(())
    }

    fn write(&mut self, position: u64, bytes: &[u8]) -> Result<(), StoreError> {
        let mut bytes = bytes.to_vec();
        self.encrypt(position, &mut bytes)?;
        self.lower.write(self.below(position)?, &bytes)
    }

    fn flush(&mut self) -> Result<(), StoreError> {
        self.lower.flush()
    }

    fn discard(&mut self, position: u64, length: u64) -> Result<(), StoreError> {
        self.lower.discard(self.below(position)?, length)
    }

    /// Zeroes are encrypted like anything else: `unmap` would show them to whoever sees the lower store.
    fn write_zeroes(&mut self, position: u64, length: u64, _unmap: bool) -> Result<(), StoreError> {
        let mut done = 0;
        while done < length {
            let some = (length - done).min(ZEROES);
            let mut bytes = vec![0; usize::try_from(some).map_err(|_| StoreError::OutOfRange)?];
            let at = position.checked_add(done).ok_or(StoreError::OutOfRange)?;
            self.encrypt(at, &mut bytes)?;
            self.lower.write(self.below(at)?, &bytes)?;
            done += some;
        }
        Ok(())
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let mut zeroes = 0;
        let mut batch = Vec::with_capacity(operations.len());
        let plan: Vec<(Down, Option<(u64, u64)>)> = operations
            .into_iter()
            .map(|operation| {
                let read = match operation {
                    Operation::Read { position, length } => Some((position, length)),
                    _ => None,
                };
                (self.translate(operation, &mut batch, &mut zeroes).unwrap_or_else(Down::Refused), read)
            })
            .collect();
        let mut outcomes = self.lower.submit(&batch).into_iter();
        plan.into_iter()
            .map(|(down, read)| match down {
                Down::Passed => {
                    let mut bytes = outcomes.next().unwrap_or(Err(StoreError::Io))?;
                    if let Some((position, length)) = read {
                        self.decrypt(position, &mut bytes, length)?;
                    }
                    Ok(bytes)
                }
                Down::Zeroes { position, length } => {
                    self.write_zeroes(position, length, false).map(|()| Vec::new())
                }
                Down::Refused(error) => Err(error),
            })
            .collect()
    }

    fn resize(&mut self, size: u64) -> Result<StoreInfo> {
        let lower = size.checked_add(self.data);
        let lower = lower.ok_or_else(|| Error::Invalid(format!("{size} bytes are too many")))?;
        self.lower
            .resize(lower)
            .map_err(|error| Error::Other(format!("resizing the lower store to {lower} bytes: {error}")))?;
        self.info()
    }
}

impl Crypt {
    /// What the store is, after what the lower store is now.
    fn info(&self) -> Result<StoreInfo> {
        let lower = self.lower.info();
        let block = u64::from(lower.block_size.max(self.unit));
        let whole = lower.size.checked_sub(self.data).filter(|_| self.data.is_multiple_of(block));
        let Some(whole) = whole else {
            return Err(Error::Other(format!(
                "the data begins at byte {}, but the lower store has {} bytes in blocks of {}",
                self.data, lower.size, lower.block_size
            )));
        };
        Ok(StoreInfo {
            size: whole - whole % block,
            block_size: lower.block_size.max(self.unit),
            optimal_size: lower.optimal_size.next_multiple_of(lower.block_size.max(self.unit)),
            read_only: lower.read_only,
            discard: self.discard,
            write_zeroes: false,
            identity: lower.identity,
        })
    }

    /// Where a byte of the data is in the lower store.
    fn below(&self, position: u64) -> Result<u64, StoreError> {
        position.checked_add(self.data).ok_or(StoreError::OutOfRange)
    }

    /// The number of the data unit that begins at `position`, and the unit's length.
    fn unit_at(&self, position: u64, length: usize) -> Result<(usize, u64), StoreError> {
        let unit = u64::from(self.unit);
        let whole = position.is_multiple_of(unit) && (length as u64).is_multiple_of(unit);
        let size = usize::try_from(unit).map_err(|_| StoreError::OutOfRange)?;
        if whole { Ok((size, position / unit)) } else { Err(StoreError::OutOfRange) }
    }

    fn encrypt(&self, position: u64, bytes: &mut [u8]) -> Result<(), StoreError> {
        let (unit, first) = self.unit_at(position, bytes.len())?;
        self.cipher.encrypt(unit, first, bytes);
        Ok(())
    }

    /// Decrypts what the lower store gave for a read of `length` bytes.
    fn decrypt(&self, position: u64, bytes: &mut [u8], length: u64) -> Result<(), StoreError> {
        if bytes.len() as u64 != length {
            return Err(StoreError::Io);
        }
        let (unit, first) = self.unit_at(position, bytes.len())?;
        self.cipher.decrypt(unit, first, bytes);
        Ok(())
    }

    /// Adds to `batch` what the lower store is to do for an operation. `zeroes` counts the zeroes that were encrypted for it.
    fn translate(
        &self,
        operation: Operation,
        batch: &mut Vec<Operation>,
        zeroes: &mut u64,
    ) -> Result<Down, StoreError> {
        batch.push(match operation {
            Operation::Read { position, length } => {
                Operation::Read { position: self.below(position)?, length }
            }
            Operation::Write { position, mut data } => {
                self.encrypt(position, &mut data)?;
                Operation::Write { position: self.below(position)?, data }
            }
            Operation::Flush => Operation::Flush,
            Operation::Discard { position, length } if self.discard => {
                Operation::Discard { position: self.below(position)?, length }
            }
            Operation::Discard { .. } => return Err(StoreError::Unsupported),
            Operation::WriteZeroes { position, length, .. } => {
                // Few zeroes go with the batch; many would be a lot of memory.
                if length > MOST || *zeroes + length > ZEROES {
                    return Ok(Down::Zeroes { position, length });
                }
                *zeroes += length;
                let mut data = vec![0; usize::try_from(length).map_err(|_| StoreError::OutOfRange)?];
                self.encrypt(position, &mut data)?;
                Operation::Write { position: self.below(position)?, data }
            }
        });
        Ok(Down::Passed)
    }
}

/// Reads the header and opens it, or makes it.
fn unlock(lower: &Lower, key: &Key, new_key: Option<&Key>, format: bool) -> Result<Header> {
    let below = lower.info();
    if below.size <= DATA {
        return Err(Error::Invalid(format!(
            "the lower store has {} bytes; an encrypted one needs more than {DATA}",
            below.size
        )));
    }
    let (mut damaged, mut whole) = (false, Vec::new());
    for position in COPIES {
        let block = lower.read(position, below.block_size.into()).map_err(|error| {
            Error::Other(format!("reading the header at byte {position} of the lower store: {error}"))
        })?;
        match Copy::look(&block) {
            Copy::Foreign => {}
            Copy::Damaged => damaged = true,
            Copy::Newer(version) => {
                return Err(Error::Unsupported(format!(
                    "the header has version {version}, and this plugin reads version 1: use a newer one"
                )));
            }
            Copy::Whole(sealed) => whole.push((position, sealed)),
        }
    }
    whole.sort_by_key(|(_, sealed)| sealed.sequence());
    let Some((position, sealed)) = whole.pop() else {
        return match (damaged, format) {
            (true, _) => Err(Error::Other(
                "the header and its copy are damaged; the data cannot be decrypted without: put it back from a backup".into(),
            )),
            (false, true) => initialise(lower, &below, new_key.unwrap_or(key)),
            (false, false) => Err(Error::Invalid(
                "the lower store is not an encrypted one; `format=yes` makes it one if it is blank".into(),
            )),
        };
    };
    // After a restart, the key that was to be changed has been.
    let (mut header, changed) = match (sealed.open(key)?, new_key) {
        (Some(header), None) => (header, None),
        (Some(header), Some(new_key)) => (header, Some(new_key).filter(|new_key| ***new_key != **key)),
        (None, Some(new_key)) => match sealed.open(new_key)? {
            Some(header) => (header, None),
            None => {
                return Err(Error::Invalid("neither `key` nor `new-key` is the key of this store".into()));
            }
        },
        (None, None) => return Err(Error::Invalid("`key` is not the key of this store".into())),
    };
    // The copy that counts stays as it is until the other one is whole.
    let other = COPIES.into_iter().filter(|place| *place != position);
    if let Some(new_key) = changed {
        if below.read_only {
            return Err(Error::Invalid("`new-key`: the lower store is read-only".into()));
        }
        header.sequence = header.sequence.wrapping_add(1);
        write_copies(lower, &header.seal(new_key)?, other.chain([position]))?;
        info!("the key was changed");
    } else if !below.read_only && whole.pop().is_none_or(|(_, copy)| copy != sealed) {
        match write_copies(lower, &sealed, other) {
            Ok(()) => warn!("one of the two copies of the header was not whole; it was written anew"),
            Err(error) => warn!("one of the two copies of the header is not whole: {error}"),
        }
    }
    Ok(header)
}

/// Makes an encrypted store of a blank one.
fn initialise(lower: &Lower, below: &StoreInfo, key: &Key) -> Result<Header> {
    if below.read_only {
        return Err(Error::Invalid("`format`: the lower store is read-only".into()));
    }
    let begin =
        lower.read(0, DATA).map_err(|error| Error::Other(format!("reading the lower store: {error}")))?;
    if let Some(at) = begin.iter().position(|byte| *byte != 0) {
        return Err(Error::Invalid(format!(
            "`format`: the lower store is not blank: byte {at} is not zero; write zeroes to its first {DATA} bytes if what it holds is not needed"
        )));
    }
    let mut header = Header {
        unit: below.block_size,
        data: DATA,
        sequence: 1,
        identity: [0; 16],
        volume: Key::new([0; xts::KEY]),
    };
    fill_random(&mut header.identity)?;
    fill_random(&mut header.volume[..])?;
    write_copies(lower, &header.seal(key)?, COPIES)?;
    info!("the lower store is encrypted from now on");
    Ok(header)
}

fn fill_random(bytes: &mut [u8]) -> Result<()> {
    let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let got = zeroize::Zeroizing::new(random(length));
    if got.len() != bytes.len() || got.iter().all(|byte| *byte == 0) {
        return Err(Error::Other("the host gives no random bytes".into()));
    }
    bytes.copy_from_slice(&got);
    Ok(())
}

/// Writes the header to these places, one after the other.
fn write_copies(lower: &Lower, sealed: &Sealed, places: impl IntoIterator<Item = u64>) -> Result<()> {
    let failed = |error| Error::Other(format!("writing the header: {error}"));
    let block = usize::try_from(lower.info().block_size).unwrap_or(SIZE).max(SIZE);
    let mut bytes = vec![0; block];
    bytes[..SIZE].copy_from_slice(sealed.bytes());
    for place in places {
        lower.write(place, &bytes).map_err(failed)?;
        lower.flush().map_err(failed)?;
    }
    Ok(())
}
