//! The encoding in which compound values cross the native boundary: little-endian numbers; text and lists behind a `u32` count;
//! options behind a byte 0 or 1; enumerations as a byte, counted in the order of the WIT.
//!
//! Decoders take bytes from the other side of a boundary: they check everything, allocate no more than a small multiple of the input's length,
//! and tell what is wrong.
//!
//! All values are in one file, though it is long: an encoder and its decoder are read together, and they share the small tools at the end.

use std::fmt;

use crate::{
    AcpiNode, Boot, ConnectionError, CpuState, Description, DeviceError, LineRequest, Machine, MemoryKind,
    MemoryRange, Offloads, PersonalityError, PortInfo, Queue, Region, Segment, Space, StopMethod, StoreInfo,
    Table, Trigger, VirtioDescription,
};

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct WireError {
    /// What was being read.
    pub what: &'static str,
    /// Where, in bytes from the start.
    pub offset: usize,
}

impl fmt::Display for WireError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "the other side of the native boundary sent no valid {} (at byte {})",
            self.what, self.offset
        )
    }
}

impl std::error::Error for WireError {}

/// `key=value` settings in their order.
pub type Settings = Vec<(String, String)>;

/// Encodes settings.
#[must_use]
pub fn encode_settings(settings: &[(String, String)]) -> Vec<u8> {
    let mut out = Writer::default();
    out.list(settings, |out, (key, value)| {
        out.text(key);
        out.text(value);
    });
    out.0
}

/// Decodes settings.
///
/// # Errors
/// The bytes are none.
pub fn decode_settings(bytes: &[u8]) -> Result<Settings, WireError> {
    Reader::whole("settings", bytes, |r| r.list(|r| Ok((r.text()?, r.text()?))))
}

/// Encodes a description.
#[must_use]
pub fn encode_description(description: &Description) -> Vec<u8> {
    let Description { regions, lines, timers, channels, acpi } = description;
    let mut out = Writer::default();
    out.list(regions, |out, Region { name, space, base, size }| {
        out.text(name);
        out.u8(match space {
            Space::Pio => 0,
            Space::Mmio => 1,
        });
        out.option(base.as_ref(), |out, base| out.u64(*base));
        out.u64(*size);
    });
    out.list(lines, |out, LineRequest { gsi, trigger }| {
        out.option(gsi.as_ref(), |out, gsi| out.u32(*gsi));
        out.u8(match trigger {
            Trigger::Edge => 0,
            Trigger::Level => 1,
        });
    });
    out.u32(*timers);
    out.list(channels, |out, name| out.text(name));
    out.option(acpi.as_ref(), |out, AcpiNode { hid, uid }| {
        out.text(hid);
        out.u32(*uid);
    });
    out.0
}

/// Decodes a description.
///
/// # Errors
/// The bytes are none.
pub fn decode_description(bytes: &[u8]) -> Result<Description, WireError> {
    Reader::whole("description", bytes, |r| {
        Ok(Description {
            regions: r.list(|r| {
                Ok(Region {
                    name: r.text()?,
                    space: r.one_of(&[Space::Pio, Space::Mmio])?,
                    base: r.option(Reader::u64)?,
                    size: r.u64()?,
                })
            })?,
            lines: r.list(|r| {
                Ok(LineRequest {
                    gsi: r.option(Reader::u32)?,
                    trigger: r.one_of(&[Trigger::Edge, Trigger::Level])?,
                })
            })?,
            timers: r.u32()?,
            channels: r.list(Reader::text)?,
            acpi: r.option(|r| Ok(AcpiNode { hid: r.text()?, uid: r.u32()? }))?,
        })
    })
}

/// Encodes a device's error.
#[must_use]
pub fn encode_device_error(error: &DeviceError) -> Vec<u8> {
    let (number, text) = match error {
        DeviceError::Invalid(text) => (0, text),
        DeviceError::Unsupported(text) => (1, text),
        DeviceError::Schema(text) => (2, text),
        DeviceError::Other(text) => (3, text),
    };
    Writer::error(number, text)
}

/// Decodes a device's error.
///
/// # Errors
/// The bytes are none.
pub fn decode_device_error(bytes: &[u8]) -> Result<DeviceError, WireError> {
    Reader::whole("device error", bytes, |r| {
        let make = r.one_of(&[
            DeviceError::Invalid as fn(String) -> DeviceError,
            DeviceError::Unsupported,
            DeviceError::Schema,
            DeviceError::Other,
        ])?;
        Ok(make(r.text()?))
    })
}

