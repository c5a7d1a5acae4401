//! A bare machine for small guest programs: RAM, a port that takes notes, one that stops, and every exception a handler that stops.

use std::sync::{Arc, Mutex, OnceLock};

use iced_x86::IcedError;
use iced_x86::code_asm::CodeAssembler;
use tenon_core::{
    Bus, Claim, Clock, CpuModel, CpuState, CrashReport, DescriptorTable, Engine, InterruptController, Kick,
    Msi, Ram, Region, Segment, Space, Stop, Vcpu, Vm, VmSetup,
};
use tenon_soft::Soft;
use vm_memory::{ByteValued, Bytes, GuestAddress};

/// The long-mode page tables: the first 2 MiB in 4 KiB pages for everybody, the rest of the first GiB in large ones for the kernel.
pub const PML4: u64 = 0x1000;
pub const PDPT: u64 = 0x2000;
pub const DIRECTORY: u64 = 0x3000;
pub const TABLE: u64 = 0x4000;
pub const GDT: u64 = 0x800;
pub const TSS: u64 = 0x900;
pub const IDT: u64 = 0xe000;
/// The kernel's stack, that of the TSS for ring 0, and interrupt stack 1. All grow down from here.
pub const STACK: u64 = 0x9000;
pub const RING0_STACK: u64 = 0xa000;
pub const IST1: u64 = 0xb000;
pub const CODE: u64 = 0x1_0000;
/// Handlers of the vectors, 0x100 bytes each.
pub const HANDLERS: u64 = 0x2_0000;
pub const USER_CODE: u64 = 0x4_0000;
pub const USER_STACK: u64 = 0x4_8000;

pub const CODE32: u16 = 0x08;
pub const CODE64: u16 = 0x10;
pub const DATA: u16 = 0x18;
pub const USER_CODE32: u16 = 0x23;
pub const USER_DATA: u16 = 0x2b;
pub const USER_CODE64: u16 = 0x33;
pub const ABSENT: u16 = 0x38;
pub const TSS_SELECTOR: u16 = 0x40;
pub const CODE16: u16 = 0x50;
pub const DATA16: u16 = 0x58;
/// Two free entries.
pub const GATE: u16 = 0x60;

/// Writes go to [`Guest::notes`].
pub const NOTE: i32 = 0xe0;
/// A write stops the vCPU that was made first.
pub const STOP: i32 = 0xe1;
/// A write raises the GSI in bits 0 to 7, with bit 8 clear lowers it.
pub const LINE: i32 = 0xe4;
/// A write sends an MSI with this data to APIC 0.
pub const MSI: i32 = 0xe8;

#[derive(Default)]
struct Ports {
    notes: Mutex<Vec<u64>>,
    kick: OnceLock<Arc<dyn Kick>>,
    controller: OnceLock<Arc<dyn InterruptController>>,
}

impl Region for Ports {
    fn read(&self, offset: u64, _: u8) -> u64 {
        offset + 0x70
    }
    fn write(&self, offset: u64, _: u8, value: u64) {
        match offset {
            0 => self.notes.lock().unwrap().push(value),
            1 => self.kick.get().unwrap().kick(),
            4 => self.controller.get().unwrap().set_line((value & 0xff) as u32, value & 0x100 != 0),
            8 => self.controller.get().unwrap().signal_msi(Msi { address: 0xfee0_0000, data: value as u32 }),
            _ => {}
        }
    }
}

pub struct Guest {
    pub ram: Arc<Ram>,
    pub pio: Arc<Bus>,
    pub mmio: Arc<Bus>,
    pub clock: Arc<Clock>,
    pub vm: Arc<dyn Vm>,
    pub vcpu: Box<dyn Vcpu>,
    ports: Arc<Ports>,
    _claim: Claim,
}

/// What `program` assembles to at `address`.
pub fn assemble(
    bits: u32,
    address: u64,
    program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
) -> Vec<u8> {
    let mut assembler = CodeAssembler::new(bits).unwrap();
    program(&mut assembler).unwrap();
    assembler.assemble(address).unwrap()
}

impl Guest {
    /// A machine whose first vCPU is as after a reset.
    pub fn new(clock: Arc<Clock>, vcpus: u32) -> Self {
        Self::with_ram(Ram::new(8 << 20).unwrap(), clock, vcpus)
    }

