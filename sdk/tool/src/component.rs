//! From a core module to a component, and what a component asks for.

use wit_component::{ComponentEncoder, DecodedWasm};
use wit_parser::WorldItem;

use crate::Error;

/// What a component shows to the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Component {
    /// The contract's interfaces of which the component imports at least one function, by their short names such as `log`: its permissions.
    /// Interfaces of which it imports types alone are not among them, since a type lets it do nothing.
    pub permissions: Vec<String>,
    /// What it exports, in full, such as `tenon:device/device@0.1.0`.
    pub exports: Vec<String>,
    /// What it imports beyond the contract, in full. A plugin with any of these does not load.
    pub foreign: Vec<String>,
}

impl Component {
    /// What the component can be loaded as: the kinds of a manifest. A device is one of registers, or one that is fed by queues of requests.
    #[must_use]
    pub fn kinds(&self) -> Vec<&'static str> {
        const KINDS: [(&str, &str); 4] = [
            ("tenon:device/device@", "device"),
            ("tenon:device/virtio-device@", "device"),
            ("tenon:store/store@", "store"),
            ("tenon:personality/personality@", "personality"),
        ];
        let exports = |interface: &str| self.exports.iter().any(|name| name.starts_with(interface));
        KINDS.iter().filter(|(interface, _)| exports(interface)).map(|(_, kind)| *kind).collect()
    }
}

/// Makes a component out of a core module that was built with `tenon-sdk` for `wasm32-unknown-unknown`.
///
/// # Errors
/// The module was not built with the SDK's export macro, or imports what the contract does not have.
pub fn componentize(module: &[u8]) -> Result<Vec<u8>, Error> {
    let wrong = |error: &dyn std::fmt::Display| {
        Error::Component(format!(
            "the compiled module is not a plugin: {error}; it must contain one `tenon_sdk::export_device!`, \
             `export_virtio_device!`, `export_store!` or `export_personality!`, \
             be built for wasm32-unknown-unknown, and import nothing else than the SDK does"
        ))
    };
    let mut encoder = ComponentEncoder::default()
        .validate(true)
        .module(module)
        .map_err(|e| wrong(&format_args!("{e:#}")))?;
    let component = encoder.encode().map_err(|e| wrong(&format_args!("{e:#}")))?;
    if inspect(&component)?.exports.is_empty() {
        return Err(wrong(&"it exports no interface of the contract"));
    }
    Ok(component)
}

/// Says what a component imports and exports.
///
/// # Errors
/// The bytes are no component.
pub fn inspect(component: &[u8]) -> Result<Component, Error> {
    let decoded = wit_component::decode(component)
        .map_err(|error| Error::Component(format!("this is not a component: {error:#}")))?;
    let DecodedWasm::Component(resolve, world) = decoded else {
        return Err(Error::Component("this is a WIT package, not a component".into()));
    };
    let world = &resolve.worlds[world];
    let name = |key| resolve.name_world_key(key);
    let (mut permissions, mut foreign) = (Vec::new(), Vec::new());
    for (key, item) in &world.imports {
        let name = name(key);
        let interface = match item {
            WorldItem::Interface { id, .. } => Some(&resolve.interfaces[*id]),
            _ => None,
        };
        match interface {
            Some(interface) if is_contract(&name) => {
                if !interface.functions.is_empty() {
                    permissions.extend(interface.name.clone());
                }
            }
            _ => foreign.push(name),
        }
    }
    let exports = world.exports.keys().map(name).collect();
    Ok(Component { permissions, exports, foreign })
}

fn is_contract(name: &str) -> bool {
    ["tenon:device/", "tenon:store/", "tenon:personality/"].iter().any(|package| name.starts_with(package))
}
