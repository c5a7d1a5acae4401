//! A virtio device that is a WASM component: one store with one instance.
//!
//! Long for the bindings: every import and export of the contract once.

use std::time::Duration;

use tenon_abi as abi;
use tenon_abi::{OperationDone, RequestOperation, SavedState, VirtioDescription};
use wasmtime::Store;
use wasmtime::component::Resource;

use super::folders::{from_action, to_outcome};
use super::instance::{Entry, VirtioInstance, host_calls};
use super::services::VirtioServices;
use crate::bindings::virtio::exports::tenon::device::virtio_device as export;
use crate::bindings::virtio::tenon::device as import;
use crate::bindings::virtio::{VirtioPlugin, VirtioPluginPre};
use crate::fault::{Fault, TooManyHostCalls};
use crate::host::{Allowance, Host, Limiter};
use crate::instance::Answer;
use crate::manifest::Limits;

/// How many handles an instance may hold.
const HANDLES: usize = 4096;

/// What is behind a virtio device's imports.
pub(crate) struct VirtioState {
    services: Option<Box<VirtioServices>>,
    limiter: Limiter,
    /// Of the call that runs: how often it may call the host, and how often it still may.
    calls: u32,
    calls_left: u32,
    allowance: Allowance,
}

impl VirtioState {
    /// Counts one host call, whose time does not count.
    fn outside<T>(&mut self, act: impl FnOnce(&mut VirtioServices) -> T) -> wasmtime::Result<T> {
        let left = self.allowance.leave();
        let result = act(self.services()?);
        self.allowance.back(left);
        Ok(result)
    }

    /// Counts one host call.
    #[inline]
    fn services(&mut self) -> wasmtime::Result<&mut VirtioServices> {
        self.calls_left = self.calls_left.checked_sub(1).ok_or(TooManyHostCalls)?;
        self.services
            .as_deref_mut()
            .ok_or_else(|| wasmtime::Error::msg("it called the host before `describe`"))
    }
}

/// An instance.
pub(crate) struct WasmVirtio {
    store: Store<VirtioState>,
    bindings: VirtioPlugin,
    ticks: u64,
    deadline: Duration,
    /// Used again for each batch.
    requests: Vec<import::virtio_types::Request>,
    done: Vec<export::OperationDone>,
}

