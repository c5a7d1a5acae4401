//! `--disk STORE:PLACE[,KEY=VALUE…]`: a chain of backing stores, and the disk that shows it to the guest.
//!
//! `STORE` is the id of a store plugin. One that stands on another store is followed by that other: `crypt:qcow2:disk.qcow2`. The last one is followed by its place: a path, an address, or a
//! size, which is its setting `path`, `url` or `size`. Settings behind it belong to the outermost store that has the key, or else to the disk; `STORE.KEY=VALUE` names the store.
//! `top=STORE:PLACE` names the second store of one that stands on two. `KEY-file=PATH` takes a setting from a file, as keys should be. `id=NAME` is the
//! disk's serial number, by which a guest finds it.
//! `ro` makes the disk and every store read-only; a comma in a value is written twice.

use std::fmt;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use tenon_plugins::{Kind, Plugin, Store, StoreGrants};

use crate::Usage;
use crate::args::PluginSpec;
use crate::plugins::Shelf;

/// The settings that the place of a store may be, in the order in which they are looked for.
const PLACES: [&str; 3] = ["path", "url", "size"];
/// The permission of a store that stands on others.
pub(crate) const LOWER: &str = "lower-stores";
/// The setting by which a store is made read-only.
const READ_ONLY_STORE: &str = "readonly";
/// The setting by which a disk is.
const READ_ONLY_DISK: &str = "read-only";
/// The setting that offers the guest to discard.
const DISCARD_DISK: &str = "discard";
/// The setting by which a guest finds a disk, under the name that it has here and under the disk's own.
const ID: (&str, &str) = ("id", "serial");
/// The store of plain files.
const FILE: &str = "file";
/// The store of images that have books.
const QCOW2: &str = "qcow2";
/// The store that writes nothing to the one it stands on.
const OVERLAY: &str = "overlay";
/// `top=STORE:PLACE` is the second store that a store stands on: where an overlay keeps what is changed.
const TOP: &str = "top";
/// How large a new store for what is changed is: it grows.
pub(crate) const EMPTY_TOP: u64 = 1 << 20;
/// The setting that keeps what is changed in memory.
const IN_MEMORY: &str = "limit";
/// The setting by which a store is made on a blank one.
const FORMAT: &str = "format";
/// `KEY-file=PATH` gives a store's setting `KEY` the content of a file.
const FROM_FILE: &str = "-file";
/// The longest such file.
const LONGEST_FILE: u64 = 4096;
/// The plugin that shows a store to the guest as a disk.
pub(crate) const DISK: &str = "virtio-blk";
/// The setting that names another plugin for what shows a disk or a network to the guest.
pub(crate) const DEVICE: &str = "device";
/// How many stores may stand on one another.
const DEEPEST: usize = 8;

/// A disk as written on the command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct DiskSpec {
    /// The stores and the place: what stands before the first comma.
    chain: String,
    settings: Vec<(String, String)>,
    pub(crate) read_only: bool,
}

impl FromStr for DiskSpec {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut parts = split_commas(text).into_iter();
        let chain = parts.next().unwrap_or_default();
        if !chain.contains(':') {
            return Err(format!("`{chain}` names no store; write STORE:PLACE, such as file:{chain}"));
        }
        let mut spec = Self { chain, settings: Vec::new(), read_only: false };
        for part in parts {
            match part.split_once('=') {
                Some((key, value)) if !key.is_empty() => {
                    spec.settings.push((key.to_owned(), value.to_owned()))
                }
                None if part == "ro" => spec.read_only = true,
                _ => return Err(format!("`{part}` is not KEY=VALUE; the only word without a value is `ro`")),
            }
        }
        Ok(spec)
    }
}

impl fmt::Display for DiskSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the settings, among which may be keys.
        f.write_str(&self.chain)
    }
}

/// Splits at commas; two of them are one in the text.
pub(crate) fn split_commas(text: &str) -> Vec<String> {
    let mut parts = Vec::new();
    let mut part = String::new();
    let mut rest = text.chars().peekable();
    while let Some(c) = rest.next() {
        if c != ',' || rest.next_if_eq(&',').is_some() {
            part.push(c);
        } else {
            parts.push(std::mem::take(&mut part));
        }
    }
    parts.push(part);
    parts
}

