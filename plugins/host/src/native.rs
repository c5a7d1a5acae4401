//! Native plugins: shared libraries that speak the tables of `tenon-abi`.
//!
//! They are trusted code: no sandbox, no deadline, no limits. What they give back is checked all the same, since a mistake should be an error and not a mystery.
//!
//! Long, for it is one boundary: each function of the table, with what makes the call sound.
#![allow(unsafe_code, reason = "loads libraries and calls through their tables")]

use std::ffi::c_void;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use libloading::Library;
use tenon_abi as abi;
use tenon_abi::{
    Bytes, DeviceHost, DeviceTable, PersonalityError, PersonalityHost, PersonalityTable, Sink, StoreTable,
    VirtioTable, wire,
};
use tenon_abi::{Description, SavedState};

use crate::bundle::{MAX_CODE, NativeFile};
use crate::fault::Fault;
use crate::files::read_bounded;
use crate::guest::{Image, Loading};
use crate::instance::{Answer, Call, DeviceInstance};
use crate::manifest::{Kind, Manifest, Version};
use crate::services::Services;

/// A native library that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NativeError {
    /// The file cannot be read.
    #[error("plugin.so: {0}")]
    Io(#[from] std::io::Error),
    /// The system's loader refuses.
    #[error("plugin.so cannot be loaded: {0}")]
    Load(#[from] libloading::Error),
    /// It is some other library.
    #[error("plugin.so is not a Tenon plugin: its symbol `{}` does not begin as one", abi::SYMBOL)]
    Magic,
    /// Its tables are of another version.
    #[error(
        "plugin.so has version {found} of the native tables, and this host has version {}; build it with this Tenon's SDK",
        abi::ABI_VERSION
    )]
    Abi {
        /// The library's version.
        found: u32,
    },
    /// It was built for another line of the contract.
    #[error("plugin.so was built for api {found}, and this host offers {}", crate::HOST_API)]
    Contract {
        /// The library's version, as text.
        found: String,
    },
    /// It is not what its manifest says.
    #[error("plugin.so has no {0}, and its plugin.toml says that it is one")]
    Kind(Kind),
    /// A table is shorter than this host's.
    #[error(
        "plugin.so has a {kind} table of {found} bytes, and this host needs {wanted}; build it with this Tenon's SDK"
    )]
    Table {
        /// The kind.
        kind: Kind,
        /// The library's size.
        found: u64,
        /// This host's size.
        wanted: u64,
    },
}