impl WasmVirtio {
    pub(crate) fn new(
        host: &Host,
        pre: &VirtioPluginPre<VirtioState>,
        limits: &Limits,
    ) -> Result<Self, Fault> {
        let mut allowance = Allowance::new(&host.ticker, limits.deadline);
        allowance.begin();
        let ticks = allowance.ticks;
        let calls = host_calls(0);
        let state = VirtioState {
            services: None,
            limiter: Limiter::new(limits.memory),
            calls,
            calls_left: calls,
            allowance,
        };
        let mut store = Store::new(&host.engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(usize::try_from(limits.memory).unwrap_or(usize::MAX));
        store.set_max_component_handles(HANDLES);
        store.epoch_deadline_callback(|mut store| store.data_mut().allowance.expire());
        store.set_epoch_deadline(ticks);
        let deadline = limits.deadline;
        let bindings = pre.instantiate(&mut store).map_err(|error| crate::wasm::fault(&error, deadline))?;
        Ok(Self { store, bindings, ticks, deadline, requests: Vec::new(), done: Vec::new() })
    }

    #[inline]
    fn begin(&mut self, weight: usize) {
        self.store.set_epoch_deadline(self.ticks);
        let state = self.store.data_mut();
        state.calls = host_calls(weight);
        state.calls_left = state.calls;
        state.allowance.begin();
    }

    #[cold]
    fn fault(&self, error: &wasmtime::Error) -> Fault {
        match crate::wasm::fault(error, self.deadline) {
            Fault::HostCalls(_) => Fault::HostCalls(self.store.data().calls),
            fault => fault,
        }
    }

    fn answer<T>(&self, result: wasmtime::Result<Result<T, import::types::ErrorCode>>) -> Answer<T> {
        use import::types::ErrorCode;
        let error = |error| match error {
            ErrorCode::Invalid(text) => abi::DeviceError::Invalid(text),
            ErrorCode::Unsupported(text) => abi::DeviceError::Unsupported(text),
            ErrorCode::Schema(text) => abi::DeviceError::Schema(text),
            ErrorCode::Other(text) => abi::DeviceError::Other(text),
        };
        match result {
            Ok(answer) => Ok(answer.map_err(error)),
            Err(wrong) => Err(self.fault(&wrong)),
        }
    }
}

fn done(done: &OperationDone) -> export::OperationDone {
    export::OperationDone { request: done.request.0, error: done.result().err().map(to_error) }
}

fn to_error(error: abi::StoreError) -> import::stores::StoreError {
    use import::stores::StoreError as Given;
    match error {
        abi::StoreError::OutOfRange => Given::OutOfRange,
        abi::StoreError::ReadOnly => Given::ReadOnly,
        abi::StoreError::NoSpace => Given::NoSpace,
        abi::StoreError::Unsupported => Given::Unsupported,
        abi::StoreError::Io => Given::Io,
    }
}

fn to_operation(operation: &import::stores::Operation) -> RequestOperation {
    use import::stores::OperationKind as Kind;
    RequestOperation {
        request: abi::Handle(operation.request),
        kind: match operation.kind {
            Kind::Read => RequestOperation::READ,
            Kind::Write => RequestOperation::WRITE,
            Kind::Flush => RequestOperation::FLUSH,
            Kind::Discard => RequestOperation::DISCARD,
            Kind::WriteZeroes => RequestOperation::WRITE_ZEROES,
            Kind::UnmapZeroes => RequestOperation::UNMAP_ZEROES,
        },
        offset: operation.offset,
        success_length: operation.success_length.into(),
        length: operation.length,
        position: operation.position,
        success: operation.success.to_le_bytes(),
    }
}

impl VirtioInstance for WasmVirtio {
    fn attach(&mut self, services: Box<VirtioServices>) {
        self.store.data_mut().services = Some(services);
    }

    fn detach(&mut self) -> Option<Box<VirtioServices>> {
        self.store.data_mut().services.take()
    }

    fn services(&mut self) -> Option<&mut VirtioServices> {
        self.store.data_mut().services.as_deref_mut()
    }

    fn describe(&mut self, settings: &[(String, String)]) -> Answer<VirtioDescription> {
        let config: Vec<_> = settings
            .iter()
            .map(|(key, value)| import::types::Setting { key: key.clone(), value: value.clone() })
            .collect();
        self.begin(0);
        let result = self.bindings.tenon_device_virtio_device().call_describe(&mut self.store, &config);
        let description = |d: import::virtio_types::VirtioDescription| VirtioDescription {
            device_type: d.device_type,
            features: d.features,
            queues: d
                .queues
                .into_iter()
                .map(|queue| abi::Queue { name: queue.name, max_size: queue.max_size, head: queue.head })
                .collect(),
            config_size: d.config_size,
            timers: d.timers,
            channels: d.channels,
            stores: d.stores,
            ports: d.ports,
            sockets: d.sockets,
            folders: d.folders,
        };
        Ok(self.answer(result)?.map(description))
    }

    fn start(&mut self) -> Answer<()> {
        let [timers, channels, stores, ports, sockets, folders] =
            self.services().map_or([0; 6], |services| services.counts());
        let attachment = export::VirtioAttachment {
            timers: (0..timers).map(Resource::new_own).collect(),
            channels: (0..channels).map(Resource::new_own).collect(),
            stores: (0..stores).map(Resource::new_own).collect(),
            ports: (0..ports).map(Resource::new_own).collect(),
            sockets: (0..sockets).map(Resource::new_own).collect(),
            folders: (0..folders).map(Resource::new_own).collect(),
        };
        self.begin(0);
        let result = self.bindings.tenon_device_virtio_device().call_start(&mut self.store, &attachment);
        self.answer(result)
    }

