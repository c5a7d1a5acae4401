//! Write Tenon plugins: devices, backing stores, guest-OS personalities.
