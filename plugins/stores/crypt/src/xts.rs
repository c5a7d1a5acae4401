//! AES-256-XTS (IEEE 1619-2007) of whole data units.
//!
//! A data unit is a multiple of 16 bytes here, so that the standard's ciphertext stealing never comes in. All blocks of all units go to the cipher in one call:
//! a cipher in software, as in a component, works on several at a time.

use aes::cipher::array::Array;
use aes::cipher::consts::{U32, U64};
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};
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
        let (data, tweak) = halves(key);
        Self { data: Aes256::new(data), tweak: Aes256::new(tweak) }
    }

    /// Encrypts data units of `unit` bytes, the first of which has the number `first`.
    pub fn encrypt(&self, unit: usize, first: u64, bytes: &mut [u8]) {
        let tweaks = self.tweaks(unit, first, bytes);
        whiten(unit, &tweaks, bytes);
        self.data.encrypt_blocks(Block::slice_as_chunks_mut(bytes).0);
        whiten(unit, &tweaks, bytes);
    }

    /// Decrypts data units of `unit` bytes, the first of which has the number `first`.
    pub fn decrypt(&self, unit: usize, first: u64, bytes: &mut [u8]) {
        let tweaks = self.tweaks(unit, first, bytes);
        whiten(unit, &tweaks, bytes);
        self.data.decrypt_blocks(Block::slice_as_chunks_mut(bytes).0);
        whiten(unit, &tweaks, bytes);
    }

    /// The tweak of each data unit's first block.
    fn tweaks(&self, unit: usize, first: u64, bytes: &[u8]) -> Vec<Block> {
        debug_assert!(unit.is_multiple_of(BLOCK) && bytes.len().is_multiple_of(unit));
        let numbers = (u128::from(first)..).take(bytes.len() / unit);
        let mut tweaks: Vec<Block> = numbers.map(|number| number.to_le_bytes().into()).collect();
        self.tweak.encrypt_blocks(&mut tweaks);
        tweaks
    }
}

/// The two AES keys of a key.
pub(crate) fn halves(key: &[u8; KEY]) -> (&Array<u8, U32>, &Array<u8, U32>) {
    Array::<u8, U64>::cast_from_core(key).split_ref()
}

/// Adds to each block its own tweak: that of the block before it in its unit, times the polynomial `x`.
fn whiten(unit: usize, tweaks: &[Block], bytes: &mut [u8]) {
    for (unit, tweak) in bytes.chunks_exact_mut(unit).zip(tweaks) {
        let mut tweak = u128::from_le_bytes((*tweak).into());
        for block in unit.as_chunks_mut::<BLOCK>().0 {
            *block = (u128::from_le_bytes(*block) ^ tweak).to_le_bytes();
            tweak = (tweak << 1) ^ if tweak >> 127 == 1 { 0x87 } else { 0 };
        }
    }
}