/// One store of a chain, with what it was given.
struct Layer {
    plugin: Arc<Plugin>,
    settings: Vec<(String, String)>,
    /// Its second lower store.
    top: Option<DiskSpec>,
}

impl Layer {
    /// Whether `key` names its second lower store.
    fn is_top(&self, key: &str) -> bool {
        key == TOP && self.stands_on_another() && !self.has(key)
    }

    fn id(&self) -> &str {
        &self.plugin.manifest().id
    }

    fn has(&self, key: &str) -> bool {
        self.plugin.manifest().config.contains_key(key)
    }

    /// Whether it was given a setting.
    fn says(&self, key: &str) -> bool {
        self.settings.iter().any(|(said, _)| said == key)
    }

    fn stands_on_another(&self) -> bool {
        self.plugin.manifest().permissions.contains(LOWER)
    }
}

/// A disk whose stores are open.
pub(crate) struct Disk {
    pub(crate) store: Arc<Store>,
    /// The device, with the settings that are not the stores'.
    pub(crate) device: PluginSpec,
}

impl DiskSpec {
    /// What may be ids of stores, in the chain and in that of an overlay's top; the last of each may be a part of the place.
    pub(crate) fn stores(&self) -> impl Iterator<Item = &str> {
        let tops = self.settings.iter().filter(|(name, _)| name == "top").map(|(_, top)| top);
        std::iter::once(&self.chain).chain(tops).flat_map(|chain| chain.split(':'))
    }

    /// The plugin that shows it to the guest.
    pub(crate) fn device(&self) -> &str {
        let device = self.settings.iter().rfind(|(key, _)| key == DEVICE);
        device.map_or(DISK, |(_, plugin)| plugin)
    }

    /// Opens the stores, from the lowest up, under `name`.
    pub(crate) fn open(&self, shelf: &Shelf, name: &str) -> Result<Disk> {
        let (mut layers, mut device) = self.layers(shelf)?;
        let mut lower: Vec<Arc<Store>> = Vec::new();
        while let Some(mut layer) = layers.pop() {
            let store_name = format!("{name}.{}", layer.id());
            let top_name = format!("{store_name}.{TOP}");
            let grants = granted(&layer.settings);
            if let Some(top) = &layer.top {
                lower.push(top.open(shelf, &top_name)?.store);
            } else if layer.id() == OVERLAY && !self.read_only && !layer.says(IN_MEMORY) {
                lower.push(scratch(shelf, &top_name)?);
                if !layer.says(FORMAT) {
                    layer.settings.push((FORMAT.into(), "yes".into()));
                }
            }
            lower = vec![layer.plugin.open_store(&store_name, &layer.settings, lower, &grants)?];
        }
        let Some(store) = lower.pop() else { bail!(Usage(anyhow!("--disk {}: no store", self.chain))) };
        let info = store.info();
        let plugin = shelf.load(&device.plugin)?;
        let mut unless_said = |key: &str, value: &str| {
            let is_said = device.settings.iter().any(|(said, _)| said == key);
            if plugin.manifest().config.contains_key(key) && !is_said {
                device.settings.push((key.into(), value.into()));
            }
        };
        if self.read_only || info.read_only {
            unless_said(READ_ONLY_DISK, "yes");
        } else if !info.discard {
            unless_said(DISCARD_DISK, "no");
        }
        Ok(Disk { store, device })
    }

    /// The lowest store's id, and its place.
    pub(crate) fn lowest(&self, shelf: &Shelf) -> Result<(String, String)> {
        let (layers, _) = self.layers(shelf)?;
        let lowest = layers.last().and_then(|layer| {
            let place = layer.settings.iter().find(|(key, _)| PLACES.contains(&key.as_str()))?;
            Some((layer.id().to_owned(), place.1.clone()))
        });
        lowest.with_context(|| format!("{self} has no place"))
    }

