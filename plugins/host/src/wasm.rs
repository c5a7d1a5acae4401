//! A device that is a WASM component: one store with one instance.
//!
//! Each call begins with a new deadline and a new budget of host calls. Handles are indices of the lists in the description; the component model
//! gives the plugin none that it was not given, so nothing is looked up.

use std::time::Duration;

use tenon_abi as abi;
use tenon_abi::SavedState;
use wasmtime::component::Resource;
use wasmtime::{Store, Trap};

use crate::bindings::device::exports::tenon::device::device as export;
use crate::bindings::device::tenon::device as import;
use crate::bindings::device::{DevicePlugin, DevicePluginPre};
use crate::fault::{Fault, Misuse, OverLimit, TooManyHostCalls};
use crate::host::{Allowance, Host, Limiter};
use crate::instance::{Answer, Call, DeviceInstance};
use crate::manifest::Limits;
use crate::services::Services;

/// How often one call may call the host.
const HOST_CALLS: u32 = 10_000;
/// How many handles an instance may hold.
const HANDLES: usize = 4096;

/// What is behind a device's imports.
pub(crate) struct DeviceState {
    services: Option<Box<Services>>,
    limiter: Limiter,
    calls_left: u32,
    allowance: Allowance,
}

impl DeviceState {
    /// Counts one host call.
    #[inline]
    fn services(&mut self) -> wasmtime::Result<&mut Services> {
        self.calls_left = self.calls_left.checked_sub(1).ok_or(TooManyHostCalls)?;
        self.services
            .as_deref_mut()
            .ok_or_else(|| wasmtime::Error::msg("it called the host before `describe`"))
    }
}

/// An instance.
pub(crate) struct WasmDevice {
    store: Store<DeviceState>,
    bindings: DevicePlugin,
    ticks: u64,
    deadline: Duration,
}

impl WasmDevice {
    pub(crate) fn new(
        host: &Host,
        pre: &DevicePluginPre<DeviceState>,
        limits: &Limits,
    ) -> Result<Self, Fault> {
        let mut allowance = Allowance::new(&host.ticker, limits.deadline);
        allowance.begin();
        let ticks = allowance.ticks;
        let state = DeviceState {
            services: None,
            limiter: Limiter::new(limits.memory),
            calls_left: HOST_CALLS,
            allowance,
        };
        let mut store = Store::new(&host.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(usize::try_from(limits.memory).unwrap_or(usize::MAX));
        store.set_max_component_handles(HANDLES);
        store.epoch_deadline_callback(|mut store| store.data_mut().allowance.expire());
        store.set_epoch_deadline(ticks);
        let bindings = pre.instantiate(&mut store).map_err(|error| fault(&error, limits.deadline))?;
        Ok(Self { store, bindings, ticks, deadline: limits.deadline })
    }

    #[inline]
    fn begin(&mut self) -> (&export::Guest, &mut Store<DeviceState>) {
        self.store.set_epoch_deadline(self.ticks);
        let state = self.store.data_mut();
        state.calls_left = HOST_CALLS;
        state.allowance.begin();
        (self.bindings.tenon_device_device(), &mut self.store)
    }

    #[cold]
    fn fault(&self, error: &wasmtime::Error) -> Fault {
        fault(error, self.deadline)
    }

    fn answer<T>(
        &self,
        result: wasmtime::Result<Result<T, import::types::ErrorCode>>,
    ) -> Result<Result<T, abi::DeviceError>, Fault> {
        match result {
            Ok(answer) => Ok(answer.map_err(device_error)),
            Err(error) => Err(self.fault(&error)),
        }
    }
}

/// What ended a call, from wasmtime's error.
pub(crate) fn fault(error: &wasmtime::Error, deadline: Duration) -> Fault {
    if error.downcast_ref::<TooManyHostCalls>().is_some() {
        return Fault::HostCalls(HOST_CALLS);
    }
    if let Some(limit) = error.downcast_ref::<OverLimit>() {
        return Fault::Limit(limit.0.clone());
    }
    if let Some(misuse) = error.downcast_ref::<Misuse>() {
        return Fault::Contract(misuse.0.clone());
    }
    match error.downcast_ref::<Trap>() {
        Some(Trap::Interrupt) => Fault::Deadline(deadline),
        Some(trap) => Fault::Trap(trap.to_string()),
        None => {
            let text = error.root_cause().to_string();
            if text.contains("handle limit") { Fault::Limit(text) } else { Fault::Trap(text) }
        }
    }
}

fn device_error(error: import::types::ErrorCode) -> abi::DeviceError {
    use import::types::ErrorCode;
    match error {
        ErrorCode::Invalid(text) => abi::DeviceError::Invalid(text),
        ErrorCode::Unsupported(text) => abi::DeviceError::Unsupported(text),
        ErrorCode::Schema(text) => abi::DeviceError::Schema(text),
        ErrorCode::Other(text) => abi::DeviceError::Other(text),
    }
}

fn description(description: import::types::Description) -> abi::Description {
    use import::types::{Space, Trigger};
    abi::Description {
        regions: description
            .regions
            .into_iter()
            .map(|region| abi::Region {
                name: region.name,
                space: match region.space {
                    Space::Pio => abi::Space::Pio,
                    Space::Mmio => abi::Space::Mmio,
                },
                base: region.base,
                size: region.size,
            })
            .collect(),
        lines: description
            .lines
            .into_iter()
            .map(|line| abi::LineRequest {
                gsi: line.gsi,
                trigger: match line.trigger {
                    Trigger::Edge => abi::Trigger::Edge,
                    Trigger::Level => abi::Trigger::Level,
                },
            })
            .collect(),
        timers: description.timers,
        channels: description.channels,
        acpi: description.acpi.map(|node| abi::AcpiNode { hid: node.hid, uid: node.uid }),
    }
}

impl DeviceInstance for WasmDevice {
    fn attach(&mut self, services: Box<Services>) {
        self.store.data_mut().services = Some(services);
    }

