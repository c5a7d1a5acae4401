//! Network backends: where the frames of a guest's network device go. Each is a [`NetworkPort`](tenon_core::NetworkPort).
//!
//! | kind | what it needs | what is at the other end |
//! | --- | --- | --- |
//! | `user` ([`UserNetwork`]) | nothing | the host's own sockets: TCP and UDP out, forwards in |
//! | `tap:NAME` | an interface made for the user, or CAP_NET_ADMIN | the host's kernel |
//! | `socket,listen=PATH` | a folder | a machine with `socket,connect=PATH` |
//! | any with `pcap=FILE` ([`Recorder`]) | a file | a recording of all frames beside it |
//!
//! ```
//! let spec = tenon_net::parse("user,forward=tcp:127.0.0.1:0-:22,mac=52:54:00:12:34:56")?;
//! let port = tenon_net::open(&spec)?;
//! assert_eq!(port.info().mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
//! # Ok::<(), tenon_net::NetworkError>(())
//! ```

mod checksum;
mod frame;
mod fuzz;
mod open;
mod pcap;
mod poll;
mod queue;
mod socket;
mod spec;
mod tap;
mod user;

pub use fuzz::fuzz_frame;
pub use open::open;
pub use pcap::Recorder;
pub use spec::{Kind, NetworkError, SNAPLEN, Spec, is_setting, local_mac, parse};
pub use user::{Forward, Protocol, UserConfig, UserNetwork};
