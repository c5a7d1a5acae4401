//! `tenon plugin …`: make, build, look at, test and list plugins.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use comfy_table::presets::NOTHING;
use comfy_table::{ContentArrangement, Table};
use serde::Serialize;
use tenon_plugin_tool::{BuildOptions, Built, Error};
use tenon_plugins::{Bundle, Manifest, SettingType};

use crate::Usage;
use crate::args::{KindChoice, PluginCommand};
use crate::plugins::{Shelf, catalog, find};
use crate::say::{explain, print, print_table};
use crate::trial;

pub(crate) fn plugin(command: &PluginCommand) -> Result<ExitCode> {
    match command {
        PluginCommand::New { name, kind, dir, sdk } => new(name, *kind, dir.as_deref(), sdk.as_deref())?,
        PluginCommand::Build { dir, native, out } => {
            tell_built(&build(dir, *native, out.clone())?)?;
        }
        PluginCommand::Inspect { plugin, json, places } => inspect(find(&catalog(places), plugin)?, *json)?,
        PluginCommand::Test { dir } => test(dir)?,
        PluginCommand::List { json, places } => list(&catalog(places).list(), *json)?,
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
    print(format_args!("Use it with: tenon run … --{} {}", built.kind, built.directory.display()))
}

fn words(list: &[String]) -> String {
    if list.is_empty() { "nothing".into() } else { list.join(", ") }
}

#[derive(Serialize)]
struct Inspection {
    id: String,
    version: String,
    kind: String,
    api: String,
    summary: String,
    origin: String,
    component: bool,
    native: bool,
    digest: Option<String>,
    permissions: Vec<String>,
    imports: Vec<ImportLine>,
    /// Why it does not load.
    problem: Option<String>,
    memory: u64,
    deadline_ms: u128,
    failure: String,
    schema: u32,
    settings: Vec<SettingLine>,
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
    fn new(bundle: Bundle) -> Result<Self> {
        let Manifest { id, version, kind, api, summary, failure, permissions, limits, schema, config } =
            &bundle.manifest.clone();
        let (origin, (component, native)) = (bundle.origin.clone(), bundle.forms());
        let shelf = Shelf::open(&crate::args::PluginPlaces::default(), &[])?;
        let (digest, imports, problem) = match shelf.load_bundle(bundle) {
            Ok(plugin) => {
                // Interfaces of which only types are used let a plugin do nothing.
                let imports = plugin.imports().iter().filter(|import| !import.functions.is_empty());
                let imports = imports
                    .map(|import| ImportLine {
                        interface: import.interface.clone(),
                        functions: import.functions.clone(),
                    })
                    .collect();
                (Some(plugin.digest()), imports, None)
            }
            Err(error) => (None, Vec::new(), Some(explain(&error))),
        };
        let settings = config.iter().map(|(key, schema)| SettingLine {
            key: key.clone(),
            kind: match schema.r#type {
                SettingType::Choice => schema.choices.join("|"),
                other => format!("{other:?}").to_lowercase(),
            },
            default: schema.default.clone(),
            help: schema.help.clone(),
        });
        Ok(Self {
            id: id.clone(),
            version: version.to_string(),
            kind: kind.to_string(),
            api: api.to_string(),
            summary: summary.clone(),
            origin,
            component,
            native,
            digest,
            permissions: permissions.iter().cloned().collect(),
            imports,
            problem,
            memory: limits.memory,
            deadline_ms: limits.deadline.as_millis(),
            failure: format!("{failure:?}").to_lowercase(),
            schema: *schema,
            settings: settings.collect(),
        })
    }
}

fn inspect(bundle: Bundle, json: bool) -> Result<()> {
    let about = Inspection::new(bundle)?;
    if json {
        return print(serde_json::to_string_pretty(&about)?);
    }
    let mut table = table();
    let forms = match (about.component, about.native) {
        (true, true) => "component, native library",
        (true, false) => "component",
        _ => "native library only",
    };
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
        .add_row(["plugin", &format!("{} {} ({})", about.id, about.version, about.kind)])
        .add_row(["", &about.summary])
        .add_row(["from", &about.origin])
        .add_row(["forms", forms])
        .add_row(["contract", &about.api])
        .add_row(["digest", about.digest.as_deref().unwrap_or("–")])
        .add_row(["may use", &words(&about.permissions)])
        .add_row(["imports", &imports])
        .add_row(["limits", &format!("{} of memory, {} ms a call", bytes(about.memory), about.deadline_ms)])
        .add_row(["on failure", &about.failure]);
    if about.kind == "device" {
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
    summary: String,
    origin: String,
    problem: Option<String>,
}

fn list(found: &[(String, Result<Bundle, tenon_plugins::BundleError>)], json: bool) -> Result<()> {
    let lines: Vec<ListLine> = found
        .iter()
        .map(|(id, bundle)| match bundle {
            Ok(bundle) => ListLine {
                id: id.clone(),
                kind: bundle.manifest.kind.to_string(),
                version: bundle.manifest.version.to_string(),
                summary: bundle.manifest.summary.clone(),
                origin: bundle.origin.clone(),
                problem: None,
            },
            Err(error) => ListLine {
                id: id.clone(),
                kind: String::new(),
                version: String::new(),
                summary: String::new(),
                origin: String::new(),
                problem: Some(error.to_string()),
            },
        })
        .collect();
    if json {
        return print(serde_json::to_string_pretty(&lines)?);
    }
    if lines.is_empty() {
        return print(
            "No plugins are found. They are looked for in --plugin-dir, TENON_PLUGIN_PATH, `plugins` beside this program, and ~/.local/share/tenon/plugins.",
        );
    }
    let mut table = table();
    table.set_header(["PLUGIN", "KIND", "VERSION", "WHAT IT IS"]);
    for line in &lines {
        table.add_row([&line.id, &line.kind, &line.version, line.problem.as_ref().unwrap_or(&line.summary)]);
    }
    print_table(&table)
}

fn test(dir: &Path) -> Result<()> {
    let built = tenon_plugin_tool::test(dir, &BuildOptions::default())?;
    let shelf = Shelf::open(&crate::args::PluginPlaces::default(), &[])?;
    let plugin = shelf.load_bundle(Bundle::open(&built.directory)?)?;
    print(format_args!(
        "{} {}: the component loads; it may use {}",
        built.id,
        built.version,
        words(&built.permissions)
    ))?;
    for line in trial::run(&plugin, &shelf.load("memory")?)? {
        print(format_args!("{}: {line}", built.id))?;
    }
    print(format_args!("{}: passed", built.id))
}

pub(crate) fn table() -> Table {
    let mut table = Table::new();
    table.load_style(NOTHING).set_content_arrangement(ContentArrangement::Dynamic);
    table
}

fn bytes(count: u64) -> String {
    if count.is_multiple_of(1 << 20) { format!("{} MiB", count >> 20) } else { format!("{count} bytes") }
}
