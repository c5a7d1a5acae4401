//! The native tables and the WIT say the same: the WIT stays the only description of the contract.

#![allow(clippy::unwrap_used, reason = "a test and its helpers")]

use std::path::Path;

use tenon_sdk::abi::{
    CONTRACT, DeviceHost, DeviceTable, PersonalityHost, PersonalityTable, StoreHost, StoreTable, VirtioHost,
    VirtioTable,
};
use wit_bindgen_core::wit_parser::{Function, FunctionKind, Resolve, WorldItem, WorldKey};

/// The functions that a plugin of the world `KIND-plugin` imports and exports, by the names that the tables give them.
fn functions(package: &str, kind: &str) -> (Vec<String>, Vec<String>) {
    let mut resolve = Resolve::default();
    let (package, _) =
        resolve.push_dir(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../wit").join(package)).unwrap();
    let name = &resolve.packages[package].name;
    assert_eq!(name.version.as_ref().unwrap().to_string(), CONTRACT, "{name}");
    let world = &resolve.worlds[resolve.packages[package].worlds[&format!("{kind}-plugin")]];
    let names = |items: &mut dyn Iterator<Item = (&WorldKey, &WorldItem)>, with_interface: bool| {
        items
            .flat_map(|(_, item)| {
                let WorldItem::Interface { id, .. } = item else { panic!("{item:?} is no interface") };
                let interface = &resolve.interfaces[*id];
                let prefix =
                    interface.name.as_deref().filter(|_| with_interface).map(|name| format!("{name}_"));
                interface
                    .functions
                    .values()
                    .map(move |function| field(function, prefix.as_deref().unwrap_or("")))
            })
            .collect()
    };
    (names(&mut world.imports.iter(), true), names(&mut world.exports.iter(), false))
}

fn field(function: &Function, prefix: &str) -> String {
    match function.kind {
        FunctionKind::Method(_) => function.name.trim_start_matches("[method]").replace(['.', '-'], "_"),
        FunctionKind::Freestanding => format!("{prefix}{}", function.name).replace('-', "_"),
        ref other => panic!("{}: the tables have no rule for {other:?}", function.name),
    }
}

/// The table's functions that carry the contract, and not the boundary itself.
fn without<'a>(table: &[&'a str], own: &[&str]) -> Vec<&'a str> {
    let rest: Vec<&str> = table.iter().copied().filter(|name| !own.contains(name)).collect();
    assert_eq!(rest.len() + own.len(), table.len(), "{own:?} are not all there");
    rest
}

#[test]
fn a_native_device_is_offered_and_asked_what_the_wit_says() {
    let (imports, exports) = functions("device", "device");
    assert_eq!(without(DeviceHost::FUNCTIONS, &["panicked"]), imports);
    assert_eq!(without(DeviceTable::FUNCTIONS, &["create", "destroy"]), exports);
}

#[test]
fn a_native_personality_is_offered_and_asked_what_the_wit_says() {
    let (imports, exports) = functions("personality", "personality");
    assert_eq!(without(PersonalityHost::FUNCTIONS, &["panicked"]), imports);
    assert_eq!(without(PersonalityTable::FUNCTIONS, &[]), exports);
}

#[test]
fn a_native_virtio_device_is_offered_and_asked_what_the_wit_says() {
    let (imports, exports) = functions("device", "virtio");
    assert_eq!(without(VirtioHost::FUNCTIONS, &["panicked"]), imports);
    assert_eq!(without(VirtioTable::FUNCTIONS, &["create", "destroy"]), exports);
}

#[test]
fn a_native_store_is_offered_and_asked_what_the_wit_says() {
    let (imports, exports) = functions("store", "store");
    assert_eq!(without(StoreHost::FUNCTIONS, &["connection_close", "done", "panicked"]), imports);
    assert_eq!(without(StoreTable::FUNCTIONS, &["create", "destroy"]), exports);
}
