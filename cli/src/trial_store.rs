//! `tenon plugin test` for a store: opened as a machine opens it, over a disk in memory if it stands on one, and put through the suite that any vendor can run.

use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use tenon_abi::{StoreError, StoreInfo};
use tenon_plugins::{Data, OperationKind, Plugin, Store, StoreGrants};
use tenon_testkit::{StoreChecks, StoreSubject, suite};

use tenon_sdk::store::Operation;

use crate::args::KeepsChoice;
use crate::disks::{LOWER, granted};
use crate::trial::Settings;

/// How large the store is on which it stands.
const LOWER_SIZE: &str = "16M";

/// A store behind the plugin host.
struct Subject {
    plugin: Arc<Plugin>,
    settings: Vec<(String, String)>,
    lower: Vec<Arc<Store>>,
    store: Option<Arc<Store>>,
}

/// Tries a store. `memory` is what it stands on, if it stands on something. Returns what was done, a line each.
pub(crate) fn run(
    plugin: &Arc<Plugin>,
    settings: Settings<'_>,
    keeps: Option<KeepsChoice>,
    memory: &Arc<Plugin>,
) -> Result<Vec<String>> {
    let lower = if plugin.manifest().permissions.contains(LOWER) {
        let size = [("size".to_owned(), LOWER_SIZE.to_owned())];
        vec![memory.open_store("lower", &size, Vec::new(), &StoreGrants::none())?]
    } else {
        Vec::new()
    };
    // What it keeps by itself may be gone when it is closed.
    let keeps = keeps.unwrap_or(if lower.is_empty() { KeepsChoice::Open } else { KeepsChoice::Always });
    let checks = StoreChecks { content: keeps != KeepsChoice::Never, reopen: keeps == KeepsChoice::Always };
    let mut subject = Subject { plugin: plugin.clone(), settings: settings.to_vec(), lower, store: None };
    subject.open().map_err(|error| anyhow!(error)).context("it does not open with these settings")?;
    suite::store(&mut subject, checks).map_err(|error| {
        if error.contains("written") {
            anyhow!("{error}; of a store that does not promise to keep what is written, say so by --keeps")
        } else {
            anyhow!(error)
        }
    })
}

impl Subject {
    fn open(&mut self) -> Result<(), String> {
        let grants = granted(&self.settings);
        let store = self.plugin.open_store("trial", &self.settings, self.lower.clone(), &grants);
        self.store = Some(store.map_err(|error| error.to_string())?);
        Ok(())
    }

    fn store(&self) -> Result<&Arc<Store>, String> {
        self.store.as_ref().ok_or_else(|| "the store is closed".to_owned())
    }
}

impl StoreSubject for Subject {
    fn info(&mut self) -> StoreInfo {
        self.store.as_ref().map_or_else(|| StoreInfo::new(0), |store| store.info())
    }

    fn submit(&mut self, operations: Vec<Operation>) -> Vec<Result<Vec<u8>, StoreError>> {
        let Some(store) = &self.store else {
            return operations.iter().map(|_| Err(StoreError::Io)).collect();
        };
        let operations = operations
            .into_iter()
            .map(|operation| match operation {
                Operation::Read { position, length } => {
                    let room = usize::try_from(length).unwrap_or(0);
                    (OperationKind::Read, position, length, Data::Host(vec![0; room]))
                }
                Operation::Write { position, data } => {
                    (OperationKind::Write, position, data.len() as u64, Data::Host(data))
                }
                Operation::Flush => (OperationKind::Flush, 0, 0, Data::None),
                Operation::Discard { position, length } => {
                    (OperationKind::Discard, position, length, Data::None)
                }
                Operation::WriteZeroes { position, length, unmap } => {
                    (OperationKind::WriteZeroes { unmap }, position, length, Data::None)
                }
            })
            .collect::<Vec<_>>();
        let reads: Vec<_> = operations.iter().map(|(kind, ..)| *kind == OperationKind::Read).collect();
        let outcomes = store.run(operations).into_iter().zip(reads);
        outcomes
            .map(|((result, bytes), read)| result.map(|()| if read { bytes } else { Vec::new() }))
            .collect()
    }

    fn resize(&mut self, size: u64) -> Result<(), String> {
        self.store()?.resize(size).map(drop)
    }

    fn reopen(&mut self) -> Result<(), String> {
        self.store()?.close()?;
        self.store = None;
        self.open()
    }

    fn alive(&mut self) -> Result<(), String> {
        let usage = self.store()?.usage();
        if usage.faults == 0 { Ok(()) } else { Err(format!("an instance fell {} times", usage.faults)) }
    }
}
