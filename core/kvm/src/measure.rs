//! How well this host's KVM runs guests, found out in a few milliseconds with a tiny VM.
//!
//! The interface of KVM is the same everywhere, what is behind it is not: with hardware virtualisation guest code runs on the CPU; some nested and
//! paravirtual hosts run only guest user code so, and emulate guest kernel code instruction by instruction, a thousand times slower.
#![allow(unsafe_code)] // Reading the thread's CPU clock is a libc call.

use std::fmt;
use std::sync::{Arc, OnceLock};

use kvm_ioctls::Cap;
use tenon_core::{
    Bus, Clock, CpuModel, CpuState, DescriptorTable, EngineError, Kick, Ram, Region, Segment, Space, Stop,
    Vcpu, VmSetup,
};
use vm_memory::{Bytes, GuestAddress};

use crate::engine::Kvm;
use crate::vcpu::KvmVcpu;

/// How much slower than guest user code, which runs on the CPU everywhere, guest kernel code may be and still count as run by the CPU too. Emulated it
/// is a thousand times slower; run by the CPU, as fast.
const SLOWER: f64 = 20.0;
/// A loop that runs this long is timed well enough.
const ENOUGH_NS: u64 = 300_000;
/// The first loop's instructions; each further one has ten times as many, up to the most.
const FIRST: u32 = 2_000;
const MOST: u32 = 20_000_000;
/// How often the last loop is run. The best counts, for the others were disturbed.
const REPEATS: u32 = 2;
/// How many accesses to a port are timed.
const EXITS: u32 = 200;

/// Where things are in the tiny guest's memory.
const CODE: u64 = 0x1000;
const PAGE_TABLES: u64 = 0x2000;
/// The port that ends a run, and one that does nothing.
const END: u16 = 0xf4;
const NOTHING: u16 = 0x80;
/// A TSC value that no host reaches by itself.
const FAR_TSC: u64 = 1 << 60;
const TSC: u32 = 0x10;

/// Whether KVM is the engine to take on this host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Guest code runs on the CPU, kernel and user code alike.
    Hardware,
    /// Guest kernel code is emulated: a software engine is faster.
    Emulated,
}

/// What [`Kvm::measure`] found.
#[derive(Clone, Debug, PartialEq)]
pub struct Quality {
    /// Million instructions a second of guest kernel code (ring 0), in a loop of two instructions.
    pub ring0_mips: f64,
    /// The same of guest user code (ring 3).
    pub ring3_mips: f64,
    /// Nanoseconds of an access to a port that nothing answers, guest to host and back.
    pub exit_ns: f64,
    /// Guests see the CPU model that was asked for, and not the host's CPU.
    pub keeps_cpu_model: bool,
    /// A guest's time stamp counter can be set, so that a saved guest's goes on where it was.
    pub sets_tsc: bool,
    /// How many vCPUs a VM can have.
    pub max_vcpus: usize,
    /// How many memory slots a VM can have.
    pub memory_slots: usize,
    /// Abilities of the API beyond those that the engine insists on, and whether they are there.
    pub extensions: Vec<(&'static str, bool)>,
}

impl Quality {
    /// Whether KVM is the engine to take.
    #[must_use]
    pub fn verdict(&self) -> Verdict {
        if self.ring0_mips * SLOWER >= self.ring3_mips { Verdict::Hardware } else { Verdict::Emulated }
    }

    /// Why, in one sentence for users.
    #[must_use]
    pub fn why(&self) -> String {
        let (zero, three) = (mips(self.ring0_mips), mips(self.ring3_mips));
        match self.verdict() {
            Verdict::Hardware => format!(
                "KVM runs guest kernel code on the CPU here: {zero} million instructions a second in a loop, {three} of guest user code"
            ),
            Verdict::Emulated => format!(
                "KVM emulates guest kernel code here: {zero} million instructions a second, against {three} of guest user code; this \
                 host is probably a nested or paravirtual guest itself"
            ),
        }
    }
}

impl fmt::Display for Quality {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let yes = |is: bool| if is { "yes" } else { "no" };
        writeln!(f, "{}", self.why())?;
        writeln!(f, "guest kernel code: {} million instructions a second", mips(self.ring0_mips))?;
        writeln!(f, "guest user code: {} million instructions a second", mips(self.ring3_mips))?;
        writeln!(f, "an access to a device: {:.1} µs", self.exit_ns / 1000.0)?;
        writeln!(f, "shows the CPU model asked for: {}", yes(self.keeps_cpu_model))?;
        writeln!(f, "sets a guest's time stamp counter: {}", yes(self.sets_tsc))?;
        write!(f, "vCPUs: {}, memory slots: {}", self.max_vcpus, self.memory_slots)?;
        for (name, is) in &self.extensions {
            write!(f, "\n{name}: {}", yes(*is))?;
        }
        Ok(())
    }
}

