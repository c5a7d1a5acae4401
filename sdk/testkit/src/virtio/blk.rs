//! What a guest relies on, checked for any block device (virtio 1.2 §5.2): on the bench, or as it was loaded.

use tenon_sdk::virtio::{StoreError, VirtioDescription, VirtioDevice};

use super::{Answered, VirtioBench, VirtioSetup, VirtioSubject};
use crate::On;
use crate::random::Random;

// Feature bits (§5.2.3).
const RO: u64 = 1 << 5;
const FLUSH: u64 = 1 << 9;
const MQ: u64 = 1 << 12;
const DISCARD: u64 = 1 << 13;
const WRITE_ZEROES: u64 = 1 << 14;

// Request types (§5.2.6).
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH_REQUEST: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD_REQUEST: u32 = 11;
const WRITE_ZEROES_REQUEST: u32 = 13;

/// Status bytes.
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

const SECTOR: usize = 512;

/// Checks a block device with these settings, between the stores of `setup`; see [`blk`].
///
/// # Panics
/// The device fails a check. The panic says which.
pub fn blk_conformance<D: VirtioDevice>(settings: &[(&str, &str)], setup: &VirtioSetup) {
    let mut bench = match VirtioBench::<D>::with(settings, setup) {
        Ok(bench) => bench,
        Err(error) => panic!("the device does not start with {settings:?}: {error}"),
    };
    if let Err(text) = blk(&mut bench) {
        panic!("{text}");
    }
}

/// A block device under check.
struct Disk<'a> {
    device: &'a mut dyn VirtioSubject,
    about: VirtioDescription,
    /// In sectors.
    capacity: u64,
    /// In sectors: the smallest unit of a request.
    unit: u64,
    queues: u16,
    random: Random,
}

/// Checks that a block device that was just started, over a store of at least 1 MiB whose content may be overwritten,
///
/// - reads what was written, through every queue, in one batch of many, across restarts and after resets;
/// - fails what leaves its capacity or is no whole sectors, and changes nothing then;
/// - answers unknown types, odd segments and missing status bytes as virtio says, and lives;
/// - flushes, discards and writes zeroes if it offers to; a failed operation of its store is never a success;
/// - refuses to write if it is read-only;
/// - carries out requests again whose operations were under way at a restart;
/// - tells of a store that has grown.
///
/// What the subject's host cannot do is left out. Returns what was done, a line each.
///
/// # Errors
/// The device fails a check. The text says which.
pub fn blk(device: &mut dyn VirtioSubject) -> Result<Vec<String>, String> {
    let about = device.description();
    if about.device_type != 2 {
        return Err(format!("device type {} is not a block device's, 2", about.device_type));
    }
    device.activate(about.features)?;
    let capacity = device.config_read(0, 8);
    let block = if about.features & 1 << 6 != 0 { device.config_read(20, 4) } else { SECTOR as u64 };
    let queues = if about.features & MQ != 0 { device.config_read(34, 2) } else { 1 };
    if queues == 0 || queues > about.queues.len() as u64 {
        return Err(format!("num_queues is {queues}, and the device has {} queues", about.queues.len()));
    }
    let unit = block / SECTOR as u64;
    if capacity < 2048 || unit == 0 || !block.is_power_of_two() {
        return Err(format!(
            "{capacity} sectors in blocks of {block} bytes; 2048 sectors at least are needed"
        ));
    }
    let queues = u16::try_from(queues).unwrap_or(1);
    let mut disk = Disk { device, about, capacity, unit, queues, random: Random::new(0xb10c) };
    let mut said = vec![format!("{capacity} sectors in blocks of {block} bytes, {queues} queues")];
    disk.bounds()?;
    said.push("requests that leave the disk or are odd fail, and change nothing".into());
    disk.identity()?;
    if disk.about.features & RO != 0 {
        disk.read_only()?;
        said.push("writes to the read-only disk fail".into());
        return Ok(said);
    }
    disk.content()?;
    said.push("what was written is read, through every queue, in batches, over restarts and resets".into());
    disk.ranges(&mut said)?;
    disk.faults(&mut said)?;
    disk.under_way(&mut said)?;
    disk.grows(&mut said)?;
    Ok(said)
}

