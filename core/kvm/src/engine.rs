//! The engine: `/dev/kvm`, and what it must have for a machine.

use std::io;
use std::sync::Arc;

use kvm_ioctls::Cap;
use tenon_core::{Engine, EngineError, Vm, VmSetup};

use crate::vm::KvmVm;
use crate::{cpuid, kick};

/// Where KVM is.
pub(crate) const DEVICE: &str = "/dev/kvm";
/// The one version of the API that there ever was.
const API_VERSION: i32 = 12;
/// The most vCPUs that a machine has.
const MAX_VCPUS: u32 = 64;

/// What this engine needs of the kernel, with the names under which the kernel's documentation has them.
const NEEDED: [(Cap, &str); 13] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
];

/// A failed call to the host, for [`Result::map_err`].
pub(crate) fn host<E: Into<io::Error>>(call: &'static str) -> impl FnOnce(E) -> EngineError {
    move |error| EngineError::Host { call, source: error.into() }
}

/// The KVM engine.
pub struct Kvm {
    pub(crate) fd: Arc<kvm_ioctls::Kvm>,
}

impl Kvm {
    /// Opens `/dev/kvm` and looks whether it has what machines need.
    ///
    /// # Errors
    /// There is no such device, it may not be opened, or it is too old. The text says what to do.
    pub fn new() -> Result<Self, EngineError> {
        let fd = kvm_ioctls::Kvm::new().map_err(|error| refused(error.into()))?;
        check_version(fd.get_api_version())?;
        let missing: Vec<_> =
            NEEDED.iter().filter(|(cap, _)| !fd.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(EngineError::Invalid(format!(
                "this kernel's KVM lacks {}; use a newer kernel, or --engine soft",
                missing.join(", ")
            )));
        }
        kick::install_handler().map_err(host("sigaction"))?;
        Ok(Self { fd: Arc::new(fd) })
    }

    pub(crate) fn make_vm(&self, setup: VmSetup) -> Result<Arc<KvmVm>, EngineError> {
        if setup.clock.is_virtual() {
            return Err(EngineError::Invalid(
                "KVM cannot run a machine by instruction count: use --engine soft with --clock icount, or --clock real".into(),
            ));
        }
        let most = MAX_VCPUS.min(u32::try_from(self.fd.get_max_vcpus()).unwrap_or(MAX_VCPUS));
        if !(1..=most).contains(&setup.vcpus) {
            return Err(EngineError::Invalid(format!(
                "{} vCPUs: this engine gives a machine 1 to {most} here",
                setup.vcpus
            )));
        }
        let cpuid = cpuid::Template::new(&self.fd, setup.cpu_model)?;
        KvmVm::new(&self.fd, setup, cpuid)
    }
}

impl Engine for Kvm {
    fn name(&self) -> &'static str {
        "kvm"
    }

    fn create_vm(&self, setup: VmSetup) -> Result<Arc<dyn Vm>, EngineError> {
        Ok(self.make_vm(setup)?)
    }
}

/// Looks at the device's answer to the question for its version. A negative one is a refusal: what else can be opened under that name does not know the question.
fn check_version(version: i32) -> Result<(), EngineError> {
    match version {
        API_VERSION => Ok(()),
        ..0 => Err(EngineError::Invalid(format!("{DEVICE} is not a KVM device"))),
        _ => Err(EngineError::Invalid(format!(
            "{DEVICE} speaks version {version} of the KVM API; this engine speaks {API_VERSION}"
        ))),
    }
}

/// Says what a refusal to open the device means and what to do about it.
fn refused(error: io::Error) -> EngineError {
    let why = match error.raw_os_error() {
        Some(libc::ENOENT) => {
            "the device does not exist: switch virtualisation (VT-x or AMD-V) on in the firmware, or nested virtualisation in the \
             outer hypervisor, and load the module kvm_intel or kvm_amd"
        }
        Some(libc::EACCES | libc::EPERM) => {
            "permission denied: add yourself to the group `kvm` (usermod -aG kvm USER) and log in again"
        }
        Some(libc::ENODEV | libc::ENXIO) => {
            "the device is there, but no module behind it: load kvm_intel or kvm_amd"
        }
        Some(libc::EBUSY) => "the CPU's virtualisation is in use by another hypervisor: stop that one first",
        _ => return EngineError::Host { call: "opening /dev/kvm", source: error },
    };
    EngineError::Invalid(format!("{DEVICE}: {why}; or use --engine soft"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_know_kvms_question_is_no_kvm_device() {
        let says = |version| check_version(version).unwrap_err().to_string();
        assert!(says(-1).contains("/dev/kvm is not a KVM device"), "{}", says(-1));
        assert!(says(11).contains("11") && says(11).contains("12"), "{}", says(11));
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let says = |errno, words: &[&str]| {
            let text = refused(io::Error::from_raw_os_error(errno)).to_string();
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        says(libc::ENOENT, &["/dev/kvm", "kvm_intel", "kvm_amd", "--engine soft"]);
        says(libc::EACCES, &["/dev/kvm", "group `kvm`", "--engine soft"]);
        says(libc::ENODEV, &["/dev/kvm", "module", "--engine soft"]);
        says(libc::EMFILE, &["/dev/kvm"]);
    }
}
