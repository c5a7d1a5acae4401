//! Bring-up: boots a Linux kernel by its PVH entry with a minimal serial port. Usage: boot VMLINUX INITRD [vcpus] [cmdline] [icount]
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    clippy::cast_possible_wrap,
    missing_docs
)]

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use tenon_core::*;
use vm_memory::{Bytes, GuestAddress};

#[derive(Default)]
struct Uart(Mutex<Regs>, OnceLock<Arc<dyn InterruptController>>, AtomicBool);
#[derive(Default)]
struct Regs {
    ier: u8,
    lcr: u8,
    mcr: u8,
    scr: u8,
    thri: bool,
    line: Vec<u8>,
}

impl Uart {
    fn irq(&self, high: bool) {
        if let Some(c) = self.1.get() {
            c.set_line(4, high);
        }
    }
}

impl Region for Uart {
    fn read(&self, offset: u64, _: u8) -> u64 {
        let mut r = self.0.lock().unwrap();
        let dlab = r.lcr & 0x80 != 0;
        u64::from(match offset {
            0 | 1 if dlab => 1,
            1 => r.ier,
            2 => {
                if r.thri && r.ier & 2 != 0 {
                    r.thri = false;
                    drop(r);
                    self.irq(false);
                    2
                } else {
                    1
                }
            }
            3 => r.lcr,
            4 => r.mcr,
            5 => 0x60,
            6 => {
                if r.mcr & 0x10 != 0 {
                    (r.mcr & 0x0c) << 4 | (r.mcr & 2) << 3 | (r.mcr & 1) << 5
                } else {
                    0xb0
                }
            }
            7 => r.scr,
            _ => 0,
        })
    }
    fn write(&self, offset: u64, _: u8, value: u64) {
        let v = value as u8;
        let mut r = self.0.lock().unwrap();
        let dlab = r.lcr & 0x80 != 0;
        match offset {
            0 | 1 if dlab => {}
            0 => {
                r.line.push(v);
                let _ = std::io::stdout().write_all(&[v]);
                let _ = std::io::stdout().flush();
                if v == b'\n' {
                    if r.line.windows(17).any(|w| w == b"TENON-GUEST-READY") {
                        self.2.store(true, Ordering::SeqCst);
                    }
                    r.line.clear();
                }
                r.thri = true;
                let on = r.ier & 2 != 0;
                drop(r);
                if on {
                    self.irq(true);
                }
            }
            1 => {
                let rise = v & 2 != 0 && r.ier & 2 == 0;
                r.ier = v & 0xf;
                if rise {
                    r.thri = true;
                    drop(r);
                    self.irq(true);
                } else if v & 2 == 0 {
                    drop(r);
                    self.irq(false);
                }
            }
            3 => r.lcr = v,
            4 => r.mcr = v,
            7 => r.scr = v,
            _ => {}
        }
    }
}

