//! The dispatch loop: runs blocks, and between them attends to events, interrupts, halts, faults and time.

#![allow(unsafe_code, reason = "blocks are reached by raw pointers into the arena")]

use std::sync::atomic::Ordering;

use tenon_core::{Activity, CpuState, CrashReport, Event, Stop};

use crate::block::{Block, BlockCache};
use crate::control;
use crate::cpu::{CS, Cpu, DS, ES, Fault, RIP, SS, efer, fl, mode};
use crate::exception;
use crate::flags::Lazy;
use crate::ops::BURST;
use crate::tlb::Tlb;
use crate::turns::SLICE;
use crate::vm::{EV_INBOX, EV_KICK, Notice, VmShared};

/// Why a block's last handler gave no next block: the block at RIP is to be looked up.
pub(crate) const LOOK_UP: u8 = 0;
/// [`Cpu::fault`] is to be delivered.
pub(crate) const FAULT: u8 = 1;
/// State changed: attend before going on.
pub(crate) const ATTEND: u8 = 2;
/// As [`ATTEND`], and other vCPUs deserve the host's CPU more (PAUSE).
pub(crate) const YIELD: u8 = 3;
/// As [`ATTEND`], and the instruction has seen to TF itself: INT, SYSCALL and SYSRET, whose single-step trap depends on the new flags.
pub(crate) const ENTERED: u8 = 4;

impl Cpu {
    pub(crate) fn new(vm: std::sync::Arc<VmShared>, index: u32) -> Box<Self> {
        let mut cpu = Box::new(Self {
            gpr: [0; 18],
            lazy: Lazy::explicit(0),
            tlb: std::ptr::null_mut(),
            block: std::ptr::null_mut(),
            rflags: 2,
            icount: 0,
            limit: u64::MAX,
            burst: 0,
            exit: LOOK_UP,
            fault: Fault::UD,
            start_rip: 0,
            decode_base: 0,
            seg: Default::default(),
            tr: Default::default(),
            ldt: Default::default(),
            gdt: Default::default(),
            idt: Default::default(),
            cr0: 0,
            cr2: 0,
            cr3: 0,
            cr4: 0,
            efer: 0,
            debug: [0; 6],
            cpl: 0,
            mode: 0,
            shadow: false,
            nmi_masked: false,
            activity: Activity::Running,
            recheck: false,
            fx: tenon_soft_fp::FpState::power_on(),
            operands: tenon_soft_fp::Operands::default(),
            msrs: control::Msrs::default(),
            blocks: BlockCache::new(vm.vcpus.len()),
            index,
            lapic: vm.chip.apic(index).clone(),
            shared: vm.vcpus[index as usize].clone(),
            vm,
            tlbs: [Tlb::new(), Tlb::new()],
            unsettled: None,
            synced: 0,
        });
        cpu.update_mode();
        cpu
    }

    /// The next instruction's address.
    pub(crate) fn rip(&self) -> u64 {
        self.gpr[RIP]
    }

    /// Jumps. In code that is not 64-bit the caller has cut the address.
    pub(crate) fn set_rip(&mut self, rip: u64) {
        self.gpr[RIP] = rip;
    }

    /// A branch of flat 32-bit code may have left a carry past 4 GiB in RIP. It is never one to a block that is linked, for these are in the same page.
    #[inline]
    fn cut_rip(&mut self) {
        if self.mode & mode::FLAT != 0 {
            self.gpr[RIP] &= 0xffff_ffff;
        }
    }

    /// Whether CS, DS, ES and SS are segments of 4 GiB from 0 on, and data may be written.
    fn has_flat_segments(&self) -> bool {
        /// Present, no system segment; of data segments also the type: writable, growing up.
        const CODE: u16 = 0x98;
        const DATA: (u16, u16) = (0x9e, 0x92);
        let whole = |segment: &tenon_core::Segment| segment.base == 0 && segment.limit == u32::MAX;
        let data = |n: usize| whole(&self.seg[n]) && self.seg[n].rights & DATA.0 == DATA.1;
        data(SS) && data(DS) && data(ES) && whole(&self.seg[CS]) && self.seg[CS].rights & CODE == CODE
    }

