//! The cipher against the standard, and against another implementation of it.
#![allow(clippy::unwrap_used, reason = "a test")]

use tenon_store_crypt::xts::Xts;

/// The keys of IEEE 1619-2007, annex B, vectors 10 to 14: digits of e and of π.
const KEY: &str = "2718281828459045235360287471352662497757247093699959574966967627\
                   3141592653589793238462643383279502884197169399375105820974944592";

/// The cipher text of vector 10, whole.
const VECTOR_10: &str = "\
    1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b5d31e276f8fe4a8d66b317f9ac683f44680a86ac35adfc3345befecb4bb188fd\
    5776926c49a3095eb108fd1098baec70aaa66999a72a82f27d848b21d4a741b0c5cd4d5fff9dac89aeba122961d03a757123e9870f8acf1000020887891429ca\
    2a3e7a7d7df7b10355165c8b9a6d0a7de8b062c4500dc4cd120c0f7418dae3d0b5781c34803fa75421c790dfe1de1834f280d7667b327f6c8cd7557e12ac3a0f\
    93ec05c52e0493ef31a12d3d9260f79a289d6a379bc70c50841473d1a8cc81ec583e9645e07b8d9670655ba5bbcfecc6dc3966380ad8fecb17b6ba02469a020a\
    84e18e8f84252070c13e9f1f289be54fbc481457778f616015e1327a02b140f1505eb309326d68378f8374595c849d84f4c333ec4423885143cb47bd71c5edae\
    9be69a2ffeceb1bec9de244fbe15992b11b77c040f12bd8f6a975a44a0f90c29a9abc3d4d893927284c58754cce294529f8614dcd2aba991925fedc4ae74ffac\
    6e333b93eb4aff0479da9a410e4450e0dd7ae4c6e2910900575da401fc07059f645e8b7e9bfdef33943054ff84011493c27b3429eaedb4ed5376441a77ed4385\
    1ad77f16f541dfd269d50d6a5f14fb0aab1cbb4c1550be97f7ab4066193c4caa773dad38014bd2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151";

/// The first and the last block of the others, by the number of the data unit.
const OTHERS: [(u64, &str, &str); 4] = [
    (0xffff, "77a31251618a15e6b92d1d66dffe7b50", "a4f9e27b42af8100cb9d59cef9645803"),
    (0xff_ffff, "e387aaa58ba483afa7e8eb469778317e", "2263a1eef52dd6888c309f5a7d712826"),
    (0xffff_ffff, "bf53d2dade78e822a4d949a9bc6766b0", "4c82f335abb152c4a93411373aaa8220"),
    (0xff_ffff_ffff, "64497e5a831e4a932c09be3e5393376d", "d609d273ad5b0d59631c531f6a0a57b9"),
];

fn hex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

fn cipher() -> Xts {
    Xts::new(&hex(KEY).try_into().unwrap())
}

fn plain() -> Vec<u8> {
    (0..=255).chain(0..=255).collect()
}

#[test]
fn the_vectors_of_the_standard_come_out() {
    let mut bytes = plain();
    cipher().encrypt(512, 0xff, &mut bytes);
    assert_eq!(bytes, hex(VECTOR_10));
    cipher().decrypt(512, 0xff, &mut bytes);
    assert_eq!(bytes, plain());
    for (unit, first, last) in OTHERS {
        cipher().encrypt(512, unit, &mut bytes);
        assert_eq!((&bytes[..16], &bytes[496..]), (&hex(first)[..], &hex(last)[..]), "unit {unit:#x}");
        cipher().decrypt(512, unit, &mut bytes);
        assert_eq!(bytes, plain(), "unit {unit:#x}");
    }
}

#[test]
fn units_of_4096_bytes_are_as_openssl_encrypts_them() {
    let mut bytes: Vec<u8> = (0..3 * 4096_u32).map(|n| u8::try_from(n * 7 % 251).unwrap()).collect();
    cipher().encrypt(4096, 7, &mut bytes);
    // The checksum of what OpenSSL 3.0 makes of the same bytes, unit by unit.
    assert_eq!(crc32fast::hash(&bytes), 0xbcac_0703);
}
