//! The ways to reset that are older than ACPI's reset register. Guests take them where they expect a PC with firmware.
//!
//! | way | who takes it | what is here |
//! | --- | --- | --- |
//! | a jump to F000:FFF0 in real mode | Linux, first of all, on a hardware-reduced platform without EFI; DOS and boot loaders | code there that writes the reset register |
//! | command 0xfe to port 0x64, the keyboard controller's | Linux with `reboot=k`; many small kernels | [`KeyboardReset`] |
//! | value 6 to port 0xcf9 | chip sets with PCI | nothing: the ports 0xcf8 to 0xcff are one claim, that of a PCI host bridge |
//! | a triple fault | Linux with `reboot=t` | nothing: engines report it as a crash |
//!
//! Linux on a hardware-reduced platform leaves ACPI's reset register alone: it takes EFI's service, and where there is none, the jump.

use tenon_core::{Ram, Region, Request, Requests};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::map::RESET_VECTOR;
use crate::power::{POWER_PORT, RESET_VALUE};

/// The keyboard controller's command port.
pub const KEYBOARD_PORT: u16 = 0x64;

/// Writes the code at F000:FFF0 (physical 0xffff0): it writes 1 to the reset register and halts.
///
/// # Errors
/// There is no memory at its place.
pub fn write_reset_vector(ram: &Ram) -> Result<(), GuestMemoryError> {
    let [low, high] = (POWER_PORT + 2).to_le_bytes();
    #[rustfmt::skip]
    let code = [
        0xba, low, high,   // mov dx, reset register
        0xb0, RESET_VALUE, // mov al, RESET_VALUE
        0xee,              // out dx, al
        0xfa,              // cli
        0xf4,              // hlt
        0xeb, 0xfc,        // jmp to cli
    ];
    ram.map().write_slice(&code, GuestAddress(RESET_VECTOR))
}

/// What is left of a keyboard controller: its command that pulses the CPU's reset line. Reads are all ones, by which guests know that there
/// is no controller. A keyboard controller that is a device claims the port itself and answers instead.
pub struct KeyboardReset {
    requests: Requests,
}

impl KeyboardReset {
    /// Claims port [`KEYBOARD_PORT`] alone; asks through `requests`.
    #[must_use]
    pub fn new(requests: Requests) -> Self {
        Self { requests }
    }
}

impl Region for KeyboardReset {
    fn read(&self, _: u64, _: u8) -> u64 {
        u64::MAX
    }

    fn write(&self, _: u64, _: u8, value: u64) {
        // Commands 0xf0 to 0xff pulse those of four output lines whose bit is 0. Line 0 is the CPU's reset.
        if value & 0xf1 == 0xf0 {
            self.requests.send(Request::Reset);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_pulse_of_line_0_resets() {
        let requests = Requests::new();
        let keyboard = KeyboardReset::new(requests.clone());
        for value in (0..0xf0u64).chain((0xf1..=0xff).step_by(2)) {
            keyboard.write(0, 1, value);
        }
        assert!(requests.receiver().try_recv().is_err());
        for value in [0xfe, 0xf0] {
            keyboard.write(0, 1, value);
            assert!(matches!(requests.receiver().try_recv(), Ok(Request::Reset)));
        }
    }

    #[test]
    fn the_reset_vector_is_the_last_paragraph_below_1_mib() {
        let ram = Ram::new(2 << 20).unwrap();
        write_reset_vector(&ram).unwrap();
        let code: [u8; 16] = ram.map().read_obj(GuestAddress(0xf_fff0)).unwrap();
        assert_eq!(code, *b"\xba\x02\x06\xb0\x01\xee\xfa\xf4\xeb\xfc\0\0\0\0\0\0");
        assert_eq!(ram.map().read_obj::<u8>(GuestAddress(0x10_0000)).unwrap(), 0);
    }
}
