//! The smallest ring-3 guest: the native test's code and data pages at the same addresses, and exception handlers that stop.
//!
//! Each vector's handler is one OUT to a port whose region kicks the vCPU, so that the state after the exception's delivery
//! tells everything: the handler's address the vector, the kernel stack the frame.

use std::sync::Arc;

use tenon_core::{
    Bus, Claim, Clock, CpuModel, CpuState, DescriptorTable, Engine, Kick, Ram, Region, Segment, Space, Stop,
    Vcpu, Vm, VmSetup,
};

use crate::native::{CODE, CODE_SIZE, CODE32, DATA, DATA_SIZE, End, Machine, USER_DATA, WRITABLE};

const RAM_SIZE: u64 = 64 << 20;
/// The kernel's view of the first 2 MiB.
const HIGH: u64 = 0xffff_8000_0000_0000;
const PML4: u64 = 0x1000;
const CODE_TABLE: u64 = 0x4000;
const GDT: u64 = 0x8000;
const TSS: u64 = 0x8800;
const IDT: u64 = 0x9000;
const STUBS: u64 = 0xa000;
const STACK: u64 = 0xc000;
const DATA_PAGES: u64 = 0x1_0000;
const CODE_PAGES: u64 = 0x20_0000;
/// How many runs one guest serves: each takes a fresh code page, so that no run depends on how code is cached.
const RUNS: u64 = (RAM_SIZE - CODE_PAGES) / 0x1000;
const PORT: u16 = 0xe0;

const PRESENT: u64 = 1;
const WRITE: u64 = 2;
const USER: u64 = 4;
const LARGE: u64 = 1 << 7;
const NO_EXECUTE: u64 = 1 << 63;

struct Kicks(Arc<dyn Kick>);

impl Region for Kicks {
    fn read(&self, _: u64, _: u8) -> u64 {
        0
    }

    fn write(&self, _: u64, _: u8, _: u64) {
        self.0.kick();
    }
}

pub struct Guest {
    vcpu: Box<dyn Vcpu>,
    memory: *mut u8,
    template: CpuState,
    runs: u64,
    _ram: Arc<Ram>,
    _vm: Arc<dyn Vm>,
    _claim: Claim,
}

impl Guest {
    pub fn new(engine: &dyn Engine) -> Self {
        let ram = Ram::new(RAM_SIZE).expect("64 MiB");
        let memory = ram.regions().next().expect("a region").2;
        let pio = Bus::new(Space::Pio);
        let setup = VmSetup {
            ram: ram.clone(),
            pio: pio.clone(),
            mmio: Bus::new(Space::Mmio),
            clock: Clock::real().expect("a clock"),
            vcpus: 1,
            cpu_model: CpuModel::Baseline,
        };
        let vm = engine.create_vm(setup).expect("a VM");
        let mut vcpu = vm.create_vcpu(0).expect("a vCPU");
        let claim = pio.claim("stop", PORT.into(), 1, Arc::new(Kicks(vcpu.kicker()))).expect("a free port");
        let template = template(vcpu.state().expect("a state"));
        let mut guest = Self { vcpu, memory, template, runs: 0, _ram: ram, _vm: vm, _claim: claim };
        guest.lay_out();
        guest
    }

    /// The guest has no fresh code page left; make another.
    pub fn used_up(&self) -> bool {
        self.runs == RUNS
    }

