//! Make, build and test a plugin: the library behind `tenon plugin new`, `build` and `test`.
//!
//! It drives `cargo` and turns what `rustc` made into a component; it runs no plugin. Loading, permissions and limits are the plugin host's.

mod build;
mod component;
mod new;

pub use build::{BuildOptions, Built, build, test};
pub use component::{Component, componentize, inspect};
pub use new::{Kind, find_sdk, new};

use std::path::PathBuf;

/// Making, building or testing a plugin failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file cannot be read or written.
    #[error("{path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The folder is not a plugin's.
    #[error("{path}: {what}")]
    Manifest {
        /// The file.
        path: PathBuf,
        /// What is wrong and what would be right.
        what: String,
    },
    /// Cargo cannot be run, or failed and has said why.
    #[error("{0}")]
    Cargo(String),
    /// The compiled module is not a plugin.
    #[error("{0}")]
    Component(String),
    /// The component uses what the manifest does not ask for.
    #[error(
        "{path}: the plugin uses {used}, which `[permissions] imports` does not have; add {used}, or do without: an administrator sees the list before the plugin runs"
    )]
    Permissions {
        /// The manifest.
        path: PathBuf,
        /// The interfaces.
        used: String,
    },
    /// A new plugin cannot have this name.
    #[error("{0}")]
    Name(String),
    /// A new plugin cannot be made.
    #[error("{0}")]
    New(String),
}

impl Error {
    fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}
