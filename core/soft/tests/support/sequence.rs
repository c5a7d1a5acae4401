//! One case: a machine state, memory, and one to fourteen instructions.
//!
//! Long, for the cases and how they are compared share the layout of the memory that they use.

use std::collections::BTreeSet;
use std::fmt;

use iced_x86::{
    Code, CodeSize, FlowControl, Instruction, InstructionInfoFactory, Mnemonic, OpKind, Register,
};

use crate::forms::{flags, shifts, undefined_result};
use crate::generate::{Random, aim, instruction};
use crate::native::{CODE, CODE_SIZE, CODE32, DATA, DATA_SIZE, Machine, WRITABLE};

pub struct Case {
    pub machine: Machine,
    pub code: Box<[u8; CODE_SIZE]>,
    pub data: Box<[u8; DATA_SIZE]>,
    pub instructions: Vec<Instruction>,
    /// The flags that nobody defines after each instruction.
    undefined: Vec<u64>,
}

/// Where a memory operand goes: mostly somewhere harmless, sometimes to where it hurts.
fn target(random: &mut Random) -> u64 {
    let end = DATA + DATA_SIZE as u64;
    let near = |random: &mut Random, edge: u64| edge - random.below(20);
    match random.below(50) {
        0..=3 => near(random, DATA + 0x1000 * (1 + random.clone().below(3))),
        4..=6 => near(random, DATA + WRITABLE as u64),
        7..=8 => DATA + WRITABLE as u64 + random.below((DATA_SIZE - WRITABLE) as u64),
        9..=10 => near(random, end),
        11 => end + random.below(0x1000),
        12 => random.below(0x8000),
        13 => {
            random.pick(&[0x7fff_ffff_ffff, 0x8000_0000_0000, 0xffff_7fff_ffff_ffff, 1 << 63])
                - random.below(16)
        }
        14..=31 => (DATA + random.below(WRITABLE as u64 - 0x400)) & !15,
        _ => DATA + random.below(WRITABLE as u64 - 0x400),
    }
}

impl Case {
    /// `first`: forms for the first instruction, `all` for the others; all of `bits`-bit code.
    pub fn new(random: &mut Random, bits: u32, first: &[Code], all: &[Code]) -> Option<Self> {
        let mut machine = Machine::zero();
        for register in &mut machine.gpr {
            *register = random.integer();
        }
        if bits == 32 {
            machine.cs = CODE32;
        }
        for register in [4, 5, 6, 7] {
            if register == 4 || !random.one_in(4) {
                machine.gpr[register] = (DATA + 0x400 + random.below(WRITABLE as u64 - 0x800))
                    & if random.one_in(8) { !0 } else { !7 };
            }
        }
        machine.rflags = 0x202 | random.next() & 0x8d5 | if random.one_in(4) { 0x400 } else { 0 };
        machine.fp = random.fp_image();
        let mut data = Box::new([0; DATA_SIZE]);
        let mut at = 0;
        let step = random.next();
        while at < DATA_SIZE {
            data[at..at + 8].copy_from_slice(&(at as u64).wrapping_mul(step | 1).to_le_bytes());
            at += 8;
        }

        let mut builder = Builder {
            bits,
            machine,
            data,
            pinned: BTreeSet::new(),
            bytes: Vec::new(),
            instructions: Vec::new(),
            undefined: 0,
            undefined_after: Vec::new(),
            start: 0,
        };
        builder.start = random.below(CODE_SIZE as u64 - 15 * 16);
        let last_on_page = random.one_in(64);
        let length = match random.below(16) {
            _ if last_on_page => 1,
            0..=7 => 1,
            8..=13 => 2 + random.below(3),
            _ => 5 + random.below(10),
        };
        // Some attempts fail: what an instruction addresses may be taken by one before it.
        for _ in 0..3 * length {
            let added = builder.instructions.len() as u64;
            if added == length {
                break;
            }
            let code = random.pick(if added == 0 { first } else { all });
            if matches!(builder.add(random, code), Step::Last) {
                break;
            }
        }
        let first = builder.instructions.first()?.mnemonic();
        if matches!(first, Mnemonic::Popf | Mnemonic::Popfd | Mnemonic::Popfq) {
            // Not: single steps, nested tasks, alignment checks.
            builder.clear_bits(builder.machine.gpr[4], 0x4_4100);
        }
        let Builder { mut machine, data, bytes, mut instructions, undefined_after, mut start, .. } = builder;
        if last_on_page
            && !instructions[0].is_ip_rel_memory_operand()
            && instructions[0].flow_control() == FlowControl::Next
        {
            // The end of the page cuts it, or comes right behind it.
            start = CODE_SIZE as u64 - 1 - random.below(bytes.len() as u64);
            instructions.truncate(1);
            instructions[0].set_ip(CODE + start);
        }
        if bits == 32 {
            machine.gpr = machine.gpr.map(|value| value & 0xffff_ffff);
        }
        machine.rip = CODE + start;
        let mut code = Box::new([0xcc; CODE_SIZE]);
        let fits = bytes.len().min(CODE_SIZE - start as usize);
        code[start as usize..start as usize + fits].copy_from_slice(&bytes[..fits]);
        Some(Self { machine, code, data, instructions, undefined: undefined_after })
    }

