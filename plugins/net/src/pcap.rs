//! A recorder in front of another port: every frame that passes, in both directions, in a file that Wireshark and tcpdump read.
//!
//! The format is that of libpcap with times in nanoseconds. The header of virtio-net is left off, so a frame whose checksum is left to the receiver is seen with a wrong one,
//! and a large segment whole. A thread of its own writes the file: a slow disk loses records, which are counted, and holds up no frame.

use std::fs::{File, TryLockError};
use std::io::{self, BufWriter, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, SyncSender, TryRecvError, sync_channel};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use tenon_core::{Buffers, FRAME_HEADER, NetworkPort, Offloads, PortCounters, PortInfo, PortNews};

/// The magic number of a file with nanoseconds.
const MAGIC: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
/// The most records that wait for the disk.
const WAITING: usize = 256;

struct Record {
    time: SystemTime,
    /// The frame's length on the wire.
    length: usize,
    bytes: Vec<u8>,
}

/// A port whose frames are recorded.
pub struct Recorder {
    port: Arc<dyn NetworkPort>,
    snaplen: usize,
    records: Option<SyncSender<Record>>,
    thread: Option<JoinHandle<()>>,
    lost: AtomicU64,
}

impl Recorder {
    /// Records what passes `port` in the file at `path`, which is made anew, at most `snaplen` bytes of each frame.
    ///
    /// # Errors
    /// The file cannot be made or written, somebody records to it already, or the thread is not started.
    pub fn new(port: Arc<dyn NetworkPort>, path: &Path, snaplen: u32) -> io::Result<Arc<Self>> {
        let file = File::options().write(true).create(true).truncate(false).open(path)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => io::Error::other("another network card is recorded there"),
            TryLockError::Error(error) => error,
        })?;
        file.set_len(0)?;
        let mut file = BufWriter::with_capacity(1 << 17, file);
        let mut head = Vec::with_capacity(24);
        head.extend_from_slice(&MAGIC.to_le_bytes());
        for version in [2_u16, 4] {
            head.extend_from_slice(&version.to_le_bytes());
        }
        for word in [0, 0, snaplen, ETHERNET] {
            head.extend_from_slice(&word.to_le_bytes());
        }
        file.write_all(&head)?;
        file.flush()?;
        let (records, waiting) = sync_channel(WAITING);
        let name = path.display().to_string();
        let thread = std::thread::Builder::new().name("net-pcap".into()).spawn(move || {
            if let Err(error) = write(file, &waiting) {
                tracing::error!(%error, file = name, "recording of network frames ends");
            }
        })?;
        Ok(Arc::new(Self {
            port,
            snaplen: usize::try_from(snaplen).unwrap_or(usize::MAX),
            records: Some(records),
            thread: Some(thread),
            lost: AtomicU64::new(0),
        }))
    }

    fn record(&self, length: usize, bytes: Vec<u8>) {
        let record = Record { time: SystemTime::now(), length, bytes };
        if self.records.as_ref().is_none_or(|records| records.try_send(record).is_err()) {
            self.lost.fetch_add(1, Relaxed);
        }
    }
}

/// Writes records until nobody sends any.
fn write(mut file: BufWriter<File>, records: &Receiver<Record>) -> io::Result<()> {
    loop {
        let record = match records.try_recv() {
            Ok(record) => record,
            Err(TryRecvError::Disconnected) => return file.flush(),
            Err(TryRecvError::Empty) => {
                // Whoever looks at the file while nothing happens sees all of it.
                file.flush()?;
                match records.recv() {
                    Ok(record) => record,
                    Err(_) => return Ok(()),
                }
            }
        };
        let time = record.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        // Seconds have 32 bits in this format, until 2106; frames are far shorter than 4 GiB.
        let seconds = u32::try_from(time.as_secs()).unwrap_or(u32::MAX);
        let short = |length: usize| u32::try_from(length).unwrap_or(u32::MAX);
        for word in [seconds, time.subsec_nanos(), short(record.bytes.len()), short(record.length)] {
            file.write_all(&word.to_le_bytes())?;
        }
        file.write_all(&record.bytes)?;
    }
}

impl NetworkPort for Recorder {
    fn info(&self) -> PortInfo {
        self.port.info()
    }

    fn accept(&self, offloads: Offloads) {
        self.port.accept(offloads);
    }

    fn send(&self, frame: &Buffers) -> bool {
        let length = usize::try_from(frame.length()).unwrap_or(usize::MAX).saturating_sub(FRAME_HEADER);
        let mut bytes = vec![0; length.min(self.snaplen)];
        frame.read(FRAME_HEADER as u64, &mut bytes);
        let sent = self.port.send(frame);
        if sent {
            self.record(length, bytes);
        }
        sent
    }

    fn waiting(&self, most: usize, into: &mut Vec<u32>) {
        self.port.waiting(most, into);
    }

    fn receive(&self) -> Option<Vec<u8>> {
        let frame = self.port.receive()?;
        let packet = frame.get(FRAME_HEADER..).unwrap_or_default();
        self.record(packet.len(), packet[..packet.len().min(self.snaplen)].to_vec());
        Some(frame)
    }

    fn watch(&self, news: Box<dyn Fn(PortNews) + Send + Sync>) {
        self.port.watch(news);
    }

    fn counters(&self) -> PortCounters {
        self.port.counters()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        drop(self.records.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        let lost = self.lost.load(Relaxed);
        if lost > 0 {
            tracing::warn!(lost, "frames were not recorded: the disk did not keep up");
        }
    }
}
