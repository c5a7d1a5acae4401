//! `tenon disk`: what it makes, tells, copies and refuses.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tempfile::TempDir;
use tenon_tests::{outcome, program, refused, tenon};

const MIB: usize = 1 << 20;

/// A folder with a key, and a disk that holds something at both ends and nothing between.
struct Place {
    folder: TempDir,
    content: Vec<u8>,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut content = vec![0; 5 * MIB + 512];
        content[..MIB + 5].fill(b'a');
        content[5 * MIB..].fill(b'z');
        fs::write(folder.path().join("from.img"), &content).expect("a disk");
        fs::write(folder.path().join("key"), "0123456789abcdef".repeat(8)).expect("a key");
        Self { folder, content }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A disk of these stores over a file here; `crypt` gets its key.
    fn disk(&self, stores: &str, name: &str) -> String {
        let key = if stores.contains("crypt") {
            format!(",key-file={}", self.path("key").display())
        } else {
            String::new()
        };
        format!("{stores}:{}{key}", self.path(name).display())
    }

    #[track_caller]
    fn does(&self, words: &[&str]) -> String {
        let (status, output, error) = outcome(&mut tenon(words));
        assert_eq!(status, 0, "{words:?}: {error}");
        output
    }
}

fn info(disk: &str) -> Value {
    let (status, output, error) = outcome(&mut tenon(&["disk", "info", "--json", disk]));
    assert_eq!(status, 0, "{disk}: {error}");
    serde_json::from_str(&output).expect("JSON")
}

/// How many bytes of the host's disk a file takes.
fn taken(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    fs::metadata(path).expect("a file").blocks() * 512
}

#[test]
fn a_disk_that_went_through_other_stores_comes_back_as_it_was() {
    let place = Place::new();
    for (n, stores) in ["qcow2", "crypt:file", "crypt:qcow2"].into_iter().enumerate() {
        let (there, back) =
            (place.disk(stores, &format!("there{n}")), place.disk("file", &format!("back{n}")));
        place.does(&["disk", "convert", &place.disk("file", "from.img"), &there]);
        place.does(&["disk", "check", &there]);
        place.does(&["disk", "convert", &there, &back, "--size", "6M"]);
        let mut expected = place.content.clone();
        let found = fs::read(place.path(&format!("back{n}"))).expect("the copy");
        expected.resize(found.len(), 0);
        assert!(found == expected, "{stores}: other bytes came back");
    }
    // What is all zeroes takes no space where the store can keep it so.
    assert!(taken(&place.path("there0")) < 4 * MIB as u64, "{}", taken(&place.path("there0")));
    assert!(taken(&place.path("back0")) < 4 * MIB as u64, "{}", taken(&place.path("back0")));
}

#[test]
fn what_a_component_wrote_its_native_form_reads() {
    let place = Place::new();
    let (from, there, back) =
        (place.disk("file", "from.img"), place.disk("crypt:file", "there"), place.disk("file", "back"));
    place.does(&["disk", "convert", &from, &there]);
    place.does(&["disk", "convert", &there, &back, "--allow-native", "crypt"]);
    let same = fs::read(place.path("back")).expect("the copy") == place.content;
    assert!(same, "other bytes came back");
    refused(&["disk", "info", &there, "--allow-native", "qcow2"], 2, &["--allow-native qcow2", "no disk"]);
}

#[test]
fn what_an_older_disk_held_is_gone_after_a_copy() {
    let place = Place::new();
    fs::write(place.path("old.img"), vec![b'o'; 6 * MIB]).expect("a disk");
    place.does(&[
        "disk",
        "convert",
        &place.disk("file", "from.img"),
        &place.disk("file", "old.img"),
        "--overwrite",
    ]);
    let found = fs::read(place.path("old.img")).expect("the copy");
    assert!(found[..place.content.len()] == place.content, "the copy is not what was copied");
    assert!(found[place.content.len()..].iter().all(|byte| *byte == b'o'), "more than that was written");
}

