//! Machines that start in PC firmware: a small bare one on both engines, and Debian's OVMF on the software engine, which starts Debian's GRUB from a disk and keeps its variables.

use std::fs;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tenon_tests::{Outcome, Tenon, bare, debian, has_kvm};

/// The size of the bare firmware's flash, two blocks.
const FLASH: usize = 8192;

/// A folder with firmware: code and the first content of its variables.
struct Firmware {
    folder: TempDir,
    code: PathBuf,
}

impl Firmware {
    fn new(code: &[u8], variables: &[u8]) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let place = |name: &str, content: &[u8]| {
            let path = folder.path().join(name);
            fs::write(&path, content).expect("a file");
            path
        };
        let code = place("CODE.fd", code);
        place("VARS.fd", variables);
        Self { folder, code }
    }

    /// The bare one, which ends in the way that `end` names.
    fn bare(end: u8) -> Self {
        let mut variables = vec![0xf0; FLASH];
        variables[0] = end;
        Self::new(&rom(&fs::read(bare("firmware")).expect("the guest")), &variables)
    }

    fn nvram(&self, content: &[u8]) -> PathBuf {
        let path = self.folder.path().join("nvram");
        fs::write(&path, content).expect("a file");
        path
    }

    fn run(&self, engine: &str) -> Tenon {
        Tenon::run()
            .args(["--engine", engine, "--memory", "128M", "--device", "exit", "--firmware"])
            .arg(&self.code)
    }
}

/// `tenon run`'s option for variables in a file.
fn kept_in(tenon: Tenon, path: &Path) -> Tenon {
    tenon.arg("--nvram").arg(format!("file:{}", path.display()))
}

/// A ROM of the bare firmware: its image, and the end of it that the program has ready.
fn rom(elf: &[u8]) -> Vec<u8> {
    const TOP: usize = 512;
    let number = |at: usize, bytes: usize| {
        elf[at..at + bytes].iter().rev().fold(0usize, |value, byte| value << 8 | usize::from(*byte))
    };
    // ELF's header: the entry, the table of segments. The image is the first.
    let (entry, segment) = (number(24, 8), number(32, 8));
    let (offset, length) = (number(segment + 8, 8), number(segment + 32, 8).next_multiple_of(4));
    let mut rom = vec![0; (length + TOP).next_multiple_of(4096)];
    rom[..number(segment + 32, 8)].copy_from_slice(&elf[offset..offset + number(segment + 32, 8)]);
    let name = b"TENON-TOP-OF-ROM";
    let top = rom.windows(name.len()).position(|bytes| bytes == name).expect("the end of the ROM");
    let mut end = rom[top..top + TOP].to_vec();
    let numbers = [(1usize << 32) - rom.len(), length / 4, entry];
    for (field, value) in end[name.len()..].chunks_mut(4).zip(numbers) {
        field.copy_from_slice(&u32::try_from(value).expect("below 4 GiB").to_le_bytes());
    }
    let at = rom.len() - TOP;
    rom[at..].copy_from_slice(&end);
    rom
}

#[track_caller]
fn bare_firmware_finds_its_board(engine: &str) -> String {
    let firmware = Firmware::bare(b'E');
    let nvram = firmware.nvram(&[0; FLASH]);
    let outcome = kept_in(firmware.run(engine), &nvram).outcome();
    assert_eq!(outcome.status, 0, "{engine}: {}", outcome.all());
    assert!(outcome.stdout.contains("checks, 0 failed"), "{engine}: {}", outcome.all());
    // The blank store was given the first content, and then kept what was written: see the guest.
    let mut kept = vec![0xf0; FLASH];
    (kept[0], kept[1]) = (b'E', 0x30);
    kept[4096..].fill(0xff);
    kept[4096 + 9] = b'!';
    assert!(fs::read(&nvram).expect("the store") == kept, "{engine}: another content is kept");
    outcome.stdout
}

#[test]
fn firmware_starts_in_rom_and_finds_its_board() {
    let soft = bare_firmware_finds_its_board("soft");
    if has_kvm() {
        assert_eq!(bare_firmware_finds_its_board("kvm"), soft);
    }
}

#[test]
fn firmware_resets_and_powers_off_as_a_440fx_does() {
    for engine in ["soft", "kvm"] {
        if engine == "kvm" && !has_kvm() {
            continue;
        }
        for (end, status, told) in [(b'R', 3, "reset"), (b'K', 3, "reset"), (b'O', 0, "power-off")] {
            let outcome = Firmware::bare(end).run(engine).outcome();
            assert_eq!(outcome.status, status, "{engine}: {}", outcome.all());
            assert_eq!(outcome.summary["end"], told, "{engine}: {}", outcome.all());
        }
    }
}

