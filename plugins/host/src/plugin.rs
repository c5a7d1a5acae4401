//! A loaded plugin: its code checked against the contract and its manifest, ready to be instantiated.

use std::collections::BTreeSet;
use std::sync::Arc;

use tenon_abi as abi;
use tenon_core::Ram;

use crate::bindings::device::DevicePluginPre;
use crate::bindings::personality::PersonalityPluginPre;
use crate::bindings::store::StorePluginPre;
use crate::bindings::virtio::VirtioPluginPre;
use crate::bundle::{Bundle, MAX_CODE};
use crate::contract::{self, Import, Misfit, Role};
use crate::fault::Fault;
use crate::guest::{self, Boot, GuestError, GuestState, Image, Loading};
use crate::host::Host;
use crate::instance::DeviceInstance;
use crate::manifest::{Kind, Manifest, ManifestError};
use crate::native::{Native, NativeError};
use crate::services::LogLimit;
use crate::store::StoreState;
use crate::virtio::VirtioState;
use crate::wasm::{DeviceState, WasmDevice};

/// What an administrator allows beyond what every plugin gets.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    native: BTreeSet<String>,
}

impl Grants {
    /// Nothing.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Lets the plugin `id` run as native code, without a sandbox and without a deadline: its native library is then taken instead of its component.
    #[must_use]
    pub fn allow_native(mut self, id: &str) -> Self {
        self.native.insert(id.to_owned());
        self
    }
}

/// A plugin that cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[error("plugin `{plugin}` ({origin}): {error}")]
pub struct LoadError {
    /// The plugin's id.
    pub plugin: String,
    /// Where it came from.
    pub origin: String,
    /// Why.
    #[source]
    pub error: LoadProblem,
}

/// Why a plugin cannot be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadProblem {
    /// It does not keep to the contract or to its manifest.
    #[error(transparent)]
    Misfit(#[from] Misfit),
    /// It is not a component.
    #[error("plugin.wasm is not a WebAssembly component that can run here: {0}")]
    Component(String),
    /// It is too large.
    #[error("plugin.wasm has {0} bytes; at most {MAX_CODE} are accepted")]
    Size(u64),
    /// There is only a native library.
    #[error(
        "it is native code, which runs without a sandbox; if you trust it, allow it with `--allow-native {0}`"
    )]
    NativeNotAllowed(String),
    /// The native library.
    #[error(transparent)]
    Native(#[from] NativeError),
    /// The manifest of code that is part of this program.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
}

/// A loaded plugin. Any number of devices can be made of it.
pub struct Plugin {
    pub(crate) host: Arc<Host>,
    pub(crate) manifest: Manifest,
    origin: String,
    digest: [u8; 32],
    imports: Vec<Import>,
    pub(crate) code: Code,
}

pub(crate) enum Code {
    Device(DevicePluginPre<DeviceState>),
    Virtio(VirtioPluginPre<VirtioState>),
    Personality(PersonalityPluginPre<GuestState>),
    Store(StorePluginPre<StoreState>),
    Native(Arc<Native>),
}

impl Host {
    /// Loads a plugin: checks its version, its imports against its permissions, and its types.
    ///
    /// # Errors
    /// It does not fit, is damaged, or is native code that nobody allowed.
    pub fn load(self: &Arc<Self>, bundle: Bundle, grants: &Grants) -> Result<Arc<Plugin>, LoadError> {
        let (plugin, origin) = (bundle.manifest.id.clone(), bundle.origin.clone());
        self.load_bundle(bundle, grants).map_err(|error| LoadError { plugin, origin, error })
    }

    fn load_bundle(self: &Arc<Self>, bundle: Bundle, grants: &Grants) -> Result<Arc<Plugin>, LoadProblem> {
        let Bundle { origin, manifest, wasm, native } = bundle;
        contract::check_api(&manifest)?;
        let host = self.clone();
        if let Some(native) = native.as_ref().filter(|_| grants.native.contains(&manifest.id)) {
            let (native, digest) = Native::open(native, &manifest)?;
            tracing::warn!(plugin = manifest.id, %origin, "running native code without a sandbox, as allowed");
            let code = Code::Native(Arc::new(native));
            return Ok(Arc::new(Plugin { host, manifest, origin, digest, imports: Vec::new(), code }));
        }
        let Some(wasm) = wasm else { return Err(LoadProblem::NativeNotAllowed(manifest.id)) };
        if wasm.len() as u64 > MAX_CODE {
            return Err(LoadProblem::Size(wasm.len() as u64));
        }
        let digest = *blake3::hash(&wasm).as_bytes();
        let component = self.compile(&wasm, &digest).map_err(LoadProblem::Component)?;
        let (role, imports) = contract::check(&self.engine, &component, &manifest)?;
        let types = |error: wasmtime::Error| LoadProblem::Misfit(Misfit::Types(format!("{error:#}")));
        let code = match role {
            Role::Device => {
                let pre = self.devices.instantiate_pre(&component).map_err(types)?;
                Code::Device(DevicePluginPre::new(pre).map_err(types)?)
            }
            Role::Virtio => {
                let pre = self.virtio_devices.instantiate_pre(&component).map_err(types)?;
                Code::Virtio(VirtioPluginPre::new(pre).map_err(types)?)
            }
            Role::Store => {
                let pre = self.stores.instantiate_pre(&component).map_err(types)?;
                Code::Store(StorePluginPre::new(pre).map_err(types)?)
            }
            Role::Personality => {
                let pre = self.personalities.instantiate_pre(&component).map_err(types)?;
                Code::Personality(PersonalityPluginPre::new(pre).map_err(types)?)
            }
        };
        Ok(Arc::new(Plugin { host, manifest, origin, digest, imports, code }))
    }

