//! A machine for small guests: some RAM, a port that ends the run with a value, and registers that note accesses.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, OnceLock};

use iced_x86::code_asm::CodeAssembler;
use tenon_core::{
    Bus, Claim, Clock, CpuModel, CpuState, CrashReport, DescriptorTable, Engine, Kick, Ram, Region, Segment,
    Space, Stop, Vcpu, Vm, VmSetup,
};
use tenon_kvm::{Kvm, Quality};
use vm_memory::{Bytes, GuestAddress};

/// Where guests' code is.
pub(crate) const CODE: u64 = 0x1_0000;
/// The top of the first vCPU's stack.
pub(crate) const STACK: u64 = 0x8_0000;
/// A write to this port ends the run.
pub(crate) const EXIT_PORT: u16 = 0xf4;
/// Ports that note accesses: 16 of them.
pub(crate) const NOTE_PORT: u16 = 0x600;
/// MMIO that notes accesses: one page.
pub(crate) const NOTE_MMIO: u64 = 0xd000_0000;
/// The interrupt descriptor table of long mode guests.
pub(crate) const IDT: u64 = 0x9000;
const GDT: u64 = 0x500;
/// The page tables: one root, one table of directories, and four directories.
pub(crate) const PAGE_TABLES: u64 = 0x2_0000;

pub(crate) const RAM: u64 = 2 << 20;

/// The engine, or the reason why there is none, said on the test's output.
pub(crate) fn engine() -> Option<Kvm> {
    match Kvm::new() {
        Ok(kvm) => Some(kvm),
        Err(error) => {
            println!("not run: {error}");
            None
        }
    }
}

/// What this host's KVM can do.
pub(crate) fn quality(kvm: &Kvm) -> &'static Quality {
    static QUALITY: OnceLock<Quality> = OnceLock::new();
    QUALITY.get_or_init(|| kvm.measure().unwrap())
}

/// Notes writes (offset, size, value), and answers reads from a list, or with the offset.
#[derive(Default)]
pub(crate) struct Note {
    pub(crate) writes: Mutex<Vec<(u64, u8, u64)>>,
    pub(crate) answers: Mutex<VecDeque<u64>>,
}

impl Note {
    pub(crate) fn taken(&self) -> Vec<(u64, u8, u64)> {
        std::mem::take(&mut *self.writes.lock().unwrap())
    }
}

impl Region for Note {
    fn read(&self, offset: u64, _size: u8) -> u64 {
        self.answers.lock().unwrap().pop_front().unwrap_or(offset)
    }
    fn write(&self, offset: u64, size: u8, value: u64) {
        self.writes.lock().unwrap().push((offset, size, value));
    }
}

/// The setup of a machine without devices.
pub(crate) fn setup(vcpus: u32, clock: Arc<Clock>) -> VmSetup {
    let (pio, mmio) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
    VmSetup { ram: Ram::new(RAM).unwrap(), pio, mmio, clock, vcpus, cpu_model: CpuModel::Baseline }
}

#[derive(Default)]
struct Exit {
    value: Mutex<Option<u64>>,
    kicks: OnceLock<Vec<Arc<dyn Kick>>>,
}

impl Region for Exit {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, value: u64) {
        *self.value.lock().unwrap() = Some(value);
        self.kicks.get().unwrap().iter().for_each(|kick| kick.kick());
    }
}

/// A machine.
pub(crate) struct Guest {
    pub(crate) ram: Arc<Ram>,
    pub(crate) vm: Arc<dyn Vm>,
    pub(crate) vcpus: Vec<Box<dyn Vcpu>>,
    pub(crate) ports: Arc<Note>,
    pub(crate) mmio: Arc<Note>,
    exit: Arc<Exit>,
    _claims: Vec<Claim>,
}

/// How a run ended.
#[derive(Debug)]
pub(crate) enum Ended {
    Exit(u64),
    Crash(Box<CrashReport>),
}

