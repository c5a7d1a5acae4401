//! `vsock`: a stream between the guest's shell and a program of the host, as `nc` has it for TCP.
//!
//! `vsock connect CID PORT` connects; `vsock listen PORT` takes one connection. Standard input is sent, and then the end of it; what comes goes to standard output, until it ends.

use std::ffi::c_void;
use std::fs::File;
use std::io::{self, Error};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;
use std::thread;

const AF_VSOCK: i32 = 40;
const SOCK_STREAM: i32 = 1;
const SHUT_WR: i32 = 1;
/// Any CID of this guest.
const ANY: u32 = u32::MAX;

/// `struct sockaddr_vm` of linux/vm_sockets.h.
#[repr(C)]
struct Address {
    family: u16,
    reserved: u16,
    port: u32,
    cid: u32,
    zero: [u8; 4],
}

unsafe extern "C" {
    fn socket(domain: i32, kind: i32, protocol: i32) -> i32;
    fn connect(socket: i32, address: *const Address, length: u32) -> i32;
    fn bind(socket: i32, address: *const Address, length: u32) -> i32;
    fn listen(socket: i32, backlog: i32) -> i32;
    fn accept(socket: i32, address: *mut c_void, length: *mut u32) -> i32;
    fn shutdown(socket: i32, how: i32) -> i32;
}

/// A new descriptor, or why there is none.
fn descriptor(number: i32) -> io::Result<OwnedFd> {
    if number < 0 {
        return Err(Error::last_os_error());
    }
    // SAFETY: a call has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

fn done(result: i32) -> io::Result<()> {
    if result < 0 { Err(Error::last_os_error()) } else { Ok(()) }
}

fn open(words: &[&str]) -> io::Result<Option<OwnedFd>> {
    let number = |word: &str| word.parse::<u32>().ok();
    let (cid, port, listens) = match words {
        ["connect", cid, port] => (number(cid), number(port), false),
        ["listen", port] => (Some(ANY), number(port), true),
        _ => return Ok(None),
    };
    let (Some(cid), Some(port)) = (cid, port) else { return Ok(None) };
    let family = AF_VSOCK as u16;
    let address = Address { family, reserved: 0, port, cid, zero: [0; 4] };
    let length = size_of::<Address>() as u32;
    // SAFETY: plain calls of the C library; the address lives past them, and has the length that is said.
    unsafe {
        let stream = descriptor(socket(AF_VSOCK, SOCK_STREAM, 0))?;
        if !listens {
            done(connect(stream.as_raw_fd(), &raw const address, length))?;
            return Ok(Some(stream));
        }
        done(bind(stream.as_raw_fd(), &raw const address, length))?;
        done(listen(stream.as_raw_fd(), 1))?;
        eprintln!("vsock: listening");
        descriptor(accept(stream.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut())).map(Some)
    }
}

fn exchange(stream: OwnedFd) -> io::Result<()> {
    let mut outgoing = File::from(stream.try_clone()?);
    let mut incoming = File::from(stream);
    let sender = thread::spawn(move || {
        let sent = io::copy(&mut io::stdin().lock(), &mut outgoing);
        // SAFETY: a plain call with a descriptor that is open.
        sent.and_then(|_| done(unsafe { shutdown(outgoing.as_raw_fd(), SHUT_WR) }))
    });
    io::copy(&mut incoming, &mut io::stdout().lock())?;
    sender.join().unwrap_or_else(|_| Err(Error::other("the sending thread panicked")))
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let ended = match open(&words) {
        Ok(Some(stream)) => exchange(stream),
        Ok(None) => {
            eprintln!("vsock: a stream to the host\nusage: vsock connect CID PORT\n       vsock listen PORT");
            return ExitCode::from(2);
        }
        Err(error) => Err(error),
    };
    match ended {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vsock: {error}");
            ExitCode::FAILURE
        }
    }
}