#[test]
fn a_copy_that_does_not_fit_changes_nothing() {
    let place = Place::new();
    fs::write(place.path("small.img"), vec![b's'; MIB]).expect("a disk");
    let (from, small) = (place.disk("file", "from.img"), place.disk("file", "small.img"));
    refused(&["disk", "convert", &from, &small], 2, &["small.img", "--overwrite"]);
    refused(&["disk", "convert", &from, &small, "--overwrite"], 1, &["small.img", "disk resize"]);
    assert!(fs::read(place.path("small.img")).expect("the disk") == vec![b's'; MIB]);
    let new = place.disk("qcow2", "new.qcow2");
    refused(&["disk", "convert", &from, &new, "--size", "1M"], 1, &["new.qcow2", "--size"]);
    assert!(!place.path("new.qcow2").exists(), "what was begun is left behind");
}

#[test]
fn a_disk_is_made_once_and_grows() {
    let place = Place::new();
    for stores in ["file", "qcow2", "crypt:qcow2"] {
        let disk = place.disk(stores, "disk");
        place.does(&["disk", "create", &disk, "--size", "8M"]);
        let before = fs::read(place.path("disk")).expect("the disk");
        refused(&["disk", "create", &disk, "--size", "8M"], 1, &["disk", "exists"]);
        assert!(fs::read(place.path("disk")).expect("the disk") == before, "{stores}: it was made again");
        let size = info(&disk)["size"].as_u64().expect("a size");
        assert!((7 << 20..=8 << 20).contains(&size), "{stores}: {size}");
        place.does(&["disk", "resize", &disk, "16M"]);
        assert!(info(&disk)["size"].as_u64().expect("a size") >= 15 << 20, "{stores}");
        refused(&["disk", "resize", &disk, "8M"], 2, &["lose", "only growing"]);
        fs::remove_file(place.path("disk")).expect("the disk");
    }
    let image = place.disk("qcow2", "stands");
    place.does(&["disk", "create", &image, "--backing", place.path("from.img").to_str().expect("UTF-8")]);
    refused(&["disk", "resize", &place.disk("file", "from.img"), "33333333"], 1, &["from.img", "512"]);
    refused(&["disk", "create", &place.disk("file", "x")], 2, &["--size"]);
    refused(&["disk", "create", &place.disk("file", "x"), "--size", "16777215T"], 1, &["x", "bytes"]);
    assert!(!place.path("x").exists(), "what was begun is left behind");
    refused(&["disk", "create", "memory:1M"], 2, &["memory"]);
}

#[test]
fn a_store_that_is_not_there_is_named_with_those_that_are() {
    refused(&["disk", "info", "foo:disk.img"], 2, &["no store `foo`", "`crypt`", "`qcow2`"]);
    refused(
        &["disk", "info", "https://example.org/disk.img"],
        2,
        &["write http:https://example.org/disk.img"],
    );
    let place = Place::new();
    let over = format!("overlay:{},top={}", place.disk("file", "from.img"), place.disk("file", "top.img"));
    place.does(&["disk", "create", &over]);
    refused(&["disk", "resize", &over, "16M"], 1, &[over.split(',').next().expect("a chain"), "`size`"]);
}

#[test]
fn what_would_be_lost_is_refused() {
    let place = Place::new();
    let from = place.disk("file", "from.img");
    let overlay = format!("overlay:{from}");
    refused(&["disk", "convert", &from, &overlay, "--overwrite"], 2, &["overlay", "top="]);
    for forgetful in [&overlay, "memory:1M", "null:1M"] {
        refused(&["disk", "resize", forgetful, "16M"], 2, &["kept"]);
    }
    // A setting that nobody has is a typing error, such as one of `top`.
    let top = place.disk("qcow2", "top");
    place.does(&["disk", "create", &top, "--size", "8M"]);
    refused(&["disk", "convert", &from, &format!("{overlay},tpo={top}")], 2, &["`tpo`", "top", "serial"]);
    refused(&["disk", "info", &format!("{from},rule=x")], 2, &["`rule`", "the disk takes"]);
    place.does(&["disk", "info", &format!("{from},id=x")]);
    // With a top that keeps it, it is there.
    let kept = format!("{overlay},top={top}");
    fs::remove_file(place.path("top")).expect("the top");
    place.does(&["disk", "create", &kept]);
    place.does(&["disk", "convert", &from, &kept, "--overwrite"]);
    place.does(&["disk", "check", &kept]);
}