impl Ended {
    pub(crate) fn value(self) -> u64 {
        match self {
            Ended::Exit(value) => value,
            Ended::Crash(report) => panic!("{report}"),
        }
    }

    pub(crate) fn crash(self) -> Box<CrashReport> {
        match self {
            Ended::Exit(value) => panic!("the guest ended with {value:#x}"),
            Ended::Crash(report) => report,
        }
    }
}

impl Guest {
    pub(crate) fn new(kvm: &Kvm, vcpus: u32) -> Self {
        Self::with(kvm, vcpus, CpuModel::Baseline, RAM)
    }

    pub(crate) fn with(kvm: &Kvm, vcpus: u32, cpu_model: CpuModel, memory: u64) -> Self {
        Self::with_ram(kvm, vcpus, cpu_model, Ram::new(memory).unwrap())
    }

    pub(crate) fn with_ram(kvm: &Kvm, vcpus: u32, cpu_model: CpuModel, ram: Arc<Ram>) -> Self {
        let (pio, bus) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
        let (ports, mmio, exit) =
            (Arc::new(Note::default()), Arc::new(Note::default()), Arc::new(Exit::default()));
        let claims = vec![
            pio.claim("exit", EXIT_PORT.into(), 4, exit.clone()).unwrap(),
            pio.claim("note", NOTE_PORT.into(), 16, ports.clone()).unwrap(),
            bus.claim("note", NOTE_MMIO, 4096, mmio.clone()).unwrap(),
        ];
        let setup =
            VmSetup { ram: ram.clone(), pio, mmio: bus, clock: Clock::real().unwrap(), vcpus, cpu_model };
        let vm = kvm.create_vm(setup).unwrap();
        let vcpus: Vec<_> = (0..vcpus).map(|index| vm.create_vcpu(index).unwrap()).collect();
        let kicks = vcpus.iter().map(|vcpu| vcpu.kicker()).collect();
        assert!(exit.kicks.set(kicks).is_ok());
        let guest = Self { ram, vm, vcpus, ports, mmio, exit, _claims: claims };
        guest.tables();
        guest
    }

    /// Descriptors and page tables: the first 4 GiB mapped one to one, for all privilege levels.
    fn tables(&self) {
        const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
        const DATA: u64 = 0x00cf_9300_0000_ffff;
        const CODE_64: u64 = 0x00af_9b00_0000_ffff;
        const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
        const USER_CODE_64: u64 = 0x00af_fb00_0000_ffff;
        for (n, entry) in (0..).zip([0, CODE_32, DATA, CODE_64, USER_DATA, USER_CODE_64]) {
            self.put(GDT + n * 8, &u64::to_le_bytes(entry));
        }
        let present = 7;
        self.put(PAGE_TABLES, &((PAGE_TABLES + 0x1000) | present).to_le_bytes());
        for gib in 0..4 {
            let directory = PAGE_TABLES + 0x2000 + gib * 0x1000;
            self.put(PAGE_TABLES + 0x1000 + gib * 8, &(directory | present).to_le_bytes());
            for n in 0..512 {
                let page = (gib << 30 | n << 21) | 0x80 | present;
                self.put(directory + n * 8, &page.to_le_bytes());
            }
        }
    }

    pub(crate) fn put(&self, at: u64, bytes: &[u8]) {
        self.ram.map().write_slice(bytes, GuestAddress(at)).unwrap();
    }

    pub(crate) fn peek(&self, at: u64) -> u64 {
        self.ram.map().read_obj(GuestAddress(at)).unwrap()
    }

    /// Puts `code` at `at`.
    pub(crate) fn assemble(&self, bits: u32, at: u64, code: impl FnOnce(&mut CodeAssembler)) {
        let mut a = CodeAssembler::new(bits).unwrap();
        code(&mut a);
        self.put(at, &a.assemble(at).unwrap());
    }

    /// An interrupt gate of long mode for `vector`, to `handler`.
    pub(crate) fn gate(&self, vector: u8, handler: u64) {
        let low = (handler & 0xffff) | 0x18 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
        self.put(IDT + u64::from(vector) * 16, &low.to_le_bytes());
        self.put(IDT + u64::from(vector) * 16 + 8, &(handler >> 32).to_le_bytes());
    }

