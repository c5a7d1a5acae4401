//! Device plugin: a virtio file system (virtio 1.2 §5.11): the driver speaks FUSE, and what it asks is asked of a folder of the host.
//!
//! - **The device keeps nothing.** Nodes, how often the driver was told of each, and open files are numbers of the host's, so that the device has no state at all: whoever crashes leaves nothing
//!   behind, and a new instance goes on with the next request.
//! - **What is asked is read in the sandbox, what is done is checked by the host.** This code turns bytes into actions; that none of them leaves the folder, or changes one that is shared read-only, is not its
//!   concern.
//! - **The guest's view is at most a second old**: that is how long it may believe names and attributes. It caches data until a file's time or length changes, or the file is opened again; there is no
//!   window of shared memory (DAX), no cache of writes, and no notification of what the host changes.
//! - Extended attributes, and locks between guest and host, are not there.

mod protocol;
mod serve;

use tenon_sdk::virtio::{
    self, Answer, Attachment, Batch, Config, Decoder, Encoder, Error, Folder, Result, VirtioDescription,
    VirtioDevice,
};

const DEVICE_TYPE: u16 = 26;
/// The tag, and how many queues of requests there are (virtio 1.2 §5.11.4).
const CONFIG_SIZE: u16 = 40;
const LONGEST_TAG: usize = 36;
/// The most entries of a queue: room for a megabyte in pages, and more requests besides.
const QUEUE_SIZE: u16 = 1024;
/// Most requests are no longer than this but for data.
const HEAD: u16 = 256;

/// The file system.
pub struct FileSystem {
    folder: Folder,
    config: [u8; CONFIG_SIZE as usize],
}

tenon_sdk::export_virtio_device!(FileSystem);

/// The configuration space with this tag.
fn config_space(config: &Config) -> Result<[u8; CONFIG_SIZE as usize]> {
    let tag = config.text("tag").unwrap_or("share");
    if !(1..=LONGEST_TAG).contains(&tag.len()) || tag.contains(char::is_control) {
        return Err(Error::Invalid(format!(
            "`tag` is `{}`, but must be 1 to {LONGEST_TAG} bytes without control characters",
            tag.escape_debug()
        )));
    }
    let mut space = [0; CONFIG_SIZE as usize];
    space[..tag.len()].copy_from_slice(tag.as_bytes());
    space[LONGEST_TAG..].copy_from_slice(&1_u32.to_le_bytes());
    Ok(space)
}

impl VirtioDevice for FileSystem {
    fn describe(config: &Config) -> Result<VirtioDescription> {
        config_space(config)?;
        Ok(VirtioDescription::new(DEVICE_TYPE)
            .queue("hiprio", QUEUE_SIZE, HEAD)
            .queue("requests", QUEUE_SIZE, HEAD)
            .config(CONFIG_SIZE)
            .folder("share"))
    }

    fn start(config: &Config, mut attachment: Attachment) -> Result<Self> {
        Ok(Self { folder: attachment.folder()?, config: config_space(config)? })
    }

    fn config_read(&mut self, offset: u32, size: u8) -> u64 {
        virtio::field(&self.config, offset, size)
    }

    fn requests_ready(&mut self, _queue: u16, batch: &Batch<'_>) {
        let answers: Vec<Answer> = batch
            .iter()
            .map(|request| Answer { request: request.handle, written: serve::serve(&self.folder, &request) })
            .collect();
        virtio::complete_all(&answers);
    }

    fn reset(&mut self) {}

    fn save(&self, _state: &mut Encoder) -> Result<()> {
        Ok(())
    }

    fn restore(&mut self, _state: &mut Decoder<'_>) -> Result<()> {
        Ok(())
    }
}