    /// Works out [`Cpu::mode`] and the TLB in use after a change of control registers, a segment register but FS and GS, privilege or the TF and VM flags.
    pub(crate) fn update_mode(&mut self) {
        let code = if self.efer & efer::LMA != 0 && self.seg[1].rights & 1 << 13 != 0 {
            mode::CODE64
        } else if self.seg[1].rights & 1 << 14 != 0 && self.rflags & fl::VM == 0 {
            mode::CODE32
        } else {
            mode::CODE16
        };
        let stack = if self.seg[2].rights & 1 << 14 != 0 { mode::STACK32 } else { 0 };
        let protected = self.cr0 & crate::cpu::cr0::PE != 0;
        let flat = protected && code == mode::CODE32 && stack != 0 && self.has_flat_segments();
        self.mode = code | if code == mode::CODE64 { 0 } else { stack } | if flat { mode::FLAT } else { 0 };
        let user = self.cpl == 3;
        self.tlb = &raw mut *self.tlbs[usize::from(user)];
        let bits = self.mode | u32::from(user) << 4;
        self.blocks.set_mode(bits.to_le_bytes()[0]);
        self.recheck = true;
    }

    /// Runs until there is a reason to stop.
    pub(crate) fn run(&mut self) -> Stop {
        let shared = self.vm.clone();
        let Some(turns) = &shared.turns else {
            loop {
                if let Some(stop) = self.attend(true) {
                    return stop;
                }
                if let Err(fault) = self.run_blocks() {
                    return self.crash(fault);
                }
            }
        };
        let index = self.index as usize;
        turns.begin(index);
        self.synced = self.icount;
        let mut end = self.icount + SLICE;
        let stop = loop {
            if let Some(stop) = self.attend(false) {
                break stop;
            }
            if self.activity != Activity::Running {
                // Nobody else may be running either: then time goes straight to the next deadline.
                if turns.alone(index) && shared.clock.next_deadline() != u64::MAX {
                    shared.clock.advance_to(shared.clock.next_deadline());
                    continue;
                }
                turns.pass(index, true);
                self.shared.sleep();
                turns.enter(index);
                self.synced = self.icount;
                end = self.icount + SLICE;
                continue;
            }
            if self.icount >= end {
                turns.pass(index, false);
                turns.enter(index);
                self.synced = self.icount;
                end = self.icount + SLICE;
                continue;
            }
            let until_deadline = shared.clock.next_deadline().saturating_sub(shared.clock.now()).max(1);
            self.limit = end.min(self.icount.saturating_add(until_deadline));
            let result = self.run_blocks();
            self.sync_clock();
            if let Err(fault) = result {
                break self.crash(fault);
            }
        };
        turns.end(index);
        stop
    }

    /// The machine's time in nanoseconds, exact at the instruction that asks.
    pub(crate) fn now(&self) -> u64 {
        let now = self.vm.clock.now();
        if self.vm.turns.is_some() { now + (self.icount - self.synced) } else { now }
    }

    /// Moves a virtual clock to where the instruction count is.
    pub(crate) fn sync_clock(&mut self) {
        if self.vm.turns.is_some() {
            let passed = self.icount - self.synced;
            self.synced = self.icount;
            if passed != 0 {
                let vm = self.vm.clone();
                vm.clock.advance_to(vm.clock.now() + passed);
            }
        }
    }

    /// Sees to events, halts and interrupts, until the next instruction may run. With `sleep` a halted vCPU waits here.
    fn attend(&mut self, sleep: bool) -> Option<Stop> {
        loop {
            let event = self.shared.event.swap(0, Ordering::SeqCst);
            if event & EV_INBOX != 0 {
                self.read_notices();
            }
            if event & EV_KICK != 0 {
                return Some(Stop::Kicked);
            }
            self.recheck = false;
            if self.lapic.pending() != 0
                && let Err(fault) = exception::service(self)
            {
                return Some(self.crash(fault));
            }
            if self.activity == Activity::Running {
                return None;
            }
            if self.lapic.pending() != 0 && exception::wakes(self) {
                continue;
            }
            if !sleep {
                // Its own event word may have been set meanwhile.
                if self.shared.event.load(Ordering::SeqCst) != 0 {
                    continue;
                }
                return None;
            }
            self.shared.sleep();
        }
    }

