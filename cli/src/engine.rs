//! Which engine runs the guest, and why.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use tenon_core::Engine;
use tenon_kvm::{Kvm, Verdict};
use tenon_soft::Soft;

use crate::args::{ClockChoice, EngineChoice};
use crate::say::explain;

/// An engine, and why it was taken.
pub(crate) struct Choice {
    pub(crate) engine: Arc<dyn Engine>,
    /// In a few words.
    pub(crate) reason: &'static str,
    /// With the figures.
    pub(crate) why: String,
}

/// What a short measurement says about this host's KVM.
pub(crate) struct Judgement {
    pub(crate) is_fast: bool,
    pub(crate) why: String,
    /// Every figure, a line each.
    pub(crate) details: String,
}

/// Measures this host's KVM.
pub(crate) fn judge_kvm() -> Result<Judgement> {
    let quality = Kvm::new()?.measure()?;
    Ok(Judgement {
        is_fast: quality.verdict() == Verdict::Hardware,
        why: quality.why(),
        details: quality.to_string(),
    })
}

/// Takes the engine that was asked for, or with `auto` the one that fits this host.
pub(crate) fn choose(wanted: EngineChoice, clock: ClockChoice) -> Result<Choice> {
    let soft = |reason, why: String| Choice { engine: Arc::new(Soft::new()), reason, why };
    let kvm = |reason, why: String| Ok(Choice { engine: Arc::new(Kvm::new()?), reason, why });
    match (wanted, clock) {
        (EngineChoice::Kvm, ClockChoice::Icount) => bail!(crate::Usage(anyhow!(
            "--clock icount needs the software engine: KVM does not count instructions; leave out --engine kvm"
        ))),
        (EngineChoice::Kvm, ClockChoice::Real) => kvm("asked for", "asked for".into()),
        (EngineChoice::Soft, _) => Ok(soft("asked for", "asked for".into())),
        (EngineChoice::Auto, ClockChoice::Icount) => {
            Ok(soft("--clock icount needs it", "--clock icount needs it".into()))
        }
        (EngineChoice::Auto, ClockChoice::Real) => match judge_kvm() {
            Ok(Judgement { is_fast: true, why, .. }) => kvm("KVM runs at hardware speed here", why),
            Ok(judgement) => Ok(soft("KVM is emulated here", judgement.why)),
            Err(error) => Ok(soft("there is no KVM here", format!("no KVM: {}", explain(&error)))),
        },
    }
}
