//! `--firmware [FILE]` and `--nvram STORE:PLACE`: the machine starts in PC firmware, which keeps its variables in a store.
//!
//! The code is mapped as ROM that ends at 4 GiB, the variables are a flash chip right below it. Their first content is the file beside the code whose name has `VARS`
//! for `CODE`, as distributions install them. Without `--nvram` they are forgotten with the machine; a store that is blank is given that first content, and one that holds something else than
//! variables is left alone: firmware makes anew what it does not know.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, bail};
use tenon_abi::StoreError;
use tenon_core::{HIGH_BASE, Machine, Ram, Rom};
use tenon_platform::{FirmwareBoard, FirmwareParts, Flash, FlashStore, Pci, Platform};
use tenon_plugins::{MAX_TRANSFER, MachineParts, Store, read_bounded};

use crate::Usage;
use crate::args::RunArgs;
use crate::plugins::Shelf;

/// Where distributions put OVMF with 4 MiB of flash, of which the code is the larger part.
const INSTALLED: [&str; 3] = [
    "/usr/share/OVMF/OVMF_CODE_4M.fd",
    "/usr/share/edk2/x64/OVMF_CODE.4m.fd",
    "/usr/share/edk2/ovmf/OVMF_CODE.fd",
];
/// More than this is no flash chip of a PC.
const LARGEST: u64 = 16 << 20;

/// The firmware of a machine.
pub(crate) struct Firmware {
    /// The file with its code.
    pub(crate) path: PathBuf,
    code: Vec<u8>,
    variables: Option<Vec<u8>>,
    store: Option<Arc<Store>>,
}

struct Nvram(Arc<Store>);

impl FlashStore for Nvram {
    fn keep(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        write(&self.0, offset, bytes).map_err(io::Error::other)
    }
}

impl Firmware {
    /// Reads what the command line names; `None` where it names no firmware.
    pub(crate) fn open(args: &RunArgs, shelf: &Shelf) -> Result<Option<Self>> {
        let Some(named) = &args.firmware else {
            if args.nvram.is_some() {
                bail!(Usage(anyhow!("--nvram: only firmware has variables; add --firmware")));
            }
            return Ok(None);
        };
        let installed = || INSTALLED.iter().map(PathBuf::from).find(|path| path.exists());
        let path = named.clone().or_else(installed).ok_or_else(|| {
            Usage(anyhow!(
                "--firmware: no OVMF in {}; install the package `ovmf`, or name a file",
                INSTALLED[0]
            ))
        })?;
        let code = read(&path)?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        // Images of another name hold code and variables together, or have none.
        let beside = path.with_file_name(name.replacen("CODE", "VARS", 1));
        let first = if beside != path && beside.exists() { Some(read(&beside)?) } else { None };
        let (variables, store) = match &args.nvram {
            None => (first, None),
            Some(spec) => {
                let named = || format!("--nvram {spec}");
                let store = spec.open(shelf, "nvram").with_context(named)?.store;
                let content = content(&store, first).with_context(named)?;
                (Some(content), Some(store))
            }
        };
        Ok(Some(Self { path, code, variables, store }))
    }

    /// RAM of this size, and the code as ROM.
    pub(crate) fn ram(&self, size: u64) -> Result<Arc<Ram>> {
        let base = HIGH_BASE.saturating_sub(self.code.len() as u64);
        let rom =
            Rom::new(base, &self.code).with_context(|| format!("firmware `{}`", self.path.display()))?;
        Ram::with_roms(size, vec![rom]).map_err(|error| Usage(anyhow!("--memory: {error}")).into())
    }

    /// Shows the board that the firmware knows. Before any device is attached.
    pub(crate) fn show_board(pci: &Pci) -> Result<()> {
        Ok(pci.show_as_pc()?)
    }

