//! Folders of the host in an unmodified Debian kernel, by virtio-fs on the software engine.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use tempfile::TempDir;
use tenon_tests::{Outcome, PROMPT, Tenon, noise};

const LARGE: usize = 16 << 20;

/// A folder to be shared, beside one that is not.
fn place() -> TempDir {
    let place = tempfile::tempdir().expect("a temporary folder");
    fs::create_dir(place.path().join("shared")).expect("a folder");
    fs::create_dir(place.path().join("outside")).expect("a folder");
    fs::write(place.path().join("outside/secret"), "TENON-SECRET").expect("a file");
    place
}

/// Runs Debian with these shares. The guest mounts `share` at /m, where it runs `script`.
fn run(script: &str, shared: &Path, shares: &[String]) -> Outcome {
    fs::write(shared.join("script"), script).expect("a file");
    let mut tenon = Tenon::virtio_debian();
    for share in shares {
        tenon = tenon.args(["--share", share]);
    }
    let outcome = tenon
        .typing(PROMPT, "mkdir /m /d; mount -t virtiofs share /m && sh /m/script; cd /; umount /m\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    let devices = outcome.summary["devices"].as_array().expect("devices");
    let device = devices.iter().find(|device| device["plugin"] == "virtio-fs").expect("the device");
    assert_eq!(device["faults"], 0, "{}", outcome.all());
    outcome
}

/// What the guest printed behind `name: `.
#[track_caller]
fn said<'o>(outcome: &'o Outcome, name: &str) -> &'o str {
    let line = outcome.stdout.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
    line.unwrap_or_else(|| panic!("the guest does not say `{name}`: {}", outcome.all()))
}

#[test]
fn linux_works_in_a_folder_of_the_host() {
    let place = place();
    let shared = place.path().join("shared");
    let mut sum = 0;
    for folder in 0..10 {
        fs::create_dir_all(shared.join(format!("tree/{folder}"))).expect("a folder");
        for file in 0..50 {
            let content = format!("{}\n", folder * 1000 + file);
            sum += folder * 1000 + file;
            fs::write(shared.join(format!("tree/{folder}/{file}")), content).expect("a file");
        }
    }
    let large = noise(1, LARGE);
    fs::write(shared.join("large"), &large).expect("a file");
    let script = r#"
        cd /m
        echo "files: $(find tree -type f | wc -l)"
        echo "sum: $(find tree -type f | xargs cat | awk '{ s += $1 } END { print s }')"
        cp large copy && cmp large copy && echo "copied: yes"
        echo 3 > /proc/sys/vm/drop_caches
        cmp large copy && echo "still: yes"
        head -c 1000000 large >> copy
        mkdir -p made/deeper
        echo hello > made/deeper/file
        mv made/deeper/file made/renamed
        ln -s renamed made/link
        ln made/renamed made/hard
        echo "link: $(cat made/link)"
        chmod 640 made/renamed
        echo "stat: $(stat -c '%a %s %h %F' made/hard)"
        echo xyz > made/short; truncate -s 2 made/short
        touch -d '2001-09-09 01:46:40' made/short
        rm -r tree/3; rmdir made/deeper
        echo "left: $(find tree -type f | wc -l)"
        rmdir tree 2> /dev/null || echo "full: yes"
        echo one > /m/log; echo two >> /m/log
        sync
        mount | grep -c ' /m ' > /dev/null && df /m > /dev/null && echo "all: done"
    "#;
    let outcome = run(script, &shared, &[shared.display().to_string()]);
    assert_eq!(said(&outcome, "files"), "500");
    assert_eq!(said(&outcome, "sum"), sum.to_string());
    for yes in ["copied", "still", "full"] {
        assert_eq!(said(&outcome, yes), "yes");
    }
    assert_eq!(said(&outcome, "link"), "hello");
    assert_eq!(said(&outcome, "stat"), "640 6 2 regular file");
    assert_eq!(said(&outcome, "left"), "450");
    assert_eq!(said(&outcome, "all"), "done");
    let read = |name: &str| fs::read(shared.join(name)).expect("a file");
    assert!(read("copy") == [&large[..], &large[..1_000_000]].concat(), "the copy is not what it should be");
    assert_eq!(read("made/renamed"), b"hello\n");
    assert_eq!(read("made/short"), b"xy");
    assert_eq!(read("log"), b"one\ntwo\n");
    assert_eq!(fs::read_link(shared.join("made/link")).expect("a link"), Path::new("renamed"));
    let about = fs::metadata(shared.join("made/hard")).expect("a file");
    assert_eq!((about.permissions().mode() & 0o7777, about.nlink()), (0o640, 2));
    assert_eq!(fs::metadata(shared.join("made/short")).expect("a file").mtime(), 1_000_000_000);
    assert!(!shared.join("tree/3").exists() && !shared.join("made/deeper").exists());
}