    /// The flags that nobody defines when the run has ended at `rip` with this vector. (An INT3 may end right before an instruction.)
    pub fn undefined_flags(&self, rip: u64, vector: u8) -> u64 {
        let faulted = self.instructions.iter().position(|instruction| instruction.ip() == rip);
        match faulted.filter(|_| vector != 3) {
            Some(0) => 0,
            Some(n) => self.undefined[n - 1],
            None => *self.undefined.last().expect("an instruction"),
        }
    }

    /// At `rip` is an instruction that the host carries out piece by piece, so that it may report any byte of its area, or what
    /// is wrong with it: AMD's FXSAVE and FXRSTOR touch the last byte first.
    pub fn is_large(&self, rip: u64) -> bool {
        use Mnemonic as M;
        let at = self.instructions.iter().find(|instruction| instruction.ip() == rip);
        at.is_some_and(|at| {
            matches!(at.memory_size().size(), 10 | 14 | 28 | 94 | 108 | 512)
                || matches!(
                    at.mnemonic(),
                    M::Maskmovdqu | M::Bound | M::Pusha | M::Pushad | M::Popa | M::Popad
                )
        })
    }

    pub fn is_maskmovq(&self, rip: u64) -> bool {
        self.instructions
            .iter()
            .any(|instruction| instruction.ip() == rip && instruction.mnemonic() == Mnemonic::Maskmovq)
    }

    /// Offsets into the data of what environment stores write and nobody tracks; only cases of one instruction have such.
    pub fn untracked_bytes(&self) -> std::ops::Range<usize> {
        let first = &self.instructions[0];
        let inside = match first.mnemonic() {
            Mnemonic::Fxsave | Mnemonic::Fxsave64 => 5..32,
            Mnemonic::Fnstenv | Mnemonic::Fnsave if matches!(first.memory_size().size(), 14 | 94) => 6..14,
            Mnemonic::Fnstenv | Mnemonic::Fnsave => 12..28,
            _ => return 0..0,
        };
        let at = address(first, 0, &self.machine.gpr).wrapping_sub(DATA) as usize;
        at.saturating_add(inside.start)..at.saturating_add(inside.end)
    }
}

fn address(instruction: &Instruction, operand: u32, gpr: &[u64; 16]) -> u64 {
    let found = instruction.virtual_address(operand, 0, |register, _, _| {
        if register.is_segment_register() {
            return Some(0);
        }
        let value = gpr[register.full_register().number()];
        Some(match register.size() {
            1 if register >= Register::AH && register <= Register::BH => {
                gpr[register.number() & 3] >> 8 & 0xff
            }
            1 => value & 0xff,
            2 => value & 0xffff,
            4 => value & 0xffff_ffff,
            _ => value,
        })
    });
    let found = found.unwrap_or(0);
    if instruction.code_size() == CodeSize::Code64 { found } else { found & 0xffff_ffff }
}

/// What became of an instruction that was to be added.
enum Step {
    Added,
    /// Added, and nothing can follow it.
    Last,
    /// It does not go with those before it.
    Unsuitable,
}

