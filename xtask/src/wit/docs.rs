//! `cargo xtask wit-docs`: the contract's reference as Markdown, one file per package.

use std::fmt::Write;
use std::fs;

use anyhow::{Context, Result};
use wit_parser::{Docs, Function, Handle, Resolve, Type, TypeDef, TypeDefKind, TypeId, WorldItem};

use super::PACKAGES;
use crate::tree;

/// Writes the reference.
///
/// # Errors
/// The contract is no valid WIT, or a file cannot be written.
pub(crate) fn run() -> Result<()> {
    let out = tree::target()?.join("doc/contract");
    fs::create_dir_all(&out).with_context(|| format!("cannot make {}", out.display()))?;
    for package in PACKAGES {
        let mut resolve = Resolve::default();
        let (id, _) = resolve.push_path(tree::root().join("wit").join(package))?;
        let file = out.join(format!("{package}.md"));
        fs::write(&file, page(&resolve, id)?).with_context(|| format!("cannot write {}", file.display()))?;
        println!("{}", file.display());
    }
    Ok(())
}

fn page(resolve: &Resolve, id: wit_parser::PackageId) -> Result<String> {
    let package = &resolve.packages[id];
    let mut page = format!("# {}\n\n{}", package.name, prose(&package.docs));
    for world in package.worlds.values() {
        let world = &resolve.worlds[*world];
        writeln!(page, "## World `{}`\n\n{}", world.name, prose(&world.docs))?;
        for (what, items) in [("imports", &world.imports), ("exports", &world.exports)] {
            for item in items.values() {
                if let WorldItem::Interface { id, .. } = item {
                    let name = resolve.interfaces[*id].name.as_deref().unwrap_or_default();
                    writeln!(page, "- {what} [`{name}`](#interface-{name})")?;
                }
            }
        }
        page.push('\n');
    }
    for (name, interface) in &package.interfaces {
        let interface = &resolve.interfaces[*interface];
        writeln!(page, "## Interface `{name}`\n\n{}", prose(&interface.docs))?;
        for (name, id) in &interface.types {
            type_entry(&mut page, resolve, name, *id, &interface.functions)?;
        }
        for function in interface.functions.values().filter(|function| function.kind.resource().is_none()) {
            writeln!(page, "### `{}`\n\n{}", signature(resolve, function), prose(&function.docs))?;
        }
    }
    Ok(page)
}

fn type_entry<'a>(
    page: &mut String,
    resolve: &Resolve,
    name: &str,
    id: TypeId,
    functions: impl IntoIterator<Item = (&'a String, &'a Function)>,
) -> Result<()> {
    let definition = &resolve.types[id];
    let rows: Vec<(String, &Docs)> = match &definition.kind {
        TypeDefKind::Record(record) => record
            .fields
            .iter()
            .map(|field| (format!("{}: {}", field.name, shown(resolve, &field.ty)), &field.docs))
            .collect(),
        TypeDefKind::Variant(variant) => variant
            .cases
            .iter()
            .map(|case| match &case.ty {
                Some(ty) => (format!("{}({})", case.name, shown(resolve, ty)), &case.docs),
                None => (case.name.clone(), &case.docs),
            })
            .collect(),
        TypeDefKind::Enum(all) => all.cases.iter().map(|case| (case.name.clone(), &case.docs)).collect(),
        TypeDefKind::Flags(flags) => flags.flags.iter().map(|flag| (flag.name.clone(), &flag.docs)).collect(),
        // A name that another interface defines is documented there.
        TypeDefKind::Type(Type::Id(_)) => return Ok(()),
        _ => Vec::new(),
    };
    writeln!(page, "### {} `{name}`\n\n{}", definition.kind.as_str(), prose(&definition.docs))?;
    if !rows.is_empty() {
        page.push_str("| | |\n| --- | --- |\n");
        for (what, docs) in rows {
            let why =
                docs.contents.as_deref().unwrap_or_default().trim().replace('\n', " ").replace('|', "\\|");
            writeln!(page, "| `{what}` | {why} |")?;
        }
        page.push('\n');
    }
    for (_, function) in functions.into_iter().filter(|(_, function)| function.kind.resource() == Some(id)) {
        writeln!(page, "#### `{}`\n\n{}", signature(resolve, function), prose(&function.docs))?;
    }
    Ok(())
}

fn prose(docs: &Docs) -> String {
    docs.contents.as_deref().map_or_else(String::new, |text| format!("{}\n", text.trim_end()))
}

fn signature(resolve: &Resolve, function: &Function) -> String {
    let parameters: Vec<String> = function
        .params
        .iter()
        .filter(|parameter| parameter.name != "self")
        .map(|parameter| format!("{}: {}", parameter.name, shown(resolve, &parameter.ty)))
        .collect();
    let result = function.result.as_ref().map(|ty| format!(" -> {}", shown(resolve, ty))).unwrap_or_default();
    format!("{}({}){result}", function.item_name(), parameters.join(", "))
}

/// A type as WIT writes it.
fn shown(resolve: &Resolve, ty: &Type) -> String {
    let Type::Id(id) = ty else { return format!("{ty:?}").to_lowercase() };
    let TypeDef { name, kind, .. } = &resolve.types[*id];
    if let Some(name) = name {
        return name.clone();
    }
    let or_none = |ty: &Option<Type>| ty.as_ref().map_or_else(|| "_".to_owned(), |ty| shown(resolve, ty));
    match kind {
        TypeDefKind::List(ty) => format!("list<{}>", shown(resolve, ty)),
        TypeDefKind::Option(ty) => format!("option<{}>", shown(resolve, ty)),
        TypeDefKind::Result(result) => match (&result.ok, &result.err) {
            (None, None) => "result".to_owned(),
            (ok, None) => format!("result<{}>", or_none(ok)),
            (ok, err) => format!("result<{}, {}>", or_none(ok), or_none(err)),
        },
        TypeDefKind::Tuple(tuple) => {
            let types: Vec<String> = tuple.types.iter().map(|ty| shown(resolve, ty)).collect();
            format!("tuple<{}>", types.join(", "))
        }
        TypeDefKind::Handle(Handle::Own(id)) => resolve.types[*id].name.clone().unwrap_or_default(),
        TypeDefKind::Handle(Handle::Borrow(id)) => {
            format!("borrow<{}>", resolve.types[*id].name.as_deref().unwrap_or_default())
        }
        other => other.as_str().to_owned(),
    }
}
