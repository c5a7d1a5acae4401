//! Network backends: where the frames of a guest's network device go. Each is a [`NetworkPort`](tenon_core::NetworkPort).
//!
//! | kind | what it needs | what is at the other end |
//! | --- | --- | --- |
//! | [`UserNetwork`] | nothing | the host's own sockets: TCP and UDP out, forwards in |
//!
//! ```
//! let spec = tenon_net::parse("user,forward=tcp:127.0.0.1:0-:22,mac=52:54:00:12:34:56")?;
//! let port = tenon_net::open(&spec)?;
//! assert_eq!(port.info().mac, [0x52, 0x54, 0, 0x12, 0x34, 0x56]);
//! # Ok::<(), tenon_net::NetworkError>(())
//! ```

mod checksum;
mod frame;
mod open;
mod queue;
mod spec;
mod user;

pub use open::open;
pub use spec::{Kind, NetworkError, SNAPLEN, Spec, local_mac, parse};
pub use user::{Forward, Protocol, UserConfig, UserNetwork};
