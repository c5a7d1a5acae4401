//! Numbers that are the same in every run.

/// Xorshift64* (Vigna 2016), for tests that try what nobody thinks of.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// Those of this seed, which may be any number.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        // The generator has no way out of 0.
        let mut random = Self(seed ^ 0x9e37_79b9_7f4a_7c15 | 1);
        random.next();
        random
    }

    /// Any number.
    #[allow(clippy::should_implement_trait, reason = "it never ends, and is no iterator")]
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// One of 0 to `limit` - 1; 0 where there is none.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }

    /// The same of 32 bits.
    pub fn below32(&mut self, limit: u32) -> u32 {
        u32::try_from(self.below(limit.into())).unwrap_or(0)
    }

    /// A place in something of this length.
    pub fn index(&mut self, length: usize) -> usize {
        usize::try_from(self.below(length as u64)).unwrap_or(0)
    }

    /// Any byte.
    pub fn byte(&mut self) -> u8 {
        self.next().to_be_bytes()[0]
    }

    /// This many bytes.
    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(count + 8);
        while bytes.len() < count {
            bytes.extend(self.next().to_be_bytes());
        }
        bytes.truncate(count);
        bytes
    }

    /// Fewer bytes than `most`.
    pub fn some_bytes(&mut self, most: usize) -> Vec<u8> {
        let count = self.index(most);
        self.bytes(count)
    }
}
