//! `port`: reads and writes I/O ports from the guest's shell, for trying a device by hand.
//!
//! `port 0x510` reads a byte and prints it; `port 0x511 0x41` writes one. Debian's kernel has no /dev/port; this asks for the right to use ports itself.

use std::arch::asm;
use std::process::ExitCode;

unsafe extern "C" {
    /// ioperm(2) for all ports at once.
    fn iopl(level: i32) -> i32;
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let numbers: Option<Vec<u16>> = words.iter().map(|word| number(word)).collect();
    let (port, value) = match numbers.as_deref() {
        Some([port]) => (*port, None),
        Some([port, value]) => (*port, Some(value.to_le_bytes()[0])),
        _ => {
            eprintln!("port: reads or writes a byte\nusage: port PORT [VALUE], each decimal or 0x…");
            return ExitCode::from(2);
        }
    };
    // SAFETY: iopl changes nothing but this process's right to use ports.
    if unsafe { iopl(3) } != 0 {
        eprintln!("port: {}", std::io::Error::last_os_error());
        return ExitCode::FAILURE;
    }
    match value {
        None => {
            let byte: u8;
            // SAFETY: this process may use ports now; reading one touches no memory.
            unsafe { asm!("in al, dx", in("dx") port, out("al") byte, options(nomem, nostack)) };
            println!("{byte:#04x}");
        }
        // SAFETY: as above; what the device does is what whoever called asked for.
        Some(byte) => unsafe { asm!("out dx, al", in("dx") port, in("al") byte, options(nomem, nostack)) },
    }
    ExitCode::SUCCESS
}

fn number(word: &str) -> Option<u16> {
    match word.strip_prefix("0x") {
        Some(hex) => u16::from_str_radix(hex, 16).ok(),
        None => word.parse().ok(),
    }
}