    /// The same with this RAM.
    pub fn with_ram(ram: Arc<Ram>, clock: Arc<Clock>, vcpus: u32) -> Self {
        let (pio, mmio) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
        let setup = VmSetup {
            ram: ram.clone(),
            pio: pio.clone(),
            mmio: mmio.clone(),
            clock: clock.clone(),
            vcpus,
            cpu_model: CpuModel::Baseline,
        };
        let vm = Soft::new().create_vm(setup).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        let ports = Arc::new(Ports::default());
        assert!(ports.kick.set(vcpu.kicker()).is_ok() && ports.controller.set(vm.interrupts()).is_ok());
        let claim = pio.claim("test", NOTE as u64, 16, ports.clone()).unwrap();
        let mut guest = Self { ram, pio, mmio, clock, vm, vcpu, ports, _claim: claim };
        guest.lay_out();
        guest
    }

    /// A machine in 64-bit mode, ring 0, about to run [`CODE`].
    pub fn long() -> Self {
        Self::long_with(Clock::real().unwrap(), 1)
    }

    pub fn long_with(clock: Arc<Clock>, vcpus: u32) -> Self {
        let mut guest = Self::new(clock, vcpus);
        guest.change(|state| *state = long_mode(state.clone()));
        guest
    }

    /// A machine in flat 32-bit protected mode without paging, ring 0, about to run [`CODE`], with 32-bit gates.
    pub fn protected() -> Self {
        let mut guest = Self::new(Clock::real().unwrap(), 1);
        for vector in 0..256 {
            let handler = HANDLERS + vector * 0x100;
            let gate = handler & 0xffff | u64::from(CODE32) << 16 | 0x8e << 40 | (handler >> 16) << 48;
            guest.put(IDT + 8 * vector, gate);
        }
        guest.put(GDT + u64::from(TSS_SELECTOR), 0x67 | TSS << 16 | 0x89 << 40);
        guest.put(TSS + 4, RING0_STACK as u32);
        guest.put(TSS + 8, u32::from(DATA));
        guest.change(|state| {
            *state = long_mode(state.clone());
            state.segments[1] = Segment { selector: CODE32, base: 0, limit: u32::MAX, rights: 0xc09b };
            state.segments[2] = Segment { selector: DATA, base: 0, limit: u32::MAX, rights: 0xc093 };
            state.cr0 = 0x11;
            state.cr4 = 0x200;
            state.efer = 0;
        });
        guest
    }