#[derive(Clone, Copy)]
enum Table {
    Device(&'static DeviceTable),
    Virtio(&'static VirtioTable),
    Personality(&'static PersonalityTable),
    Store(&'static StoreTable),
}

/// Native code: a loaded library, or a part of this program.
pub(crate) struct Native {
    table: Table,
    /// The tables live in it; none if they are part of this program.
    library: Option<Library>,
    /// The file that it was loaded from. The loader tells libraries apart by name, and this one's is the descriptor's number: were it
    /// closed, the next library would get the same name, and this one's code.
    _file: Option<std::fs::File>,
}

impl Native {
    /// Loads a library and checks its tables. Gives the digest of its bytes as well.
    pub(crate) fn open(file: &NativeFile, manifest: &Manifest) -> Result<(Self, [u8; 32]), NativeError> {
        let bytes = match file {
            NativeFile::Path(path) => &read_bounded(path, MAX_CODE)?,
            NativeFile::Bytes(bytes) => bytes,
        };
        let digest = *blake3::hash(bytes).as_bytes();
        // What was read is what is loaded, from a file that has no name and that nobody else can change.
        let memory = rustix::fs::memfd_create("tenon-plugin", rustix::fs::MemfdFlags::CLOEXEC)
            .map_err(std::io::Error::from)?;
        let mut memory = std::fs::File::from(memory);
        memory.write_all(bytes)?;
        let path = format!("/proc/self/fd/{}", memory.as_raw_fd());
        // SAFETY: the library's initialisers run. An administrator has said that this code is trusted.
        let library = unsafe { Library::new(&path) }?;
        // SAFETY: the symbol's type is checked by its magic and version, which are read first and lie at its beginning in every version.
        let plugin = unsafe { *library.get::<*const abi::Plugin>(abi::SYMBOL.as_bytes())? };
        // SAFETY: `plugin` is the address of a symbol of the loaded library; the first 8 bytes are readable if it is a plugin at all.
        if unsafe { (*plugin).magic } != abi::MAGIC {
            return Err(NativeError::Magic);
        }
        // SAFETY: as above, and the magic says that a version follows.
        let found = unsafe { (*plugin).abi };
        if found != abi::ABI_VERSION {
            return Err(NativeError::Abi { found });
        }
        // SAFETY: magic and version say that this is a `Plugin` as we know it; it lives as long as the library.
        let plugin: &'static abi::Plugin = unsafe { &*plugin };
        Ok((
            Self { table: Self::check(plugin, manifest)?, library: Some(library), _file: Some(memory) },
            digest,
        ))
    }

    /// Takes code that is part of this program.
    pub(crate) fn linked(plugin: &'static abi::Plugin, manifest: &Manifest) -> Result<Self, NativeError> {
        if plugin.magic != abi::MAGIC || plugin.abi != abi::ABI_VERSION {
            return Err(NativeError::Abi { found: plugin.abi });
        }
        Ok(Self { table: Self::check(plugin, manifest)?, library: None, _file: None })
    }

    /// Whether it is part of this program.
    pub(crate) fn is_linked(&self) -> bool {
        self.library.is_none()
    }

    /// Whether it is a virtio device.
    pub(crate) fn virtio(&self) -> Option<&'static VirtioTable> {
        if let Table::Virtio(table) = self.table { Some(table) } else { None }
    }

    /// The table of a store.
    pub(crate) fn store(&self) -> Option<&'static StoreTable> {
        if let Table::Store(table) = self.table { Some(table) } else { None }
    }

    /// The table that the manifest promises.
    fn check(plugin: &'static abi::Plugin, manifest: &Manifest) -> Result<Table, NativeError> {
        // SAFETY: the contract is a constant of the library.
        let contract = String::from_utf8_lossy(unsafe { plugin.contract.as_slice() });
        if !contract.parse::<Version>().is_ok_and(|version| crate::HOST_API.runs(version)) {
            return Err(NativeError::Contract { found: contract.into_owned() });
        }
        let kind = manifest.kind;
        let (table, found, wanted) = match kind {
            Kind::Device => match (plugin.device, plugin.virtio) {
                (Some(table), _) => (Table::Device(table), table.size, DeviceTable::SIZE),
                (None, Some(table)) => (Table::Virtio(table), table.size, VirtioTable::SIZE),
                (None, None) => return Err(NativeError::Kind(kind)),
            },
            Kind::Store => {
                let table = plugin.store.ok_or(NativeError::Kind(kind))?;
                (Table::Store(table), table.size, StoreTable::SIZE)
            }
            Kind::Personality => {
                let table = plugin.personality.ok_or(NativeError::Kind(kind))?;
                (Table::Personality(table), table.size, PersonalityTable::SIZE)
            }
        };
        if found < wanted {
            return Err(NativeError::Table { kind, found, wanted });
        }
        Ok(table)
    }

    /// Makes a device.
    pub(crate) fn device(self: &Arc<Self>) -> Result<NativeDevice, Fault> {
        let Table::Device(table) = self.table else {
            return Err(Fault::Contract("it has no device of registers".into()));
        };
        let context = Box::into_raw(Box::new(Context { services: None, panic: None }));
        // SAFETY: the table was checked; host table and context are good until `destroy`, in `drop`.
        let instance = unsafe { (table.create)(&raw const DEVICE_HOST, context.cast()) };
        let device = NativeDevice { native: self.clone(), table, instance, context, output: Vec::new() };
        if instance.is_null() { Err(Fault::Trap("it could not make an instance".into())) } else { Ok(device) }
    }

    /// Runs `load` of a personality.
    pub(crate) fn load(
        &self,
        loading: Loading,
        machine: &abi::Machine,
        options: &[(String, String)],
    ) -> Result<Result<abi::Boot, PersonalityError>, Fault> {
        let Table::Personality(table) = self.table else {
            return Err(Fault::Contract("it is no personality".into()));
        };
        let images = u32::try_from(loading.images.len()).unwrap_or(u32::MAX);
        let mut context = GuestContext { loading, panic: None };
        let (machine, options) = (wire::encode_machine(machine), wire::encode_settings(options));
        let mut output = Vec::new();
        // SAFETY: the table was checked; everything lent lives past the call.
        let status = unsafe {
            (table.load)(
                &raw const PERSONALITY_HOST,
                (&raw mut context).cast(),
                Bytes::new(&machine),
                images,
                Bytes::new(&options),
                Sink::to(&mut output),
            )
        };
        let contract = |error: wire::WireError| Fault::Contract(error.to_string());
        match status {
            abi::Status::OK => Ok(Ok(wire::decode_boot(&output).map_err(contract)?)),
            abi::Status::REFUSED => Ok(Err(wire::decode_personality_error(&output).map_err(contract)?)),
            _ => Err(Fault::Trap(context.panic.unwrap_or_else(|| "it panicked".into()))),
        }
    }
}

/// What a device's host functions find behind their context.
struct Context {
    services: Option<Box<Services>>,
    panic: Option<String>,
}

/// An instance.
pub(crate) struct NativeDevice {
    table: &'static DeviceTable,
    instance: *mut c_void,
    context: *mut Context,
    output: Vec<u8>,
    /// The table lives in it.
    #[allow(dead_code, reason = "held, not used")]
    native: Arc<Native>,
}

// SAFETY: the ABI lets calls come from different threads, one at a time, which `&mut self` ensures; the context is ours alone between calls.
unsafe impl Send for NativeDevice {}

impl NativeDevice {
    fn context(&mut self) -> &mut Context {
        // SAFETY: made in `device`, freed in `drop`; the plugin uses it during its calls only, and none is running while we hold `&mut self`.
        unsafe { &mut *self.context }
    }

    fn done(&mut self, status: abi::Status) -> Result<(), Fault> {
        match status {
            abi::Status::OK => Ok(()),
            abi::Status::TRAPPED => {
                Err(Fault::Trap(self.context().panic.take().unwrap_or_else(|| "it panicked".into())))
            }
            abi::Status(number) => Err(Fault::Contract(format!("it returned the status {number}"))),
        }
    }

    /// Reads what a call that may refuse has put into `output`.
    fn answer<T>(
        &mut self,
        status: abi::Status,
        decode: impl FnOnce(&[u8]) -> Result<T, wire::WireError>,
    ) -> Answer<T> {
        let contract = |error: wire::WireError| Fault::Contract(error.to_string());
        if status == abi::Status::REFUSED {
            return Ok(Err(wire::decode_device_error(&self.output).map_err(contract)?));
        }
        self.done(status)?;
        Ok(Ok(decode(&self.output).map_err(contract)?))
    }

    fn sink(&mut self) -> Sink {
        self.output.clear();
        Sink::to(&mut self.output)
    }
}

impl DeviceInstance for NativeDevice {
    fn attach(&mut self, services: Box<Services>) {
        self.context().services = Some(services);
    }

    fn detach(&mut self) -> Option<Box<Services>> {
        self.context().services.take()
    }

    fn services(&mut self) -> Option<&mut Services> {
        self.context().services.as_deref_mut()
    }

    fn crowded(&self) -> bool {
        // SAFETY: as in `context`.
        unsafe { &*self.context }.services.as_deref().is_some_and(Services::crowded)
    }

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<Description> {
        let config = wire::encode_settings(settings);
        let sink = self.sink();
        // SAFETY: the table was checked, the instance lives, what is lent lives past the call.
        let status = unsafe { (self.table.describe)(self.instance, Bytes::new(&config), sink) };
        self.answer(status, wire::decode_description)
    }

    fn start(&mut self) -> Answer<()> {
        let [lines, timers, channels] = self.services().map_or([0; 3], |services| services.counts());
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status = unsafe { (self.table.start)(self.instance, lines, timers, channels, sink) };
        self.answer(status, |_| Ok(()))
    }

    fn call(&mut self, call: Call) -> Result<u64, Fault> {
        let (table, instance) = (self.table, self.instance);
        let mut result = 0;
        // SAFETY: as in `describe`.
        let status = unsafe {
            match call {
                Call::Read { region, offset, size } => {
                    (table.read)(instance, region, offset, size.into(), &raw mut result)
                }
                Call::Write { region, offset, size, value } => {
                    (table.write)(instance, region, offset, size.into(), value)
                }
                Call::Timer(timer) => (table.timer_fired)(instance, timer),
                Call::Readable(channel) => (table.channel_readable)(instance, channel),
                Call::Reset => (table.reset)(instance),
            }
        };
        self.done(status)?;
        Ok(result)
    }

    fn save(&mut self) -> Answer<SavedState> {
        let mut schema = 0;
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status = unsafe { (self.table.save)(self.instance, &raw mut schema, sink) };
        Ok(self.answer(status, |data| Ok(data.to_vec()))?.map(|data| SavedState { schema, data }))
    }

    fn restore(&mut self, state: &SavedState) -> Answer<()> {
        let sink = self.sink();
        // SAFETY: as in `describe`.
        let status =
            unsafe { (self.table.restore)(self.instance, state.schema, Bytes::new(&state.data), sink) };
        self.answer(status, |_| Ok(()))
    }
}

impl Drop for NativeDevice {
    fn drop(&mut self) {
        if !self.instance.is_null() {
            // SAFETY: the instance came from `create` and is used no more.
            unsafe { (self.table.destroy)(self.instance) };
        }
        // SAFETY: made by `Box::into_raw` in `device`; the plugin is gone.
        drop(unsafe { Box::from_raw(self.context) });
    }
}

/// Runs a host function of a device. Nothing unwinds into the plugin: the functions behind it do not panic on any argument.
///
/// # Safety
/// `context` is that of a live [`NativeDevice`] during a call into it.
unsafe fn with<T: Default>(context: *mut c_void, act: impl FnOnce(&mut Services) -> T) -> T {
    // SAFETY: promised by the caller; the call into the plugin borrows nothing of the context.
    let context = unsafe { &mut *context.cast::<Context>() };
    context.services.as_deref_mut().map(act).unwrap_or_default()
}

/// The text that a plugin lends, made valid.
///
/// # Safety
/// The bytes came in the call that is still running.
unsafe fn text<'a>(message: Bytes<'a>) -> std::borrow::Cow<'a, str> {
    // SAFETY: promised by the caller.
    String::from_utf8_lossy(unsafe { message.as_slice() })
}

