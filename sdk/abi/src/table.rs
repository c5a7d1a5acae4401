//! Declares a table of functions together with the list of its fields, so that a test can hold it against the WIT.

macro_rules! table {
    (
        $(#[$attribute:meta])*
        pub struct $name:ident {
            $( $(#[$field_attribute:meta])* $field:ident: fn($($argument:ident: $type:ty),*) $(-> $result:ty)?; )*
        }
    ) => {
        $(#[$attribute])*
        #[repr(C)]
        #[derive(Clone, Copy)]
        pub struct $name {
            /// The size of this table in bytes.
            pub size: u64,
            $( $(#[$field_attribute])* pub $field: unsafe extern "C" fn($($argument: $type),*) $(-> $result)?, )*
        }

        impl $name {
            /// The names of the functions, in order.
            pub const FUNCTIONS: &[&str] = &[$(stringify!($field)),*];
            /// The size of this table as this version knows it.
            pub const SIZE: u64 = size_of::<Self>() as u64;
        }

        // One pointer for each function behind the size: no padding, no surprise between compilers.
        #[cfg(target_pointer_width = "64")]
        const _: () = assert!(size_of::<$name>() == 8 + $name::FUNCTIONS.len() * size_of::<usize>());
    };
}