fn mips(value: f64) -> String {
    if value < 10.0 { format!("{value:.1}") } else { format!("{value:.0}") }
}

impl Kvm {
    /// Measures with a VM of its own. Takes some 10 to 50 ms of the calling thread.
    ///
    /// # Errors
    /// The host refuses the VM, or its KVM cannot run even a loop; the text has the report.
    pub fn measure(&self) -> Result<Quality, EngineError> {
        let mut bench = Bench::new(self)?;
        let extensions = [
            ("TSC deadline timer", Cap::TscDeadlineTimer),
            ("TSC scaling", Cap::TscControl),
            ("dirty ring", Cap::DirtyLogRing),
            ("x2APIC with all ids", Cap::X2ApicApi),
            ("split interrupt controller", Cap::SplitIrqchip),
            ("level-triggered irqfd", Cap::IrqfdResample),
        ]
        .map(|(name, cap)| (name, self.fd.check_extension(cap)));
        Ok(Quality {
            ring0_mips: bench.mips(0)?,
            ring3_mips: bench.mips(3)?,
            exit_ns: bench.exit_ns()?,
            keeps_cpu_model: bench.vcpu.keeps_cpu_model(),
            sets_tsc: bench.sets_tsc()?,
            max_vcpus: self.fd.get_max_vcpus(),
            memory_slots: self.fd.get_nr_memslots(),
            extensions: extensions.to_vec(),
        })
    }
}

/// Ends a run.
struct End(OnceLock<Arc<dyn Kick>>);

impl Region for End {
    fn read(&self, _offset: u64, _size: u8) -> u64 {
        0
    }
    fn write(&self, _offset: u64, _size: u8, _value: u64) {
        if let Some(kick) = self.0.get() {
            kick.kick();
        }
    }
}

/// A tiny VM in long mode.
struct Bench {
    ram: Arc<Ram>,
    vcpu: KvmVcpu,
    _claim: tenon_core::Claim,
}

impl Bench {
    fn new(kvm: &Kvm) -> Result<Self, EngineError> {
        let failed = |what: &str, error: &dyn fmt::Display| EngineError::Invalid(format!("{what}: {error}"));
        let ram = Ram::new(tenon_core::MIN_MEMORY).map_err(|e| failed("measuring KVM", &e))?;
        let (pio, mmio) = (Bus::new(Space::Pio), Bus::new(Space::Mmio));
        let end = Arc::new(End(OnceLock::new()));
        let claim = pio.claim("end", END.into(), 1, end.clone()).map_err(|e| failed("measuring KVM", &e))?;
        let clock = Clock::real().map_err(|e| failed("measuring KVM", &e))?;
        let setup = VmSetup { ram: ram.clone(), pio, mmio, clock, vcpus: 1, cpu_model: CpuModel::Baseline };
        let vm = kvm.make_vm(setup)?;
        let vcpu = vm.make_vcpu(0)?;
        let _ = end.0.set(vcpu.kicker());
        let bench = Self { ram, vcpu, _claim: claim };
        // One large page maps all of the memory to itself, for both rings.
        for (table, entry) in [(0, PAGE_TABLES + 0x1000), (0x1000, PAGE_TABLES + 0x2000), (0x2000, 0x80)] {
            bench.put(PAGE_TABLES + table, &(entry | 7u64).to_le_bytes())?;
        }
        Ok(bench)
    }

    fn put(&self, at: u64, bytes: &[u8]) -> Result<(), EngineError> {
        self.ram
            .map()
            .write_slice(bytes, GuestAddress(at))
            .map_err(|error| EngineError::Invalid(format!("measuring KVM: {error}")))
    }