    /// Runs vCPU 0 until the guest writes to the exit port, or cannot go on.
    pub(crate) fn run(&mut self) -> Ended {
        loop {
            match self.vcpus[0].run().unwrap() {
                Stop::Crashed(report) => return Ended::Crash(report),
                Stop::Kicked => {
                    if let Some(value) = self.exit.value.lock().unwrap().take() {
                        return Ended::Exit(value);
                    }
                }
            }
        }
    }

    /// Runs all vCPUs, each on a thread of its own, until one writes to the exit port.
    pub(crate) fn run_all(&mut self) -> u64 {
        std::thread::scope(|scope| {
            for vcpu in &mut self.vcpus {
                scope.spawn(|| {
                    assert!(matches!(vcpu.run().unwrap(), Stop::Kicked));
                });
            }
        });
        self.exit.value.lock().unwrap().take().expect("no vCPU wrote to the exit port")
    }

    /// Starts vCPU 0 in this state, assembles `code` for it at [`CODE`], and runs it to its end.
    pub(crate) fn play(&mut self, mode: Mode, code: impl FnOnce(&mut CodeAssembler)) -> Ended {
        self.load(mode, code);
        self.run()
    }

    /// What [`Guest::play`] does before it runs.
    pub(crate) fn load(&mut self, mode: Mode, code: impl FnOnce(&mut CodeAssembler)) {
        self.assemble(mode.bits(), CODE, code);
        self.vcpus[0].set_state(&mode.state(CODE, STACK)).unwrap();
    }
}

/// The mode in which a guest starts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    Real,
    Protected,
    Long,
    /// Ring 3 of long mode, with IOPL 3.
    User,
}

impl Mode {
    pub(crate) fn bits(self) -> u32 {
        match self {
            Mode::Real => 16,
            Mode::Protected => 32,
            Mode::Long | Mode::User => 64,
        }
    }

    pub(crate) fn state(self, rip: u64, stack: u64) -> CpuState {
        let mut state = CpuState::after_reset();
        state.general[4] = stack;
        state.rip = rip;
        let flat = |selector, rights| Segment { selector, base: 0, limit: 0xffff_ffff, rights };
        match self {
            Mode::Real => {
                let selector = u16::try_from(rip >> 4).unwrap();
                state.segments[1] = Segment { selector, base: rip, limit: 0xffff, rights: 0x9b };
                state.rip = 0;
                state.general[4] = 0x8000;
            }
            Mode::Protected => {
                state.segments = [flat(0x10, 0xc093); 6];
                state.segments[1] = flat(0x8, 0xc09b);
                state.cr0 = 0x11;
            }
            Mode::Long | Mode::User => {
                let (code, data, rights) =
                    if self == Mode::Long { (0x18, 0x10, 0) } else { (0x2b, 0x23, 0x60) };
                state.segments = [flat(data, 0xc093 | rights); 6];
                state.segments[1] = flat(code, 0xa09b | rights);
                state.cr0 = 0x8000_0011;
                state.cr3 = PAGE_TABLES;
                state.cr4 = 0x620;
                state.efer = 0x500;
                if self == Mode::User {
                    state.rflags |= 3 << 12;
                }
            }
        }
        if self != Mode::Real {
            state.gdt = DescriptorTable { base: GDT, limit: 0x2f };
            state.idt = DescriptorTable { base: IDT, limit: 0xfff };
        }
        state
    }
}

/// `out EXIT_PORT, eax`, and then nothing more.
pub(crate) fn exit(a: &mut CodeAssembler) {
    use iced_x86::code_asm::{dx, eax};
    let mut forever = a.create_label();
    a.mov(dx, u32::from(EXIT_PORT)).unwrap();
    a.out(dx, eax).unwrap();
    a.set_label(&mut forever).unwrap();
    a.jmp(forever).unwrap();
}
