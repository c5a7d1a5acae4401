//! A machine without an engine, and the fixture plugins.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock};

use tenon_core::{Bus, Clock, InterruptController, Interrupts, Msi, Requests, Space};
use tenon_plugin_tool::{BuildOptions, build};
use tenon_plugins::{Bundle, Device, Grants, Host, MachineParts, Plugin};

/// The ports of the fixture device.
pub(crate) const BASE: u64 = 0x500;

/// Notes every change of a line.
#[derive(Default)]
pub(crate) struct Controller(pub(crate) Mutex<Vec<(u32, bool)>>);

impl InterruptController for Controller {
    fn set_line(&self, gsi: u32, high: bool) {
        self.0.lock().unwrap().push((gsi, high));
    }
    fn signal_msi(&self, _: Msi) {}
}

/// A machine's parts.
pub(crate) struct Machine {
    pub(crate) parts: MachineParts,
    pub(crate) controller: Arc<Controller>,
}

impl Machine {
    pub(crate) fn new(clock: Arc<Clock>) -> Self {
        let controller = Arc::new(Controller::default());
        let parts = MachineParts {
            pio: Bus::new(Space::Pio),
            mmio: Bus::new(Space::Mmio),
            mmio_window: 0xd000_0000..0xd001_0000,
            interrupts: Interrupts::new(controller.clone()),
            clock,
            requests: Requests::new(),
        };
        Self { parts, controller }
    }

    /// A machine whose clock stands until it is moved.
    pub(crate) fn still() -> Self {
        Self::new(Clock::virtual_time())
    }

    pub(crate) fn read(&self, port: u64) -> u64 {
        self.parts.pio.read(BASE + port, 1)
    }

    pub(crate) fn write(&self, port: u64, value: u64) {
        self.parts.pio.write(BASE + port, 4, value);
    }

    /// The levels that the controller saw.
    pub(crate) fn levels(&self) -> Vec<(u32, bool)> {
        self.controller.0.lock().unwrap().clone()
    }

    /// The fixture device with these settings.
    pub(crate) fn misdeed(&self, settings: &[(&str, &str)]) -> Arc<Device> {
        misdeed().attach("misdeed0", &owned(settings), &self.parts).unwrap()
    }
}

pub(crate) fn owned(settings: &[(&str, &str)]) -> Vec<(String, String)> {
    settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

/// The directory of a built fixture: component, native library and manifest.
pub(crate) fn fixture(name: &'static str) -> PathBuf {
    static BUILD: Mutex<()> = Mutex::new(());
    let _one_at_a_time = BUILD.lock().unwrap();
    let scratch = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let options = BuildOptions {
        output: Some(scratch.join("fixtures")),
        target_dir: Some(scratch.join("target")),
        native: true,
        archive: false,
        quiet: true,
    };
    build(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name), &options)
        .unwrap()
        .directory
}

/// The host of all tests; its cache is new.
pub(crate) fn host() -> &'static Arc<Host> {
    static HOST: OnceLock<Arc<Host>> = OnceLock::new();
    HOST.get_or_init(|| Host::new(None).unwrap())
}

fn misdeed_directory() -> &'static PathBuf {
    static DIRECTORY: OnceLock<PathBuf> = OnceLock::new();
    DIRECTORY.get_or_init(|| fixture("misdeed"))
}

/// The files of the misbehaving device.
pub(crate) fn misdeed_bundle() -> Bundle {
    Bundle::open(misdeed_directory()).unwrap()
}

/// The misbehaving device.
pub(crate) fn misdeed() -> &'static Arc<Plugin> {
    static PLUGIN: OnceLock<Arc<Plugin>> = OnceLock::new();
    PLUGIN.get_or_init(|| host().load(misdeed_bundle(), &Grants::none()).unwrap())
}

/// The personality.
pub(crate) fn guest() -> &'static Arc<Plugin> {
    static PLUGIN: OnceLock<Arc<Plugin>> = OnceLock::new();
    PLUGIN.get_or_init(|| host().load(Bundle::open(&fixture("guest")).unwrap(), &Grants::none()).unwrap())
}
