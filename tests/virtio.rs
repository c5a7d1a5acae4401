//! Virtio devices over PCI with real drivers: a bare one in ring 3 on both engines, and those of an unmodified Debian kernel on the software engine.

use std::collections::BTreeSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread;

use tempfile::TempDir;
use tenon_tests::{Outcome, PROMPT, Tenon, bare, bundled, has_kvm, noise};

const MIB: usize = 1 << 20;

/// A file with this content, that is still there when the machine has ended.
fn disk(content: &[u8]) -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("disk.img");
    fs::write(&path, content).expect("a file");
    (folder, path)
}

#[track_caller]
fn powered_off(outcome: &Outcome) {
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert_eq!(outcome.summary["end"], "power-off", "{}", outcome.all());
}

/// What the summary says of the first device of a plugin.
#[track_caller]
fn device<'o>(outcome: &'o Outcome, plugin: &str) -> &'o serde_json::Value {
    let devices = outcome.summary["devices"].as_array().expect("devices");
    devices
        .iter()
        .find(|device| device["plugin"] == plugin)
        .unwrap_or_else(|| panic!("no {plugin}: {}", outcome.all()))
}

#[track_caller]
fn bare_driver_verifies(engine: &str, native: bool) {
    let tenon = Tenon::bare("blk", engine).args(["--memory", "128M"]);
    let disk = tenon.file("disk.img", &vec![0; 4 * MIB]);
    let mut tenon = tenon.arg("--disk").arg(format!("file:{}", disk.display()));
    if native {
        tenon = tenon.args(["--allow-native", "virtio-blk"]);
    }
    let outcome = tenon.outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    assert!(outcome.stdout.contains("checks, 0 failed"), "{}", outcome.all());
    let disk = device(&outcome, "virtio-blk");
    assert_eq!(disk["virtio"]["answers"], 64 + 1 + 64 + 1, "{}", outcome.all());
    // 32 reads that are ready together are one entry.
    assert_eq!(disk["virtio"]["batches"], 64 + 1 + 2 + 1, "{}", outcome.all());
    assert_eq!(disk["form"], if native { "native" } else { "wasm" });
}

#[test]
fn a_bare_driver_reads_back_what_it_wrote() {
    bare_driver_verifies("soft", false);
}

#[test]
fn a_bare_driver_reads_back_what_it_wrote_on_kvm() {
    if has_kvm() {
        bare_driver_verifies("kvm", false);
    }
}

#[test]
fn the_same_source_as_native_code_does_the_same() {
    bare_driver_verifies("soft", true);
}

#[track_caller]
fn sends_messages(engine: &str) -> String {
    let outcome = Tenon::bare("msi", engine).args(["--disk", "memory:1M"]).outcome();
    assert_eq!(outcome.status, 0, "{engine}: {}", outcome.all());
    assert!(outcome.stdout.contains("5 checks, 0 failed"), "{engine}: {}", outcome.all());
    outcome.stdout
}

#[test]
fn message_signalled_interrupts_arrive_and_can_be_masked() {
    let soft = sends_messages("soft");
    if has_kvm() {
        assert_eq!(sends_messages("kvm"), soft);
    }
}