    /// Takes a native plugin that is part of this program, with its `plugin.toml`. It needs nobody's permission, being trusted as the program is, and its origin is
    /// `built-in`.
    ///
    /// # Errors
    /// Its manifest cannot be read, or does not fit it.
    pub fn builtin(
        self: &Arc<Self>,
        code: &'static abi::Plugin,
        manifest: &str,
    ) -> Result<Arc<Plugin>, LoadError> {
        let origin = "built-in";
        let parsed = Manifest::parse(origin, manifest);
        let id = parsed.as_ref().map_or_else(|_| String::new(), |manifest| manifest.id.clone());
        let load = |manifest: Result<Manifest, ManifestError>| -> Result<Arc<Plugin>, LoadProblem> {
            let manifest = manifest?;
            contract::check_api(&manifest)?;
            let code = Code::Native(Arc::new(Native::linked(code, &manifest)?));
            Ok(Arc::new(Plugin {
                host: self.clone(),
                manifest,
                origin: origin.into(),
                digest: [0; 32],
                imports: Vec::new(),
                code,
            }))
        };
        load(parsed).map_err(|error| LoadError { plugin: id, origin: origin.into(), error })
    }
}

impl Plugin {
    /// What the plugin says about itself.
    #[must_use]
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Where it came from.
    #[must_use]
    pub fn origin(&self) -> &str {
        &self.origin
    }

    /// The BLAKE3 digest of its code, in hexadecimal; zeroes if it is part of this program.
    #[must_use]
    pub fn digest(&self) -> String {
        blake3::Hash::from(self.digest).to_hex().to_string()
    }

    /// Whether it is a device that is fed by virtqueues ([`Plugin::attach_virtio`]), and not one of registers ([`Plugin::attach`]).
    #[must_use]
    pub fn is_virtio(&self) -> bool {
        match &self.code {
            Code::Virtio(_) => true,
            Code::Native(native) => native.virtio().is_some(),
            _ => false,
        }
    }

    /// Whether it is part of this program.
    #[must_use]
    pub fn is_builtin(&self) -> bool {
        matches!(&self.code, Code::Native(native) if native.is_linked())
    }

    /// Whether it runs as native code.
    #[must_use]
    pub fn is_native(&self) -> bool {
        matches!(self.code, Code::Native(_))
    }

    /// What a component imports; empty for native code, which may do anything.
    #[must_use]
    pub fn imports(&self) -> &[Import] {
        &self.imports
    }

    /// Makes an instance of a device, without a host side.
    pub(crate) fn instantiate(&self) -> Result<Box<dyn DeviceInstance>, Fault> {
        match &self.code {
            Code::Device(pre) => Ok(Box::new(WasmDevice::new(&self.host, pre, &self.manifest.limits)?)),
            Code::Native(native) => Ok(Box::new(native.device()?)),
            Code::Personality(_) | Code::Virtio(_) | Code::Store(_) => {
                Err(Fault::Contract("it has no device of registers".into()))
            }
        }
    }

    /// Loads a guest: runs the personality on `images`, with guest memory `ram` of which `machine.memory` says what may be written. Called on the thread that
    /// assembles the machine, before any vCPU runs, and again after each reset.
    ///
    /// # Errors
    /// The plugin is no personality, a setting is wrong, or the personality refuses or fails; guest memory may then hold a part of the guest.
    pub fn load_guest(
        &self,
        machine: &abi::Machine,
        ram: &Arc<Ram>,
        images: Vec<Image>,
        options: &[(String, String)],
    ) -> Result<Boot, GuestError> {
        let plugin = self.manifest.id.clone();
        let options = self.manifest.settings(options)?;
        let loading = Loading {
            name: plugin.clone(),
            ram: ram.clone(),
            ranges: machine.memory.clone(),
            images,
            log: LogLimit::new(),
        };
        let result = match &self.code {
            Code::Personality(pre) => {
                guest::load(&self.host, pre, &self.manifest.limits, loading, machine, &options)
            }
            Code::Native(native) if self.manifest.kind == Kind::Personality => {
                native.load(loading, machine, &options)
            }
            Code::Native(_) | Code::Device(_) | Code::Virtio(_) | Code::Store(_) => {
                return Err(GuestError::NotAPersonality(plugin));
            }
        };
        match result {
            Ok(Ok(boot)) => {
                Ok(Boot { summary: boot.summary, vcpu: guest::cpu_state(&boot.vcpu), stop: boot.stop })
            }
            Ok(Err(error)) => Err(GuestError::Refused { plugin, error }),
            Err(fault) => Err(GuestError::Fault { plugin, fault }),
        }
    }
}