    fn call(&mut self, entry: &Entry<'_>) -> Answer<u64> {
        self.begin(entry.weight());
        let (guest, store) = (self.bindings.tenon_device_virtio_device(), &mut self.store);
        let result = match *entry {
            Entry::Activate(features) => guest.call_activate(store, features),
            Entry::Adjust { key, value } => {
                let setting = import::types::Setting { key: key.to_owned(), value: value.to_owned() };
                guest.call_adjust(store, &setting)
            }
            Entry::ConfigRead { offset, size } => {
                return guest.call_config_read(store, offset, size).map(Ok).map_err(|e| self.fault(&e));
            }
            Entry::ConfigWrite { offset, size, value } => {
                guest.call_config_write(store, offset, size, value).map(Ok)
            }
            Entry::Requests { queue, requests, heads } => {
                self.requests.clear();
                self.requests.extend(requests.iter().map(|r| import::virtio_types::Request {
                    handle: r.handle.0,
                    readable: r.readable,
                    writable: r.writable,
                    head: r.head,
                }));
                guest.call_requests_ready(store, queue, &self.requests, heads).map(Ok)
            }
            Entry::Done(list) => {
                self.done.clear();
                self.done.extend(list.iter().map(done));
                guest.call_operations_done(store, &self.done).map(Ok)
            }
            Entry::PortReady(port) => guest.call_port_ready(store, port).map(Ok),
            Entry::PortChanged(port) => guest.call_port_changed(store, port).map(Ok),
            Entry::SocketReady(socket) => guest.call_socket_ready(store, socket).map(Ok),
            Entry::StoreChanged(index) => guest.call_store_changed(store, index).map(Ok),
            Entry::Readable(channel) => guest.call_channel_readable(store, channel).map(Ok),
            Entry::Writable(channel) => guest.call_channel_writable(store, channel).map(Ok),
            Entry::Timer(timer, _) => guest.call_timer_fired(store, timer).map(Ok),
            Entry::Reset => guest.call_reset(store).map(Ok),
        };
        Ok(self.answer(result)?.map(|()| 0))
    }

    fn save(&mut self) -> Answer<SavedState> {
        self.begin(0);
        let result = self.bindings.tenon_device_virtio_device().call_save(&mut self.store);
        Ok(self.answer(result)?.map(|state| SavedState { schema: state.schema, data: state.data }))
    }

    fn restore(&mut self, state: &SavedState) -> Answer<()> {
        let state = import::types::SavedState { schema: state.schema, data: state.data.clone() };
        self.begin(0);
        let result = self.bindings.tenon_device_virtio_device().call_restore(&mut self.store, &state);
        self.answer(result)
    }
}

// The imports.

impl import::types::Host for VirtioState {}
impl import::virtio_types::Host for VirtioState {}

impl import::log::Host for VirtioState {
    fn log(&mut self, level: import::log::Level, message: String) -> wasmtime::Result<()> {
        use import::log::Level;
        let level = match level {
            Level::Error => abi::Level::Error,
            Level::Warn => abi::Level::Warn,
            Level::Info => abi::Level::Info,
            Level::Debug => abi::Level::Debug,
            Level::Trace => abi::Level::Trace,
        };
        self.services()?.base.log(level, &message);
        Ok(())
    }
}

impl import::time::Host for VirtioState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.services()?.base.now())
    }
}

type Timer = Resource<import::time::Timer>;

impl import::time::HostTimer for VirtioState {
    fn arm(&mut self, timer: Timer, deadline: u64) -> wasmtime::Result<()> {
        self.services()?.base.arm(timer.rep(), deadline);
        Ok(())
    }

    fn arm_periodic(&mut self, timer: Timer, first: u64, period: u64) -> wasmtime::Result<()> {
        self.services()?.base.arm_periodic(timer.rep(), first, period);
        Ok(())
    }

    fn cancel(&mut self, timer: Timer) -> wasmtime::Result<()> {
        self.services()?.base.cancel(timer.rep());
        Ok(())
    }

    fn drop(&mut self, _: Timer) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::wall_clock::Host for VirtioState {
    fn now(&mut self) -> wasmtime::Result<u64> {
        Ok(self.services()?.base.wall())
    }
}

type Channel = Resource<import::channels::Channel>;

impl import::channels::Host for VirtioState {}

impl import::channels::HostChannel for VirtioState {
    fn write(&mut self, channel: Channel, bytes: Vec<u8>) -> wasmtime::Result<u32> {
        Ok(self.services()?.base.channel_write(channel.rep(), &bytes))
    }

