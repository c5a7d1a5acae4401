//! AES-256-XTS (IEEE 1619-2007) of whole data units.
//!
//! A data unit is a multiple of 16 bytes here, so that the standard's ciphertext stealing never comes in. All blocks of a unit go to the cipher in one call: a
//! cipher in software, as in a component, works on several at a time.

use aes::cipher::inout::InOutBuf;
use aes::cipher::typenum::U16;
use aes::cipher::{BlockDecrypt, BlockEncrypt, KeyInit};
use aes::{Aes256, Block};

/// How long a key is: one AES key for the data, one for the tweaks.
pub const KEY: usize = 64;

/// How many bytes one AES block has.
const BLOCK: usize = 16;

/// The cipher with its key.
pub struct Xts {
    data: Aes256,
    tweak: Aes256,
}

impl Xts {
    /// The cipher under this key.
    #[must_use]
    pub fn new(key: &[u8; KEY]) -> Self {
        let (data, tweak) = key.split_at(KEY / 2);
        Self { data: Aes256::new(data.into()), tweak: Aes256::new(tweak.into()) }
    }

    /// Encrypts data units of `unit` bytes, the first of which has the number `first`.
    pub fn encrypt(&self, unit: usize, first: u64, bytes: &mut [u8]) {
        self.each_unit(unit, first, bytes, |blocks| self.data.encrypt_blocks_inout(blocks));
    }

    /// Decrypts data units of `unit` bytes, the first of which has the number `first`.
    pub fn decrypt(&self, unit: usize, first: u64, bytes: &mut [u8]) {
        self.each_unit(unit, first, bytes, |blocks| self.data.decrypt_blocks_inout(blocks));
    }

    fn each_unit(&self, unit: usize, first: u64, bytes: &mut [u8], cipher: impl Fn(InOutBuf<'_, '_, Block>)) {
        debug_assert!(unit.is_multiple_of(BLOCK) && bytes.len().is_multiple_of(unit));
        let mut tweaks: Vec<Block> = (u128::from(first)..)
            .take(bytes.len() / unit)
            .map(|number| number.to_le_bytes().into())
            .collect();
        self.tweak.encrypt_blocks(&mut tweaks);
        for (unit, tweak) in bytes.chunks_exact_mut(unit).zip(tweaks) {
            let tweak = u128::from_le_bytes(tweak.into());
            whiten(unit, tweak);
            cipher(InOutBuf::from(&mut *unit).into_chunks::<U16>().0);
            whiten(unit, tweak);
        }
    }
}

/// Adds to each block its own tweak: that of the block before it, times the polynomial `x`.
fn whiten(unit: &mut [u8], mut tweak: u128) {
    for block in unit.chunks_exact_mut(BLOCK) {
        if let Ok(block) = <&mut [u8; BLOCK]>::try_from(block) {
            *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
        }
        tweak = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
    }
}
