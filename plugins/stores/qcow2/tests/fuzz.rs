//! Images of any content: opened with any grants, read, written, zeroed, discarded, resized, checked. `cargo fuzz run qcow2` runs the same target.
//!
//! An image that passes the check before must be a good disk: what was written is read back, and it passes the check afterwards.
#![allow(clippy::unwrap_used, reason = "a test")]

#[path = "../../file/tests/support/mod.rs"]
mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::{Ask, Bench};
use tenon_sdk::store::StoreError;
use tenon_store_qcow2::{CreateOptions, PLUGIN, check, create, info};
use tenon_testkit::fuzz::{Input, Seen};

/// Disks up to this length are compared with a model.
const MODELLED: u64 = 1 << 20;

/// A folder in memory where there is one: images are small and many.
fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() }.unwrap()
}

/// The bytes are flags, eight deeds of up to four bytes, and the image ([`Input::sparse`]).
pub(crate) fn target(data: &[u8]) -> Seen {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let mut input = Input::new(data);
    let flags = input.u8();
    let deeds: Vec<[u8; 4]> =
        input.take(31).chunks(4).map(|deed| std::array::from_fn(|n| *deed.get(n).unwrap_or(&0))).collect();
    fs::write(at("i.qcow2"), input.sparse()).unwrap();
    let mut grants = Vec::new();
    if flags & 2 != 0 {
        fs::write(at("base.raw"), [0x5a; 64 << 10]).unwrap();
        grants.push(at("base.raw"));
    }
    if flags & 4 != 0 {
        create(&at("base.qcow2"), Some(64 << 10), &CreateOptions { cluster_size: 512, ..Default::default() })
            .unwrap();
        grants.push(at("base.qcow2"));
    }
    try_image(&at("i.qcow2"), flags & 1 != 0, &grants, &deeds)
}