impl Disk<'_> {
    fn offers(&self, feature: u64) -> bool {
        self.about.features & feature != 0
    }

    /// A request: header and data in, room for data and status out.
    fn ask(&mut self, queue: u16, readable: &[u8], room: usize) -> Result<Option<Answered>, String> {
        let ticket = self.device.submit(queue, &[(readable, room)])[0];
        self.device.alive()?;
        Ok(self.device.answered(ticket))
    }

    /// The status of a request that must be answered, and the data before it.
    fn status(&mut self, queue: u16, readable: &[u8], room: usize) -> Result<(u8, Vec<u8>), String> {
        let kind = readable.first().copied().unwrap_or_default();
        let answer = self.ask(queue, readable, room)?;
        let Some(Answered { mut buffer, .. }) = answer else {
            return Err(format!("a request of type {kind} is not answered"));
        };
        // A driver looks for the status where it has put it, whatever the device says that it wrote.
        let Some(status) = buffer.pop() else {
            return Err(format!("a request of type {kind} has no room for a status"));
        };
        Ok((status, buffer))
    }

    fn read(&mut self, queue: u16, sector: u64, sectors: u64) -> Result<Vec<u8>, String> {
        let length = usize::try_from(sectors).unwrap_or(0) * SECTOR;
        let (status, data) = self.status(queue, &header(IN, sector), length + 1)?;
        if status != OK || data.len() != length {
            return Err(format!(
                "reading {sectors} sectors at {sector} gives status {status} and {} bytes",
                data.len()
            ));
        }
        Ok(data)
    }

    fn write(&mut self, queue: u16, sector: u64, data: &[u8]) -> Result<(), String> {
        let (status, _) = self.status(queue, &[&header(OUT, sector), data].concat(), 1)?;
        if status != OK {
            return Err(format!("writing {} bytes at sector {sector} gives status {status}", data.len()));
        }
        Ok(())
    }

    fn expect(&mut self, what: &str, readable: &[u8], room: usize, right: &[u8]) -> Result<(), String> {
        let (status, _) = self.status(0, readable, room)?;
        if right.contains(&status) {
            Ok(())
        } else {
            Err(format!("{what} gives status {status}, not one of {right:?}"))
        }
    }

    fn bounds(&mut self) -> Result<(), String> {
        let (end, unit) = (self.capacity, self.unit);
        let one = usize::try_from(unit).unwrap_or(1) * SECTOR;
        let last = self.read(0, end - unit, unit)?;
        let fails: [(&str, u64, usize); 4] = [
            ("reading behind the end", end, one),
            ("reading over the end", end - unit, 2 * one),
            ("reading at the last sector of all", u64::MAX, one),
            ("reading where the byte's number overflows", u64::MAX / SECTOR as u64 + 1, one),
        ];
        for (what, sector, length) in fails {
            self.expect(what, &header(IN, sector), length + 1, &[IOERR])?;
        }
        for (what, sector, length) in fails {
            let what = what.replace("reading", "writing");
            let request = [&header(OUT, sector)[..], &vec![0x77; length]].concat();
            self.expect(&what, &request, 1, &[IOERR])?;
        }
        if self.read(0, end - unit, unit)? != last {
            return Err("a write over the end changed what lies before it".into());
        }
        self.expect("reading half a sector", &header(IN, 0), 257, &[IOERR])?;
        self.expect("a type that nobody knows", &header(0x7fff_ffff, 0), 1, &[UNSUPP])?;
        // No room for a status: nothing can be said, but the device lives.
        for request in [&header(IN, 0)[..], &header(OUT, 0), &header(FLUSH_REQUEST, 0), &[], &[1, 2, 3]] {
            let _ = self.ask(0, request, 0)?;
        }
        // Short headers and no data.
        for length in 0..16 {
            let _ = self.ask(0, &header(IN, 0)[..length], 513)?;
        }
        let _ = self.ask(0, &header(IN, 0), 1)?;
        let _ = self.ask(0, &header(OUT, 0), 1)?;
        self.device.reset();
        self.device.activate(self.about.features)?;
        self.read(0, 0, unit).map(drop)
    }

    fn identity(&mut self) -> Result<(), String> {
        let (status, data) = self.status(0, &header(GET_ID, 0), 21)?;
        if status != OK && status != UNSUPP || status == OK && (data.len() != 20 || !data.is_ascii()) {
            return Err(format!("GET_ID gives status {status} and {data:?}; 20 ASCII bytes are right"));
        }
        let _ = self.ask(0, &header(GET_ID, 0), 3)?;
        let _ = self.ask(0, &header(GET_ID, 0), 4097)?;
        Ok(())
    }

    fn read_only(&mut self) -> Result<(), String> {
        let before = self.read(0, 0, self.unit)?;
        let request = [&header(OUT, 0)[..], &vec![0x77; before.len()]].concat();
        self.expect("writing to a read-only disk", &request, 1, &[IOERR, UNSUPP])?;
        if self.read(0, 0, self.unit)? != before {
            return Err("a write to the read-only disk changed it".into());
        }
        Ok(())
    }

    fn content(&mut self) -> Result<(), String> {
        // What should be there: the first MiB.
        let total = 2048;
        let mut should = Vec::new();
        for sector in (0..total).step_by(128) {
            should.extend(self.read(0, sector, 128)?);
        }
        for round in 0..60u16 {
            let units = (total / self.unit).min(64);
            let length = 1 + self.random.below(units);
            let sector = self.random.below(total / self.unit - length + 1) * self.unit;
            let bytes = self.random.bytes(usize::try_from(length * self.unit).unwrap_or(0) * SECTOR);
            let at = usize::try_from(sector).unwrap_or(0) * SECTOR;
            self.write(round % self.queues, sector, &bytes)?;
            should[at..at + bytes.len()].copy_from_slice(&bytes);
            if round % 16 == 7 {
                self.device.restart()?;
            }
            if round % 16 == 15 {
                self.device.reset();
                self.device.activate(self.about.features)?;
            }
            let read = self.read((round + 1) % self.queues, sector, length * self.unit)?;
            if read != bytes {
                return Err(format!("{length} blocks written at sector {sector} do not read the same"));
            }
        }
        for sector in (0..total).step_by(128) {
            let at = usize::try_from(sector).unwrap_or(0) * SECTOR;
            if self.read(0, sector, 128)? != should[at..at + 128 * SECTOR] {
                return Err(format!("after all writes, the 64 KiB at sector {sector} are not as written"));
            }
        }
        self.batch()
    }

    /// Many writes in one batch, then as many reads.
    fn batch(&mut self) -> Result<(), String> {
        let count = u64::from(self.about.queues[0].max_size).min(64).min(2048 / self.unit);
        let one = usize::try_from(self.unit).unwrap_or(1) * SECTOR;
        let block = |number: u64| vec![number.to_le_bytes()[0] ^ 0x5a; one];
        let writes: Vec<Vec<u8>> =
            (0..count).map(|n| [&header(OUT, n * self.unit)[..], &block(n)].concat()).collect();
        let requests: Vec<(&[u8], usize)> = writes.iter().map(|write| (write.as_slice(), 1)).collect();
        let tickets = self.device.submit(0, &requests);
        let reads: Vec<[u8; 16]> = (0..count).map(|n| header(IN, n * self.unit)).collect();
        for ticket in tickets {
            match self.device.answered(ticket) {
                Some(Answered { buffer, .. }) if buffer == [OK] => {}
                other => return Err(format!("one of {count} writes in a batch ended as {other:?}")),
            }
        }
        let requests: Vec<(&[u8], usize)> = reads.iter().map(|read| (&read[..], one + 1)).collect();
        let tickets = self.device.submit(0, &requests);
        for (n, ticket) in (0..count).zip(tickets) {
            let answered = self.device.answered(ticket);
            let right = |answered: Answered| {
                let Answered { written, buffer, .. } = answered;
                written as usize == one + 1 && buffer[..one] == block(n) && buffer[one..] == [OK]
            };
            if !answered.is_some_and(right) {
                return Err(format!("read {n} of {count} in a batch is wrong"));
            }
        }
        Ok(())
    }

    fn ranges(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let unit = u32::try_from(self.unit).unwrap_or(1);
        let bytes = vec![0x3c; unit as usize * SECTOR * 4];
        if self.offers(WRITE_ZEROES) {
            self.write(0, 0, &bytes)?;
            let ask = |segments: &[u8]| [&header(WRITE_ZEROES_REQUEST, 0)[..], segments].concat();
            self.expect("zeroing two blocks", &ask(&segment(self.unit, 2 * unit, 0)), 1, &[OK])?;
            let read = self.read(0, 0, 4 * self.unit)?;
            let one = unit as usize * SECTOR;
            if read[..one] != bytes[..one]
                || read[3 * one..] != bytes[3 * one..]
                || read[one..3 * one].iter().any(|byte| *byte != 0)
            {
                return Err("zeroing two of four blocks did not do just that".into());
            }
            self.expect("zeroing with an unknown flag", &ask(&segment(0, unit, 2)), 1, &[UNSUPP])?;
            let end = self.capacity;
            self.expect("zeroing over the end", &ask(&segment(end, unit, 0)), 1, &[IOERR])?;
            self.expect("zeroing at the end of all", &ask(&segment(u64::MAX, u32::MAX, 0)), 1, &[IOERR])?;
            self.segments(WRITE_ZEROES_REQUEST)?;
            said.push("zeroes are written where asked, and nowhere else".into());
        }
        if self.offers(DISCARD) {
            self.write(0, 0, &bytes)?;
            let ask = |segments: &[u8]| [&header(DISCARD_REQUEST, 0)[..], segments].concat();
            self.expect("discarding two blocks", &ask(&segment(self.unit, 2 * unit, 0)), 1, &[OK])?;
            let read = self.read(0, 0, 4 * self.unit)?;
            let one = unit as usize * SECTOR;
            if read[..one] != bytes[..one] || read[3 * one..] != bytes[3 * one..] {
                return Err("discarding two of four blocks changed the others".into());
            }
            self.expect("discarding with the unmap flag", &ask(&segment(0, unit, 1)), 1, &[UNSUPP])?;
            let end = self.capacity;
            self.expect("discarding over the end", &ask(&segment(end, unit, 0)), 1, &[IOERR])?;
            self.segments(DISCARD_REQUEST)?;
            said.push("space is discarded where asked, and nowhere else".into());
        }
        if self.offers(FLUSH) {
            self.expect("a flush", &header(FLUSH_REQUEST, 0), 1, &[OK])?;
        }
        Ok(())
    }

    /// Lists of segments that are none: anything may be said of them, but the device lives.
    fn segments(&mut self, kind: u32) -> Result<(), String> {
        for length in [0, 1, 15, 17, 31, 4096, 65536] {
            let _ = self.ask(0, &[&header(kind, 0)[..], &vec![0xff; length]].concat(), 1)?;
        }
        Ok(())
    }

    fn faults(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let Some(name) = self.about.stores.first().cloned() else { return Ok(()) };
        let one = vec![0x11; usize::try_from(self.unit).unwrap_or(1) * SECTOR];
        let mut kinds = vec![
            (On::Read, header(IN, 0).to_vec(), one.len() + 1),
            (On::Write, [&header(OUT, 0)[..], &one].concat(), 1),
        ];
        if self.offers(FLUSH) {
            kinds.push((On::Flush, header(FLUSH_REQUEST, 0).to_vec(), 1));
        }
        for (on, request, room) in kinds {
            for error in [StoreError::Io, StoreError::NoSpace, StoreError::ReadOnly] {
                let mut struck = 0;
                let reached = self.device.with_store(&name, &mut |store| {
                    struck = store.counts().faults;
                    store.fail_next(on, error);
                });
                if !reached {
                    return Ok(());
                }
                // A flush that has nothing to do must fail, too, so something is to do.
                self.expect(&format!("{on:?} while the store fails"), &request, room, &[IOERR])?;
                let mut strikes = struck;
                self.device.with_store(&name, &mut |store| strikes = store.counts().faults);
                if strikes == struck {
                    return Err(format!("{on:?} never came to the store"));
                }
                if on == On::Flush {
                    // A host believes no flush before what the failed one lost was written again.
                    self.write(0, 0, &one)?;
                }
                self.expect(&format!("{on:?} after a failure"), &request, room, &[OK])?;
            }
        }
        said.push("a failed operation of the store is an error for the guest, and the next one works".into());
        Ok(())
    }

    /// Operations that are under way when the instance is replaced are carried out by the new one.
    fn under_way(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let Some(name) = self.about.stores.first().cloned() else { return Ok(()) };
        if !self.device.hold(&name, true) {
            return Ok(());
        }
        let one = usize::try_from(self.unit).unwrap_or(1) * SECTOR;
        let writes: Vec<Vec<u8>> = (0..16u8)
            .map(|n| [&header(OUT, u64::from(n) * self.unit)[..], &vec![n + 1; one]].concat())
            .collect();
        let requests: Vec<(&[u8], usize)> = writes.iter().map(|write| (write.as_slice(), 1)).collect();
        let tickets = self.device.submit(0, &requests);
        if tickets.iter().any(|ticket| self.device.answered(*ticket).is_some()) {
            return Err("a write was answered before the store had done it".into());
        }
        self.device.restart()?;
        self.device.hold(&name, false);
        for ticket in tickets {
            match self.device.answered(ticket) {
                Some(Answered { buffer, .. }) if buffer == [OK] => {}
                other => return Err(format!("a write that was under way at a restart ended as {other:?}")),
            }
        }
        for n in 0..16u8 {
            let read = self.read(0, u64::from(n) * self.unit, self.unit)?;
            if read.iter().any(|byte| *byte != n + 1) {
                return Err(format!("write {n}, which was under way at a restart, is not there"));
            }
        }
        // A reset while operations are under way ends them all.
        self.device.hold(&name, true);
        let _ = self.device.submit(0, &requests);
        self.device.reset();
        self.device.hold(&name, false);
        self.device.alive()?;
        self.device.activate(self.about.features)?;
        self.read(0, 0, self.unit)?;
        said.push("requests under way survive a restart, and end with a reset".into());
        Ok(())
    }

    fn grows(&mut self, said: &mut Vec<String>) -> Result<(), String> {
        let Some(name) = self.about.stores.first().cloned() else { return Ok(()) };
        let more = self.capacity + 2048;
        if !self.device.resize_store(&name, more * SECTOR as u64) {
            return Ok(());
        }
        let capacity = self.device.config_read(0, 8);
        if capacity != more {
            return Err(format!("the store has grown to {more} sectors, and the device says {capacity}"));
        }
        self.capacity = more;
        self.read(0, more - self.unit, self.unit)?;
        said.push("a store that has grown is a disk that has grown".into());
        Ok(())
    }
}

fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

fn segment(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut segment = [0; 16];
    segment[..8].copy_from_slice(&sector.to_le_bytes());
    segment[8..12].copy_from_slice(&sectors.to_le_bytes());
    segment[12..].copy_from_slice(&flags.to_le_bytes());
    segment
}