#[test]
fn a_restarted_machine_begins_in_rom_again_with_what_it_wrote_to_flash() {
    let firmware = Firmware::bare(b'R');
    // The checks of the first start find the flash as it was; those of the second do not, and say so.
    let outcome = firmware.run("soft").args(["--on-reset", "restart"]).until("flash: content\n", 1).outcome();
    assert_eq!(outcome.status, 143, "{}", outcome.all());
    let outcome = firmware
        .run("soft")
        .args(["--on-reset", "restart"])
        .until("FAIL flash: content: got 0x30 want 0xf0\n", 1)
        .outcome();
    assert_eq!(outcome.status, 143, "{}", outcome.all());
}

#[test]
fn what_cannot_be_firmware_is_refused_by_name() {
    let run = |code: &[u8]| Firmware::new(code, &[0xf0; FLASH]).run("soft").outcome();
    Tenon::run()
        .args(["--firmware", "/nowhere/OVMF.fd"])
        .outcome()
        .refused(1, &["/nowhere/OVMF.fd", "No such file"]);
    Tenon::run().args(["--firmware", "/usr"]).outcome().refused(1, &["/usr", "a folder"]);
    Tenon::run().args(["--firmware", "/dev/zero"]).outcome().refused(1, &["/dev/zero", "a device"]);
    run(&[]).refused(1, &["CODE.fd", "empty"]);
    Firmware::new(&[1; 4096], &[]).run("soft").outcome().refused(1, &["VARS.fd", "empty"]);
    run(&[1; 5000]).refused(1, &["CODE.fd", "0x1388", "4 KiB"]);
    run(&[1; (16 << 20) + 4096]).refused(1, &["CODE.fd", "larger"]);
    run(&[0xff; 4096]).refused(1, &["firmware", "nothing there"]);
    // All of it together is too large for its place.
    Firmware::new(&[1; (16 << 20) - 4096], &[0xf0; FLASH])
        .run("soft")
        .outcome()
        .refused(1, &["variables", "16 MiB"]);
}

#[test]
fn a_store_that_cannot_hold_the_variables_is_refused_and_left_alone() {
    let header = |length: u8| {
        let mut volume = vec![0xff; FLASH];
        volume[40..44].copy_from_slice(b"_FVH");
        (volume[48], volume[49]) = (length, 0);
        // The variables' own header is behind it: formatted.
        volume[usize::from(length) + 20] = 0x5a;
        volume
    };
    let firmware = Firmware::new(&fs::read(&Firmware::bare(b'E').code).expect("a file"), &header(0x48));
    let with = |content: &[u8], settings: &str| {
        let path = firmware.nvram(content);
        let spec = format!("file:{}{settings}", path.display());
        let outcome = firmware.run("soft").args(["--nvram", &spec]).outcome();
        assert_eq!(fs::read(path).expect("the store"), content, "{}", outcome.all());
        outcome
    };
    with(&[0; FLASH - 4096], "").refused(1, &["--nvram", "nvram", "4096 bytes", "8192"]);
    with(&[0; FLASH], ",ro").refused(1, &["--nvram", "read-only"]);
    with(&[b'x'; FLASH], "").refused(1, &["--nvram", "something else"]);
    with(&header(0x50), "").refused(1, &["--nvram", "something else"]);
    let mut variables = header(0x48);
    variables[0x48] = 0;
    with(&variables, "").refused(1, &["--nvram", "something else"]);
    // Where no first variables say what it should be.
    fs::remove_file(firmware.folder.path().join("VARS.fd")).expect("the file is there");
    with(&[b'x'; FLASH], "").refused(1, &["--nvram", "something else"]);
    let outcome = firmware.run("soft").args(["--nvram", "file:/nowhere/nvram"]).outcome();
    outcome.refused(1, &["--nvram", "/nowhere/nvram", "does not exist"]);
    let outcome = Tenon::plain_debian().args(["--nvram", "memory:8K"]).outcome();
    outcome.refused(2, &["--nvram", "--firmware"]);
}

#[test]
fn flash_whose_store_fails_tells_the_guest_and_goes_on() {
    let firmware = Firmware::bare(b'E');
    let nvram = firmware.nvram(&fs::read(firmware.folder.path().join("VARS.fd")).expect("a file"));
    let spec = format!("fault:file:{},rules=write:every=1:error=io", nvram.display());
    let before = fs::read(&nvram).expect("the store");
    let outcome = firmware.run("soft").args(["--nvram", &spec]).outcome();
    assert_eq!(outcome.status, 1, "{}", outcome.all());
    assert!(outcome.stdout.contains("FAIL flash: status after programming: got 0x90"), "{}", outcome.all());
    assert!(outcome.stdout.contains("ok PM timer: runs\n"), "{}", outcome.all());
    assert!(outcome.stderr.contains("variables cannot be kept"), "{}", outcome.all());
    assert_eq!(fs::read(nvram).expect("the store"), before);
}

/// A file of OVMF and its disk, if they were made; if not, says that the test is not run.
fn ovmf(file: &str) -> Option<PathBuf> {
    let path = debian("firmware").join(file);
    if path.is_file() {
        return Some(path);
    }
    println!("not run: {} is missing; run `cargo xtask guests --firmware`", path.display());
    None
}