    fn read_notices(&mut self) {
        for notice in self.shared.take_notices() {
            match notice {
                Notice::CodeDecoded(index) => {
                    if self.drop_write_tags(index) {
                        // It may have been written after the other vCPU read it.
                        self.forget_page(index);
                        self.vm.tell_others(self.index, Notice::CodeWritten(index));
                    }
                }
                Notice::CodeWritten(index) => self.forget_page(index),
                Notice::DirtyLog => self.drop_all_write_tags(),
                Notice::All => self.forget_everything(),
            }
        }
    }

    fn forget_everything(&mut self) {
        self.block = std::ptr::null_mut();
        self.drop_all_write_tags();
        self.flush_tlb();
        self.blocks.clear();
    }

    /// Delivers a fault. That counts as an instruction, so that time passes for a guest that does nothing but fault.
    fn raise(&mut self, fault: Fault) -> Result<(), Fault> {
        self.icount += 1;
        exception::deliver(self, fault)
    }

    /// Runs blocks until something has to be attended to.
    fn run_blocks(&mut self) -> Result<(), Fault> {
        if self.shadow || self.rflags & fl::TF != 0 {
            return self.step();
        }
        let shared = self.shared.clone();
        let mut block = std::ptr::null_mut::<Block>();
        self.blocks.pending = std::ptr::null_mut();
        loop {
            if block.is_null() {
                self.cut_rip();
                block = self.blocks.quick(self.linear_rip());
                if block.is_null() {
                    match self.find_block(false) {
                        Ok(found) => block = found,
                        Err(fault) => return self.raise(fault),
                    }
                } else {
                    self.link(block);
                }
            }
            // SAFETY: a block that was found or linked is in the arena, which is only emptied in `find_block`.
            let count = u64::from(unsafe { (*block).count });
            if shared.event.load(Ordering::Relaxed) != 0 {
                return Ok(());
            }
            if self.icount + count > self.limit {
                return if self.icount < self.limit { self.step() } else { Ok(()) };
            }
            self.block = block;
            self.icount += count;
            self.burst = self.limit.min(self.icount + BURST);
            let first = Block::first(block);
            // SAFETY: as above; the op's handler was made for it.
            block = unsafe { ((*first).run)(self, first) };
            if block.is_null() {
                match self.exit {
                    LOOK_UP => {}
                    FAULT => {
                        self.exit = LOOK_UP;
                        return self.raise(self.fault);
                    }
                    exit => {
                        self.exit = LOOK_UP;
                        if exit == YIELD && self.vm.vcpus.len() > 1 && self.vm.turns.is_none() {
                            std::thread::yield_now();
                        }
                        return Ok(());
                    }
                }
            }
        }
    }

    #[inline]
    fn link(&mut self, block: *mut Block) {
        let pending = std::mem::replace(&mut self.blocks.pending, std::ptr::null_mut());
        if !pending.is_null() {
            // SAFETY: `pending` is a link of a block in the arena; whatever empties the arena or forgets blocks clears it.
            unsafe {
                if (*block).one_page() {
                    *pending = block;
                }
            }
        }
    }

    /// Runs one instruction.
    pub(crate) fn step(&mut self) -> Result<(), Fault> {
        let shadow = std::mem::take(&mut self.shadow);
        let trap = self.rflags & fl::TF != 0;
        let block = match self.find_block(true) {
            Ok(block) => block,
            Err(fault) => {
                self.shadow = shadow;
                return self.raise(fault);
            }
        };
        self.block = block;
        self.icount += 1;
        self.burst = self.icount;
        let first = Block::first(block);
        // SAFETY: as in `run_blocks`.
        unsafe { ((*first).run)(self, first) };
        self.cut_rip();
        let exit = std::mem::replace(&mut self.exit, LOOK_UP);
        if exit == FAULT {
            return self.raise(self.fault);
        }
        // MOV SS holds the trap back until after the next instruction.
        if trap && exit != ENTERED && !self.shadow {
            return exception::single_step(self);
        }
        Ok(())
    }

