//! The native plugin ABI: repr(C) tables shared by the SDK and the host.