    /// Runs the code at [`CODE`] in this ring with `count` in ECX, and gives the nanoseconds that it took.
    fn time(&mut self, ring: u16, count: u32) -> Result<u64, EngineError> {
        let level = ring << 5;
        let flat = |selector, rights| Segment { selector: selector | ring, base: 0, limit: u32::MAX, rights };
        let mut state = CpuState::after_reset();
        state.segments = [flat(0x10, 0xc093 | level); 6];
        state.segments[1] = flat(0x8, 0xa09b | level);
        (state.cr0, state.cr3, state.cr4, state.efer) = (0x8000_0011, PAGE_TABLES, 0x620, 0x500);
        state.gdt = DescriptorTable { base: 0, limit: 0 };
        state.rflags |= 3 << 12; // Ports are open to all rings.
        state.rip = CODE;
        state.general[1] = count.into();
        self.vcpu.set_state(&state)?;
        let start = thread_time();
        match self.vcpu.run()? {
            Stop::Kicked => Ok(thread_time().saturating_sub(start).max(1)),
            Stop::Crashed(report) => Err(EngineError::Invalid(format!("measuring KVM: {report}"))),
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a measurement, and small numbers")]
    fn mips(&mut self, ring: u16) -> Result<f64, EngineError> {
        // dec ecx; jnz -4; out END, al; jmp -2
        self.put(CODE, &[0xff, 0xc9, 0x75, 0xfc, 0xe6, END.to_le_bytes()[0], 0xeb, 0xfe])?;
        self.time(ring, 1)?; // The first run pays for the pages.
        let mut instructions = FIRST;
        loop {
            let mut best = self.time(ring, instructions / 2)?;
            if best >= ENOUGH_NS || instructions >= MOST {
                for _ in 0..REPEATS {
                    best = best.min(self.time(ring, instructions / 2)?);
                }
                // A disturbed first try made a short loop look long enough.
                if best >= ENOUGH_NS || instructions >= MOST {
                    return Ok(f64::from(instructions) * 1000.0 / best as f64);
                }
            }
            instructions *= 10;
        }
    }

    #[expect(clippy::cast_precision_loss, reason = "a measurement, and small numbers")]
    fn exit_ns(&mut self) -> Result<f64, EngineError> {
        // out NOTHING, al; dec ecx; jnz -6; out END, al; jmp -2
        let (nothing, end) = (NOTHING.to_le_bytes()[0], END.to_le_bytes()[0]);
        self.put(CODE, &[0xe6, nothing, 0xff, 0xc9, 0x75, 0xfa, 0xe6, end, 0xeb, 0xfe])?;
        self.time(0, 1)?;
        Ok(self.time(0, EXITS)? as f64 / f64::from(EXITS))
    }

    fn sets_tsc(&mut self) -> Result<bool, EngineError> {
        let state = CpuState { msrs: vec![(TSC, FAR_TSC)], ..CpuState::after_reset() };
        self.vcpu.set_state(&state)?;
        let state = self.vcpu.state()?;
        Ok(state.msrs.iter().any(|(number, value)| *number == TSC && *value >= FAR_TSC))
    }
}

/// The CPU time of this thread, guest code included: unlike the time of day it stands while others run.
fn thread_time() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the structure. The clock exists on every Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) };
    u64::try_from(time.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(time.tv_nsec).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quality(ring0_mips: f64) -> Quality {
        Quality {
            ring0_mips,
            ring3_mips: 5000.0,
            exit_ns: 1500.0,
            keeps_cpu_model: true,
            sets_tsc: false,
            max_vcpus: 64,
            memory_slots: 32,
            extensions: vec![("TSC scaling", true)],
        }
    }

    #[test]
    fn the_verdict_goes_by_kernel_code_and_says_why() {
        assert_eq!(quality(3000.0).verdict(), Verdict::Hardware);
        assert!(quality(3000.0).why().contains("3000"));
        // A slow host is not one that emulates.
        assert_eq!(Quality { ring3_mips: 90.0, ..quality(80.0) }.verdict(), Verdict::Hardware);
        assert_eq!(quality(2.04).verdict(), Verdict::Emulated);
        assert!(quality(2.04).why().contains("2.0 million") && quality(2.04).why().contains("5000"));
        let text = quality(2.04).to_string();
        assert!(text.contains("1.5 µs") && text.contains("TSC scaling: yes"), "{text}");
    }
}
