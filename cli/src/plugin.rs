//! `tenon plugin …`: make, build, look at, test and list plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;
use tenon_plugin_tool::{BuildOptions, Built, Error};
use tenon_plugins::{Bundle, Manifest, SettingType};

use crate::Usage;
use crate::args::{KeepsChoice, KindChoice, PluginCommand, PluginPlaces};
use crate::disks::LOWER;
use crate::plugins::{BUILT_IN_FORM, Shelf, built_in, catalog, find, form, is_built_in};
use crate::run::FAILED;
use crate::say::{explain, print, print_table};
use crate::trial;

pub(crate) fn plugin(command: &PluginCommand) -> Result<ExitCode> {
    match command {
        PluginCommand::New { name, kind, dir, sdk } => new(name, *kind, dir.as_deref(), sdk.as_deref())?,
        PluginCommand::Build { dir, native, out } => {
            tell_built(&build(dir, *native, out.clone())?)?;
        }
        PluginCommand::Inspect { plugin, json, places } => inspect(plugin, *json, places)?,
        PluginCommand::Test { plugin, settings, allow_native, keeps, json, places } => {
            return test(
                built(plugin, *allow_native, places)?,
                settings,
                *allow_native,
                *keeps,
                *json,
                places,
            );
        }
        PluginCommand::List { json, places } => list(&lines(places)?, *json)?,
    }
    Ok(ExitCode::SUCCESS)
}

fn new(name: &str, kind: KindChoice, dir: Option<&Path>, sdk: Option<&Path>) -> Result<()> {
    let kind = match kind {
        KindChoice::Device => tenon_plugin_tool::Kind::Device,
        KindChoice::Virtio => tenon_plugin_tool::Kind::Virtio,
        KindChoice::Store => tenon_plugin_tool::Kind::Store,
        KindChoice::Personality => tenon_plugin_tool::Kind::Personality,
    };
    let dir = dir.map_or_else(|| PathBuf::from(name), Path::to_owned);
    tenon_plugin_tool::new(name, kind, &dir, sdk).map_err(|error| match error {
        Error::Name(_) => anyhow::Error::new(Usage(error.into())),
        error => error.into(),
    })?;
    let place = dir.display();
    print(format_args!(
        "Made {place}. Next:\n  cd {place}\n  tenon plugin test     # its tests, then the component as a machine would use it\n  tenon plugin build    # the folder and archive that a machine takes"
    ))
}

fn build(dir: &Path, native: bool, output: Option<PathBuf>) -> Result<Built> {
    let options = BuildOptions { output, native, archive: true, ..BuildOptions::default() };
    Ok(tenon_plugin_tool::build(dir, &options)?)
}

fn tell_built(built: &Built) -> Result<()> {
    let size =
        |path: &Path| fs::metadata(path).map(|about| about.len()).with_context(|| path.display().to_string());
    print(format_args!("{} {}", built.id, built.version))?;
    print(format_args!("  may use    {}", words(&built.permissions)))?;
    if !built.unused.is_empty() {
        print(format_args!(
            "  not used   {}; take them out of `[permissions] imports`",
            words(&built.unused)
        ))?;
    }
    print(format_args!("  folder     {}", built.directory.display()))?;
    print(format_args!("  component  {} bytes", size(&built.component)?))?;
    if let Some(native) = &built.native {
        print(format_args!("  native     {} bytes", size(native)?))?;
    }
    if let Some(archive) = &built.archive {
        print(format_args!("  archive    {}", archive.display()))?;
    }
    print(format_args!("Use it with: tenon run … {}", option(built)))
}

/// What gives a machine the plugin that was built.
fn option(built: &Built) -> String {
    let folder = built.directory.display();
    if built.kind != "store" {
        return format!("--{} {folder}", built.kind);
    }
    // A store is found by its id, for what stands behind it may hold a slash.
    let shelf = built.directory.parent().unwrap_or(&built.directory).display();
    let place = if built.permissions.iter().any(|name| name == LOWER) { "STORE:PLACE" } else { "PLACE" };
    format!("--plugin-dir {shelf} --disk {}:{place}", built.id)
}

fn words(list: &[String]) -> String {
    if list.is_empty() { "nothing".into() } else { list.join(", ") }
}

/// What a plugin of the catalogue can run as.
fn forms(bundle: &Bundle) -> Vec<&'static str> {
    let (component, native) = bundle.forms();
    component.then_some("component").into_iter().chain(native.then_some("native")).collect()
}

#[derive(Serialize)]
struct Inspection {
    id: String,
    version: String,
    kind: String,
    api: String,
    summary: String,
    origin: String,
    /// What it can run as: `component`, `native`, `built-in`.
    forms: Vec<&'static str>,
    digest: Option<String>,
    permissions: Vec<String>,
    imports: Vec<ImportLine>,
    /// Why it does not load.
    problem: Option<String>,
    limits: Option<LimitLine>,
    failure: String,
    schema: u32,
    settings: Vec<SettingLine>,
}

