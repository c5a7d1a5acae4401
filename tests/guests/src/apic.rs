//! The local APIC (through its memory-mapped registers) and the I/O APIC. Intel SDM vol. 3 chapter 11; 82093AA data sheet.

const LOCAL: u64 = 0xfee0_0000;
const IO: u64 = 0xfec0_0000;

/// Local APIC registers.
pub const ID: u64 = 0x20;
/// End of interrupt.
pub const EOI: u64 = 0xb0;
/// Task priority.
pub const TPR: u64 = 0x80;
const SPURIOUS: u64 = 0xf0;
/// First word of the in-service register.
pub const IN_SERVICE: u64 = 0x100;
/// First word of the interrupt-request register.
pub const REQUEST: u64 = 0x200;
const COMMAND_LOW: u64 = 0x300;
const COMMAND_HIGH: u64 = 0x310;
/// The timer's entry in the local vector table.
pub const LVT_TIMER: u64 = 0x320;
/// The timer's initial count.
pub const INITIAL_COUNT: u64 = 0x380;
/// The timer's current count.
pub const CURRENT_COUNT: u64 = 0x390;
/// The timer's divider.
pub const DIVIDE: u64 = 0x3e0;

/// Reads a local APIC register.
pub fn read(register: u64) -> u32 {
    // SAFETY: the local APIC's page is mapped.
    unsafe { core::ptr::read_volatile((LOCAL + register) as *const u32) }
}

/// Writes a local APIC register.
pub fn write(register: u64, value: u32) {
    // SAFETY: the local APIC's page is mapped.
    unsafe { core::ptr::write_volatile((LOCAL + register) as *mut u32, value) }
}

/// Turns the local APIC on.
pub fn enable() {
    write(SPURIOUS, 0x1ff);
    write(TPR, 0);
}

/// Ends the interrupt in service.
pub fn end_of_interrupt() {
    write(EOI, 0);
}

/// Sends an interprocessor interrupt: the command register's two words.
pub fn send(destination: u8, command: u32) {
    write(COMMAND_HIGH, u32::from(destination) << 24);
    write(COMMAND_LOW, command);
    while read(COMMAND_LOW) & 0x1000 != 0 {
        core::hint::spin_loop();
    }
}

/// Reads an I/O APIC register.
pub fn io_read(register: u32) -> u32 {
    // SAFETY: the I/O APIC's page is mapped.
    unsafe {
        core::ptr::write_volatile(IO as *mut u32, register);
        core::ptr::read_volatile((IO + 0x10) as *const u32)
    }
}

/// Writes an I/O APIC register.
pub fn io_write(register: u32, value: u32) {
    // SAFETY: the I/O APIC's page is mapped.
    unsafe {
        core::ptr::write_volatile(IO as *mut u32, register);
        core::ptr::write_volatile((IO + 0x10) as *mut u32, value);
    }
}

/// Routes an input of the I/O APIC to vCPU 0. `flags` are the entry's bits above the vector, such as [`LEVEL`] or [`MASKED`].
pub fn route(input: u32, vector: u8, flags: u32) {
    io_write(0x10 + input * 2 + 1, 0);
    io_write(0x10 + input * 2, u32::from(vector) | flags);
}

/// The entry is level-triggered.
pub const LEVEL: u32 = 1 << 15;
/// The entry is masked.
pub const MASKED: u32 = 1 << 16;