#[test]
fn a_copy_that_is_interrupted_leaves_nothing() {
    let place = Place::new();
    let from = format!("fault:{},rules=read:every=1:delay=1s", place.disk("file", "from.img"));
    let to = place.disk("file", "to.img");
    // To the program itself, and not to the one that would kill it after a while.
    let mut child = Command::new(program()).args(["disk", "convert", &from, &to]).spawn().expect("it starts");
    while !place.path("to.img").exists() && child.try_wait().expect("a child").is_none() {
        std::thread::yield_now();
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).expect("it runs");
    let status = child.wait().expect("a child");
    assert_eq!(status.signal(), Some(15), "{status}");
    assert!(!place.path("to.img").exists(), "a half is left behind");
}

#[test]
fn a_small_disk_is_copied_behind_a_cipher() {
    let place = Place::new();
    fs::write(place.path("small.img"), [7; 1536]).expect("a disk");
    let (small, secret) = (place.disk("file", "small.img"), place.disk("crypt:file", "secret.img"));
    place.does(&["disk", "convert", &small, &secret]);
    assert_eq!(info(&secret)["size"], 1536);
    place.does(&["disk", "convert", &secret, &place.disk("file", "back.img")]);
    assert_eq!(fs::read(place.path("back.img")).expect("the copy"), [7; 1536]);
    refused(&["disk", "create", &place.disk("file", "none.img"), "--size", "0"], 2, &["--size"]);
}

#[test]
fn every_image_that_a_disk_is_made_of_is_checked() {
    let place = Place::new();
    let (from, base) = (place.disk("file", "from.img"), place.disk("qcow2", "base.qcow2"));
    place.does(&["disk", "convert", &from, &base]);
    let child = place.disk("qcow2", "child.qcow2");
    place.does(&["disk", "create", &child, "--backing", &place.path("base.qcow2").display().to_string()]);
    let on_base = format!("{child},backing={}", place.path("base.qcow2").display());
    let over = format!("overlay:{from},top={}", place.disk("qcow2", "top.qcow2"));
    place.does(&["disk", "create", &over]);
    for disk in [&on_base, &over] {
        place.does(&["disk", "check", disk]);
    }
    // The cluster of the L1 table is used by an entry of its own.
    for (name, disk) in [("base.qcow2", &on_base), ("top.qcow2", &over)] {
        let mut bytes = fs::read(place.path(name)).expect("an image");
        let table = u64::from_be_bytes(bytes[40..48].try_into().expect("eight bytes"));
        let entry = usize::try_from(table).expect("an offset");
        bytes[entry..entry + 8].copy_from_slice(&(table | 1 << 63).to_be_bytes());
        fs::write(place.path(name), bytes).expect("an image");
        refused(&["disk", "check", disk], 1, &[name]);
    }
}

#[test]
fn an_image_whose_writer_was_killed_is_repaired() {
    let place = Place::new();
    let image = place.disk("qcow2", "image.qcow2");
    place.does(&["disk", "convert", &place.disk("file", "from.img"), &image]);
    let mut bytes = fs::read(place.path("image.qcow2")).expect("the image");
    let field = |bytes: &[u8], at: usize| {
        let field = u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        usize::try_from(field).expect("an offset")
    };
    // The mark of an image that is open, and the first reference counts.
    bytes[79] |= 1;
    let counts = field(&bytes, field(&bytes, 48));
    bytes[counts..counts + 8].fill(0);
    fs::write(place.path("image.qcow2"), bytes).expect("the image");
    refused(&["disk", "check", &image], 1, &["not closed in good order", "--repair"]);
    let (status, output, error) = outcome(&mut tenon(&["disk", "check", &image, "--repair", "--json"]));
    assert_eq!(status, 0, "{error}");
    let found: serde_json::Value = serde_json::from_str(&output).expect("JSON");
    assert_eq!(found["books"][0]["repaired"]["too_low"], 4, "{output}");
    assert_eq!((&found["good"], &found["books"][0]["unclean"]), (&true.into(), &false.into()), "{output}");
    place.does(&["disk", "check", &image]);
}

