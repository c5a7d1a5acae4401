//! Finds the header of a store for changes, or makes a blank store one.

use tenon_sdk::store::{Error, Lower, Result, StoreError, StoreInfo, info};

use crate::header::{self, CLUSTER, Header, LONGEST, TABLE};
use crate::map::GRAIN;

/// The header of a copy that nothing was changed of.
pub(crate) fn fresh(base: &StoreInfo, block: u32, size: Option<u64>) -> Result<Header> {
    let shortest = base.size.next_multiple_of(block.into());
    let size = size.unwrap_or(shortest);
    if size < shortest || !size.is_multiple_of(block.into()) || size > LONGEST {
        return Err(Error::Invalid(format!(
            "`size` is {size}, but must be a multiple of {block} from {shortest}, the length of the base, to {LONGEST}"
        )));
    }
    let header = Header { block, base: base.size, size, next: 0, sequence: 0 };
    Ok(Header { next: header.first_data(), ..header })
}

/// Reads the header of a store for changes, or makes it.
pub(crate) fn find(
    top: &Lower,
    base: &StoreInfo,
    block: u32,
    size: Option<u64>,
    format: bool,
) -> Result<Header> {
    let above = top.info();
    let mut found: Option<Header> = None;
    let mut blank = true;
    for copy in 0..2 {
        if above.size < (copy + 1) * CLUSTER {
            continue;
        }
        let bytes = top
            .read(copy * CLUSTER, above.block_size.into())
            .map_err(|error| Error::Other(format!("reading the header of the store for changes: {error}")))?;
        blank &= bytes.iter().all(|byte| *byte == 0);
        if let Some(header) = Header::decode(&bytes)?
            && found.as_ref().is_none_or(|other| other.sequence < header.sequence)
        {
            found = Some(header);
        }
    }
    let Some(header) = found else {
        return match (format, blank) {
            (true, true) => make(top, &above, fresh(base, block, size)?),
            (true, false) => Err(Error::Invalid(
                "`format`: the store for changes is not blank; write zeroes to its first 128 KiB if what it holds is not needed".into(),
            )),
            (false, _) => Err(Error::Invalid(
                "the second store is none for changes; `format=yes` makes it one if it is blank".into(),
            )),
        };
    };
    if header.base != base.size {
        return Err(Error::Invalid(format!(
            "the changes are of a base of {} bytes, and this one has {}: it is another, or was changed",
            header.base, base.size
        )));
    }
    if header.block < block && u64::from(block) > GRAIN {
        return Err(Error::Invalid(format!(
            "the changes were made in blocks of {} bytes, and the stores now have blocks of {block}",
            header.block
        )));
    }
    if let Some(size) = size.filter(|size| *size != header.size) {
        return Err(Error::Invalid(format!(
            "`size` is {size}, but the copy was made with {} bytes",
            header.size
        )));
    }
    if !header.size.is_multiple_of(block.into()) {
        return Err(Error::Invalid(format!(
            "the copy has {} bytes, which are no blocks of {block}",
            header.size
        )));
    }
    if above.size / CLUSTER < header.next {
        return Err(Error::Other(format!(
            "the store for changes has {} bytes, and {} clusters of {CLUSTER} are in use: its end is missing",
            above.size, header.next
        )));
    }
    Ok(header)
}

/// Makes a store for changes of a blank one.
fn make(top: &Lower, above: &StoreInfo, header: Header) -> Result<Header> {
    if above.read_only {
        return Err(Error::Invalid("`format`: the store for changes is read-only".into()));
    }
    let failed = |error| Error::Other(format!("making the store for changes: {error}"));
    let needed = header.next * CLUSTER;
    if above.size < needed {
        top.resize(needed).map_err(failed)?;
    }
    top.write_zeroes(TABLE * CLUSTER, needed - TABLE * CLUSTER, true).map_err(failed)?;
    top.flush().map_err(failed)?;
    let mut header = header;
    for _ in 0..2 {
        header.sequence += 1;
        write_header(top, &header).map_err(failed)?;
        top.flush().map_err(failed)?;
    }
    info!("the second store keeps changes from now on");
    Ok(header)
}

/// Writes the copy of the header whose turn it is.
pub(crate) fn write_header(top: &Lower, header: &Header) -> Result<(), StoreError> {
    let mut block = vec![0; usize::try_from(top.info().block_size).unwrap_or(header::SIZE)];
    block[..header::SIZE].copy_from_slice(&header.encode());
    top.write(header.sequence % 2 * CLUSTER, &block)
}