    /// Where an overlay keeps what is changed, if there is one with a store of its own for it.
    pub(crate) fn top(&self, shelf: &Shelf) -> Result<Option<Self>> {
        Ok(self.layers(shelf)?.0.into_iter().find_map(|layer| layer.top))
    }

    /// The qcow2 images of it, also those that keep what is changed, and backing files.
    pub(crate) fn images(&self, shelf: &Shelf) -> Result<Vec<String>> {
        let mut images = Vec::new();
        for layer in self.layers(shelf)?.0 {
            if let Some(top) = &layer.top {
                images.extend(top.images(shelf)?);
            }
            if layer.id() == QCOW2 {
                for (key, value) in &layer.settings {
                    match key.as_str() {
                        "path" => images.push(value.clone()),
                        "backing" => {
                            // What a backing file is, the file alone says.
                            let is_image = |path: &&str| tenon_store_qcow2::info(Path::new(path)).is_ok();
                            images.extend(value.split(':').filter(is_image).map(str::to_owned));
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(images)
    }

    /// Whether its stores stand on one another, and not one above a base.
    pub(crate) fn stands(&self) -> bool {
        self.stores().count() > 2 && !self.stores().any(|store| store == OVERLAY)
    }

    /// Why nothing that is written is kept, if it is not.
    pub(crate) fn forgets(&self, shelf: &Shelf) -> Result<Option<String>> {
        let (layers, _) = self.layers(shelf)?;
        if let Some(layer) = layers.iter().find(|layer| layer.id() == OVERLAY) {
            return match &layer.top {
                Some(top) => top.forgets(shelf),
                None => Ok(Some(
                    "changes to the overlay are gone when it is closed; `top=STORE:PLACE` names where they are kept"
                        .into(),
                )),
            };
        }
        // A store whose place is a size is made when it is opened.
        let made = layers.last().filter(|layer| !PLACES[..2].iter().any(|key| layer.has(key)));
        Ok(made.map(|layer| format!("a `{}` is gone when it is closed", layer.id())))
    }

    /// The same with one more setting.
    pub(crate) fn with(&self, key: &str, value: &str) -> Self {
        let mut spec = self.clone();
        spec.settings.push((key.into(), value.into()));
        spec
    }

    /// The same, read-only.
    pub(crate) fn only_reading(&self) -> Self {
        Self { read_only: true, ..self.clone() }
    }

    /// The same, told to format the stores that want to be formatted.
    pub(crate) fn formatted(&self, shelf: &Shelf) -> Result<Self> {
        let (layers, _) = self.layers(shelf)?;
        let mut spec = self.clone();
        for layer in layers.iter().filter(|layer| layer.has(FORMAT)) {
            spec.settings.push((format!("{}.{FORMAT}", layer.id()), "yes".into()));
        }
        Ok(spec)
    }

    /// The chain from the outermost store to the lowest, with the settings of each, and the device.
    fn layers(&self, shelf: &Shelf) -> Result<(Vec<Layer>, PluginSpec)> {
        let wrong = |what: String| Usage(anyhow!("--disk {}: {what}", self.chain));
        let mut layers: Vec<Layer> = Vec::new();
        let mut rest = self.chain.as_str();
        loop {
            let Some((id, behind)) = rest.split_once(':') else {
                bail!(wrong(format!("`{rest}` is no STORE:PLACE, and the store before it stands on one")));
            };
            let plugin = shelf.load_store(id).map_err(|error| match error.is::<Usage>() {
                true if id == "https" => {
                    wrong(format!("write http:{} for an image on a web server", self.chain)).into()
                }
                true => wrong(error.to_string()).into(),
                false => error,
            })?;
            if plugin.manifest().kind != Kind::Store {
                bail!(wrong(format!("`{id}` is a {}, not a store", plugin.manifest().kind)));
            }
            if layers.len() == DEEPEST {
                bail!(wrong(format!("more than {DEEPEST} stores stand on one another")));
            }
            let mut layer = Layer { plugin, settings: Vec::new(), top: None };
            rest = behind;
            if layer.stands_on_another() {
                layers.push(layer);
                continue;
            }
            match PLACES.into_iter().find(|key| layer.has(key)) {
                Some(key) if !rest.is_empty() => layer.settings.push((key.into(), rest.into())),
                Some(key) => {
                    bail!(wrong(format!("the store `{}` needs its {key} behind the colon", layer.id())))
                }
                None if rest.is_empty() => {}
                None => bail!(wrong(format!(
                    "the store `{}` has no place, and `{rest}` stands behind it",
                    layer.id()
                ))),
            }
            layers.push(layer);
            break;
        }
        let mut device = PluginSpec { plugin: self.device().into(), settings: Vec::new() };
        for (key, value) in self.settings.iter().filter(|(key, _)| key != DEVICE) {
            let named = key
                .split_once('.')
                .and_then(|(id, key)| layers.iter().position(|layer| layer.id() == id).map(|at| (at, key)));
            let has = |layer: &Layer, key: &str| {
                layer.has(key) || from_file(&layer.plugin, key).is_some() || layer.is_top(key)
            };
            let owner = named
                .or_else(|| layers.iter().position(|layer| has(layer, key)).map(|at| (at, key.as_str())));
            let Some((at, key)) = owner else {
                let key = if key == ID.0 { ID.1 } else { key };
                let disk = shelf.load(&device.plugin)?;
                if !disk.manifest().config.contains_key(key) {
                    bail!(wrong(no_setting(key, &layers, &disk)));
                }
                device.settings.push((key.to_owned(), value.clone()));
                continue;
            };
            let layer = &mut layers[at];
            if layer.is_top(key) {
                let top = Self { chain: value.clone(), settings: Vec::new(), read_only: self.read_only };
                layer.top = Some(top);
                continue;
            }
            let setting = match from_file(&layer.plugin, key) {
                Some(own) => {
                    let text = content(value).with_context(|| format!("--disk {}: {key}", self.chain))?;
                    (own.to_owned(), text)
                }
                None => (key.to_owned(), value.clone()),
            };
            layer.settings.push(setting);
        }
        // Nothing is written under an overlay, so that many machines may share it.
        let mut read_only = self.read_only;
        for layer in &mut layers {
            if read_only && layer.has(READ_ONLY_STORE) && !layer.says(READ_ONLY_STORE) {
                layer.settings.push((READ_ONLY_STORE.into(), "yes".into()));
            }
            read_only |= layer.id() == OVERLAY;
        }
        for layer in &layers {
            layer.plugin.manifest().settings(&layer.settings).map_err(|error| wrong(error.to_string()))?;
        }
        Ok((layers, device))
    }
}

/// A file without a name, for what is changed until the machine ends.
fn scratch(shelf: &Shelf, name: &str) -> Result<Arc<Store>> {
    let folder = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
    let folder = folder.map_or_else(|| "/var/tmp".into(), PathBuf::from);
    let file = tempfile::tempfile_in(&folder).and_then(|file| file.set_len(EMPTY_TOP).map(|()| file));
    let file = file.with_context(|| {
        format!(
            "no file for what is changed can be made in `{}`; TMPDIR names another folder, `{TOP}=STORE:PLACE` another place",
            folder.display()
        )
    })?;
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    Ok(shelf.load(FILE)?.open_store(name, &[("path".into(), path)], Vec::new(), &StoreGrants::none())?)
}

/// That nothing on the way has the setting `key`, and which there are.
fn no_setting(key: &str, layers: &[Layer], disk: &Plugin) -> String {
    let stores = layers.iter().map(|layer| {
        // The place is no setting to be written behind a comma.
        let own = layer.plugin.manifest().config.keys();
        let own = own.filter(|key| {
            !(layer.settings.iter().any(|(said, _)| said == *key) && PLACES.contains(&key.as_str()))
        });
        let top = (layer.id() == OVERLAY).then_some(TOP);
        taken(layer.id(), own.map(String::as_str).chain(top))
    });
    let of_disk = taken("the disk", disk.manifest().config.keys().map(String::as_str));
    let all: Vec<String> = stores.chain([of_disk]).collect();
    format!("there is no setting `{key}`: {}", all.join("; "))
}

/// Which settings something has.
pub(crate) fn taken<'k>(who: &str, keys: impl Iterator<Item = &'k str>) -> String {
    let keys: Vec<&str> = keys.collect();
    if keys.is_empty() { format!("{who} takes none") } else { format!("{who} takes {}", keys.join(", ")) }
}

/// The setting that `key` gives the content of a file, if it is one of those.
fn from_file<'k>(plugin: &Plugin, key: &'k str) -> Option<&'k str> {
    let has = |key: &str| plugin.manifest().config.contains_key(key);
    key.strip_suffix(FROM_FILE).filter(|own| !has(key) && has(own))
}

/// A plugin's settings, with the content of files where they name some.
pub(crate) fn with_files(plugin: &Plugin, settings: &[(String, String)]) -> Result<Vec<(String, String)>> {
    let setting = |(key, value): &(String, String)| match from_file(plugin, key) {
        Some(own) => Ok((own.to_owned(), content(value)?)),
        None => Ok((key.clone(), value.clone())),
    };
    settings.iter().map(setting).collect()
}

/// A file's text, or in hexadecimal what is no text.
fn content(path: &str) -> Result<String> {
    let bytes = tenon_plugins::read_bounded(Path::new(path), LONGEST_FILE)
        .map_err(|error| Usage(anyhow!("`{path}`: {error}")))?;
    Ok(match String::from_utf8(bytes) {
        Ok(text) if text.trim().bytes().all(|byte| byte.is_ascii_graphic()) => text.trim().to_owned(),
        Ok(text) => hexadecimal(text.as_bytes()),
        Err(error) => hexadecimal(error.as_bytes()),
    })
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What a store may reach: the host in its `url`, since the administrator wrote it.
pub(crate) fn granted(settings: &[(String, String)]) -> StoreGrants {
    let url = settings.iter().find(|(key, _)| key == "url").map(|(_, url)| url.as_str());
    url.and_then(host_and_port)
        .map_or_else(StoreGrants::none, |(host, port)| StoreGrants::none().allow_host(host, port))
}

/// The host and port of `http://HOST[:PORT]/…` or `https://…`.
fn host_and_port(url: &str) -> Option<(&str, u16)> {
    let (scheme, rest) = url.split_once("://")?;
    let default = if scheme.eq_ignore_ascii_case("https") { 443 } else { 80 };
    let authority = rest.split(['/', '?', '#']).next()?;
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.contains(']') => Some((host, port.parse().ok()?)),
        _ => Some((authority, default)),
    }
}

/// A CD-ROM image: a file, read-only.
pub(crate) fn cdrom(path: &Path) -> Result<DiskSpec> {
    let Some(path) = path.to_str() else {
        bail!(Usage(anyhow!("--cdrom {}: the path is not UTF-8", path.display())));
    };
    Ok(DiskSpec { chain: format!("file:{path}"), settings: Vec::new(), read_only: true })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_a_chain_with_settings() {
        let spec: DiskSpec = "crypt:qcow2:a,,b.qcow2,ro,crypt.key=k,serial=x".parse().unwrap();
        assert_eq!(spec.chain, "crypt:qcow2:a,b.qcow2");
        assert!(spec.read_only);
        assert_eq!(spec.settings, [("crypt.key".into(), "k".into()), ("serial".into(), "x".into())]);
        for text in ["", "disk.img", "file:a,rw", "file:a,=1"] {
            assert!(text.parse::<DiskSpec>().is_err(), "{text} was accepted");
        }
    }

    #[test]
    fn a_url_grants_its_host_and_port() {
        assert_eq!(host_and_port("http://mirror.example/a:b"), Some(("mirror.example", 80)));
        assert_eq!(host_and_port("https://mirror.example:8443/x"), Some(("mirror.example", 8443)));
        assert_eq!(host_and_port("http://[::1]:8080/x"), Some(("[::1]", 8080)));
        assert_eq!(host_and_port("HTTPS://mirror.example?x=/"), Some(("mirror.example", 443)));
        assert_eq!(host_and_port("mirror.example/x"), None);
    }
}
