//! Bit planes: how ggml spreads the bits of codes over bytes.
//!
//! In every plane used here, `STRIDE` bytes hold `STRIDE * 8 / BITS` codes: bits `BITS * s` of byte
//! `l` belong to code `STRIDE * s + l`. Knows nothing of scales.

/// Sets bits `shift..shift + BITS` of `codes` from `bytes`; those bits must be zero before.
#[inline(always)]
pub fn unpack<const BITS: usize, const STRIDE: usize>(
    bytes: &[u8],
    shift: usize,
    codes: &mut [u8],
) {
    let mask = ((1u16 << BITS) - 1) as u8;
    // Indices, not zipped iterators: those are left as calls where the loop is compiled for wider vectors.
    let (bytes, _) = bytes.as_chunks::<STRIDE>();
    let (codes, _) = codes.as_chunks_mut::<STRIDE>();
    let planes = 8 / BITS;
    for i in 0..bytes.len().min(codes.len() / planes) {
        for s in 0..planes {
            for l in 0..STRIDE {
                codes[planes * i + s][l] |= ((bytes[i][l] >> (BITS * s)) & mask) << shift;
            }
        }
    }
}

/// Gathers bits `shift..shift + BITS` of `codes` into bytes. The inverse of [`unpack`].
///
/// Eight bytes at a time, as one word, whose bytes stay apart: `shift + BITS` is at most 8.
#[inline(always)]
pub fn pack<const BITS: usize, const STRIDE: usize, const BYTES: usize>(
    codes: &[u8],
    shift: usize,
) -> [u8; BYTES] {
    debug_assert!(shift + BITS <= 8, "bits of the next code");
    let mask = u64::from_ne_bytes([((1u16 << BITS) - 1) as u8; WORD]);
    let mut packed = [0; BYTES];
    let chunks = codes.chunks_exact(STRIDE * 8 / BITS);
    for (bytes, codes) in packed.as_chunks_mut::<STRIDE>().0.iter_mut().zip(chunks) {
        for (w, bytes) in bytes.chunks_mut(WORD).enumerate() {
            let mut word = 0;
            for (s, codes) in codes.as_chunks::<STRIDE>().0.iter().enumerate() {
                let codes = word_of(&codes[w * WORD..][..bytes.len()]);
                word |= ((codes >> shift) & mask) << (BITS * s);
            }
            bytes.copy_from_slice(&word.to_le_bytes()[..bytes.len()]);
        }
    }
    packed
}

/// Bytes of a word.
const WORD: usize = 8;

/// At most eight bytes, the first in the lowest bits.
#[inline(always)]
fn word_of(bytes: &[u8]) -> u64 {
    let mut word = [0; WORD];
    word[..bytes.len()].copy_from_slice(bytes);
    u64::from_le_bytes(word)
}

/// Nibbles: byte `l` of each `HALF` bytes holds codes `l` (low) and `l + HALF` (high).
#[inline(always)]
pub fn unpack_nibbles<const HALF: usize, const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut codes = [0; N];
    unpack::<4, HALF>(bytes, 0, &mut codes);
    codes
}

/// The inverse of [`unpack_nibbles`]; higher bits of the codes are ignored.
#[inline(always)]
pub fn pack_nibbles<const HALF: usize, const BYTES: usize>(codes: &[u8]) -> [u8; BYTES] {
    pack::<4, HALF, BYTES>(codes, 0)
}
