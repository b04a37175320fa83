//! One typed method per kernel: shapes in, launch grid and parameters out. What does not fit one view is cut into parts.

mod decode;
mod floats;
mod integers;
mod matmul;
mod mixers;
mod packed;
mod rows;
mod softmax;
mod stored;
mod values;

pub use decode::can_dequantize;
pub use floats::FloatLayout;
pub use integers::IntegerLayout;
pub use matmul::MatmulLayout;
pub use mixers::{AttentionLayout, ConvLayout, ScanLayout};
pub use rows::Rounding;
pub use softmax::{KlDivergence, LogitRows, SoftmaxSums};
pub use stored::{Packed, Packing};

/// Groups for so many threads' work.
fn groups_of(work: usize, threads: u32) -> u32 {
    u32::try_from(work.div_ceil(threads as usize))
        .expect("an array has less than 2^32 groups of values")
}

/// A size as kernels take it.
fn word(size: usize) -> u32 {
    u32::try_from(size).expect("sizes of kernels have 32 bits")
}
