//! The platform: ACPI tables, power and reset registers.