struct Power(Mutex<Vec<Arc<dyn Kick>>>, AtomicBool);
impl Region for Power {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }
    fn write(&self, offset: u64, _: u8, value: u64) {
        if offset == 0 && value & 0x20 != 0 || offset == 2 {
            self.1.store(true, Ordering::SeqCst);
            for k in self.0.lock().unwrap().iter() {
                k.kick();
            }
        }
    }
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let vcpus: u32 = args.get(3).map_or(1, |a| a.parse().unwrap());
    let extra = args.get(4).cloned().unwrap_or_default();
    let icount = args.get(5).is_some_and(|a| a == "icount");
    let ram = Ram::new(1 << 30).unwrap();
    let kernel = std::fs::read(&args[1]).unwrap();
    let q = |at: usize| u64::from_le_bytes(kernel[at..at + 8].try_into().unwrap());
    let d = |at: usize| u32::from_le_bytes(kernel[at..at + 4].try_into().unwrap());
    let w = |at: usize| u16::from_le_bytes(kernel[at..at + 2].try_into().unwrap());
    let mut entry = 0;
    for n in 0..usize::from(w(56)) {
        let p = q(32) as usize + n * 56;
        let (offset, paddr, size) = (q(p + 8) as usize, q(p + 24), q(p + 32) as usize);
        match d(p) {
            1 => ram.map().write_slice(&kernel[offset..offset + size], GuestAddress(paddr)).unwrap(),
            4 => {
                let mut at = offset;
                while at < offset + size {
                    let (namesz, descsz, kind) = (d(at) as usize, d(at + 4) as usize, d(at + 8));
                    let desc = at + 12 + namesz.next_multiple_of(4);
                    if kind == 18 && &kernel[at + 12..at + 15] == b"Xen" {
                        entry = d(desc).into();
                    }
                    at = desc + descsz.next_multiple_of(4);
                }
            }
            _ => {}
        }
    }
    let initrd = std::fs::read(&args[2]).unwrap();
    let initrd_at = (1u64 << 30) - (initrd.len() as u64).next_multiple_of(4096) - 4096;
    ram.map().write_slice(&initrd, GuestAddress(initrd_at)).unwrap();
    let cmdline = format!(
        "console=ttyS0 earlyprintk=serial reboot=t panic=-1 cryptomgr.notests mitigations=off tsc=reliable {extra}\0"
    );
    ram.map().write_slice(cmdline.as_bytes(), GuestAddress(0x8000)).unwrap();
    let rsdp = tenon_platform::write_tables(
        &ram,
        &tenon_platform::Platform {
            vcpus: vcpus as u8,
            devices: vec![tenon_platform::AcpiNode {
                hid: "PNP0501".into(),
                uid: 0,
                resources: vec![
                    tenon_platform::Resource::Ports { base: 0x3f8, size: 8 },
                    tenon_platform::Resource::Line { gsi: 4, edge: true },
                ],
            }],
        },
    )
    .unwrap();
    let map = tenon_platform::memory_map(&ram);
    let mut info = Vec::new();
    info.extend(0x336e_c578u32.to_le_bytes());
    info.extend(1u32.to_le_bytes());
    info.extend(0u32.to_le_bytes());
    info.extend(1u32.to_le_bytes());
    info.extend(0x7100u64.to_le_bytes());
    info.extend(0x8000u64.to_le_bytes());
    info.extend(rsdp.to_le_bytes());
    info.extend(0x7200u64.to_le_bytes());
    info.extend((map.len() as u32).to_le_bytes());
    info.extend(0u32.to_le_bytes());
    ram.map().write_slice(&info, GuestAddress(0x7000)).unwrap();
    let mut module = Vec::new();
    for v in [initrd_at, initrd.len() as u64, 0, 0] {
        module.extend(v.to_le_bytes());
    }
    ram.map().write_slice(&module, GuestAddress(0x7100)).unwrap();
    let mut table = Vec::new();
    for r in &map {
        table.extend(r.start.to_le_bytes());
        table.extend(r.size.to_le_bytes());
        table.extend(
            match r.kind {
                tenon_platform::MemoryKind::Ram => 1u32,
                tenon_platform::MemoryKind::Reserved => 2,
                tenon_platform::MemoryKind::Acpi => 3,
            }
            .to_le_bytes(),
        );
        table.extend(0u32.to_le_bytes());
    }
    ram.map().write_slice(&table, GuestAddress(0x7200)).unwrap();

    let clock = if icount { Clock::virtual_time() } else { Clock::real().unwrap() };
    let pio = Bus::new(Space::Pio);
    let mmio = Bus::new(Space::Mmio);
    let vm = tenon_soft::Soft::new()
        .create_vm(VmSetup {
            ram: ram.clone(),
            pio: pio.clone(),
            mmio,
            clock,
            vcpus,
            cpu_model: CpuModel::Baseline,
        })
        .unwrap();
    let uart = Arc::new(Uart::default());
    let _ = uart.1.set(vm.interrupts());
    let _c1 = pio.claim("serial", 0x3f8, 8, uart.clone()).unwrap();
    let power = Arc::new(Power(Mutex::default(), AtomicBool::new(false)));
    let _c2 = pio.claim("power", 0x600, 4, power.clone()).unwrap();
    let started = std::time::Instant::now();
    let total = Arc::new(AtomicU64::new(0));
    let threads: Vec<_> = (0..vcpus)
        .map(|index| {
            let mut vcpu = vm.create_vcpu(index).unwrap();
            power.0.lock().unwrap().push(vcpu.kicker());
            if index == 0 {
                let mut s = CpuState::after_reset();
                let data = Segment { selector: 0x10, base: 0, limit: u32::MAX, rights: 0xc093 };
                s.segments = [data; 6];
                s.segments[1] = Segment { selector: 8, base: 0, limit: u32::MAX, rights: 0xc09b };
                s.cr0 = 0x11;
                s.rip = entry;
                s.general = [0; 16];
                s.general[3] = 0x7000;
                vcpu.set_state(&s).unwrap();
            }
            let (power, total, uart) = (power.clone(), total.clone(), uart.clone());
            std::thread::spawn(move || {
                loop {
                    let stop = vcpu.run().unwrap();
                    if let Stop::Crashed(report) = &stop {
                        eprintln!("vcpu {index}: {report}");
                        std::process::exit(1);
                    }
                    if power.1.load(Ordering::SeqCst) {
                        break;
                    }
                }
                let _ = &uart;
                total.fetch_add(vcpu.instructions().unwrap(), Ordering::SeqCst);
            })
        })
        .collect();
    for t in threads {
        t.join().unwrap();
    }
    let elapsed = started.elapsed().as_secs_f64();
    let n = total.load(Ordering::SeqCst);
    eprintln!("{n} instructions in {elapsed:.2} s: {:.1} MIPS", n as f64 / elapsed / 1e6);
}