    fn read(&mut self, channel: Channel, max: u32) -> wasmtime::Result<Vec<u8>> {
        Ok(self.services()?.base.channel_read(channel.rep(), max))
    }

    fn drop(&mut self, _: Channel) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::requests::Host for VirtioState {
    fn read(&mut self, request: u32, offset: u32, length: u32) -> wasmtime::Result<Vec<u8>> {
        Ok(self.services()?.read(request, offset, length)?)
    }

    fn write(&mut self, request: u32, offset: u32, bytes: Vec<u8>) -> wasmtime::Result<u32> {
        Ok(self.services()?.write(request, offset, &bytes)?)
    }

    fn complete(&mut self, answers: Vec<import::requests::Answer>) -> wasmtime::Result<()> {
        let services = self.services()?;
        for answer in answers {
            services.complete(answer.request, answer.written)?;
        }
        Ok(())
    }

    fn to_channel(
        &mut self,
        request: u32,
        offset: u32,
        length: u32,
        channel: Channel,
    ) -> wasmtime::Result<u32> {
        Ok(self.services()?.move_to_channel(request, offset, length, channel.rep())?)
    }

    fn from_channel(
        &mut self,
        request: u32,
        offset: u32,
        length: u32,
        channel: Channel,
    ) -> wasmtime::Result<u32> {
        Ok(self.services()?.move_from_channel(request, offset, length, channel.rep())?)
    }

    fn config_changed(&mut self) -> wasmtime::Result<()> {
        self.services()?.config_changed();
        Ok(())
    }

    fn needs_reset(&mut self) -> wasmtime::Result<()> {
        self.services()?.needs_reset();
        Ok(())
    }
}

type BackingStore = Resource<import::stores::Store>;

impl import::stores::Host for VirtioState {}

impl import::stores::HostStore for VirtioState {
    fn info(&mut self, store: BackingStore) -> wasmtime::Result<import::stores::StoreInfo> {
        let info = self.services()?.store_info(store.rep());
        Ok(import::stores::StoreInfo {
            size: info.size,
            block_size: info.block_size,
            optimal_size: info.optimal_size,
            read_only: info.read_only,
            discard: info.discard,
            write_zeroes: info.write_zeroes,
            identity: info.identity,
        })
    }

    fn begin(
        &mut self,
        store: BackingStore,
        operations: Vec<import::stores::Operation>,
    ) -> wasmtime::Result<()> {
        let services = self.services()?;
        for operation in &operations {
            services.begin(store.rep(), &to_operation(operation))?;
        }
        Ok(())
    }

    fn drop(&mut self, _: BackingStore) -> wasmtime::Result<()> {
        Ok(())
    }
}

type Port = Resource<import::ports::Port>;

fn offloads(offloads: tenon_core::Offloads) -> import::ports::Offloads {
    let mut flags = import::ports::Offloads::empty();
    if offloads.checksum {
        flags |= import::ports::Offloads::CHECKSUM;
    }
    if offloads.tso4 {
        flags |= import::ports::Offloads::TSO4;
    }
    if offloads.tso6 {
        flags |= import::ports::Offloads::TSO6;
    }
    flags
}

impl import::ports::Host for VirtioState {}

impl import::ports::HostPort for VirtioState {
    fn info(&mut self, port: Port) -> wasmtime::Result<import::ports::PortInfo> {
        let info = self.services()?.port_info(port.rep());
        Ok(import::ports::PortInfo {
            mac: info.mac.to_vec(),
            mtu: info.mtu,
            link_up: info.link_up,
            send: offloads(info.send),
            receive: offloads(info.receive),
        })
    }

    fn accept(&mut self, port: Port, offloads: import::ports::Offloads) -> wasmtime::Result<()> {
        let has = |flag| offloads.contains(flag);
        let offloads = tenon_core::Offloads {
            checksum: has(import::ports::Offloads::CHECKSUM),
            tso4: has(import::ports::Offloads::TSO4),
            tso6: has(import::ports::Offloads::TSO6),
        };
        self.services()?.accept(port.rep(), offloads);
        Ok(())
    }

