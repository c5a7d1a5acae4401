//! Any requests, with a folder in which others work as well. `cargo fuzz run virtio_fs` runs the same target.
#![allow(clippy::unwrap_used, reason = "a test")]

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use tenon_device_virtio_fs::FileSystem;
use tenon_testkit::VirtioSetup;
use tenon_testkit::fuzz::{Exchange, Input, Seen, virtio};

const FORGET: u32 = 2;
const INTERRUPT: u32 = 36;
const BATCH_FORGET: u32 = 42;
const HEADER: usize = 16;

/// The first byte says whether the folder is read-only, the rest are deeds.
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let read_only = !input.u8().is_multiple_of(2);
    // In memory, where there is such a place: what is synced there takes no time.
    let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
    let shared = place.path().join("shared");
    fs::create_dir(&shared).unwrap();
    fs::write(place.path().join("secret"), "secret").unwrap();
    let setup = VirtioSetup::new().folder("share", &shared, read_only);
    let mut answers = Seen::new();
    let deeds = input.take(usize::MAX);
    let mut seen = virtio::<FileSystem>(&[], &setup, &[], deeds, |_, exchange| {
        answers.extend(look(exchange));
    });
    seen.append(&mut answers);
    assert_eq!(fs::read(place.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::read_dir(place.path()).unwrap().count(), 2, "something was made or removed outside");
    look_after(&shared);
    seen
}

/// Every answer has a header that says what it is an answer to; what was asked for, and what came of it.
fn look(exchange: &Exchange) -> Option<String> {
    let Exchange { readable, room, answered, .. } = exchange;
    let u32_at = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let op = (readable.len() >= 40).then(|| u32_at(readable, 4));
    let is_silent = matches!(op, Some(FORGET | INTERRUPT | BATCH_FORGET));
    if is_silent || *room < HEADER {
        assert_eq!(answered.written, 0);
        return None;
    }
    let answer = &answered.data;
    assert_eq!(u32_at(answer, 0), answered.written);
    let error = u32_at(answer, 4).wrapping_neg();
    assert!(error < 512 && (error == 0 || answer.len() == HEADER), "error {error}, {} bytes", answer.len());
    let op = op?;
    assert_eq!(answer[8..16], readable[8..16], "what it is an answer to");
    // Whatever is asked that there is not is one.
    Some(if op < 64 { format!("request {op}: error {error}") } else { "no such request".into() })
}

/// What runs as its owner is what others than the guest have made. And everything can be removed.
fn look_after(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let about = fs::symlink_metadata(&path).unwrap();
        if about.is_dir() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o700)).unwrap();
            look_after(&path);
        } else if about.is_file() && about.mode() & 0o6000 != 0 {
            assert!(fs::read(&path).unwrap().iter().all(|byte| *byte == 0x5a), "the guest wrote a program");
        }
    }
}

#[test]
fn any_requests_are_survived() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../fuzz/corpus/virtio_fs");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    for op in [
        1, 3, 4, 5, 6, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 20, 26, 27, 28, 29, 30, 35, 38, 43, 44, 45,
        46,
    ] {
        let done = report.count(&format!("request {op}: error 0"));
        assert!(done > 20, "request {op} is done for {done} inputs");
    }
    // Not there, no folder, a folder, nonsense, read-only, not known any more.
    for error in [2, 20, 21, 22, 30, 116] {
        let refused = |op| report.seen.get(&format!("request {op}: error {error}")).copied().unwrap_or(0);
        let count: u64 = (0..64).map(refused).sum();
        assert!(count > 20, "error {error} is the answer for {count} inputs");
    }
}