/// Encodes a virtio device's description.
#[must_use]
pub fn encode_virtio_description(description: &VirtioDescription) -> Vec<u8> {
    let VirtioDescription {
        device_type,
        features,
        queues,
        config_size,
        timers,
        channels,
        stores,
        ports,
        sockets,
        folders,
    } = description;
    let mut out = Writer::default();
    out.u16(*device_type);
    out.u64(*features);
    out.list(queues, |out, Queue { name, max_size, head }| {
        out.text(name);
        out.u16(*max_size);
        out.u16(*head);
    });
    out.u16(*config_size);
    out.u32(*timers);
    for names in [channels, stores, ports, sockets, folders] {
        out.list(names, |out, name| out.text(name));
    }
    out.0
}

/// Decodes a virtio device's description.
///
/// # Errors
/// The bytes are none.
pub fn decode_virtio_description(bytes: &[u8]) -> Result<VirtioDescription, WireError> {
    Reader::whole("virtio description", bytes, |r| {
        Ok(VirtioDescription {
            device_type: r.u16()?,
            features: r.u64()?,
            queues: r.list(|r| Ok(Queue { name: r.text()?, max_size: r.u16()?, head: r.u16()? }))?,
            config_size: r.u16()?,
            timers: r.u32()?,
            channels: r.list(Reader::text)?,
            stores: r.list(Reader::text)?,
            ports: r.list(Reader::text)?,
            sockets: r.list(Reader::text)?,
            folders: r.list(Reader::text)?,
        })
    })
}

/// Encodes what a store is.
#[must_use]
pub fn encode_store_info(info: &StoreInfo) -> Vec<u8> {
    let StoreInfo { size, block_size, optimal_size, read_only, discard, write_zeroes, identity } = info;
    let mut out = Writer::default();
    out.u64(*size);
    out.u32(*block_size);
    out.u32(*optimal_size);
    for flag in [read_only, discard, write_zeroes] {
        out.u8((*flag).into());
    }
    out.text(identity);
    out.0
}

/// Decodes what a store is. Whether it can be that is for [`StoreInfo::check`] to say.
///
/// # Errors
/// The bytes are none.
pub fn decode_store_info(bytes: &[u8]) -> Result<StoreInfo, WireError> {
    Reader::whole("store info", bytes, |r| {
        Ok(StoreInfo {
            size: r.u64()?,
            block_size: r.u32()?,
            optimal_size: r.u32()?,
            read_only: r.bool()?,
            discard: r.bool()?,
            write_zeroes: r.bool()?,
            identity: r.text()?,
        })
    })
}

/// Encodes what a network port is.
#[must_use]
pub fn encode_port_info(info: &PortInfo) -> Vec<u8> {
    let PortInfo { mac, mtu, link_up, send, receive } = info;
    let mut out = Writer::default();
    out.0.extend(mac);
    out.u16(*mtu);
    out.u8((*link_up).into());
    out.u32(send.to_bits());
    out.u32(receive.to_bits());
    out.0
}

/// Decodes what a network port is.
///
/// # Errors
/// The bytes are none.
pub fn decode_port_info(bytes: &[u8]) -> Result<PortInfo, WireError> {
    Reader::whole("port info", bytes, |r| {
        Ok(PortInfo {
            mac: r.array()?,
            mtu: r.u16()?,
            link_up: r.bool()?,
            send: Offloads::from_bits(r.u32()?),
            receive: Offloads::from_bits(r.u32()?),
        })
    })
}

/// Encodes a connection's error.
#[must_use]
pub fn encode_connection_error(error: &ConnectionError) -> Vec<u8> {
    let (number, text) = match error {
        ConnectionError::NotGranted => (0, ""),
        ConnectionError::Unreachable(text) => (1, text.as_str()),
        ConnectionError::Closed => (2, ""),
        ConnectionError::TimedOut => (3, ""),
    };
    Writer::error(number, text)
}

/// Decodes a connection's error.
///
/// # Errors
/// The bytes are none.
pub fn decode_connection_error(bytes: &[u8]) -> Result<ConnectionError, WireError> {
    Reader::whole("connection error", bytes, |r| {
        let make = r.one_of(&[
            (|_| ConnectionError::NotGranted) as fn(String) -> ConnectionError,
            ConnectionError::Unreachable,
            |_| ConnectionError::Closed,
            |_| ConnectionError::TimedOut,
        ])?;
        Ok(make(r.text()?))
    })
}