#[test]
fn a_read_only_share_and_what_lies_outside_stay_as_they_are() {
    let place = place();
    let (shared, kept) = (place.path().join("shared"), place.path().join("kept"));
    fs::create_dir(&kept).expect("a folder");
    fs::write(kept.join("file"), "kept\n").expect("a file");
    symlink("../outside/secret", shared.join("relative")).expect("a link");
    symlink(place.path().join("outside/secret"), shared.join("absolute")).expect("a link");
    symlink("../outside", shared.join("folder")).expect("a link");
    let script = format!(
        r#"
        mount -t virtiofs data /d
        echo "kept: $(cat /d/file)"
        for deed in 'echo x > /d/new' 'echo x >> /d/file' 'rm /d/file' 'mkdir /d/new' 'mv /d/file /d/other' \
            'chmod 777 /d/file' 'truncate -s 0 /d/file' 'ln -s x /d/new' 'ln /d/file /d/new' 'touch /d/file'; do
            sh -c "$deed" 2>&1 | grep -q 'Read-only file system' && refused="$refused+" || echo "not refused: $deed"
        done
        echo "refused: $refused"
        cd /m
        for link in relative absolute folder/secret; do cat "$link" 2>&1; done
        ln -s {outside}/secret mine; cat mine 2>&1
        ls ../outside .. > /dev/null 2>&1
        echo x > folder/new; echo x > relative
        mknod device c 1 3 2> /dev/null || echo "device: refused"
        mkfifo fifo 2> /dev/null || echo "fifo: refused"
        umount /d
        echo "all: done"
        "#,
        outside = place.path().join("outside").display()
    );
    let shares = [shared.display().to_string(), format!("{},ro,tag=data", kept.display())];
    let outcome = run(&script, &shared, &shares);
    assert_eq!(said(&outcome, "kept"), "kept");
    assert_eq!(said(&outcome, "refused"), "+".repeat(10), "{}", outcome.all());
    assert_eq!((said(&outcome, "device"), said(&outcome, "fifo")), ("refused", "refused"));
    assert_eq!(said(&outcome, "all"), "done");
    assert!(!outcome.stdout.contains("TENON-SECRET"), "{}", outcome.all());
    let names = |folder: &Path| -> Vec<_> {
        fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").file_name()).collect()
    };
    assert_eq!(names(&kept), ["file"]);
    assert_eq!(fs::read(kept.join("file")).expect("a file"), b"kept\n");
    assert_eq!(names(&place.path().join("outside")), ["secret"]);
    assert_eq!(fs::read(place.path().join("outside/secret")).expect("a file"), b"TENON-SECRET");
}

#[test]
fn a_share_that_cannot_be_is_refused_in_plain_words() {
    let place = place();
    let flat = |share: &str, again: &str| {
        Tenon::bare("first", "soft").args(["--share", share, "--share", again]).outcome()
    };
    let shared = place.path().join("shared").display().to_string();
    let missing = place.path().join("missing").display().to_string();
    flat(&shared, &missing).refused(1, &["--share", &missing, "No such file"]);
    let file = place.path().join("outside/secret").display().to_string();
    flat(&file, &shared).refused(1, &["--share", &file, "Not a directory"]);
    flat(&shared, &format!("{shared},tag=share")).refused(2, &["--share", "tag", "share"]);
    flat(&shared, &format!("{shared},rw")).refused(2, &["`rw`"]);
    flat(&shared, &format!("{shared},tag={}", "x".repeat(37))).refused(2, &["--share", "36 bytes"]);
}