/// The device's host functions.
static DEVICE_HOST: DeviceHost = DeviceHost {
    size: DeviceHost::SIZE,
    log_log: {
        unsafe extern "C" fn log(context: *mut c_void, level: u32, message: Bytes<'_>) {
            // SAFETY: called by the plugin during a call into it.
            unsafe { with(context, |services| services.log(abi::Level::from_number(level), &text(message))) }
        }
        log
    },
    time_now: {
        unsafe extern "C" fn now(context: *mut c_void) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, Services::now) }
        }
        now
    },
    timer_arm: {
        unsafe extern "C" fn arm(context: *mut c_void, timer: u32, deadline: u64) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.arm(timer, deadline)) }
        }
        arm
    },
    timer_arm_periodic: {
        unsafe extern "C" fn arm(context: *mut c_void, timer: u32, first: u64, period: u64) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.arm_periodic(timer, first, period)) }
        }
        arm
    },
    timer_cancel: {
        unsafe extern "C" fn cancel(context: *mut c_void, timer: u32) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.cancel(timer)) }
        }
        cancel
    },
    wall_clock_now: {
        unsafe extern "C" fn now(context: *mut c_void) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, Services::wall) }
        }
        now
    },
    line_set_level: {
        unsafe extern "C" fn set(context: *mut c_void, line: u32, high: u32) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.set_level(line, high != 0)) }
        }
        set
    },
    line_pulse: {
        unsafe extern "C" fn pulse(context: *mut c_void, line: u32) {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.pulse(line)) }
        }
        pulse
    },
    channel_write: {
        unsafe extern "C" fn write(context: *mut c_void, channel: u32, bytes: Bytes<'_>) -> u32 {
            // SAFETY: as in `log_log`.
            unsafe { with(context, |services| services.channel_write(channel, bytes.as_slice())) }
        }
        write
    },
    channel_read: {
        unsafe extern "C" fn read(context: *mut c_void, channel: u32, buffer: *mut u8, max: u32) -> u32 {
            // SAFETY: as in `log_log`; the plugin gives room for `max` bytes.
            unsafe {
                with(context, |services| {
                    let bytes = services.channel_read(channel, max);
                    if !bytes.is_empty() {
                        std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
                    }
                    u32::try_from(bytes.len()).unwrap_or(0)
                })
            }
        }
        read
    },
    machine_control_ask: {
        unsafe extern "C" fn request(context: *mut c_void, kind: u32, status: u32) {
            let status = u8::try_from(status).unwrap_or(u8::MAX);
            if let Some(request) = abi::Request::from_numbers(kind, status) {
                // SAFETY: as in `log_log`.
                unsafe { with(context, |services| services.request(request)) }
            }
        }
        request
    },
    panicked: {
        unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
            // SAFETY: as in `log_log`.
            unsafe { (*context.cast::<Context>()).panic = Some(text(message).into_owned()) }
        }
        panicked
    },
};

