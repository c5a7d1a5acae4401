//! Kernel images of any content, with any command line, initrd, memory and protocol. `cargo fuzz run linux_kernel` runs the same target.
#![allow(clippy::unwrap_used, reason = "a test")]

use tenon_personality_linux::Linux;
use tenon_testkit::LoadBench;
use tenon_testkit::fuzz::{Input, Seen};

const PACKINGS: [&str; 5] = ["gzip", "xz", "zstd", "lz4", "lzma"];

/// The bytes are a protocol, what else there is, and the image ([`Input::sparse`]).
pub(crate) fn target(data: &[u8]) -> Seen {
    let mut input = Input::new(data);
    let (protocol, more) = (input.u8(), input.u8());
    let protocol = ["auto", "pvh", "linux64", "linux32"][usize::from(protocol % 4)];
    let memory = [64, 1, 3073, 17, 256, 2][usize::from(more % 8).min(5)] << 20;
    let cmdline = "x".repeat([0, 20, 2047, 2048][usize::from(more >> 3 & 3)]);
    let mut bench = LoadBench::new(memory)
        .image("kernel", input.sparse())
        .option("protocol", protocol)
        .option("cmdline", &cmdline);
    if more & 0xc0 != 0 {
        bench = bench.image("initrd", vec![1; usize::from(more >> 6) * 5000]);
    }
    let mut seen = Seen::new();
    match bench.load::<Linux>() {
        Ok(loaded) => {
            let summary = &loaded.boot.summary;
            assert!(summary.bytes().all(|byte| (b' '..=b'~').contains(&byte)), "{summary:?} would be shown");
            let how = summary.rsplit_once('(').map_or("", |(_, how)| how);
            seen.insert(format!("loaded: {how}"));
        }
        Err(error) => {
            let text = error.to_string();
            let words =
                text.split_whitespace().filter(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
            let packing =
                PACKINGS.iter().find(|packing| text.contains(&format!("kernel's {packing} payload")));
            let packing = packing.map_or(String::new(), |packing| format!("{packing}: "));
            seen.insert(format!("refused: {packing}{}", words.take(7).collect::<Vec<_>>().join(" ")));
        }
    }
    seen
}

/// The most memory that this process ever had, in bytes.
fn peak() -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with("VmHWM:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
}

#[test]
fn any_kernel_image_is_loaded_or_refused() {
    let corpus = concat!(env!("CARGO_MANIFEST_DIR"), "/../../../fuzz/corpus/linux_kernel");
    let report = tenon_testkit::fuzz::run(corpus.as_ref(), 3000, target);
    for packing in PACKINGS {
        let loaded = report.count(&format!("loaded: bzImage, {packing}"));
        let refused = report.count(&format!("refused: {packing}"));
        assert!(loaded > 5 && refused > 5, "{packing}: {loaded} are loaded, {refused} refused");
    }
    assert!(report.count("loaded: ELF") > 10 && report.count("refused") > 200);
    // A payload may say that it unpacks to 512 MiB; what it does not fill takes no memory.
    assert!(peak() < 1 << 30, "{} bytes of memory were used", peak());
}