    fn lay_out(&mut self) {
        self.put(PML4, PDPT | 7);
        self.put(PDPT, DIRECTORY | 7);
        self.put(DIRECTORY, TABLE | 7);
        for n in 0..512 {
            self.put(TABLE + 8 * n, n << 12 | 7);
        }
        for n in 1..512u64 {
            self.put(DIRECTORY + 8 * n, n << 21 | 0x83);
        }
        let descriptors: [u64; 12] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_1300_0000_ffff,
            0x0000_8900_0000_0067 | TSS << 16,
            0,
            0x0000_9b00_0000_ffff,
            0x0000_9300_0000_ffff,
        ];
        for (n, descriptor) in (0..).zip(descriptors) {
            self.put(GDT + 8 * n, descriptor);
        }
        self.put(TSS + 4, RING0_STACK);
        self.put(TSS + 0x24, IST1);
        self.put(TSS + 0x66, 0xffffu16);
        for vector in 0..=255 {
            self.gate(vector, 0x8e00);
            let stop = assemble(64, HANDLERS, |a| {
                a.out(STOP, iced_x86::code_asm::al)?;
                a.db(&[0xeb, 0xfe])
            });
            self.load(HANDLERS + 0x100 * u64::from(vector), &stop);
        }
    }

    /// A 64-bit gate to the vector's handler: `flags` are present, privilege and type in the high byte and the interrupt stack in the low.
    pub fn gate(&mut self, vector: u8, flags: u64) {
        let handler = HANDLERS + 0x100 * u64::from(vector);
        let low = handler & 0xffff | u64::from(CODE64) << 16 | flags << 32 | (handler >> 16) << 48;
        self.put(IDT + 16 * u64::from(vector), low);
        self.put(IDT + 16 * u64::from(vector) + 8, 0u64);
    }

    /// Puts a 64-bit handler in the place of the one that stops.
    pub fn handler(&mut self, vector: u8, program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>) {
        let address = HANDLERS + 0x100 * u64::from(vector);
        let code = assemble(64, address, program);
        assert!(code.len() <= 0x100);
        self.load(address, &code);
    }

    /// Puts a program somewhere.
    pub fn program(
        &mut self,
        bits: u32,
        address: u64,
        program: impl FnOnce(&mut CodeAssembler) -> Result<(), IcedError>,
    ) {
        let code = assemble(bits, address, program);
        self.load(address, &code);
    }

    pub fn load(&mut self, address: u64, bytes: &[u8]) {
        self.ram.map().write_slice(bytes, GuestAddress(address)).unwrap();
    }

    pub fn put<T: ByteValued>(&mut self, address: u64, value: T) {
        self.ram.map().write_obj(value, GuestAddress(address)).unwrap();
    }

    pub fn get<T: ByteValued>(&self, address: u64) -> T {
        self.ram.map().read_obj(GuestAddress(address)).unwrap()
    }

    pub fn change(&mut self, change: impl FnOnce(&mut CpuState)) {
        let mut state = self.vcpu.state().unwrap();
        change(&mut state);
        self.vcpu.set_state(&state).unwrap();
    }

    /// Runs until the guest stops itself.
    pub fn run(&mut self) -> CpuState {
        match self.vcpu.run().unwrap() {
            Stop::Kicked => self.vcpu.state().unwrap(),
            Stop::Crashed(report) => panic!("{report}"),
        }
    }

    /// Runs until the guest crashes.
    pub fn crash(&mut self) -> Box<CrashReport> {
        match self.vcpu.run().unwrap() {
            Stop::Kicked => panic!("stopped:\n{}", self.vcpu.state().unwrap()),
            Stop::Crashed(report) => report,
        }
    }

    /// Runs until an exception's handler stops.
    pub fn exception(&mut self) -> Exception {
        let state = self.run();
        let offset = state.rip.wrapping_sub(HANDLERS);
        assert!(offset < 0x1_0000 && offset % 0x100 < 16, "not in a handler:\n{state}");
        let vector = (offset / 0x100) as u8;
        let has_error = matches!(vector, 8 | 10..=14 | 17);
        let width = if state.segments[1].rights & 1 << 13 != 0 { 8 } else { 4 };
        let mut at = state.general[4];
        let mut pop = || {
            at += width;
            if width == 8 { self.get::<u64>(at - 8) } else { self.get::<u32>(at - 4).into() }
        };
        let error = has_error.then(&mut pop);
        let (rip, cs, rflags) = (pop(), pop(), pop());
        let inner = width == 8 || cs & 3 != u64::from(state.segments[1].selector & 3);
        let (rsp, ss) = if inner { (pop(), pop()) } else { (0, 0) };
        Exception { vector, error, rip, cs: cs as u16, rflags, rsp, ss: ss as u16, cr2: state.cr2, state }
    }

    /// What the guest wrote to [`NOTE`], taken.
    pub fn notes(&self) -> Vec<u64> {
        std::mem::take(&mut self.ports.notes.lock().unwrap())
    }
}

/// The frame that an exception pushed.
#[derive(Debug)]
pub struct Exception {
    pub vector: u8,
    pub error: Option<u64>,
    pub rip: u64,
    pub cs: u16,
    pub rflags: u64,
    pub rsp: u64,
    pub ss: u16,
    pub cr2: u64,
    pub state: CpuState,
}

fn long_mode(mut state: CpuState) -> CpuState {
    state.segments = [Segment { selector: DATA, base: 0, limit: u32::MAX, rights: 0xc093 }; 6];
    state.segments[1] = Segment { selector: CODE64, base: 0, limit: u32::MAX, rights: 0xa09b };
    state.tr = Segment { selector: TSS_SELECTOR, base: TSS, limit: 0x67, rights: 0x8b };
    state.ldt = Segment::default();
    state.gdt = DescriptorTable { base: GDT, limit: 0x7f };
    state.idt = DescriptorTable { base: IDT, limit: 0xfff };
    state.cr0 = 0x8001_0011;
    state.cr3 = PML4;
    state.cr4 = 0x6a0;
    state.efer = 0xd01;
    state.general = [0; 16];
    state.general[4] = STACK;
    state.rip = CODE;
    state.rflags = 2;
    state
}