    /// Adds the chips that the firmware uses. They are there for as long as the result is.
    pub(crate) fn add_chips(
        self,
        parts: &MachineParts,
        ram: &Ram,
        platform: &Platform,
    ) -> Result<FirmwareBoard> {
        let store = self.store.map(|store| Box::new(Nvram(store)) as Box<dyn FlashStore>);
        Ok(FirmwareBoard::new(FirmwareParts {
            ram,
            pio: &parts.pio,
            mmio: &parts.mmio,
            clock: &parts.clock,
            requests: &parts.requests,
            platform,
            variables: self.variables.map(|content| Flash::new(content, store)),
        })?)
    }

    /// Lets the machine reset and save the chips.
    pub(crate) fn join(board: &FirmwareBoard, machine: &Machine) {
        board.lifecycles().into_iter().for_each(|chip| machine.add_device(chip));
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    let bytes = read_bounded(path, LARGEST).with_context(|| format!("firmware `{}`", path.display()))?;
    if bytes.is_empty() {
        bail!("firmware `{}` is empty", path.display());
    }
    Ok(bytes)
}

/// What the store holds, or where it is blank, the first content, which is put there.
fn content(store: &Store, first: Option<Vec<u8>>) -> Result<Vec<u8>> {
    let info = store.info();
    if info.read_only {
        bail!("the store is read-only, and firmware writes its variables");
    }
    if info.size > LARGEST {
        bail!("the store has {} bytes; firmware's variables have at most 16 MiB", info.size);
    }
    // Of another size it is no such store, and the firmware would write to it all the same.
    if let Some(first) = &first
        && first.len() as u64 != info.size
    {
        bail!("the store has {} bytes; this firmware's variables have {}", info.size, first.len());
    }
    let there = read_all(store, info.size)?;
    if there.iter().any(|byte| *byte != 0) {
        // Without first variables to compare with, any volume may be this firmware's. What a firmware keeps in no such volume cannot be told from other things.
        let right = match first.as_deref() {
            Some(first) => there.starts_with(volume_header(first)),
            None => !volume_header(&there).is_empty(),
        };
        if !right {
            bail!(
                "the store holds something else than this firmware's variables; give it a blank store, such as a new file of {} bytes",
                info.size
            );
        }
        return Ok(there);
    }
    let first = first.ok_or_else(|| {
        anyhow!("the store is blank, and there is no file of first variables beside the code")
    })?;
    write(store, 0, &first).and_then(|()| store.flush())?;
    Ok(first)
}

/// What stays as it is for as long as a UEFI volume of variables does: the volume's header (PI 1.7 vol. 3 §3.2.1) and, where the volume is formatted, that of the variables (edk2,
/// `VARIABLE_STORE_HEADER`). Nothing of what is no such volume.
fn volume_header(volume: &[u8]) -> &[u8] {
    const SIGNATURE: std::ops::Range<usize> = 40..44;
    const LENGTH: usize = 48;
    const VARIABLES: usize = 28;
    const FORMATTED: (usize, u8) = (20, 0x5a);
    let is_volume = volume.get(SIGNATURE) == Some(b"_FVH");
    let length = volume.get(LENGTH..LENGTH + 2).map_or(0, |bytes| u16::from_le_bytes([bytes[0], bytes[1]]));
    let length = usize::from(length);
    let is_formatted = volume.get(length + FORMATTED.0) == Some(&FORMATTED.1);
    let end = if is_formatted { length + VARIABLES } else { length };
    volume.get(..end).filter(|_| is_volume).unwrap_or_default()
}

fn read_all(store: &Store, size: u64) -> Result<Vec<u8>, StoreError> {
    let mut bytes = Vec::new();
    while (bytes.len() as u64) < size {
        let at = bytes.len() as u64;
        bytes.extend(store.read(at, MAX_TRANSFER.min(size - at))?);
    }
    Ok(bytes)
}

fn write(store: &Store, offset: u64, bytes: &[u8]) -> Result<(), StoreError> {
    let most = usize::try_from(MAX_TRANSFER).unwrap_or(usize::MAX);
    for (at, piece) in (offset..).step_by(most).zip(bytes.chunks(most)) {
        store.write(at, piece.to_vec())?;
    }
    Ok(())
}
