//! The Internet checksum (RFC 1071).

/// The sum of 16-bit words of `bytes`, not folded; a last odd byte counts as if a zero followed.
/// Sums of pieces may be added if all pieces but the last are of even length.
pub(crate) fn sum(bytes: &[u8]) -> u64 {
    // Words of any size in the host's order may be added: the sum's bytes come out swapped on a little-endian host, and are swapped back once.
    let mut chunks = bytes.chunks_exact(4);
    let mut total: u64 = 0;
    for chunk in &mut chunks {
        total += u64::from(u32::from_ne_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
    }
    let rest = chunks.remainder();
    let mut last = [0; 4];
    last[..rest.len()].copy_from_slice(rest);
    total += u64::from(u32::from_ne_bytes(last));
    u64::from(fold(total).to_be())
}

fn fold(mut total: u64) -> u16 {
    while total > 0xffff {
        total = (total & 0xffff) + (total >> 16);
    }
    // The loop leaves 16 bits.
    (total & 0xffff) as u16
}

/// The checksum of what was summed up.
pub(crate) fn finish(total: u64) -> u16 {
    !fold(total)
}

/// The sum of the pseudo-header: `addresses` are source and destination, of IPv4 or of IPv6.
pub(crate) fn pseudo_header(addresses: &[u8], protocol: u8, length: usize) -> u64 {
    sum(addresses) + u64::from(protocol) + (length as u64 & 0xffff) + (length as u64 >> 16)
}

/// What goes into the checksum field of a segment whose checksum is left to the device: the sum of the pseudo-header, folded and not inverted.
pub(crate) fn partial(addresses: &[u8], protocol: u8, length: usize) -> u16 {
    fold(pseudo_header(addresses, protocol, length))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_example_of_rfc_1071_comes_out() {
        let bytes = [0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7];
        assert_eq!(finish(sum(&bytes)), !0xddf2);
    }

    #[test]
    fn every_length_is_summed_like_word_by_word() {
        let bytes: Vec<u8> = (0..200_u16).map(|i| (i * 37 % 251) as u8 | 0x80).collect();
        for length in 0..bytes.len() {
            let words: u64 = bytes[..length]
                .chunks(2)
                .map(|w| u64::from(u16::from_be_bytes([w[0], w.get(1).copied().unwrap_or(0)])))
                .sum();
            assert_eq!(finish(sum(&bytes[..length])), finish(words), "{length} bytes");
        }
    }
}
