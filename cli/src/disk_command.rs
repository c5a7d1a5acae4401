//! `tenon disk`: makes, looks at, resizes, converts and checks what disks are kept in. Every store is used through its plugin, as a machine uses it.

use std::fs::File;
use std::io::Read;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow, bail};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use tenon_plugins::{Data, MAX_TRANSFER, OperationKind, Store};
use tenon_store_qcow2 as qcow2;

use crate::args::{DiskCommand, PluginUse, Size};
use crate::disks::{DiskSpec, EMPTY_TOP};
use crate::plugins::Shelf;
use crate::run::FAILED;
use crate::say::{self, tell};
use crate::{Usage, plugin};

/// How large a disk is at least while it is found out what its stores take of it.
const ROOM: u64 = 4 << 20;
/// How many transfers are under way while a disk is copied or read.
const DEPTH: u64 = 8;

pub(crate) fn disk(command: &DiskCommand) -> Result<ExitCode> {
    match command {
        DiskCommand::Create { disk, size, backing, plugins } => {
            let shelf = shelf(plugins, &[disk])?;
            // Of an overlay it is the copy that has a length; its top grows.
            match (size, disk.top(&shelf)?) {
                (Some(size), Some(_)) => {
                    let disk = disk.with("overlay.size", &size.0.to_string());
                    create(&disk, None, backing.as_deref(), &shelf)?;
                }
                _ => create(disk, *size, backing.as_deref(), &shelf)?,
            }
        }
        DiskCommand::Info { disk, json, plugins } => info(disk, *json, &shelf(plugins, &[disk])?)?,
        DiskCommand::Resize { disk, size, plugins } => resize(disk, *size, &shelf(plugins, &[disk])?)?,
        DiskCommand::Convert { from, to, size, overwrite, plugins } => {
            convert(from, to, *size, *overwrite, &shelf(plugins, &[from, to])?)?
        }
        DiskCommand::Check { disk, repair, json, plugins } => {
            return check(disk, *repair, *json, &shelf(plugins, &[disk])?);
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The plugins for these disks.
fn shelf(plugins: &PluginUse, disks: &[&DiskSpec]) -> Result<Shelf> {
    for id in &plugins.allow_native {
        if !disks.iter().any(|disk| disk.stores().any(|store| store == id)) {
            bail!(Usage(anyhow!("--allow-native {id}: no disk here is one of `{id}`")));
        }
    }
    Shelf::open(&plugins.places, &plugins.allow_native)
}

/// Makes the lowest store, and formats those that stand on it and want that.
fn create(disk: &DiskSpec, size: Option<Size>, backing: Option<&Path>, shelf: &Shelf) -> Result<()> {
    // Of an overlay it is the top that is made: the base is there.
    let top = disk.top(shelf)?;
    let (store, place) = top.as_ref().unwrap_or(disk).lowest(shelf)?;
    let path = Path::new(&place);
    if path.exists() {
        bail!("`{place}` exists already; remove it, or take another name");
    }
    let wanted = size.map(|size| size.0).or(top.is_some().then_some(EMPTY_TOP));
    match (store.as_str(), wanted) {
        (_, Some(0)) => bail!(Usage(anyhow!("--size: a disk has more than 0 bytes"))),
        ("file", Some(size)) if !size.is_multiple_of(512) => {
            bail!(Usage(anyhow!("--size: {size} bytes are no multiple of 512")))
        }
        ("file", Some(size)) => {
            if backing.is_some() {
                bail!(Usage(anyhow!("--backing: a plain file stands on nothing; make a qcow2 image")));
            }
            let made = File::options().write(true).create_new(true).open(path).and_then(|file| {
                file.set_len(size).inspect_err(|_| {
                    std::fs::remove_file(path).ok();
                })
            });
            made.with_context(|| format!("`{place}` cannot be made with {size} bytes"))?;
        }
        ("file", None) => bail!(Usage(anyhow!("--size: a new disk needs one, such as --size 10G"))),
        ("qcow2", size) => {
            let backing = backing.map(backing_file).transpose()?;
            let options = qcow2::CreateOptions { backing, ..qcow2::CreateOptions::default() };
            qcow2::create(path, size, &options).with_context(|| format!("`{place}` cannot be made"))?;
        }
        _ => bail!(Usage(anyhow!("a `{store}` is not made by this command; `file` and `qcow2` are"))),
    }
    let formatted = disk.formatted(shelf).and_then(|ready| {
        if backing.is_some() && ready == *disk {
            // There is nothing to be formatted, and no need for all that the backing file stands on.
            return Ok(());
        }
        let granted = backing.and_then(Path::to_str).map(|path| ready.with("qcow2.backing", path));
        granted.unwrap_or(ready).open(shelf, "new").map(drop)
    });
    if formatted.is_err() {
        // It was made a moment ago, by this.
        std::fs::remove_file(path).ok();
    }
    formatted
}

/// What a backing file is. One that is neither an image that can be used nor plain bytes would be taken for a disk that it is not.
fn backing_file(path: &Path) -> Result<qcow2::Backing> {
    const OTHERS: [(&[u8], &str); 4] =
        [(b"KDMV", "VMDK"), (b"QED\0", "QED"), (b"vhdxfile", "VHDX"), (b"<<< ", "VDI")];
    let of = || format!("--backing: `{}`", path.display());
    let qcow2 = match qcow2::info(path) {
        Ok(qcow2::Info { unusable: Some(why), .. }) => bail!("{}: {why}", of()),
        Ok(_) => true,
        Err(qcow2::ImageError::NotQcow2) => false,
        Err(error) => return Err(error).with_context(of),
    };
    let mut begin = Vec::new();
    File::open(path).and_then(|file| file.take(8).read_to_end(&mut begin)).with_context(of)?;
    if let Some((_, format)) = OTHERS.iter().find(|(magic, _)| begin.starts_with(magic)) {
        bail!("{}: it begins as a {format} image does; `qemu-img convert` makes a qcow2 or raw one", of());
    }
    Ok(qcow2::Backing { path: path.into(), qcow2 })
}

/// What `tenon disk info --json` prints.
#[derive(Serialize)]
struct Info {
    disk: String,
    size: u64,
    block_size: u32,
    optimal_size: u32,
    identity: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    image: Option<Image>,
}

/// What a qcow2 image is besides.
#[derive(Serialize)]
struct Image {
    version: u32,
    taken: u64,
    cluster_size: u64,
    backing: Option<String>,
    snapshots: u32,
}

fn info(disk: &DiskSpec, json: bool, shelf: &Shelf) -> Result<()> {
    let (lowest, place) = disk.lowest(shelf)?;
    let image = if lowest == "qcow2" { qcow2::info(Path::new(&place)).ok() } else { None };
    let store = disk.only_reading().open(shelf, "disk")?.store;
    let found = store.info();
    let info = Info {
        disk: disk.to_string(),
        size: found.size,
        block_size: found.block_size,
        optimal_size: found.optimal_size,
        identity: found.identity,
        image: image.map(|image| Image {
            version: image.version,
            taken: image.taken,
            cluster_size: image.cluster_size,
            backing: image.backing,
            snapshots: image.snapshots,
        }),
    };
    if json {
        return say::print(serde_json::to_string_pretty(&info)?);
    }
    let mut table = plugin::table();
    let mut row = |name: &str, value: String| {
        table.add_row([name.to_owned(), value]);
    };
    row("disk", info.disk);
    row("size", format!("{} ({} bytes)", human(info.size), info.size));
    row("blocks", format!("{} bytes; cheap in units of {}", info.block_size, info.optimal_size));
    if !info.identity.is_empty() {
        row("identity", info.identity);
    }
    if let Some(image) = info.image {
        row("image", format!("qcow2 version {}, clusters of {} bytes", image.version, image.cluster_size));
        row("taken", format!("{} on this host", human(image.taken)));
        row("backing", image.backing.unwrap_or_else(|| "none".into()));
        if image.snapshots > 0 {
            row("snapshots", format!("{}, with which it can only be read", image.snapshots));
        }
    }
    say::print_table(&table)
}

/// Refuses a disk that keeps nothing of what is written to it.
fn keeps(disk: &DiskSpec, shelf: &Shelf) -> Result<()> {
    match disk.forgets(shelf)? {
        Some(why) => bail!(Usage(anyhow!("{disk}: nothing would be kept: {why}"))),
        None => Ok(()),
    }
}

fn resize(disk: &DiskSpec, size: Size, shelf: &Shelf) -> Result<()> {
    keeps(disk, shelf)?;
    let store = disk.open(shelf, "disk")?.store;
    let before = store.info().size;
    if store.info().read_only {
        bail!(Usage(anyhow!("{disk} is read-only")));
    }
    if size.0 < before {
        bail!(Usage(anyhow!("{disk} has {before} bytes and would lose its end; only growing is done here")));
    }
    let after = store.resize(size.0).map_err(|error| anyhow!("{disk}: {error}"))?;
    close(&store)?;
    say::print(format!("{disk}: {} → {}", human(before), human(after.size)))
}

/// Copies a disk to another, which is made if it is not there.
fn convert(from: &DiskSpec, to: &DiskSpec, size: Option<Size>, overwrite: bool, shelf: &Shelf) -> Result<()> {
    keeps(to, shelf)?;
    let source = from.only_reading().open(shelf, "from")?.store;
    let length = source.info().size;
    // Of an overlay it is the top that is written.
    let (_, place) = to.top(shelf)?.as_ref().unwrap_or(to).lowest(shelf)?;
    let is_new = !Path::new(&place).exists();
    if !is_new && !overwrite {
        bail!(Usage(anyhow!("`{place}` exists already; --overwrite writes over it")));
    }
    let unfinished = if is_new { Some(Unfinished::new(&place)?) } else { None };
    // What stands on another store may keep books of its own there, and how much they take is seen when it is made.
    let first = match size {
        Some(size) => size.0,
        None if to.stands() => length.max(ROOM),
        None => length,
    };
    if is_new {
        create(to, Some(Size(first)), None, shelf)?;
    }
    let copied = to.open(shelf, "to").and_then(|disk| {
        let mut target = disk.store;
        let mut room = target.info().size;
        if is_new && size.is_none() && to.stands() && room != length {
            drop(target);
            std::fs::remove_file(&place)?;
            create(to, Some(Size(length + first.saturating_sub(room))), None, shelf)?;
            target = to.open(shelf, "to")?.store;
            room = target.info().size;
        }
        if room < length {
            let remedy =
                if is_new { "give it a larger --size" } else { "make it larger with `tenon disk resize`" };
            bail!("there is room for {room} bytes, and {length} are copied; {remedy}");
        }
        each_part(&source, "copying", |parts| write_parts(&target, parts))?;
        close(&target)
    });
    if copied.is_err() && is_new {
        std::fs::remove_file(&place).ok();
    }
    copied.with_context(|| format!("{from} → {to}"))?;
    drop(unfinished);
    say::print(format!("{from} → {to}: {}", human(length)))
}

/// A file that is being made, which a signal that ends the process takes with it.
struct Unfinished {
    signals: signal_hook::iterator::Handle,
    watcher: Option<JoinHandle<()>>,
}

impl Unfinished {
    fn new(place: &str) -> Result<Self> {
        let mut signals = Signals::new([SIGHUP, SIGINT, SIGTERM]).context("watching for signals")?;
        let handle = signals.handle();
        let place = place.to_owned();
        let watcher = std::thread::spawn(move || {
            if let Some(signal) = signals.forever().next() {
                std::fs::remove_file(&place).ok();
                // As if it had not been caught.
                signal_hook::low_level::emulate_default_handler(signal).ok();
            }
        });
        Ok(Self { signals: handle, watcher: Some(watcher) })
    }
}

impl Drop for Unfinished {
    fn drop(&mut self) {
        self.signals.close();
        self.watcher.take().map(JoinHandle::join);
    }
}

/// Writes parts; one that is all zeroes as that, which many stores keep without space. It is never left out: where nothing was written, what
/// decrypts a store gives anything but zeroes.
fn write_parts(target: &Store, parts: Vec<(u64, Vec<u8>)>) -> Result<()> {
    let zeroes = target.info().write_zeroes;
    let operations = parts
        .into_iter()
        .map(|(at, bytes)| {
            let length = bytes.len() as u64;
            if zeroes && bytes.iter().all(|byte| *byte == 0) {
                (OperationKind::WriteZeroes { unmap: true }, at, length, Data::None)
            } else {
                (OperationKind::Write, at, length, Data::Host(bytes))
            }
        })
        .collect();
    for (result, _) in target.run(operations) {
        result.map_err(|error| anyhow!("writing `{}`: {error}", target.name()))?;
    }
    Ok(())
}

/// Reads a whole store, some parts at a time, and passes them on with their places.
fn each_part(
    store: &Store,
    what: &'static str,
    mut pass: impl FnMut(Vec<(u64, Vec<u8>)>) -> Result<()>,
) -> Result<()> {
    let length = store.info().size;
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes}, {eta} left")?;
    let bar = ProgressBar::new(length).with_style(style).with_message(what);
    let mut at = 0;
    while at < length {
        let mut places = Vec::new();
        while at < length && (places.len() as u64) < DEPTH {
            let count = MAX_TRANSFER.min(length - at);
            places.push((at, count));
            at += count;
        }
        let operations = places
            .iter()
            .map(|(at, count)| {
                let room = usize::try_from(*count).unwrap_or(0);
                (OperationKind::Read, *at, *count, Data::Host(vec![0; room]))
            })
            .collect();
        let mut parts = Vec::new();
        for ((place, _), (result, bytes)) in places.into_iter().zip(store.run(operations)) {
            result.map_err(|error| anyhow!("reading `{}` at byte {place}: {error}", store.name()))?;
            parts.push((place, bytes));
        }
        pass(parts)?;
        bar.set_position(at);
    }
    bar.finish_and_clear();
    Ok(())
}

fn close(store: &Arc<Store>) -> Result<()> {
    store.flush().map_err(|error| anyhow!("making `{}` durable: {error}", store.name()))?;
    store.close().map_err(|error| anyhow!(error))
}

/// What `tenon disk check --json` prints.
#[derive(Serialize)]
struct Checked {
    disk: String,
    good: bool,
    /// Bytes that were read; none where the books are wrong.
    read: u64,
    /// Of each image.
    books: Vec<Books>,
}

/// What an image's own books say.
#[derive(Serialize)]
struct Books {
    image: String,
    data_clusters: u64,
    /// It was not closed in good order.
    unclean: bool,
    errors: u64,
    lost_clusters: u64,
    told: Vec<String>,
    /// What was put right before.
    repaired: Option<Repaired>,
}

/// Reference counts that were put right.
#[derive(Serialize)]
struct Repaired {
    too_low: u64,
    too_high: u64,
    /// Clusters in use that lay behind the end of the file, and read as zeroes.
    behind_end: u64,
}

/// Checks the books of all images that the disk is made of, and reads everything.
fn check(disk: &DiskSpec, repair: bool, json: bool, shelf: &Shelf) -> Result<ExitCode> {
    let mut found = Checked { disk: disk.to_string(), good: true, read: 0, books: Vec::new() };
    for image in disk.images(shelf)? {
        let path = Path::new(&image);
        let of = || format!("`{image}`");
        let mut report = qcow2::check(path).with_context(of)?;
        let mut repaired = None;
        if repair && (report.errors > 0 || report.leaks > 0 || report.unclean) {
            let done = qcow2::repair(path).with_context(of)?;
            report = qcow2::check(path).with_context(of)?;
            if !json {
                say::print(format!("{image}: {done}"))?;
            }
            repaired =
                Some(Repaired { too_low: done.clusters, too_high: done.lost, behind_end: done.behind });
        }
        for fault in &report.told {
            tell!("tenon: {image}: {fault}");
        }
        if report.unclean {
            tell!(
                "tenon: {image}: it was not closed in good order; what writes it next puts its counts right, as does `--repair`"
            );
        }
        found.good &= report.errors == 0;
        if !json {
            say::print(format!(
                "{image}: {} clusters with data, {} errors, {} lost clusters",
                report.data_clusters, report.errors, report.leaks
            ))?;
        }
        found.books.push(Books {
            image,
            data_clusters: report.data_clusters,
            unclean: report.unclean,
            errors: report.errors,
            lost_clusters: report.leaks,
            told: report.told,
            repaired,
        });
    }
    if found.good {
        let store = disk.only_reading().open(shelf, "disk")?.store;
        each_part(&store, "reading", |_| Ok(()))?;
        found.read = store.info().size;
        if !json {
            say::print(format!("{disk}: all {} can be read", human(found.read)))?;
        }
    }
    if json {
        say::print(serde_json::to_string_pretty(&found)?)?;
    }
    Ok(if found.good { ExitCode::SUCCESS } else { ExitCode::from(FAILED) })
}

/// A number of bytes for people.
fn human(bytes: u64) -> String {
    indicatif::BinaryBytes(bytes).to_string()
}