/// Encodes a personality's error.
#[must_use]
pub fn encode_personality_error(error: &PersonalityError) -> Vec<u8> {
    let (number, text) = match error {
        PersonalityError::NotMine(text) => (0, text),
        PersonalityError::Corrupt(text) => (1, text),
        PersonalityError::NoRoom(text) => (2, text),
        PersonalityError::Invalid(text) => (3, text),
        PersonalityError::Other(text) => (4, text),
    };
    Writer::error(number, text)
}

/// Decodes a personality's error.
///
/// # Errors
/// The bytes are none.
pub fn decode_personality_error(bytes: &[u8]) -> Result<PersonalityError, WireError> {
    Reader::whole("personality error", bytes, |r| {
        let make = r.one_of(&[
            PersonalityError::NotMine as fn(String) -> PersonalityError,
            PersonalityError::Corrupt,
            PersonalityError::NoRoom,
            PersonalityError::Invalid,
            PersonalityError::Other,
        ])?;
        Ok(make(r.text()?))
    })
}

/// Encodes a machine.
#[must_use]
pub fn encode_machine(machine: &Machine) -> Vec<u8> {
    let Machine { vcpus, memory, rsdp } = machine;
    let mut out = Writer::default();
    out.u32(*vcpus);
    out.list(memory, |out, MemoryRange { start, size, kind }| {
        out.u64(*start);
        out.u64(*size);
        out.u8(match kind {
            MemoryKind::Ram => 0,
            MemoryKind::Reserved => 1,
            MemoryKind::Acpi => 2,
        });
    });
    out.option(rsdp.as_ref(), |out, rsdp| out.u64(*rsdp));
    out.0
}

/// Decodes a machine.
///
/// # Errors
/// The bytes are none.
pub fn decode_machine(bytes: &[u8]) -> Result<Machine, WireError> {
    Reader::whole("machine", bytes, |r| {
        Ok(Machine {
            vcpus: r.u32()?,
            memory: r.list(|r| {
                Ok(MemoryRange {
                    start: r.u64()?,
                    size: r.u64()?,
                    kind: r.one_of(&[MemoryKind::Ram, MemoryKind::Reserved, MemoryKind::Acpi])?,
                })
            })?,
            rsdp: r.option(Reader::u64)?,
        })
    })
}

/// Encodes a boot.
#[must_use]
pub fn encode_boot(boot: &Boot) -> Vec<u8> {
    let Boot { summary, vcpu, stop } = boot;
    let CpuState { general, rip, rflags, cs, ds, es, fs, gs, ss, tr, ldt, gdt, idt, cr0, cr3, cr4, efer } =
        vcpu;
    let mut out = Writer::default();
    out.text(summary);
    for value in general.iter().chain([rip, rflags]) {
        out.u64(*value);
    }
    for Segment { selector, base, limit, rights } in [cs, ds, es, fs, gs, ss, tr, ldt] {
        out.u16(*selector);
        out.u64(*base);
        out.u32(*limit);
        out.u16(*rights);
    }
    for Table { base, limit } in [gdt, idt] {
        out.u64(*base);
        out.u16(*limit);
    }
    for value in [cr0, cr3, cr4, efer] {
        out.u64(*value);
    }
    match stop {
        StopMethod::None => out.u8(0),
        StopMethod::PowerButton => out.u8(1),
        StopMethod::Console(bytes) => {
            out.u8(2);
            out.bytes(bytes);
        }
    }
    out.0
}

/// Decodes a boot.
///
/// # Errors
/// The bytes are none.
pub fn decode_boot(bytes: &[u8]) -> Result<Boot, WireError> {
    let segment = |r: &mut Reader<'_>| {
        Ok(Segment { selector: r.u16()?, base: r.u64()?, limit: r.u32()?, rights: r.u16()? })
    };
    let table = |r: &mut Reader<'_>| Ok(Table { base: r.u64()?, limit: r.u16()? });
    Reader::whole("boot", bytes, |r| {
        Ok(Boot {
            summary: r.text()?,
            vcpu: CpuState {
                general: {
                    let mut general = [0; 16];
                    for value in &mut general {
                        *value = r.u64()?;
                    }
                    general
                },
                rip: r.u64()?,
                rflags: r.u64()?,
                cs: segment(r)?,
                ds: segment(r)?,
                es: segment(r)?,
                fs: segment(r)?,
                gs: segment(r)?,
                ss: segment(r)?,
                tr: segment(r)?,
                ldt: segment(r)?,
                gdt: table(r)?,
                idt: table(r)?,
                cr0: r.u64()?,
                cr3: r.u64()?,
                cr4: r.u64()?,
                efer: r.u64()?,
            },
            stop: match r.u8()? {
                0 => StopMethod::None,
                1 => StopMethod::PowerButton,
                2 => StopMethod::Console(r.bytes()?.to_vec()),
                _ => return Err(r.wrong()),
            },
        })
    })
}