/// What an instance in a sandbox may use.
#[derive(Serialize)]
struct LimitLine {
    memory: u64,
    deadline_ms: u128,
}

#[derive(Serialize)]
struct ImportLine {
    interface: String,
    functions: Vec<String>,
}

#[derive(Serialize)]
struct SettingLine {
    key: String,
    #[serde(rename = "type")]
    kind: String,
    default: Option<String>,
    help: String,
}

impl Inspection {
    fn of(plugin: &str, places: &PluginPlaces) -> Result<Self> {
        if let Some((_, manifest)) = built_in()?.into_iter().find(|(id, _)| *id == plugin) {
            return Ok(Self::new(&manifest, BUILT_IN_FORM.into(), vec![BUILT_IN_FORM]));
        }
        let bundle = find(&catalog(places), plugin)?;
        let mut about = Self::new(&bundle.manifest, bundle.origin.clone(), forms(&bundle));
        match Shelf::open(places, &[])?.load_bundle(bundle) {
            Ok(plugin) => {
                // Interfaces of which only types are used let a plugin do nothing.
                let imports = plugin.imports().iter().filter(|import| !import.functions.is_empty());
                about.imports = imports
                    .map(|import| ImportLine {
                        interface: import.interface.clone(),
                        functions: import.functions.clone(),
                    })
                    .collect();
                about.digest = Some(plugin.digest());
            }
            Err(error) => about.problem = Some(explain(&error)),
        }
        Ok(about)
    }

    fn new(manifest: &Manifest, origin: String, forms: Vec<&'static str>) -> Self {
        let Manifest { id, version, kind, api, summary, failure, permissions, limits, schema, config } =
            manifest;
        let settings = config.iter().map(|(key, schema)| SettingLine {
            key: key.clone(),
            kind: match schema.r#type {
                SettingType::Choice => schema.choices.join("|"),
                other => format!("{other:?}").to_lowercase(),
            },
            default: schema.default.clone(),
            help: schema.help.clone(),
        });
        let limits = LimitLine { memory: limits.memory, deadline_ms: limits.deadline.as_millis() };
        Self {
            id: id.clone(),
            version: version.to_string(),
            kind: kind.to_string(),
            api: api.to_string(),
            summary: summary.clone(),
            origin,
            limits: forms.contains(&"component").then_some(limits),
            forms,
            digest: None,
            permissions: permissions.iter().cloned().collect(),
            imports: Vec::new(),
            problem: None,
            failure: format!("{failure:?}").to_lowercase(),
            schema: *schema,
            settings: settings.collect(),
        }
    }
}

fn inspect(plugin: &str, json: bool, places: &PluginPlaces) -> Result<()> {
    let about = Inspection::of(plugin, places)?;
    if json {
        return print(serde_json::to_string_pretty(&about)?);
    }
    let mut table = table();
    table
        .add_row(["plugin", &format!("{} {} ({})", about.id, about.version, about.kind)])
        .add_row(["", &about.summary])
        .add_row(["from", &about.origin])
        .add_row(["forms", &about.forms.join(", ")])
        .add_row(["contract", &about.api]);
    if let Some(limits) = &about.limits {
        let imports: Vec<String> = about
            .imports
            .iter()
            .map(|import| format!("{}: {}", import.interface, words(&import.functions)))
            .collect();
        let imports = match (&about.problem, imports.as_slice()) {
            (Some(_), _) => "–".into(),
            (None, []) => "nothing".into(),
            (None, imports) => imports.join("\n"),
        };
        table
            .add_row(["digest", about.digest.as_deref().unwrap_or("–")])
            .add_row(["may use", &words(&about.permissions)])
            .add_row(["imports", &imports])
            .add_row([
                "limits",
                &format!("{} of memory, {} ms a call", bytes(limits.memory), limits.deadline_ms),
            ]);
    } else {
        table.add_row(["may use", "what this process may: it is native code without a sandbox"]);
    }
    table.add_row(["on failure", &about.failure]);
    if about.kind != "personality" {
        table.add_row(["state", &format!("schema {}", about.schema)]);
    }
    for setting in &about.settings {
        let default = setting.default.as_ref().filter(|value| !value.is_empty());
        let default = default.map(|value| format!(" [{value}]")).unwrap_or_default();
        table.add_row([
            &format!("setting {}", setting.key),
            &format!("{}{default}: {}", setting.kind, setting.help),
        ]);
    }
    if let Some(problem) = &about.problem {
        table.add_row(["does not load", problem]);
    }
    print_table(&table)
}

#[derive(Serialize)]
struct ListLine {
    id: String,
    kind: String,
    version: String,
    forms: Vec<&'static str>,
    summary: String,
    origin: String,
    problem: Option<String>,
}

impl ListLine {
    fn new(id: &str, manifest: &Manifest, origin: &str, forms: Vec<&'static str>) -> Self {
        Self {
            id: id.to_owned(),
            kind: manifest.kind.to_string(),
            version: manifest.version.to_string(),
            forms,
            summary: manifest.summary.clone(),
            origin: origin.to_owned(),
            problem: None,
        }
    }
}

