//! Which engine runs the guest, and why.

use std::sync::Arc;

use anyhow::{Result, anyhow, bail};
use tenon_core::Engine;
use tenon_kvm::{Kvm, Verdict};
use tenon_soft::Soft;

use crate::args::{ClockChoice, EngineChoice};

/// An engine, and why it was taken.
pub(crate) struct Choice {
    pub(crate) engine: Arc<dyn Engine>,
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
    let soft = |why: String| Choice { engine: Arc::new(Soft::new()), why };
    match (wanted, clock) {
        (EngineChoice::Kvm, ClockChoice::Icount) => bail!(crate::Usage(anyhow!(
            "--clock icount needs the software engine: KVM does not count instructions; leave out --engine kvm"
        ))),
        (EngineChoice::Kvm, ClockChoice::Real) => {
            Ok(Choice { engine: Arc::new(Kvm::new()?), why: "asked for".into() })
        }
        (EngineChoice::Soft, _) => Ok(soft("asked for".into())),
        (EngineChoice::Auto, ClockChoice::Icount) => Ok(soft("--clock icount needs it".into())),
        (EngineChoice::Auto, ClockChoice::Real) => match judge_kvm() {
            Ok(Judgement { is_fast: true, why, .. }) => Ok(Choice { engine: Arc::new(Kvm::new()?), why }),
            Ok(judgement) => Ok(soft(judgement.why)),
            Err(error) => Ok(soft(format!("no KVM: {error:#}"))),
        },
    }
}