mod folder;

pub use folder::*;

#[derive(Default)]
struct Writer(Vec<u8>);

impl Writer {
    fn error(number: u8, text: &str) -> Vec<u8> {
        let mut out = Self::default();
        out.u8(number);
        out.text(text);
        out.0
    }

    fn u8(&mut self, value: u8) {
        self.0.push(value);
    }

    fn u16(&mut self, value: u16) {
        self.0.extend(value.to_le_bytes());
    }

    fn u32(&mut self, value: u32) {
        self.0.extend(value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.0.extend(value.to_le_bytes());
    }

    /// Text and lists of 4 GiB or more cannot be encoded. The count is then wrong, and the decoder refuses the value.
    fn count(&mut self, count: usize) {
        self.u32(u32::try_from(count).unwrap_or(u32::MAX));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.count(bytes.len());
        self.0.extend(bytes);
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn list<T>(&mut self, items: &[T], mut put: impl FnMut(&mut Self, &T)) {
        self.count(items.len());
        for item in items {
            put(self, item);
        }
    }

    fn option<T>(&mut self, item: Option<&T>, put: impl FnOnce(&mut Self, &T)) {
        self.u8(item.is_some().into());
        if let Some(item) = item {
            put(self, item);
        }
    }
}

struct Reader<'a> {
    what: &'static str,
    bytes: &'a [u8],
    offset: usize,
}

impl<'a> Reader<'a> {
    /// Reads a value that takes all of the bytes.
    fn whole<T>(
        what: &'static str,
        bytes: &'a [u8],
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<T, WireError> {
        let mut reader = Self { what, bytes, offset: 0 };
        let value = read(&mut reader)?;
        if reader.offset == bytes.len() { Ok(value) } else { Err(reader.wrong()) }
    }

    fn wrong(&self) -> WireError {
        WireError { what: self.what, offset: self.offset }
    }

    fn take(&mut self, count: usize) -> Result<&'a [u8], WireError> {
        let rest = self.bytes.get(self.offset..).unwrap_or_default();
        let taken = rest.get(..count).ok_or_else(|| self.wrong())?;
        self.offset += count;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], WireError> {
        let taken = self.take(N)?;
        taken.try_into().map_err(|_| self.wrong())
    }

    fn u8(&mut self) -> Result<u8, WireError> {
        Ok(u8::from_le_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, WireError> {
        Ok(u16::from_le_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, WireError> {
        Ok(u32::from_le_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, WireError> {
        Ok(u64::from_le_bytes(self.array()?))
    }

    fn bytes(&mut self) -> Result<&'a [u8], WireError> {
        let count = self.u32()?;
        self.take(usize::try_from(count).unwrap_or(usize::MAX))
    }

    fn text(&mut self) -> Result<String, WireError> {
        let bytes = self.bytes()?.to_vec();
        String::from_utf8(bytes).map_err(|_| self.wrong())
    }

    /// Every item takes at least one byte, so that a list has no more items than bytes are left.
    fn list<T>(
        &mut self,
        mut read: impl FnMut(&mut Self) -> Result<T, WireError>,
    ) -> Result<Vec<T>, WireError> {
        (0..self.u32()?).map(|_| read(self)).collect()
    }

    fn option<T>(
        &mut self,
        read: impl FnOnce(&mut Self) -> Result<T, WireError>,
    ) -> Result<Option<T>, WireError> {
        Ok(if self.bool()? { Some(read(self)?) } else { None })
    }

    fn bool(&mut self) -> Result<bool, WireError> {
        self.one_of(&[false, true])
    }

    fn one_of<T: Copy>(&mut self, all: &[T]) -> Result<T, WireError> {
        let number = self.u8()?;
        all.get(usize::from(number)).copied().ok_or_else(|| self.wrong())
    }
}