#[test]
fn what_a_new_image_stands_on_is_looked_at() {
    let place = Place::new();
    let (mid, leaf) = (place.disk("qcow2", "mid.qcow2"), place.disk("qcow2", "leaf.qcow2"));
    let at = |name: &str| place.path(name).display().to_string();
    // An image on one that stands on another itself.
    place.does(&["disk", "create", &mid, "--backing", &at("from.img")]);
    place.does(&["disk", "create", &leaf, "--backing", &at("mid.qcow2")]);
    let on_mid = format!("{leaf},backing={}", at("mid.qcow2"));
    refused(&["disk", "info", &on_mid], 1, &["from.img", "behind a `:`"]);
    place.does(&["disk", "info", &format!("{on_mid}:{}", at("from.img"))]);
    // What cannot be used as what it is, is not taken for plain bytes.
    let new = place.disk("qcow2", "new.qcow2");
    let mut old = fs::read(place.path("mid.qcow2")).expect("an image");
    old[7] = 1;
    fs::write(place.path("old.qcow"), old).expect("an image");
    refused(&["disk", "create", &new, "--backing", &at("old.qcow")], 1, &["old.qcow", "version 1"]);
    fs::write(place.path("other"), [&b"vhdxfile"[..], &[0; 4096]].concat()).expect("a file");
    refused(&["disk", "create", &new, "--backing", &at("other")], 1, &["other", "VHDX"]);
    assert!(!place.path("new.qcow2").exists());
}

#[test]
fn the_size_of_a_new_overlay_is_that_of_the_copy() {
    let place = Place::new();
    let top = place.disk("file", "top.img");
    let over = format!("overlay:{},top={top}", place.disk("file", "from.img"));
    refused(&["disk", "create", &over, "--size", "512"], 1, &["size"]);
    place.does(&["disk", "create", &over, "--size", "1G"]);
    let (status, output, error) = outcome(&mut tenon(&["disk", "info", &over]));
    assert_eq!(status, 0, "{error}");
    assert!(output.contains("1.00 GiB"), "{output}");
    refused(&["disk", "create", &place.disk("file", "odd.img"), "--size", "1000"], 2, &["512"]);
    let fixed = place.disk("file", "from.img") + ",ro";
    refused(&["disk", "resize", &fixed, "1G"], 2, &["read-only"]);
}

#[test]
fn a_wrong_key_or_a_damaged_image_is_said_to_be_that() {
    let place = Place::new();
    let secret = place.disk("crypt:file", "secret.img");
    place.does(&["disk", "create", &secret, "--size", "2M"]);
    fs::write(place.path("key"), "fedcba9876543210".repeat(8)).expect("a key");
    refused(&["disk", "info", &secret], 1, &["key"]);

    let image = place.disk("qcow2", "image.qcow2");
    place.does(&["disk", "convert", &place.disk("file", "from.img"), &image]);
    let mut bytes = fs::read(place.path("image.qcow2")).expect("the image");
    // The table of the reference counts, by its place in the header.
    let table = u64::from_be_bytes(bytes[48..56].try_into().expect("eight bytes"));
    bytes[usize::try_from(table).expect("an offset")..][..8].fill(0);
    fs::write(place.path("image.qcow2"), bytes).expect("the image");
    let (status, _, error) = outcome(&mut tenon(&["disk", "check", &image]));
    assert_eq!(status, 1, "{error}");
    assert!(error.contains("image.qcow2"), "{error}");
}
