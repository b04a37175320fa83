//! One typed method per kernel: shapes in, launch grid and parameters out. What does not fit one view is cut into parts.

mod columns;
mod decode;
mod doubles;
mod feedback;
mod floats;
mod gram;
mod integers;
mod matmul;
mod minima;
mod mixers;
mod packed;
mod parts;
mod rows;
mod softmax;
mod split;
mod stored;
mod values;

pub use columns::{ColumnSums, MagnitudeBins};
pub use decode::can_dequantize;
pub use feedback::{
    CodeValues, FEEDBACK_CHUNK, FeedbackGrid, FeedbackRows, ScaleLattice, ScaleSearch, Tries,
};
pub use floats::FloatLayout;
pub use integers::IntegerLayout;
pub use matmul::MatmulLayout;
pub use minima::has_minima;
pub use mixers::{AttentionLayout, ConvLayout, ScanLayout};
pub use rows::Rounding;
pub use softmax::{KlDivergence, LogitRows, SoftmaxSums};
pub use split::Splitting;
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