struct Builder {
    bits: u32,
    machine: Machine,
    data: Box<[u8; DATA_SIZE]>,
    /// Registers that earlier instructions have read or written: their first values are taken.
    pinned: BTreeSet<Register>,
    bytes: Vec<u8>,
    instructions: Vec<Instruction>,
    undefined: u64,
    undefined_after: Vec<u64>,
    start: u64,
}

impl Builder {
    fn target(&self, random: &mut Random) -> u64 {
        target(random) & if self.bits == 32 { 0xffff_ffff } else { u64::MAX }
    }

    /// Adds an instruction of this form.
    fn add(&mut self, random: &mut Random, code: Code) -> Step {
        use Mnemonic as M;
        let alone = self.instructions.is_empty();
        let ip = CODE + self.start + self.bytes.len() as u64;
        let Some((bytes, instruction)) = instruction(random, code, ip, self.bits) else {
            return Step::Unsuitable;
        };
        let mnemonic = instruction.mnemonic();
        if !alone
            && matches!(
                mnemonic,
                M::Popf
                    | M::Popfd
                    | M::Popfq
                    | M::Fxrstor
                    | M::Fxrstor64
                    | M::Fxsave
                    | M::Fxsave64
                    | M::Fnsave
                    | M::Fnstenv
                    | M::Ldmxcsr
            )
        {
            return Step::Unsuitable;
        }
        let repeated = instruction.has_rep_prefix() || instruction.has_repne_prefix();
        if repeated && matches!(mnemonic, M::Loop | M::Loope | M::Loopne) {
            // AMD takes the prefix for another condition.
            return Step::Unsuitable;
        }
        if mnemonic == M::Pause && bytes[bytes.len() - 2] & 0xf1 == 0x41 {
            return Step::Unsuitable; // With REX.B an XCHG on AMD.
        }
        if flags(instruction.rflags_read()) & self.undefined != 0 || undefined_result(&instruction) {
            return Step::Unsuitable;
        }
        // Aim what it addresses, if the registers are still free.
        let mut factory = InstructionInfoFactory::new();
        let info = factory.info(&instruction);
        let used: BTreeSet<Register> = info
            .used_registers()
            .iter()
            .map(|used| used.register().full_register())
            .filter(|register| register.is_gpr())
            .collect();
        let memory = (0..instruction.op_count()).find(|&n| instruction.op_kind(n) == OpKind::Memory);
        if memory.is_some() {
            let addressing =
                [instruction.memory_base().full_register(), instruction.memory_index().full_register()];
            if addressing.iter().any(|register| self.pinned.contains(register)) {
                return Step::Unsuitable;
            }
            let shift = matches!(mnemonic, M::Bt | M::Bts | M::Btr | M::Btc)
                && instruction.op1_kind() == OpKind::Register;
            if shift && !random.one_in(4) {
                let register = instruction.op1_register().full_register();
                if !self.pinned.contains(&register) && !addressing.contains(&register) {
                    self.machine.gpr[register.number()] = random.below(4096).wrapping_sub(1024);
                }
            }
            let mut to = self.target(random);
            if matches!(mnemonic, M::Fxsave | M::Fxsave64 | M::Fxrstor | M::Fxrstor64) && !random.one_in(4) {
                to &= !15;
            }
            aim(&instruction, &mut self.machine.gpr, to);
        }
        if instruction.is_string_instruction() {
            if !self.pinned.contains(&Register::RCX) {
                self.machine.gpr[1] = if random.one_in(16) { random.below(0x6000) } else { random.below(40) };
            }
            let short = [instruction.op0_kind(), instruction.op1_kind()].contains(&OpKind::MemorySegSI);
            if short && instruction.op_count() == 2 && instruction.op0_kind() != OpKind::Register {
                return Step::Unsuitable; // Both are where nothing is mapped.
            }
            let both = used.contains(&Register::RSI) && used.contains(&Register::RDI);
            if both && (self.pinned.contains(&Register::RSI) || self.pinned.contains(&Register::RDI)) {
                return Step::Unsuitable;
            }
            // One of them is harmless: which of two faults comes first is the model's own.
            let harmful = random.pick(&[6, 7]);
            for (register, number) in [(Register::RSI, 6), (Register::RDI, 7)] {
                if used.contains(&register) && !self.pinned.contains(&register) {
                    let benign = DATA + 0x400 + random.below(WRITABLE as u64 - 0x800);
                    self.machine.gpr[number] =
                        if both && number != harmful { benign } else { self.target(random) };
                }
            }
        }
        match mnemonic {
            M::Shld | M::Shrd
                if instruction.op1_register().size() == 2 && instruction.op2_kind() == OpKind::Register =>
            {
                if self.pinned.contains(&Register::RCX) || used_as_address(&instruction, Register::RCX) {
                    return Step::Unsuitable;
                }
                self.machine.gpr[1] = self.machine.gpr[1] & !0x1f | random.below(17);
            }
            M::Div | M::Idiv if alone && random.one_in(2) => {
                self.machine.gpr[2] = random.pick(&[0, 0, 0, 1, u64::MAX])
            }
            M::Xlatb if alone => self.machine.gpr[3] = self.target(random),
            M::Maskmovq | M::Maskmovdqu if alone => self.machine.gpr[7] = self.target(random),
            M::Cmpxchg8b if alone && random.one_in(2) => self.agree_with_memory(&instruction, memory),
            M::Cmpxchg if alone && random.one_in(2) => self.agree_with_memory(&instruction, memory),
            M::Leave if alone => self.machine.gpr[5] = self.target(random),
            M::Push | M::Pop | M::Call | M::Ret | M::Enter | M::Pushf | M::Pushfq
                if alone && random.one_in(8) =>
            {
                self.machine.gpr[4] = self.target(random);
            }
            _ => {}
        }
        if instruction.flow_control() != FlowControl::Next
            && !self.aim_branch(random, &instruction, bytes.len() as u64)
        {
            return Step::Unsuitable;
        }
        self.prepare_memory(random, &instruction, memory);
        let written =
            flags(instruction.rflags_written() | instruction.rflags_cleared() | instruction.rflags_set());
        let conditional = instruction.has_rep_prefix() || instruction.has_repne_prefix() || shifts(mnemonic);
        if !conditional {
            self.undefined &= !written;
        }
        self.undefined |= flags(instruction.rflags_undefined());
        if matches!(mnemonic, M::Rcl | M::Rcr)
            && !(instruction.op1_kind() == OpKind::Immediate8 && instruction.immediate8() == 1)
        {
            self.undefined |= 0x800; // OF, also where the count is a multiple of the operand's width and one.
        }
        self.undefined_after.push(self.undefined);
        self.pinned.extend(used);
        self.bytes.extend(bytes);
        self.instructions.push(instruction);
        // What environment stores leave undefined must not be read.
        let environment = matches!(mnemonic, M::Fxsave | M::Fxsave64 | M::Fnsave | M::Fnstenv);
        if instruction.flow_control() == FlowControl::Next && !environment { Step::Added } else { Step::Last }
    }

