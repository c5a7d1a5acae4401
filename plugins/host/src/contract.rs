//! Whether a component keeps to the contract and to its manifest: what it imports, what it exports, and at which versions.
//!
//! An imported interface that only lends its types (a device's `attachment` names `timer`, `line` and `channel` in any case) is no permission; one of
//! whose functions the component can call is. The functions that this version offers are listed here, so that a refusal can name the missing one; that
//! their types fit is checked by linking.

use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime::component::types::{ComponentInstance, ComponentItem};

use crate::manifest::{HOST_API, Kind, Manifest, Version};

/// Interfaces and the functions that they offer.
type Offer = &'static [(&'static str, &'static [&'static str])];

const DEVICE: Offer = &[
    ("types", &[]),
    ("log", &["log"]),
    ("time", &["now", "[method]timer.arm", "[method]timer.arm-periodic", "[method]timer.cancel"]),
    ("wall-clock", &["now"]),
    ("interrupts", &["[method]line.set-level", "[method]line.pulse"]),
    ("channels", &["[method]channel.write", "[method]channel.read"]),
    ("machine-control", &["ask"]),
];

const VIRTIO: Offer = &[
    ("types", &[]),
    ("virtio-types", &[]),
    ("log", &["log"]),
    ("time", &["now", "[method]timer.arm", "[method]timer.arm-periodic", "[method]timer.cancel"]),
    ("wall-clock", &["now"]),
    ("channels", &["[method]channel.write", "[method]channel.read"]),
    (
        "requests",
        &["read", "write", "complete", "to-channel", "from-channel", "config-changed", "needs-reset"],
    ),
    ("stores", &["[method]store.info", "[method]store.begin"]),
    (
        "ports",
        &[
            "[method]port.info",
            "[method]port.accept",
            "[method]port.send",
            "[method]port.waiting",
            "[method]port.receive",
        ],
    ),
    (
        "sockets",
        &[
            "[method]socket.connect",
            "[method]socket.news",
            "[method]socket.accept",
            "[method]socket.send",
            "[method]socket.receive",
            "[method]socket.shut",
            "[method]socket.close",
        ],
    ),
    ("entropy", &["fill"]),
    ("guest-pages", &["release-numbered", "release-own", "memory-size"]),
    ("folders", &["[method]folder.act"]),
];

const PERSONALITY: Offer = &[
    ("types", &[]),
    ("log", &["log"]),
    ("images", &["[method]image.role", "[method]image.size", "[method]image.read"]),
    ("guest-memory", &["[method]memory.write", "[method]memory.copy-image"]),
];

const STORE: Offer = &[
    ("types", &[]),
    ("log", &["log"]),
    ("time", &["now", "wait"]),
    ("entropy", &["random"]),
    ("lower-stores", &["[method]lower.info", "[method]lower.submit", "[method]lower.resize"]),
    ("connections", &["connect", "[method]connection.send", "[method]connection.receive"]),
];

/// What a plugin implements: one of its kind's interfaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Registers.
    Device,
    /// Virtqueues.
    Virtio,
    /// A guest's loader.
    Personality,
    /// A backing store.
    Store,
}

impl Role {
    fn interface(self) -> &'static str {
        match self {
            Self::Device => "device",
            Self::Virtio => "virtio-device",
            Self::Personality => "personality",
            Self::Store => "store",
        }
    }

    fn offer(self) -> Offer {
        match self {
            Self::Device => DEVICE,
            Self::Virtio => VIRTIO,
            Self::Personality => PERSONALITY,
            Self::Store => STORE,
        }
    }
}

impl Kind {
    fn package(self) -> &'static str {
        match self {
            Self::Device => "tenon:device",
            Self::Personality => "tenon:personality",
            Self::Store => "tenon:store",
        }
    }

    /// What a plugin of this kind may be; it is what it exports.
    fn roles(self) -> &'static [Role] {
        match self {
            Self::Device => &[Role::Device, Role::Virtio],
            Self::Personality => &[Role::Personality],
            Self::Store => &[Role::Store],
        }
    }
}