    fn crash(&mut self, fault: Fault) -> Stop {
        let what = match fault {
            Fault::Shutdown { .. } => exception::what_happened(self),
            Fault::Exception { vector, error, address } => {
                format!("exception {vector}, error {error:x?}, address {address:#x}")
            }
        };
        let linear = self.linear_rip();
        let mut instruction = Vec::new();
        for n in 0..15 {
            let Ok((_, p)) = self.code_at(linear.wrapping_add(n)) else { break };
            if p.is_null() {
                break;
            }
            // SAFETY: `code_at` vouches for the byte.
            instruction.push(unsafe { p.read_volatile() });
        }
        Stop::Crashed(Box::new(CrashReport {
            what,
            remedy: None,
            state: Box::new(self.state()),
            instruction,
        }))
    }

    /// The neutral state.
    pub(crate) fn state(&mut self) -> CpuState {
        let mut general = [0; 16];
        general.copy_from_slice(&self.gpr[..16]);
        CpuState {
            general,
            rip: self.rip(),
            rflags: self.flags(),
            segments: self.seg,
            tr: self.tr,
            ldt: self.ldt,
            gdt: self.gdt,
            idt: self.idt,
            cr0: self.cr0,
            cr2: self.cr2,
            cr3: self.cr3,
            cr4: self.cr4,
            cr8: self.lapic.cr8(),
            efer: self.efer,
            debug: self.debug,
            fxsave: self.fx.as_bytes().to_vec(),
            msrs: control::state_msrs(self),
            lapic: self.lapic.save(),
            activity: self.activity,
            interrupt_shadow: self.shadow,
            nmi_masked: self.nmi_masked,
            nmi_pending: self.lapic.pending() & crate::apic::PENDING_NMI != 0,
            event: None,
            xcr0: 0,
            extended: Vec::new(),
        }
    }

    /// Takes over a state.
    pub(crate) fn set_state(&mut self, state: &CpuState) -> Result<(), String> {
        let image: &[u8; 512] = state
            .fxsave
            .as_slice()
            .try_into()
            .map_err(|_| "the FXSAVE image must have 512 bytes".to_owned())?;
        self.gpr[..16].copy_from_slice(&state.general);
        self.gpr[RIP] = state.rip;
        self.set_flags(state.rflags & 0x3f_7fd7 | 2);
        self.seg = state.segments;
        self.tr = state.tr;
        self.ldt = state.ldt;
        self.gdt = state.gdt;
        self.idt = state.idt;
        self.cr0 = state.cr0;
        self.cr2 = state.cr2;
        self.cr3 = state.cr3;
        self.cr4 = state.cr4;
        self.efer = state.efer;
        self.debug = state.debug;
        self.cpl = if self.rflags & fl::VM != 0 { 3 } else { (state.segments[2].rights >> 5 & 3) as u8 };
        if self.cr0 & crate::cpu::cr0::PE == 0 {
            self.cpl = 0;
        }
        self.fx.fxrstor(image, true, 16).map_err(|refused| refused.to_string())?;
        self.activity = state.activity;
        self.shadow = state.interrupt_shadow;
        self.nmi_masked = state.nmi_masked;
        self.exit = LOOK_UP;
        self.forget_everything();
        self.update_mode();
        control::set_state_msrs(self, &state.msrs)?;
        self.lapic.restore(&state.lapic);
        crate::msr::restore_deadline(self, &state.msrs);
        self.lapic.set_cr8(state.cr8);
        if state.nmi_pending {
            self.lapic.deliver(crate::irqchip::Delivery::Nmi, 0, false);
        }
        let delivered = match state.event {
            None => Ok(()),
            Some(Event::Interrupt(vector)) => exception::interrupt(self, vector),
            Some(Event::SoftwareInterrupt(vector)) => {
                self.start_rip = self.rip();
                exception::software_interrupt(self, vector)
            }
            Some(Event::Nmi) => exception::nmi(self),
            Some(Event::Exception(vector, error)) => {
                exception::deliver(self, Fault::Exception { vector, error, address: self.cr2 })
            }
        };
        delivered.map_err(|_| "the event under delivery ends in a triple fault".to_owned())
    }
}