fn try_image(image: &Path, read_only: bool, grants: &[PathBuf], deeds: &[[u8; 4]]) -> Seen {
    let mut seen = Seen::new();
    seen.insert(format!("info: {}", if info(image).is_ok() { "told" } else { "refused" }));
    let sound = match check(image) {
        Ok(report) => {
            seen.insert(format!("check: {} errors", report.errors.min(3)));
            assert!(report.told.len() <= 100);
            report.errors == 0
        }
        Err(_) => false,
    };
    let grants: Vec<&str> = grants.iter().map(|path| path.to_str().unwrap()).collect();
    let grants = grants.join(":");
    let read_only = if read_only { "yes" } else { "no" };
    let settings = [("path", image.to_str().unwrap()), ("readonly", read_only), ("backing", &grants)];
    let mut bench = match Bench::open(&PLUGIN, &settings) {
        Ok(bench) => bench,
        Err(error) => {
            // The reason without what differs from run to run.
            let text = error.to_string().replace(image.parent().unwrap().to_str().unwrap(), "");
            let words =
                text.split_whitespace().filter(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
            seen.insert(format!("refused: {}", words.take(9).collect::<Vec<_>>().join(" ")));
            return seen;
        }
    };
    seen.insert(format!("opened: {}", if sound { "sound" } else { "damaged" }));
    // A sound image is as good a disk as any.
    let mut model = if sound && bench.info.size <= MODELLED { Model::new(&mut bench) } else { None };
    for deed in deeds {
        let Some(ask) = ask(*deed, bench.info.size) else { continue };
        let outcome = bench.run(std::slice::from_ref(&ask)).pop().unwrap();
        let name = format!("{ask:?}");
        let kind = name.split([' ', '{']).next().unwrap_or_default().to_owned();
        seen.insert(format!(
            "{}: {kind}: {}",
            if sound { "sound" } else { "damaged" },
            outcome.as_ref().err().map_or("done".into(), StoreError::to_string)
        ));
        if sound && outcome == Err(StoreError::Io) {
            // The check does not unpack compressed clusters; what cannot be unpacked, imago calls `Failed`.
            let log = bench.log().pop().unwrap_or_default();
            assert!(log.ends_with(": Failed"), "an image that passes the check is no good disk: {log}");
        }
        if let Some(known) = &mut model
            && !known.agrees(&ask, &outcome)
        {
            model = None;
        }
    }
    let size = bench.info.size;
    let resized = bench.resize(size.saturating_add(64 << 10)).is_ok();
    seen.insert(format!("resize: {}", if resized { "done" } else { "refused" }));
    if let Some(model) = model {
        model.compare(&mut bench);
        if bench.close().is_ok() {
            seen.insert("verified".into());
            let after = check(image).unwrap();
            assert!(after.errors == 0, "an image that was sound is damaged: {:?}", after.told);
        }
    }
    seen
}

/// What a deed asks for: kind, first block, blocks, and a byte of data.
fn ask([kind, first, count, byte]: [u8; 4], size: u64) -> Option<Ask> {
    let blocks = (size / 512).min(1 << 40);
    // Every fourth goes to the end of the disk.
    let first = if kind & 0x40 == 0 { u64::from(first) } else { (blocks - 1).saturating_sub(first.into()) };
    let position = first * 512;
    let length = (u64::from(count) + 1).min(blocks.checked_sub(first)?) * 512;
    Some(match kind % 8 {
        0 | 1 => Ask::Read { position, length },
        2..=4 => Ask::Write { position, data: vec![byte | 1; usize::try_from(length).unwrap()] },
        5 => Ask::Discard { position, length },
        6 => Ask::WriteZeroes { position, length, unmap: byte & 1 != 0 },
        _ => Ask::Flush,
    })
}

/// What a disk should hold; nothing is known of what was discarded.
struct Model(Vec<Option<u8>>);

impl Model {
    /// What it holds now, if all of it can be read.
    fn new(bench: &mut Bench) -> Option<Self> {
        let length = bench.info.size;
        let read = bench.run(&[Ask::Read { position: 0, length }]).pop().unwrap().ok()?;
        Some(Self(read.into_iter().map(Some).collect()))
    }

    fn fill(&mut self, position: u64, length: u64, byte: Option<u8>) {
        let start = usize::try_from(position).unwrap();
        self.0[start..start + usize::try_from(length).unwrap()].fill(byte);
    }

    /// Takes an outcome in; `false` when an operation failed, after which nothing is promised.
    fn agrees(&mut self, ask: &Ask, outcome: &Result<Vec<u8>, StoreError>) -> bool {
        let Ok(read) = outcome else { return false };
        match ask {
            Ask::Read { position, .. } => self.check(*position, read),
            Ask::Write { position, data } => self.fill(*position, data.len() as u64, data.first().copied()),
            Ask::Discard { position, length } => self.fill(*position, *length, None),
            Ask::WriteZeroes { position, length, .. } => self.fill(*position, *length, Some(0)),
            Ask::Flush => {}
        }
        true
    }

    fn check(&self, position: u64, read: &[u8]) {
        let expected = &self.0[usize::try_from(position).unwrap()..];
        let wrong =
            expected.iter().zip(read).position(|(known, read)| known.is_some_and(|known| known != *read));
        assert!(wrong.is_none(), "the byte {} behind {position} is another", wrong.unwrap_or(0));
    }

    fn compare(&self, bench: &mut Bench) {
        let read = bench.run(&[Ask::Read { position: 0, length: self.0.len() as u64 }]).pop().unwrap();
        self.check(0, &read.expect("a sound image is read"));
    }
}

/// The most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn any_image_is_survived_and_sound_ones_are_good_disks() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../fuzz/corpus/qcow2");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 1000, target);
    for (what, least) in [
        ("opened: sound", 80),
        ("opened: damaged", 20),
        ("refused", 50),
        ("verified", 50),
        ("sound: Write: done", 40),
    ] {
        assert!(report.count(what) >= least, "`{what}` for {} inputs", report.count(what));
    }
    assert!(peak() < 1 << 30, "{} bytes of memory were used", peak());
}