/// A component that does not fit.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Misfit {
    /// The manifest's `api` is of another line.
    #[error("it was built for api {wanted}, and this host offers {HOST_API}; {}", remedy(*wanted))]
    Api {
        /// What the manifest says.
        wanted: Version,
    },
    /// It needs something that is not part of the contract.
    #[error("it imports `{import}`, which no {kind} gets; there are {offered}")]
    UnknownImport {
        /// The import.
        import: String,
        /// The plugin's kind.
        kind: Kind,
        /// The interfaces there are.
        offered: String,
    },
    /// It needs an interface at another line of versions.
    #[error("it imports `{import}`, and this host offers version {HOST_API}; {}", remedy(*wanted))]
    ImportVersion {
        /// The import, with its version.
        import: String,
        /// That version.
        wanted: Version,
    },
    /// It needs a function that this version of the interface does not have.
    #[error(
        "it imports the function `{function}` of `{import}`, which this host's version {HOST_API} does not have; it has {offered}"
    )]
    UnknownFunction {
        /// The function.
        function: String,
        /// The import, with its version.
        import: String,
        /// The functions there are.
        offered: String,
    },
    /// It calls an interface that its manifest does not ask for.
    #[error(
        "it calls `{interface}`, which its plugin.toml does not ask for (permissions.imports has {permitted})"
    )]
    NotPermitted {
        /// The interface.
        interface: String,
        /// What the manifest asks for.
        permitted: String,
    },
    /// It does not do what its kind does.
    #[error("it does not export {wanted}, so it is no {kind}; it exports {found}")]
    NoExport {
        /// The interfaces, one of which would do.
        wanted: String,
        /// The manifest's kind.
        kind: Kind,
        /// What it exports.
        found: String,
    },
    /// Its types are not those of the contract.
    #[error("its types are not those of the contract: {0}")]
    Types(String),
}

fn remedy(wanted: Version) -> &'static str {
    if wanted > HOST_API { "use a newer Tenon" } else { "build it with a newer SDK" }
}

/// What a component can call: interface and functions.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Import {
    /// The interface, such as `tenon:device/time@0.1.0`.
    pub interface: String,
    /// The functions that it can call; none if it uses types only.
    pub functions: Vec<String>,
}

/// Checks a component against its manifest; gives what it implements, and its imports.
pub(crate) fn check(
    engine: &Engine,
    component: &Component,
    manifest: &Manifest,
) -> Result<(Role, Vec<Import>), Misfit> {
    check_api(manifest)?;
    let kind = manifest.kind;
    let ty = component.component_type();
    let exports: Vec<String> = ty.exports(engine).map(|(name, _)| name.to_owned()).collect();
    let exported = exports.iter().find_map(|name| {
        let (interface, version) = parse(name, kind.package())?;
        let role = kind.roles().iter().find(|role| role.interface() == interface)?;
        Some((name, version, *role))
    });
    // Imports are checked first: what cannot be had is more than what is missing.
    let role = exported.map_or(kind.roles()[0], |(_, _, role)| role);
    let mut imports = Vec::new();
    for (name, item) in ty.imports(engine) {
        let unknown = || Misfit::UnknownImport {
            import: name.to_owned(),
            kind,
            offered: list(
                role.offer().iter().map(|(interface, _)| format!("{}/{interface}", kind.package())),
            ),
        };
        let (interface, wanted) = parse(name, kind.package()).ok_or_else(unknown)?;
        let (_, offered) =
            role.offer().iter().find(|(offered, _)| *offered == interface).ok_or_else(unknown)?;
        if !HOST_API.runs(wanted) {
            return Err(Misfit::ImportVersion { import: name.to_owned(), wanted });
        }
        let ComponentItem::ComponentInstance(instance) = item.ty else { return Err(unknown()) };
        let functions = functions(engine, &instance);
        if let Some(function) = functions.iter().find(|function| !offered.contains(&function.as_str())) {
            return Err(Misfit::UnknownFunction {
                function: function.clone(),
                import: name.to_owned(),
                offered: list(offered.iter().map(|function| (*function).to_owned())),
            });
        }
        if !functions.is_empty() && !manifest.permissions.contains(interface) {
            return Err(Misfit::NotPermitted {
                interface: interface.to_owned(),
                permitted: list(manifest.permissions.iter().cloned()),
            });
        }
        imports.push(Import { interface: name.to_owned(), functions });
    }
    match exported {
        Some((_, version, role)) if HOST_API.runs(version) => Ok((role, imports)),
        Some((name, wanted, _)) => Err(Misfit::ImportVersion { import: name.clone(), wanted }),
        None => {
            let wanted = kind
                .roles()
                .iter()
                .map(|role| format!("`{}/{}@{HOST_API}`", kind.package(), role.interface()));
            Err(Misfit::NoExport {
                wanted: wanted.collect::<Vec<_>>().join(" or "),
                kind,
                found: list(exports.into_iter()),
            })
        }
    }
}