    fn detach(&mut self) -> Option<Box<Services>> {
        self.store.data_mut().services.take()
    }

    fn services(&mut self) -> Option<&mut Services> {
        self.store.data_mut().services.as_deref_mut()
    }

    #[inline]
    fn crowded(&self) -> bool {
        self.store.data().services.as_deref().is_some_and(Services::crowded)
    }

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<abi::Description> {
        let config: Vec<_> = settings
            .iter()
            .map(|(key, value)| import::types::Setting { key: key.clone(), value: value.clone() })
            .collect();
        let (guest, store) = self.begin();
        let result = guest.call_describe(store, &config);
        Ok(self.answer(result)?.map(description))
    }

    fn start(&mut self) -> Answer<()> {
        let [lines, timers, channels] = self.services().map_or([0; 3], |services| services.counts());
        let attachment = export::Attachment {
            lines: (0..lines).map(Resource::new_own).collect(),
            timers: (0..timers).map(Resource::new_own).collect(),
            channels: (0..channels).map(Resource::new_own).collect(),
        };
        let (guest, store) = self.begin();
        let result = guest.call_start(store, &attachment);
        self.answer(result)
    }

    fn call(&mut self, call: Call) -> Result<u64, Fault> {
        let (guest, store) = self.begin();
        let result = match call {
            Call::Read { region, offset, size } => guest.call_read(store, region, offset, size),
            Call::Write { region, offset, size, value } => {
                guest.call_write(store, region, offset, size, value).map(|()| 0)
            }
            Call::Timer(timer) => guest.call_timer_fired(store, timer).map(|()| 0),
            Call::Readable(channel) => guest.call_channel_readable(store, channel).map(|()| 0),
            Call::Reset => guest.call_reset(store).map(|()| 0),
        };
        result.map_err(|error| self.fault(&error))
    }

    fn save(&mut self) -> Answer<SavedState> {
        let (guest, store) = self.begin();
        let result = guest.call_save(store);
        Ok(self.answer(result)?.map(|state| SavedState { schema: state.schema, data: state.data }))
    }

    fn restore(&mut self, state: &SavedState) -> Answer<()> {
        let state = import::types::SavedState { schema: state.schema, data: state.data.clone() };
        let (guest, store) = self.begin();
        let result = guest.call_restore(store, &state);
        self.answer(result)
    }
}

// The imports.

impl import::types::Host for DeviceState {}

impl import::log::Host for DeviceState {
    fn log(&mut self, level: import::log::Level, message: String) -> wasmtime::Result<()> {
        use import::log::Level;
        let level = match level {
            Level::Error => abi::Level::Error,
            Level::Warn => abi::Level::Warn,
            Level::Info => abi::Level::Info,
            Level::Debug => abi::Level::Debug,
            Level::Trace => abi::Level::Trace,
        };
        self.services()?.log(level, &message);
        Ok(())
    }
}

impl import::time::Host for DeviceState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.services()?.now())
    }
}

impl import::time::HostTimer for DeviceState {
    fn arm(&mut self, timer: Resource<import::time::Timer>, deadline: u64) -> wasmtime::Result<()> {
        self.services()?.arm(timer.rep(), deadline);
        Ok(())
    }

    fn arm_periodic(
        &mut self,
        timer: Resource<import::time::Timer>,
        first: u64,
        period: u64,
    ) -> wasmtime::Result<()> {
        self.services()?.arm_periodic(timer.rep(), first, period);
        Ok(())
    }

    fn cancel(&mut self, timer: Resource<import::time::Timer>) -> wasmtime::Result<()> {
        self.services()?.cancel(timer.rep());
        Ok(())
    }

    fn drop(&mut self, _: Resource<import::time::Timer>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::wall_clock::Host for DeviceState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.services()?.wall())
    }
}

impl import::interrupts::Host for DeviceState {}

impl import::interrupts::HostLine for DeviceState {
    fn set_level(&mut self, line: Resource<import::interrupts::Line>, high: bool) -> wasmtime::Result<()> {
        self.services()?.set_level(line.rep(), high);
        Ok(())
    }

    fn pulse(&mut self, line: Resource<import::interrupts::Line>) -> wasmtime::Result<()> {
        self.services()?.pulse(line.rep());
        Ok(())
    }

    fn drop(&mut self, _: Resource<import::interrupts::Line>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::channels::Host for DeviceState {}

impl import::channels::HostChannel for DeviceState {
    fn write(
        &mut self,
        channel: Resource<import::channels::Channel>,
        bytes: Vec<u8>,
    ) -> wasmtime::Result<u32> {
        Ok(self.services()?.channel_write(channel.rep(), &bytes))
    }

    fn read(&mut self, channel: Resource<import::channels::Channel>, max: u32) -> wasmtime::Result<Vec<u8>> {
        Ok(self.services()?.channel_read(channel.rep(), max))
    }

    fn drop(&mut self, _: Resource<import::channels::Channel>) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::machine_control::Host for DeviceState {
    fn ask(&mut self, request: import::machine_control::Request) -> wasmtime::Result<()> {
        use import::machine_control::Request;
        self.services()?.request(match request {
            Request::PowerOff => abi::Request::PowerOff,
            Request::Reset => abi::Request::Reset,
            Request::Exit(status) => abi::Request::Exit(status),
        });
        Ok(())
    }
}
