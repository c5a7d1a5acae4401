//! The neutral state of a vCPU: the same for every engine, and the form in which it is saved.

use std::fmt;

use serde::{Deserialize, Serialize};

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The visible selector.
    pub selector: u16,
    /// The base address.
    pub base: u64,
    /// The limit in bytes, granularity applied.
    pub limit: u32,
    /// Bits 8 to 23 of a descriptor's second doubleword, shifted down by 8: type and S in bits 0 to 4, DPL in 5 and 6,
    /// P in 7, AVL in 12, L in 13, D/B in 14, G in 15 (bits 8 to 11 are 0). An unusable segment has P clear.
    pub rights: u16,
}

/// A descriptor-table register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// The linear address.
    pub base: u64,
    /// The limit in bytes.
    pub limit: u16,
}

/// What a vCPU does next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Activity {
    /// Runs instructions.
    #[default]
    Running,
    /// Waits for an interrupt after HLT.
    Halted,
    /// Waits for a start-up interrupt (SIPI) after INIT.
    WaitForSipi,
}

/// An event whose delivery through the interrupt descriptor table was begun and must be gone through before the next instruction.
/// Its cause is spent: an interrupt has left the local APIC's request register, a fault's address is in CR2.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// An interrupt from the local APIC, with its vector.
    Interrupt(u8),
    /// An INT instruction, with its vector.
    SoftwareInterrupt(u8),
    /// A non-maskable interrupt.
    Nmi,
    /// An exception, with its vector and, where it has one, its error code.
    Exception(u8, Option<u32>),
}

/// A vCPU's state.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuState {
    /// RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8 to R15: the order of the instruction encoding.
    pub general: [u64; 16],
    /// The instruction pointer.
    pub rip: u64,
    /// The flags.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS: the order of the instruction encoding.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// Local descriptor table register.
    pub ldt: Segment,
    /// Global descriptor table.
    pub gdt: DescriptorTable,
    /// Interrupt descriptor table.
    pub idt: DescriptorTable,
    /// Control registers.
    pub cr0: u64,
    /// Page-fault address.
    pub cr2: u64,
    /// Page-table root.
    pub cr3: u64,
    /// Feature switches.
    pub cr4: u64,
    /// Task priority, 0 to 15.
    pub cr8: u64,
    /// The extended feature enable register (MSR 0xc0000080).
    pub efer: u64,
    /// DR0 to DR3, DR6, DR7.
    pub debug: [u64; 6],
    /// The x87, MMX and SSE registers: the 512-byte image of FXSAVE64.
    pub fxsave: Vec<u8>,
    /// Other model-specific registers, number and value, in ascending order.
    pub msrs: Vec<(u32, u64)>,
    /// The local APIC's registers: 64 doublewords, that at offset 16·n of the register page is at index n. Empty: as after a reset.
    pub lapic: Vec<u32>,
    /// What the vCPU does next.
    pub activity: Activity,
    /// An interrupt shadow (after STI or MOV SS) holds for the next instruction.
    pub interrupt_shadow: bool,
    /// Non-maskable interrupts are blocked until the next IRET.
    pub nmi_masked: bool,
    /// A non-maskable interrupt waits.
    #[serde(default)]
    pub nmi_pending: bool,
    /// What is to be delivered before the next instruction. Engines that stop between an instruction and the delivery of its events have this.
    #[serde(default)]
    pub event: Option<Event>,
    /// The extended control register XCR0; 0 where the CPU model has no XSAVE.
    #[serde(default)]
    pub xcr0: u64,
    /// The registers beyond `fxsave`: the bytes of the standard-format XSAVE image from 512 on, header first. Empty where the CPU model
    /// has no XSAVE, and after a reset.
    #[serde(default)]
    pub extended: Vec<u8>,
}

/// Index of CS in [`CpuState::segments`].
pub(crate) const CS: usize = 1;

impl CpuState {
    /// The state after a hardware reset (Intel SDM vol. 3 §10.1.1): real mode, at the reset vector, nothing mapped.
    #[must_use]
    pub fn after_reset() -> Self {
        let data = Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x93 };
        let mut segments = [data; 6];
        segments[CS] = Segment { selector: 0xf000, base: 0xffff_0000, limit: 0xffff, rights: 0x9b };
        let mut general = [0; 16];
        general[2] = 0x600;
        let mut fxsave = vec![0; 512];
        fxsave[0..2].copy_from_slice(&0x037fu16.to_le_bytes());
        fxsave[24..28].copy_from_slice(&0x1f80u32.to_le_bytes());
        fxsave[28..32].copy_from_slice(&0xffffu32.to_le_bytes());
        Self {
            general,
            rip: 0xfff0,
            rflags: 2,
            segments,
            tr: Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x8b },
            ldt: Segment { selector: 0, base: 0, limit: 0xffff, rights: 0x82 },
            gdt: DescriptorTable { base: 0, limit: 0xffff },
            idt: DescriptorTable { base: 0, limit: 0xffff },
            cr0: 0x6000_0010,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            cr8: 0,
            efer: 0,
            debug: [0, 0, 0, 0, 0xffff_0ff0, 0x400],
            fxsave,
            msrs: Vec::new(),
            lapic: Vec::new(),
            activity: Activity::Running,
            interrupt_shadow: false,
            nmi_masked: false,
            nmi_pending: false,
            event: None,
            xcr0: 0,
            extended: Vec::new(),
        }
    }
}

impl fmt::Display for CpuState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [&str; 16] = [
            "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8 ", "r9 ", "r10", "r11", "r12", "r13",
            "r14", "r15",
        ];
        writeln!(f, "rip {:016x}  rflags {:08x}  {:?}", self.rip, self.rflags, self.activity)?;
        for row in 0..4 {
            for column in 0..4 {
                let n = row * 4 + column;
                write!(f, "{} {:016x}  ", NAMES[n], self.general[n])?;
            }
            writeln!(f)?;
        }
        for (name, s) in ["es", "cs", "ss", "ds", "fs", "gs"].iter().zip(&self.segments) {
            writeln!(
                f,
                "{name} {:04x}  base {:016x}  limit {:08x}  rights {:04x}",
                s.selector, s.base, s.limit, s.rights
            )?;
        }
        writeln!(
            f,
            "gdt {:016x}/{:04x}  idt {:016x}/{:04x}",
            self.gdt.base, self.gdt.limit, self.idt.base, self.idt.limit
        )?;
        write!(
            f,
            "cr0 {:08x}  cr2 {:016x}  cr3 {:x}  cr4 {:x}  efer {:x}",
            self.cr0, self.cr2, self.cr3, self.cr4, self.efer
        )
    }
}