/// Checks the version that the manifest names.
pub(crate) fn check_api(manifest: &Manifest) -> Result<(), Misfit> {
    if HOST_API.runs(manifest.api) { Ok(()) } else { Err(Misfit::Api { wanted: manifest.api }) }
}

/// Interface and version of `package/interface@version`.
fn parse<'a>(name: &'a str, package: &str) -> Option<(&'a str, Version)> {
    let (interface, version) = name.strip_prefix(package)?.strip_prefix('/')?.split_once('@')?;
    Some((interface, version.parse().ok()?))
}

fn functions(engine: &Engine, instance: &ComponentInstance) -> Vec<String> {
    instance
        .exports(engine)
        .filter(|(_, item)| matches!(item.ty, ComponentItem::ComponentFunc(_)))
        .map(|(name, _)| name.to_owned())
        .collect()
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<String> = items.collect();
    if items.is_empty() { "none".into() } else { format!("`{}`", items.join("`, `")) }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::path::Path;

    use wit_parser::{Resolve, WorldItem, WorldKey};

    use super::*;

    type Functions = BTreeMap<String, BTreeSet<String>>;

    /// What the world that exports the role's interface imports.
    fn written(folder: &str, role: Role) -> Functions {
        let mut resolve = Resolve::default();
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit").join(folder);
        let (package, _) = resolve.push_path(folder).unwrap();
        let name = |key: &WorldKey| match key {
            WorldKey::Interface(id) => resolve.interfaces[*id].name.clone(),
            WorldKey::Name(name) => Some(name.clone()),
        };
        let exports = |world: &&wit_parser::World| {
            world.exports.keys().any(|key| name(key).as_deref() == Some(role.interface()))
        };
        let mut worlds =
            resolve.packages[package].worlds.values().map(|id| &resolve.worlds[*id]).filter(exports);
        let world = worlds.next().unwrap();
        assert!(worlds.next().is_none(), "one world for each role");
        world
            .imports
            .iter()
            .map(|(key, item)| {
                let WorldItem::Interface { id, .. } = item else { panic!("{key:?} is no interface") };
                (name(key).unwrap(), resolve.interfaces[*id].functions.keys().cloned().collect())
            })
            .collect()
    }

    #[test]
    fn what_is_offered_is_what_the_contract_says() {
        for kind in [Kind::Device, Kind::Personality, Kind::Store] {
            for role in kind.roles() {
                let offered: Functions = role
                    .offer()
                    .iter()
                    .map(|(interface, functions)| {
                        let all: BTreeSet<String> = functions.iter().map(|name| (*name).to_owned()).collect();
                        assert_eq!(
                            all.len(),
                            functions.len(),
                            "{role:?} has a function of {interface} twice"
                        );
                        ((*interface).to_owned(), all)
                    })
                    .collect();
                assert_eq!(offered.len(), role.offer().len(), "{role:?} has an interface twice");
                let folder = kind.package().strip_prefix("tenon:").unwrap();
                assert_eq!(offered, written(folder, *role), "{role:?}");
            }
        }
    }
}