/// Every plugin, in the order of the ids. One that is part of this program is found before any other of its id.
fn lines(places: &PluginPlaces) -> Result<Vec<ListLine>> {
    let linked = built_in()?;
    let mut lines: Vec<ListLine> = linked
        .iter()
        .map(|(id, manifest)| ListLine::new(id, manifest, BUILT_IN_FORM, vec![BUILT_IN_FORM]))
        .collect();
    for (id, bundle) in catalog(places).list() {
        if is_built_in(&id) {
            continue;
        }
        lines.push(match bundle {
            Ok(bundle) => ListLine::new(&id, &bundle.manifest, &bundle.origin, forms(&bundle)),
            Err(error) => ListLine {
                id,
                kind: String::new(),
                version: String::new(),
                forms: Vec::new(),
                summary: String::new(),
                origin: String::new(),
                problem: Some(error.to_string()),
            },
        });
    }
    lines.sort_by(|a, b| a.id.cmp(&b.id));
    Ok(lines)
}

fn list(lines: &[ListLine], json: bool) -> Result<()> {
    if json {
        return print(serde_json::to_string_pretty(lines)?);
    }
    let mut table = table();
    table.set_header(["PLUGIN", "KIND", "VERSION", "FORMS", "WHAT IT IS"]);
    for line in lines {
        let forms = line.forms.join(", ");
        table.add_row([
            &line.id,
            &line.kind,
            &line.version,
            &forms,
            line.problem.as_ref().unwrap_or(&line.summary),
        ]);
    }
    print_table(&table)
}

/// What is to be tried.
enum Candidate {
    Bundle(Box<Bundle>),
    BuiltIn(String),
}

/// Finds what is to be tried. A crate is tested and built first.
fn built(plugin: &str, native: bool, places: &PluginPlaces) -> Result<Candidate> {
    let folder = Path::new(plugin);
    if folder.join("Cargo.toml").is_file() {
        let built = tenon_plugin_tool::test(folder, &BuildOptions { native, ..BuildOptions::default() })?;
        return Ok(Candidate::Bundle(Box::new(Bundle::open(&built.directory)?)));
    }
    if folder.is_dir() {
        return Ok(Candidate::Bundle(Box::new(Bundle::open(folder)?)));
    }
    if is_built_in(plugin) {
        return Ok(Candidate::BuiltIn(plugin.to_owned()));
    }
    Ok(Candidate::Bundle(Box::new(find(&catalog(places), plugin)?)))
}

/// What `tenon plugin test --json` prints.
#[derive(Serialize)]
struct Trial {
    plugin: String,
    version: String,
    kind: String,
    form: &'static str,
    /// What was done, a line each.
    checks: Vec<String>,
    /// The check that failed, and how.
    failed: Option<String>,
    passed: bool,
}

fn test(
    candidate: Candidate,
    settings: &[(String, String)],
    native: bool,
    keeps: Option<KeepsChoice>,
    json: bool,
    places: &PluginPlaces,
) -> Result<ExitCode> {
    let allowed = match &candidate {
        Candidate::Bundle(bundle) if native => vec![bundle.manifest.id.clone()],
        _ => Vec::new(),
    };
    let shelf = Shelf::open(places, &allowed)?;
    let plugin = match candidate {
        Candidate::Bundle(bundle) => shelf.load_bundle(*bundle)?,
        Candidate::BuiltIn(id) => shelf.load(&id)?,
    };
    let Manifest { id, version, kind, permissions, .. } = plugin.manifest();
    if native && !plugin.is_native() {
        return Err(Usage(anyhow!("--allow-native: `{id}` has no native library")).into());
    }
    if !json {
        let permissions: Vec<String> = permissions.iter().cloned().collect();
        let what = match form(&plugin) {
            BUILT_IN_FORM => "it is part of this program".into(),
            "native" => "the native library loads; it may use what this process may".into(),
            _ => format!("the component loads; it may use {}", words(&permissions)),
        };
        print(format_args!("{id} {version}: {what}"))?;
    }
    let outcome = trial::run(&plugin, settings, keeps, &shelf);
    if json {
        let (checks, failed) = match outcome {
            Ok(checks) => (checks, None),
            Err(error) if error.is::<Usage>() => return Err(error),
            Err(error) => (Vec::new(), Some(explain(&error))),
        };
        let passed = failed.is_none();
        let (plugin, version, kind, form) =
            (id.clone(), version.to_string(), kind.to_string(), form(&plugin));
        print(serde_json::to_string_pretty(&Trial { plugin, version, kind, form, checks, failed, passed })?)?;
        return Ok(if passed { ExitCode::SUCCESS } else { ExitCode::from(FAILED) });
    }
    for line in outcome.with_context(|| format!("{id} fails"))? {
        print(format_args!("{id}: {line}"))?;
    }
    print(format_args!("{id}: passed"))?;
    Ok(ExitCode::SUCCESS)
}

pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn bytes(count: u64) -> String {
    if count.is_multiple_of(1 << 20) { format!("{} MiB", count >> 20) } else { format!("{count} bytes") }
}