    /// CMPXCHG: makes the comparison succeed.
    fn agree_with_memory(&mut self, instruction: &Instruction, memory: Option<u32>) {
        let Some(operand) = memory else { return };
        let at = address(instruction, operand, &self.machine.gpr).wrapping_sub(DATA);
        if at < (DATA_SIZE - 16) as u64 {
            let at = at as usize;
            let word = |at: usize| u64::from_le_bytes(self.data[at..at + 8].try_into().expect("8 bytes"));
            let value = word(at);
            if instruction.mnemonic() == Mnemonic::Cmpxchg8b {
                self.machine.gpr[0] = value & 0xffff_ffff;
                self.machine.gpr[2] = value >> 32;
            } else {
                self.machine.gpr[0] = value;
            }
        }
    }

    /// Branches must not come back to the sequence: they could loop for ever. Anywhere else INT3, or nothing, awaits them.
    fn aim_branch(&mut self, random: &mut Random, instruction: &Instruction, length: u64) -> bool {
        let end = instruction.ip() + length;
        let sequence = CODE + self.start..end;
        match instruction.flow_control() {
            FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
                if matches!(
                    instruction.op0_kind(),
                    OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64
                ) =>
            {
                !sequence.contains(&instruction.near_branch_target())
            }
            FlowControl::IndirectBranch | FlowControl::IndirectCall | FlowControl::Return => {
                // Not a bad stack and a bad target at once: which comes first is the model's own.
                let good_stack = self.machine.gpr[4].wrapping_sub(DATA) < WRITABLE as u64 - 16
                    && instruction.op0_register().full_register() != Register::RSP;
                let to = if good_stack && random.one_in(8) {
                    random.next()
                } else {
                    CODE + (self.start + 100 + random.below(3000)) % CODE_SIZE as u64
                };
                if sequence.contains(&to) {
                    return false;
                }
                if instruction.op0_kind() == OpKind::Register
                    && instruction.flow_control() != FlowControl::Return
                {
                    let register = instruction.op0_register().full_register();
                    let free = !self.pinned.contains(&register);
                    if free {
                        self.machine.gpr[register.number()] = to;
                    }
                    return free;
                }
                let from = match instruction.flow_control() {
                    FlowControl::Return => self.machine.gpr[4],
                    _ => address(instruction, 0, &self.machine.gpr),
                };
                self.put(from, to);
                true
            }
            _ => true,
        }
    }