/// What a personality's host functions find behind their context.
struct GuestContext {
    loading: Loading,
    panic: Option<String>,
}

/// # Safety
/// `context` is that of a running `load`.
unsafe fn guest<'a>(context: *mut c_void) -> &'a mut GuestContext {
    // SAFETY: promised by the caller; `load` uses its context only after the plugin has returned.
    unsafe { &mut *context.cast::<GuestContext>() }
}

/// # Safety
/// The sink came in the call that is still running.
unsafe fn answer(result: Result<(), PersonalityError>, sink: Sink) -> abi::Status {
    match result {
        Ok(()) => abi::Status::OK,
        Err(error) => {
            // SAFETY: promised by the caller.
            unsafe { sink.put(&wire::encode_personality_error(&error)) };
            abi::Status::REFUSED
        }
    }
}

/// The personality's host functions.
static PERSONALITY_HOST: PersonalityHost = PersonalityHost {
    size: PersonalityHost::SIZE,
    log_log: {
        unsafe extern "C" fn log(context: *mut c_void, level: u32, message: Bytes<'_>) {
            // SAFETY: called by the plugin during `load`.
            unsafe { guest(context).loading.log(abi::Level::from_number(level), &text(message)) }
        }
        log
    },
    image_role: {
        unsafe extern "C" fn role(context: *mut c_void, image: u32, output: Sink) {
            // SAFETY: as in `log_log`.
            unsafe { output.put(guest(context).loading.image(image).map_or("", Image::role).as_bytes()) }
        }
        role
    },
    image_size: {
        unsafe extern "C" fn size(context: *mut c_void, image: u32) -> u64 {
            // SAFETY: as in `log_log`.
            unsafe { guest(context).loading.image(image).map_or(0, Image::size) }
        }
        size
    },
    image_read: {
        unsafe extern "C" fn read(
            context: *mut c_void,
            image: u32,
            offset: u64,
            buffer: *mut u8,
            length: u32,
            done: *mut u32,
            error: Sink,
        ) -> abi::Status {
            // SAFETY: as in `log_log`; the plugin gives room for `length` bytes and for the count.
            unsafe {
                let result = guest(context).loading.read(image, offset, length).map(|bytes| {
                    if !bytes.is_empty() {
                        std::ptr::copy_nonoverlapping(bytes.as_ptr(), buffer, bytes.len());
                    }
                    *done = u32::try_from(bytes.len()).unwrap_or(0);
                });
                answer(result, error)
            }
        }
        read
    },
    memory_write: {
        unsafe extern "C" fn write(
            context: *mut c_void,
            address: u64,
            bytes: Bytes<'_>,
            error: Sink,
        ) -> abi::Status {
            // SAFETY: as in `log_log`.
            unsafe { answer(guest(context).loading.write(address, bytes.as_slice()), error) }
        }
        write
    },
    memory_copy_image: {
        unsafe extern "C" fn copy(
            context: *mut c_void,
            address: u64,
            image: u32,
            offset: u64,
            length: u64,
            error: Sink,
        ) -> abi::Status {
            // SAFETY: as in `log_log`.
            unsafe { answer(guest(context).loading.copy_image(address, image, offset, length), error) }
        }
        copy
    },
    panicked: {
        unsafe extern "C" fn panicked(context: *mut c_void, message: Bytes<'_>) {
            // SAFETY: as in `log_log`.
            unsafe { guest(context).panic = Some(text(message).into_owned()) }
        }
        panicked
    },
};