#[test]
fn linux_reads_and_writes_a_disk() {
    let content = noise(1, 8 * MIB);
    let (_folder, disk) = disk(&content);
    let outcome = Tenon::virtio_debian()
        .arg("--disk")
        .arg(format!("file:{},serial=tenon-test-1", disk.display()))
        .typing(PROMPT, "cat /sys/block/vda/serial; echo; head -c 1048576 /dev/vda > /tmp/a\n")
        .typing(PROMPT, "dd if=/tmp/a of=/dev/vda bs=64k seek=64 conv=fsync 2> /dev/null\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(outcome.stdout.contains("tenon-test-1"), "{}", outcome.all());
    let mut expected = content.clone();
    expected[4 * MIB..5 * MIB].copy_from_slice(&content[..MIB]);
    assert!(fs::read(&disk).expect("the disk") == expected, "the file is not what the guest wrote");
    assert_eq!(device(&outcome, "virtio-blk")["faults"], 0);
}

#[test]
fn disks_and_cards_take_settings_and_other_plugins() {
    // Vendors' devices: those of this repository, under other names.
    let (folder, image) = disk(&noise(4, MIB));
    for (id, other) in [("virtio-blk", "my-blk"), ("virtio-net", "my-net")] {
        let place = folder.path().join(other);
        fs::create_dir(&place).expect("a folder");
        let manifest = fs::read_to_string(bundled(id).join("plugin.toml")).expect("its manifest");
        let manifest = manifest.replace(&format!("id = \"{id}\""), &format!("id = \"{other}\""));
        fs::write(place.join("plugin.toml"), manifest).expect("a file");
        fs::copy(bundled(id).join("plugin.wasm"), place.join("plugin.wasm")).expect("a file");
    }
    let outcome = Tenon::virtio_debian()
        .args(["--cpus", "2", "--net", "user,device=my-net,queues=2,mac=52:54:00:00:00:77", "--plugin-dir"])
        .arg(folder.path())
        .arg("--disk")
        .arg(format!("file:{},ro,device=my-blk,id=of-mine", image.display()))
        .typing(PROMPT, "cat /sys/block/vda/serial /sys/block/vda/ro /sys/class/net/eth0/address; echo\n")
        .typing(PROMPT, "ls /sys/class/net/eth0/queues | tr '\\n' ' '; echo\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    for told in ["of-mine1\n52:54:00:00:00:77\n", "rx-0 rx-1 tx-0 tx-1 "] {
        assert!(outcome.stdout.contains(told), "`{told}`: {}", outcome.all());
    }
    for plugin in ["my-blk", "my-net"] {
        assert_eq!(device(&outcome, plugin)["faults"], 0);
    }
}

#[test]
fn an_overlay_takes_more_than_fits_into_its_memory() {
    let (_folder, base) = disk(&[]);
    fs::File::options().write(true).open(&base).and_then(|file| file.set_len(256 << 20)).expect("a disk");
    let outcome = Tenon::virtio_debian()
        .arg("--disk")
        .arg(format!("overlay:file:{}", base.display()))
        .typing(PROMPT, "yes | head -c 160M > /dev/vda; sync; echo 3 > /proc/sys/vm/drop_caches\n")
        .typing(
            PROMPT,
            "yes | head -c 160M > /tmp/a; head -c 160M /dev/vda | cmp - /tmp/a && echo same $((40 + 2))\n",
        )
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(outcome.stdout.contains("\nsame 42\n"), "{}", outcome.all());
    assert!(fs::read(&base).expect("the base").iter().all(|byte| *byte == 0), "the base was written to");
}

#[test]
fn linux_knows_how_large_its_console_is() {
    let outcome = Tenon::virtio_debian()
        .args(["--device", "virtio-console,size=100x30"])
        .typing(PROMPT, "stty size < /dev/hvc0\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(outcome.stdout.contains("\n30 100\n"), "{}", outcome.all());
}

#[test]
fn a_read_only_disk_stays_as_it_is() {
    let content = noise(2, MIB);
    let (_folder, disk) = disk(&content);
    let outcome = Tenon::virtio_debian()
        .arg("--cdrom")
        .arg(&disk)
        .typing(PROMPT, "cat /sys/block/vda/ro; echo x > /dev/vda\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(outcome.stdout.contains("\n1\n"), "{}", outcome.all());
    assert!(fs::read(&disk).expect("the disk") == content, "the guest wrote to it");
}

#[test]
fn linux_finds_256_disks_and_reads_each() {
    let tenon = Tenon::virtio_debian().within(300);
    // Each disk begins with its own name.
    let disks: Vec<_> = (0..256)
        .map(|n| {
            let mut content = format!("disk-{n:03}").into_bytes();
            content.resize(4096, b'.');
            tenon.file(&format!("disk{n:03}.img"), &content)
        })
        .collect();
    let tenon =
        disks.iter().fold(tenon, |tenon, disk| tenon.arg("--disk").arg(format!("file:{}", disk.display())));
    let outcome = tenon
        .args(["--memory", "1G"])
        .typing(PROMPT, "for d in /sys/block/vd*; do head -c 8 /dev/${d##*/}; echo; done\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    let found: BTreeSet<&str> = outcome.stdout.lines().filter(|line| line.starts_with("disk-")).collect();
    let expected: Vec<String> = (0..256).map(|n| format!("disk-{n:03}")).collect();
    assert_eq!(found.into_iter().collect::<Vec<_>>(), expected);
}

#[test]
fn linux_takes_entropy_from_the_host() {
    let outcome = Tenon::virtio_debian()
        .args(["--device", "virtio-rng"])
        .typing(PROMPT, "cat /sys/class/misc/hw_random/rng_current; head -c 64 /dev/hwrng | wc -c\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(outcome.stdout.contains("virtio_rng.0\n64\n"), "{}", outcome.all());
}

#[test]
fn linux_talks_to_the_host_through_the_user_network() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let port = listener.local_addr().expect("its address").port();
    let content = noise(3, MIB);
    let sent = content.clone();
    let host = thread::spawn(move || {
        let (mut guest, _) = listener.accept().expect("the guest connects");
        guest.write_all(&sent).expect("the guest reads");
        drop(guest);
        let (mut guest, _) = listener.accept().expect("the guest connects again");
        let mut back = Vec::new();
        guest.read_to_end(&mut back).expect("the guest sends");
        back
    });
    let script = format!(
        "ip link set eth0 up; ip addr add 10.0.2.15/24 dev eth0; ip route add default via 10.0.2.2; \
         nc 10.0.2.2 {port} < /dev/null > /tmp/got; nc 10.0.2.2 {port} < /tmp/got\n"
    );
    let outcome = Tenon::virtio_debian()
        .args(["--net", "user"])
        .typing(PROMPT, &script)
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert!(host.join().expect("the host's side") == content, "other bytes came back");
    assert_eq!(device(&outcome, "virtio-net")["faults"], 0);
}

#[track_caller]
fn nothing_is_written_after_a_reset(engine: &str, rounds: u32, disk: &str) {
    let outcome = Tenon::run()
        .args(["--engine", engine, "--device", "exit", "--memory", "128M", "--disk", disk])
        .args(["--cmdline", &format!("rounds={rounds}"), "--kernel"])
        .arg(bare("resets"))
        .outcome();
    assert_eq!(outcome.status, 0, "{disk} on {engine}: {}", outcome.all());
    assert!(outcome.stdout.contains("2 checks, 0 failed"), "{disk} on {engine}: {}", outcome.all());
    assert_eq!(device(&outcome, "virtio-blk")["faults"], 0);
}

#[test]
fn a_thousand_resets_with_requests_under_way_leave_memory_alone() {
    let (_folder, file) = disk(&noise(4, MIB));
    // Some answers come before the reset, some would come after it.
    let slow = |delay: &str| format!("fault:file:{},rules=any:chance=1/64:delay={delay}", file.display());
    nothing_is_written_after_a_reset("soft", 1000, &slow("300us"));
    if has_kvm() {
        // Some hosts' KVM emulates ring 0, in which this guest waits.
        nothing_is_written_after_a_reset("kvm", 24, &slow("30ms"));
    }
}

/// Sends all of this, then the end of it; what came until the other end was done.
fn exchange(mut stream: UnixStream, content: &[u8]) -> Vec<u8> {
    let mut writer = stream.try_clone().expect("a second handle");
    let content = content.to_vec();
    let sender = thread::spawn(move || {
        writer.write_all(&content).expect("the guest reads");
        writer.shutdown(Shutdown::Write).expect("the end is told");
    });
    let mut came = Vec::new();
    stream.read_to_end(&mut came).expect("the guest writes");
    sender.join().expect("everything was sent");
    came
}

#[test]
fn programs_of_linux_and_of_the_host_connect_to_each_other() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("vm.sock");
    let listen = |port: u32| {
        UnixListener::bind(folder.path().join(format!("vm.sock_{port}"))).expect("a socket of the host")
    };
    let (first, ready, last) = (listen(5000), listen(5001), listen(5002));
    let (one, two) = (noise(4, MIB), noise(5, MIB));
    let (to_guest, back_to_guest, at) = (one.clone(), two.clone(), path.clone());
    let host = thread::spawn(move || {
        let accept = |listener: UnixListener| listener.accept().expect("the guest connects").0;
        // The guest connects, and is sent the first.
        assert_eq!(exchange(accept(first), &to_guest), b"");
        // It listens, sends the first back and is sent the second.
        let ready = accept(ready);
        let ask = |port: u32| {
            let mut stream = UnixStream::connect(&at).expect("the machine's socket");
            writeln!(stream, "CONNECT {port}").expect("the machine listens");
            let (mut line, mut byte) = (String::new(), [0]);
            while !line.ends_with('\n') && stream.read(&mut byte).expect("an answer") > 0 {
                line.push(byte[0].into());
            }
            (stream, line)
        };
        assert_eq!(ask(6001).1, "", "nobody listens there");
        let (stream, line) = ask(6000);
        let port = line.strip_prefix("OK ").and_then(|port| port.trim_end().parse::<u32>().ok());
        assert!(port.is_some(), "{line:?}");
        let first_back = exchange(stream, &back_to_guest);
        drop(ready);
        // It connects, and sends the second back.
        (first_back, exchange(accept(last), b""))
    });
    let outcome = Tenon::virtio_debian()
        .arg("--vsock")
        .arg(format!("{},cid=77", path.display()))
        .typing(PROMPT, "vsock connect 2 4999 < /dev/null; vsock connect 9 5000 < /dev/null\n")
        .typing(PROMPT, "vsock connect 2 5000 < /dev/null > /tmp/one; wc -c < /tmp/one\n")
        .typing(
            PROMPT,
            "vsock listen 6000 < /tmp/one > /tmp/two 2> /tmp/said & \
             until grep -q listening /tmp/said; do :; done; vsock connect 2 5001 < /dev/null; wait; wc -c < /tmp/two\n",
        )
        .typing(PROMPT, "vsock connect 2 5002 < /tmp/two\n")
        .typing(PROMPT, "poweroff -f\n")
        .outcome();
    powered_off(&outcome);
    assert_eq!(outcome.stdout.matches("Connection reset by peer").count(), 2, "{}", outcome.all());
    assert_eq!(outcome.stdout.matches(&format!("\n{MIB}\n")).count(), 2, "{}", outcome.all());
    let (first_back, second_back) = host.join().expect("the host's side");
    assert!(first_back == one, "{} bytes came back, and not the same", first_back.len());
    assert!(second_back == two, "{} bytes came back, and not the same", second_back.len());
    assert_eq!(device(&outcome, "virtio-vsock")["faults"], 0);
    assert!(!path.exists(), "the socket is left behind");
}

#[test]
fn a_socket_at_which_somebody_listens_is_left_to_him() {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let path = folder.path().join("vm.sock");
    let listener = UnixListener::bind(&path).expect("a socket of the host");
    Tenon::virtio_debian()
        .arg("--vsock")
        .arg(&path)
        .outcome()
        .refused(1, &["--vsock", "a program listens there already"]);
    assert!(path.exists());
    drop(listener);
    Tenon::virtio_debian().args(["--vsock", "x,cid=2"]).outcome().refused(2, &["`2` is no guest's CID"]);
}