/// OVMF on the software engine, with its variables in this file, and without a disk that it could boot.
fn shell(code: &Path, nvram: &Path) -> Tenon {
    let tenon =
        Tenon::run().args(["--engine", "soft", "--memory", "256M", "--disk", "memory:1M", "--firmware"]);
    kept_in(tenon.arg(code), nvram)
}

/// What comes out without the sequences that move the cursor and change colours. OVMF and GRUB place every character.
fn text(outcome: &Outcome) -> String {
    let mut plain = String::new();
    let mut parts = outcome.stdout.split("\x1b[");
    plain.push_str(parts.next().unwrap_or_default());
    for part in parts {
        let end = part.find(|c: char| c.is_ascii_alphabetic()).map_or(part.len(), |at| at + 1);
        plain.push_str(&part[end..]);
    }
    plain
}

#[test]
fn keys_reach_grub_and_linux_resets_by_efi() {
    let (Some(code), Some(disk)) = (ovmf("OVMF_CODE_4M.fd"), ovmf("boot.img")) else { return };
    // Down, and edit the second entry: at the end of its third line. The first would power off, after a countdown that is longer than this test.
    let outcome = Tenon::run()
        .args(["--engine", "soft", "--memory", "256M", "--firmware"])
        .arg(code)
        .arg("--disk")
        .arg(format!("overlay:file:{}", disk.display()))
        .typing("GNU GRUB", "\x1b[Be")
        .typing("setparams", "\x1b[B\x1b[B\x05 tenon.edited=yes\x18")
        .outcome();
    assert_eq!(outcome.status, 3, "{}", outcome.all());
    assert_eq!(outcome.summary["end"], "reset", "{}", outcome.all());
    let command_line =
        outcome.stdout.lines().find(|line| line.contains("Command line: ")).unwrap_or_default();
    assert!(command_line.ends_with("tenon.do=reboot tenon.edited=yes"), "{}", outcome.all());
    assert!(outcome.stdout.contains("EFI v2.7"), "{}", outcome.all());
    assert!(outcome.stdout.contains("TENON-GUEST-READY"), "{}", outcome.all());
}

#[test]
fn variables_are_kept_over_resets_and_machines() {
    const VARIABLE: &str = "setvar Kept -guid 0e1aef3b-6f5c-4c1c-9d6b-2b1a58a1f0aa";
    let Some(code) = ovmf("OVMF_CODE_4M.fd") else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let nvram = folder.path().join("nvram");
    // Blank: the first content is put there.
    fs::write(&nvram, vec![0; 540_672]).expect("a file");
    let first = shell(&code, &nvram)
        .typing("Shell> ", &format!("{VARIABLE} -nv -bs -rt =4d656e64\r"))
        .typing("Shell> ", "reset -s\r")
        .outcome();
    assert_eq!(first.status, 0, "{}", first.all());
    assert_eq!(first.summary["end"], "power-off", "{}", first.all());
    // With nothing to boot, OVMF says what there is and starts its shell.
    assert!(text(&first).contains("EFI Internal Shell") && text(&first).contains("BLK0:"), "{}", first.all());
    let kept = fs::read(&nvram).expect("the store");
    let name: Vec<u8> = "Kept".encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert!(kept.windows(name.len()).any(|bytes| bytes == name), "the variable is not in the store");
    // The setup is left by its last item.
    let second = shell(&code, &nvram)
        .typing("Shell> ", &format!("{VARIABLE}\r"))
        .typing("Shell> ", "exit\r")
        .typing("Select Entry", "\x1b[A")
        .typing("Reset", "\r")
        .outcome();
    assert_eq!(second.status, 3, "{}", second.all());
    assert!(text(&second).contains("4D 65 6E 64"), "{}", second.all());
    assert!(text(&second).contains("Boot Maintenance Manager"), "{}", second.all());
}

#[test]
fn ovmf_makes_damaged_variables_anew() {
    let (Some(code), Some(first)) = (ovmf("OVMF_CODE_4M.fd"), ovmf("OVMF_VARS_4M.fd")) else { return };
    let folder = tempfile::tempdir().expect("a temporary folder");
    let nvram = folder.path().join("nvram");
    let mut damaged = fs::read(first).expect("the variables");
    let mut noise = 0x2545_f491_4f6c_dd1d_u64;
    // The variables, all of them; OVMF trusts what it keeps behind them for its own writing.
    for byte in &mut damaged[0x64..0x4_0000] {
        noise = noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        *byte = noise.to_le_bytes()[7];
    }
    fs::write(&nvram, &damaged).expect("a file");
    let outcome = shell(&code, &nvram).typing("Shell> ", "reset -s\r").outcome();
    assert_eq!(outcome.status, 0, "{}", outcome.all());
    let mended = fs::read(&nvram).expect("the store");
    assert!(mended[..0x64] == damaged[..0x64] && mended[0x64..0x68] == [0xaa, 0x55, 0x3f, 0], "not mended");
}
