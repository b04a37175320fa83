//! The kernels in AVX-512 with VNNI and BF16 dot products.

mod dots;
mod lanes;
mod panels;
mod rows;
mod scan;
mod stored;

pub use dots::{dots, weighted_sums};
pub use lanes::{interleave, widen};
pub use panels::{bf16, blocks, float, super_blocks};
pub use rows::{bf16_rows, block_rows, float_rows, super_rows};
pub use scan::scan_rows;
pub use stored::{q4_k_rows, q6_k_rows, q8_0_rows};