    fn put(&mut self, address: u64, value: u64) {
        let at = address.wrapping_sub(DATA);
        if at <= (DATA_SIZE - 8) as u64 {
            self.data[at as usize..at as usize + 8].copy_from_slice(&value.to_le_bytes());
        }
    }

    fn clear_bits(&mut self, address: u64, bits: u32) {
        let at = address.wrapping_sub(DATA);
        if at <= (DATA_SIZE - 4) as u64 {
            for (byte, mask) in self.data[at as usize..at as usize + 4].iter_mut().zip(bits.to_le_bytes()) {
                *byte &= !mask;
            }
        }
    }

    /// Gives the memory operand a value of its kind.
    fn prepare_memory(&mut self, random: &mut Random, instruction: &Instruction, memory: Option<u32>) {
        let Some(operand) = memory else { return };
        let at = address(instruction, operand, &self.machine.gpr).wrapping_sub(DATA);
        let size = instruction.memory_size().size();
        if at >= DATA_SIZE as u64
            || at as usize + size.max(16) > DATA_SIZE
            || instruction.flow_control() != FlowControl::Next
        {
            return;
        }
        let at = at as usize;
        match instruction.mnemonic() {
            Mnemonic::Fxrstor | Mnemonic::Fxrstor64 => {
                let image = random.fp_image();
                self.data[at..at + 512].copy_from_slice(&image);
                return;
            }
            Mnemonic::Ldmxcsr => {
                let value = if random.one_in(4) {
                    random.next() as u32 & !0x2_0000
                } else {
                    random.next() as u32 & 0xffff
                };
                self.data[at..at + 4].copy_from_slice(&value.to_le_bytes());
                return;
            }
            _ => {}
        }
        let value = match size {
            10 => random.float80(),
            8 if random.one_in(2) => random.float(11, 52).into(),
            4 if random.one_in(2) => random.float(8, 23).into(),
            16 => random.vector(),
            _ => random.integer().into(),
        };
        let n = size.min(16);
        self.data[at..at + n].copy_from_slice(&value.to_le_bytes()[..n]);
    }
}

fn used_as_address(instruction: &Instruction, register: Register) -> bool {
    [instruction.memory_base(), instruction.memory_index()]
        .iter()
        .any(|used| used.full_register() == register)
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = (self.machine.rip - CODE) as usize;
        let length: usize = self.instructions.iter().map(Instruction::len).sum();
        for instruction in &self.instructions {
            writeln!(f, "    {instruction}")?;
        }
        writeln!(
            f,
            "    bytes at {:#x}: {:02x?}",
            self.machine.rip,
            &self.code[at..(at + length).min(CODE_SIZE)]
        )?;
        for (n, value) in self.machine.gpr.iter().enumerate() {
            write!(f, "    {:?} {value:#x}", Register::RAX + n as u32)?;
        }
        writeln!(f, "    rflags {:#x} cs {:#x}", self.machine.rflags, self.machine.cs)?;
        if let Some(operand) =
            (0..self.instructions[0].op_count()).find(|&n| self.instructions[0].op_kind(n) == OpKind::Memory)
        {
            let address = address(&self.instructions[0], operand, &self.machine.gpr);
            let at = address.wrapping_sub(DATA) as usize;
            if at <= DATA_SIZE - 16 {
                writeln!(f, "    memory at {address:#x}: {:02x?}", &self.data[at..at + 16])?;
            }
        }
        Ok(())
    }
}