    fn put(&mut self, address: u64, bytes: &[u8]) {
        assert!(address + bytes.len() as u64 <= RAM_SIZE);
        // SAFETY: inside the region, and the vCPU is not running.
        unsafe {
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.add(address as usize), bytes.len())
        }
    }

    fn get<const N: usize>(&self, address: u64) -> [u8; N] {
        assert!(address + N as u64 <= RAM_SIZE);
        // SAFETY: inside the region, and the vCPU is not running.
        unsafe { self.memory.add(address as usize).cast::<[u8; N]>().read() }
    }

    fn put_u64(&mut self, address: u64, value: u64) {
        self.put(address, &value.to_le_bytes());
    }

    fn get_u64(&self, address: u64) -> u64 {
        u64::from_le_bytes(self.get(address))
    }

    fn lay_out(&mut self) {
        let table = PRESENT | WRITE | USER;
        let (low, directory, data_table, high, high_directory) = (0x2000, 0x3000, 0x5000, 0x6000, 0x7000);
        self.put_u64(PML4, low | table);
        self.put_u64(PML4 + 8 * 256, high | table);
        self.put_u64(low, directory | table);
        self.put_u64(high, high_directory | table);
        self.put_u64(high_directory, PRESENT | WRITE | LARGE);
        self.put_u64(directory + 8 * (CODE >> 21), CODE_TABLE | table);
        self.put_u64(directory + 8 * (DATA >> 21), data_table | table);
        for page in 0..DATA_SIZE as u64 / 0x1000 {
            let write = if page * 0x1000 < WRITABLE as u64 { WRITE } else { 0 };
            self.put_u64(
                data_table + 8 * page,
                (DATA_PAGES + page * 0x1000) | PRESENT | USER | NO_EXECUTE | write,
            );
        }
        // The selectors that Linux uses.
        let descriptors: [u64; 7] = [
            0,
            0x00cf_9b00_0000_ffff,
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00cf_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            0x00af_fb00_0000_ffff,
        ];
        for (i, descriptor) in descriptors.into_iter().enumerate() {
            self.put_u64(GDT + 8 * i as u64, descriptor);
        }
        self.put_u64(TSS + 4, HIGH + STACK);
        self.put(TSS + 102, &104_u16.to_le_bytes()); // No I/O permission bitmap.
        for vector in 0..256 {
            let handler = HIGH + STUBS + 4 * vector;
            let level = if vector == 3 || vector == 4 { 3 } else { 0 };
            let gate =
                handler & 0xffff | 0x10 << 16 | (0x8e | level << 5) << 40 | (handler >> 16 & 0xffff) << 48;
            self.put_u64(IDT + 16 * vector, gate);
            self.put_u64(IDT + 16 * vector + 8, handler >> 32);
            self.put(STUBS + 4 * vector, &[0xe6, PORT as u8, 0xeb, 0xfe]);
        }
    }

    /// Runs to the first exception, as the host does; memory afterwards is in `data`.
    pub fn run(
        &mut self,
        machine: &Machine,
        code: &[u8; CODE_SIZE],
        data: &mut [u8; DATA_SIZE],
    ) -> Result<End, String> {
        let page = CODE_PAGES + self.runs * 0x1000;
        self.runs += 1;
        self.put(page, code);
        self.put_u64(CODE_TABLE, page | PRESENT | USER);
        self.put(DATA_PAGES, data);
        let mut state = self.template.clone();
        state.general = machine.gpr;
        state.rip = machine.rip;
        state.rflags = machine.rflags;
        state.fxsave.copy_from_slice(&machine.fp);
        if machine.cs == CODE32 {
            let data = state.segments[2];
            (state.segments[0], state.segments[3]) = (data, data);
            state.segments[1] = Segment { selector: CODE32 as u16, rights: 0xc0fb, ..state.segments[1] };
        }
        self.vcpu.set_state(&state).map_err(|error| error.to_string())?;
        match self.vcpu.run().map_err(|error| error.to_string())? {
            Stop::Kicked => {}
            Stop::Crashed(report) => return Err(report.to_string()),
        }
        let after = self.vcpu.state().map_err(|error| error.to_string())?;
        *data = self.get(DATA_PAGES);
        let vector = after.rip.wrapping_sub(HIGH + STUBS) / 4;
        if vector > 255 {
            return Err(format!("stopped outside the handlers:\n{after}"));
        }
        let has_error = matches!(vector, 8 | 10..=14 | 17 | 21);
        let frame = after.general[4].wrapping_sub(HIGH);
        if frame != STACK - if has_error { 48 } else { 40 } {
            return Err(format!("vector {vector}: the handler's RSP is {:#x}", after.general[4]));
        }
        let error = if has_error { self.get_u64(frame) } else { 0 };
        let frame = frame + if has_error { 8 } else { 0 };
        let (cs, ss) = (self.get_u64(frame + 8), self.get_u64(frame + 32));
        if ss != USER_DATA {
            return Err(format!("vector {vector}: came from CS {cs:#x}, SS {ss:#x}"));
        }
        let mut result = Machine {
            fp: [0; 512],
            gpr: after.general,
            rflags: self.get_u64(frame + 16),
            rip: self.get_u64(frame),
            cs,
        };
        result.gpr[4] = self.get_u64(frame + 24);
        result.fp.copy_from_slice(&after.fxsave);
        Ok(End { machine: result, vector: vector as u8, error, cr2: after.cr2 })
    }
}

/// Ring 3, 64-bit code, as Linux runs it; a run may ask for 32-bit code.
fn template(mut state: CpuState) -> CpuState {
    let null = Segment { selector: 0, base: 0, limit: 0, rights: 0 };
    state.segments = [null; 6];
    state.segments[1] = Segment { selector: 0x33, base: 0, limit: u32::MAX, rights: 0xa0fb };
    state.segments[2] = Segment { selector: 0x2b, base: 0, limit: u32::MAX, rights: 0xc0f3 };
    state.tr = Segment { selector: 0x40, base: HIGH + TSS, limit: 0x67, rights: 0x8b };
    state.ldt = Segment { selector: 0, base: 0, limit: 0, rights: 0 };
    state.gdt = DescriptorTable { base: HIGH + GDT, limit: 0x37 };
    state.idt = DescriptorTable { base: HIGH + IDT, limit: 0xfff };
    state.cr0 = 0x8005_0033;
    state.cr2 = 0;
    state.cr3 = PML4;
    state.cr4 = 0x6a0;
    state.efer = 0xd01;
    state.rflags = 0x202;
    state
}