    fn send(&mut self, port: Port, requests: Vec<u32>) -> wasmtime::Result<()> {
        Ok(self.services()?.send(port.rep(), &requests)?)
    }

    fn waiting(&mut self, port: Port, max: u32) -> wasmtime::Result<Vec<u32>> {
        Ok(self.services()?.waiting(port.rep(), max))
    }

    fn receive(&mut self, port: Port, counts: Vec<u16>, requests: Vec<u32>) -> wasmtime::Result<()> {
        Ok(self.services()?.receive(port.rep(), &counts, &requests)?)
    }

    fn drop(&mut self, _: Port) -> wasmtime::Result<()> {
        Ok(())
    }
}

type Socket = Resource<import::sockets::Socket>;

impl import::sockets::Host for VirtioState {}

impl import::sockets::HostSocket for VirtioState {
    fn connect(&mut self, socket: Socket, port: u32) -> wasmtime::Result<Option<u32>> {
        Ok(self.services()?.socket(socket.rep())?.connect(port))
    }

    fn news(&mut self, socket: Socket, max: u32) -> wasmtime::Result<Vec<import::sockets::StreamState>> {
        let state = |state: abi::StreamState| {
            let abi::StreamState { number, wanted, readable, ended, deaf, unsent } = state;
            import::sockets::StreamState { number, wanted, readable, ended, deaf, unsent }
        };
        Ok(self.services()?.socket_news(socket.rep(), max)?.into_iter().map(state).collect())
    }

    fn accept(&mut self, socket: Socket, number: u32, port: u32) -> wasmtime::Result<()> {
        Ok(self.services()?.socket(socket.rep())?.accept(number, port)?)
    }

    fn send(
        &mut self,
        socket: Socket,
        request: u32,
        offset: u32,
        length: u32,
        number: u32,
    ) -> wasmtime::Result<import::sockets::Sent> {
        let sent = self.services()?.socket_send(socket.rep(), request, offset, length, number)?;
        Ok(import::sockets::Sent { taken: sent.taken, unsent: sent.unsent })
    }

    fn receive(
        &mut self,
        socket: Socket,
        request: u32,
        offset: u32,
        length: u32,
        number: u32,
    ) -> wasmtime::Result<u32> {
        Ok(self.services()?.socket_receive(socket.rep(), request, offset, length, number)?)
    }

    fn shut(&mut self, socket: Socket, number: u32, receive: bool, send: bool) -> wasmtime::Result<()> {
        Ok(self.services()?.socket(socket.rep())?.shut(number, receive, send)?)
    }

    fn close(&mut self, socket: Socket, number: u32) -> wasmtime::Result<()> {
        Ok(self.services()?.socket(socket.rep())?.close(number)?)
    }

    fn drop(&mut self, _: Socket) -> wasmtime::Result<()> {
        Ok(())
    }
}

impl import::entropy::Host for VirtioState {
    fn fill(&mut self, request: u32, offset: u32, length: u32) -> wasmtime::Result<u32> {
        Ok(self.services()?.fill(request, offset, length)?)
    }
}

impl import::guest_pages::Host for VirtioState {
    fn release_numbered(&mut self, request: u32) -> wasmtime::Result<u32> {
        Ok(self.services()?.release_numbered(request)?)
    }

    fn release_own(&mut self, request: u32) -> wasmtime::Result<u32> {
        Ok(self.services()?.release_own(request)?)
    }

    fn memory_size(&mut self) -> wasmtime::Result<u64> {
        Ok(self.services()?.memory_size())
    }
}

type Folder = Resource<import::folders::Folder>;

impl import::folders::Host for VirtioState {}

impl import::folders::HostFolder for VirtioState {
    fn act(
        &mut self,
        folder: Folder,
        request: u32,
        action: import::folders::Action,
    ) -> wasmtime::Result<Result<import::folders::Outcome, u32>> {
        let action = from_action(action);
        let outcome = self.outside(|services| services.folder_act(folder.rep(), request, action))??;
        Ok(outcome.as_ref().as_ref().map(to_outcome).map_err(|error| error.0))
    }

    fn drop(&mut self, _: Folder) -> wasmtime::Result<()> {
        Ok(())
    }
}
