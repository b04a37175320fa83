//! Every kernel: its name, its sources, how many threads a group has, how many views it takes.
//!
//! Parameters are documented in the sources; [`crate::Device`] is the only caller.

use nemoconv_formats::GgmlType;

/// A kernel in both languages.
#[derive(Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Entry point, stem of its files.
    pub name: &'static str,
    /// Threads of a group.
    pub threads: u32,
    /// Views it takes, in order.
    pub views: usize,
    /// WGSL, pieces to be joined; none of kernels in f64, which it lacks.
    pub wgsl: &'static [&'static str],
    /// CUDA C++, pieces to be joined.
    #[cfg(feature = "cuda")]
    pub cuda: &'static [&'static str],
}

/// Shared pieces of WGSL: thread and group indices.
const WGSL_GRID: &str = include_str!("../shared/grid.wgsl");
/// Exponential, softplus, rounding to F16.
const WGSL_NUMERICS: &str = include_str!("../shared/numerics.wgsl");
/// Bytes, halves and floats out of words.
const WGSL_BYTES: &str = include_str!("../shared/bytes.wgsl");
/// What types of blocks share.
const WGSL_BLOCKS: &str = include_str!("../shared/blocks.wgsl");
/// Products of packed inputs with weights of 16 bits.
const WGSL_HALVES: &str = include_str!("../shared/halves_product.wgsl");
/// Products of operands in parts of BF16.
const WGSL_SPLIT: &str = include_str!("../shared/split_product.wgsl");
/// What rows of packed checkpoints share.
const WGSL_PACKED: &str = include_str!("../shared/packed.wgsl");
/// Grids of rounding with error feedback.
const WGSL_FEEDBACK: &str = include_str!("../shared/feedback.wgsl");
/// First fits of sub-blocks.
const WGSL_FITS: &str = include_str!("../shared/feedback_fits.wgsl");
/// The search of blocks with scale and offset.
const WGSL_LINES: &str = include_str!("../shared/feedback_lines.wgsl");
/// The loop of every `dequantize_*` of a type of blocks.
const WGSL_DEQUANTIZE: &str = include_str!("../shared/dequantize.wgsl");
/// The same of CUDA.
#[cfg(feature = "cuda")]
const CUDA_GRID: &str = include_str!("../shared/grid.cuh");
#[cfg(feature = "cuda")]
const CUDA_NUMERICS: &str = include_str!("../shared/numerics.cuh");
#[cfg(feature = "cuda")]
const CUDA_BYTES: &str = include_str!("../shared/bytes.cuh");
#[cfg(feature = "cuda")]
const CUDA_BLOCKS: &str = include_str!("../shared/blocks.cuh");
#[cfg(feature = "cuda")]
const CUDA_TENSOR_TILE: &str = include_str!("../shared/tensor_tile.cuh");
#[cfg(feature = "cuda")]
const CUDA_HALVES: &str = include_str!("../shared/halves_product.cuh");
#[cfg(feature = "cuda")]
const CUDA_SPLIT: &str = include_str!("../shared/split_product.cuh");
#[cfg(feature = "cuda")]
const CUDA_PACKED: &str = include_str!("../shared/packed.cuh");
#[cfg(feature = "cuda")]
const CUDA_FEEDBACK: &str = include_str!("../shared/feedback.cuh");
#[cfg(feature = "cuda")]
const CUDA_FITS: &str = include_str!("../shared/feedback_fits.cuh");
#[cfg(feature = "cuda")]
const CUDA_LINES: &str = include_str!("../shared/feedback_lines.cuh");
#[cfg(feature = "cuda")]
const CUDA_DEQUANTIZE: &str = include_str!("../shared/dequantize.cuh");

// Behind the views: what sources need besides, in WGSL and in CUDA.
macro_rules! kernels {
    ($(
        $(#[$doc:meta])*
        $constant:ident = $name:literal, $threads:literal threads, $views:literal views
            $(, [$($wgsl:ident),*], [$($cuda:ident),*])?;
    )*) => {
        $(
            $(#[$doc])*
            pub static $constant: Kernel = Kernel {
                name: $name,
                threads: $threads,
                views: $views,
                wgsl: &[
                    WGSL_GRID,
                    WGSL_NUMERICS,
                    $($($wgsl,)*)?
                    include_str!(concat!("../", $name, ".wgsl")),
                ],
                #[cfg(feature = "cuda")]
                cuda: &[
                    CUDA_GRID,
                    CUDA_NUMERICS,
                    $($($cuda,)*)?
                    include_str!(concat!("../", $name, ".cu")),
                ],
            };
        )*

        /// Every kernel but those of stored weights and those in f64.
        static PLAIN: &[&Kernel] = &[$(&$constant),*];
    };
}

// Behind the name: pieces after the kernel's own file.
macro_rules! stored_products {
    ($(
        $(#[$doc:meta])*
        $constant:ident = $name:literal, $views:literal views, [$($wgsl:ident)?], [$($cuda:ident)?];
    )*) => {
        $(
            $(#[$doc])*
            pub static $constant: Kernel = Kernel {
                name: $name,
                threads: 256,
                views: $views,
                wgsl: &[
                    WGSL_GRID,
                    WGSL_NUMERICS,
                    WGSL_BYTES,
                    include_str!(concat!("../", $name, ".wgsl")),
                    $($wgsl,)?
                ],
                #[cfg(feature = "cuda")]
                cuda: &[
                    CUDA_GRID,
                    CUDA_NUMERICS,
                    CUDA_BYTES,
                    CUDA_TENSOR_TILE,
                    include_str!(concat!("../", $name, ".cu")),
                    $($cuda,)?
                ],
            };
        )*

        /// Products with weights as they are stored.
        static STORED_PRODUCTS: &[&Kernel] = &[$(&$constant),*];
    };
}

macro_rules! doubles {
    ($(
        $(#[$doc:meta])*
        $constant:ident = $name:literal, $views:literal views;
    )*) => {
        $(
            $(#[$doc])*
            pub static $constant: Kernel = Kernel {
                name: $name,
                threads: 256,
                views: $views,
                wgsl: &[],
                #[cfg(feature = "cuda")]
                cuda: &[CUDA_GRID, include_str!(concat!("../", $name, ".cu"))],
            };
        )*

        /// Kernels in f64, for CUDA alone.
        static DOUBLES: &[&Kernel] = &[$(&$constant),*];
    };
}

macro_rules! decoders {
    ($($ty:ident = $name:literal;)*) => {
        /// The kernel that decodes a type. Views: bytes, values.
        pub fn dequantize(ty: GgmlType) -> Option<&'static Kernel> {
            match ty {
                $(GgmlType::$ty => {
                    static KERNEL: Kernel = Kernel {
                        name: $name,
                        threads: 256,
                        views: 2,
                        wgsl: &[
                            WGSL_GRID,
                            WGSL_NUMERICS,
                            WGSL_BYTES,
                            WGSL_BLOCKS,
                            include_str!(concat!("../", $name, ".wgsl")),
                            WGSL_DEQUANTIZE,
                        ],
                        #[cfg(feature = "cuda")]
                        cuda: &[
                            CUDA_GRID,
                            CUDA_NUMERICS,
                            CUDA_BYTES,
                            CUDA_BLOCKS,
                            include_str!(concat!("../", $name, ".cu")),
                            CUDA_DEQUANTIZE,
                        ],
                    };
                    Some(&KERNEL)
                })*
                _ => None,
            }
        }

        static DECODED: &[GgmlType] = &[$(GgmlType::$ty),*];
    };
}

kernels! {
    /// `out = alpha A B + beta out` in blocks of shared memory. Views: a, b, out.
    MATMUL_TILED = "matmul_tiled", 256 threads, 3 views;
    /// The same with registers alone: for devices whose barriers are slow. Views: a, b, out.
    MATMUL_DIRECT = "matmul_direct", 64 threads, 3 views;
    /// Inputs of products in 16 bits, two in a word. Views: input, out.
    PACK_HALVES = "pack_halves", 256 threads, 2 views;
    /// Inputs of products in blocks of Q8_0. Views: input, codes, scales.
    QUANTIZE_Q8_0 = "quantize_q8_0", 64 threads, 3 views;
    /// `sums += X^T X` with sums in two floats. Views: rows, sums.
    GRAM = "gram", 64 threads, 2 views;
    /// What columns come to. Views: rows, numbers of parts of rows.
    COLUMN_SUMS = "column_sums", 256 threads, 2 views;
    /// How many values have which magnitude. Views: values, counts (in place).
    MAGNITUDE_COUNTS = "magnitude_counts", 256 threads, 2 views;
    /// Views: input, weight, out.
    RMS_NORM = "rms_norm", 64 threads, 3 views;
    /// Views: y (in place), z, weight.
    GATED_RMS_NORM = "gated_rms_norm", 64 threads, 3 views;
    /// Views: input, state, weight, bias, out.
    CONV1D_SILU = "conv1d_silu", 256 threads, 5 views;
    /// The state after some rows. Views: input, state before, state after.
    CONV1D_ADVANCE = "conv1d_advance", 256 threads, 3 views;
    /// Views: xbc, dt, a, d, dt_bias, state (in place), out.
    SELECTIVE_SCAN = "selective_scan", 64 threads, 7 views;
    /// Views: query, keys, values, out.
    ATTENTION = "attention", 64 threads, 4 views;
    /// Views: values (in place).
    RELU_SQUARED = "relu_squared", 256 threads, 1 views;
    /// Views: values (in place).
    SCALE = "scale", 256 threads, 1 views;
    /// Views: rows (in place), bias.
    ADD_BIAS = "add_bias", 256 threads, 2 views;
    /// Views: sum (in place), values.
    ADD = "add", 256 threads, 2 views;
    /// The same with sums in two floats. Views: sums (in place), values.
    ACCUMULATE = "accumulate", 256 threads, 2 views;
    /// Sets a word where a value is NaN or infinite. Views: values, word.
    IS_FINITE = "is_finite", 256 threads, 2 views;
    /// Views: logits, words of parts of rows.
    SOFTMAX_SUMS = "softmax_sums", 64 threads, 2 views;
    /// Views: logits of the reference, logits, softmax_sums of the reference, sums of parts of rows.
    KL_DIVERGENCE = "kl_divergence", 64 threads, 4 views;
    /// Views: input, row indices, out.
    GATHER = "gather", 256 threads, 3 views;
    /// Views: sum (in place), values, row indices, weights.
    SCATTER_ADD = "scatter_add", 256 threads, 4 views;
    /// Rounds inputs of matrix products as a runtime does. Views: input, out.
    ROUND_ACTIVATION = "round_activation", 64 threads, 2 views;
    /// What inputs in Q8_1 have beside those in Q8_0. Views: input, out.
    Q8_1_REMAINDERS = "q8_1_remainders", 64 threads, 2 views;
    /// Minima of blocks of Q4_1 and Q5_1. Views: bytes, out.
    BLOCK_MINIMA = "block_minima", 256 threads, 2 views, [WGSL_BYTES], [CUDA_BYTES];
    /// Integers of packed checkpoints as values. Views: codes, scales, zero points, out.
    DEQUANTIZE_INTEGERS = "dequantize_integers", 256 threads, 4 views, [WGSL_PACKED], [CUDA_BYTES, CUDA_PACKED];
    /// FP8 and NVFP4 of packed checkpoints as values. Views: codes, scales, out.
    DEQUANTIZE_FLOATS = "dequantize_floats", 256 threads, 3 views, [WGSL_PACKED], [CUDA_BYTES, CUDA_PACKED];
    /// Factors of super-blocks. Views: wanted, repairs, pivots, scales.
    FEEDBACK_FACTORS = "feedback_factors", 32 threads, 4 views, [WGSL_FEEDBACK, WGSL_FITS], [CUDA_FEEDBACK, CUDA_FITS];
    /// GPTQ's block step. Views: wanted, repairs, feedback, pivots, errors, values, scales (in place).
    FEEDBACK_SWEEP = "feedback_sweep", 32 threads, 7 views,
        [WGSL_FEEDBACK, WGSL_FITS, WGSL_LINES], [CUDA_FEEDBACK, CUDA_FITS, CUDA_LINES];
    /// A pass after the first. Views: wanted, gradient, moments, errors, values, scales (the last three in place).
    FEEDBACK_DESCENT = "feedback_descent", 32 threads, 6 views, [WGSL_FEEDBACK], [CUDA_FEEDBACK];
    /// Views: errors, gradient, losses (in place).
    FEEDBACK_LOSS = "feedback_loss", 64 threads, 3 views;
    /// Operands of products in three parts of BF16. Views: x, out.
    SPLIT_FLOATS = "split_floats", 256 threads, 2 views;
    /// `out = alpha X Y^T + beta out` of operands in parts. Views: x, y, out.
    MATMUL_SPLIT = "matmul_split", 256 threads, 3 views, [WGSL_SPLIT], [CUDA_BYTES, CUDA_TENSOR_TILE, CUDA_SPLIT];
    /// `x W^T` of inputs in parts and weights stored in BF16. Views: bytes, x, out.
    MATMUL_SPLIT_BF16 = "matmul_split_bf16", 256 threads, 3 views, [WGSL_BYTES, WGSL_SPLIT], [CUDA_BYTES, CUDA_TENSOR_TILE, CUDA_SPLIT];
    /// `sums += X X^T` of rows in parts, with sums in two floats. Views: x, sums.
    GRAM_SPLIT = "gram_split", 256 threads, 2 views, [WGSL_SPLIT], [CUDA_BYTES, CUDA_TENSOR_TILE, CUDA_SPLIT];
}

stored_products! {
    /// `x W^T` in BF16, sums in F32. Views: bytes, x, out.
    MATMUL_BF16 = "matmul_bf16", 3 views, [WGSL_HALVES], [CUDA_HALVES];
    /// `x W^T` in F16, sums in F32. Views: bytes, x, out.
    MATMUL_F16 = "matmul_f16", 3 views, [WGSL_HALVES], [CUDA_HALVES];
    /// `x W^T` of blocks of Q8_0, dots in integers. Views: bytes, codes of x, scales of x, out.
    MATMUL_Q8_0 = "matmul_q8_0", 4 views, [], [];
}

doubles! {
    /// Products with a block-diagonal matrix. Views: a, b, before, after, out.
    MATMUL_F64 = "matmul_f64", 5 views;
    /// f32 in f64, by a factor before and one after of every column. Views: x, before, after, out.
    WIDEN_F64 = "widen_f64", 4 views;
}

decoders! {
    F32 = "dequantize_f32";
    F16 = "dequantize_f16";
    BF16 = "dequantize_bf16";
    Q4_0 = "dequantize_q4_0";
    Q4_1 = "dequantize_q4_1";
    Q5_0 = "dequantize_q5_0";
    Q5_1 = "dequantize_q5_1";
    Q8_0 = "dequantize_q8_0";
    Q2_K = "dequantize_q2_k";
    Q3_K = "dequantize_q3_k";
    Q4_K = "dequantize_q4_k";
    Q5_K = "dequantize_q5_k";
    Q6_K = "dequantize_q6_k";
    IQ4_NL = "dequantize_iq4_nl";
    IQ4_XS = "dequantize_iq4_xs";
    TQ1_0 = "dequantize_tq1_0";
    TQ2_0 = "dequantize_tq2_0";
    MXFP4 = "dequantize_mxfp4";
    NVFP4 = "dequantize_nvfp4";
    Q1_0 = "dequantize_q1_0";
    Q2_0 = "dequantize_q2_0";
}

/// Every kernel.
pub fn all() -> impl Iterator<Item = &'static Kernel> {
    let decoders = DECODED.iter().filter_map(|ty| dequantize(*ty));
    let plain = PLAIN.iter().chain(STORED_PRODUCTS).chain(DOUBLES).copied();
    plain.chain(decoders)
}

/// Every type that can be decoded.
pub fn decoded_types() -> &'static [GgmlType] {
    DECODED
}

impl Kernel {
    /// The whole WGSL text; `fuses`: the adapter rounds `fma` once.
    pub fn wgsl_text(&self, fuses: bool) -> String {
        let text = self.wgsl.concat().replace("KERNEL", self.name);
        format!("const FUSES = {fuses};\n{text}")
    }

    /// The whole CUDA text.
    #[cfg(feature = "cuda")]
    pub fn cuda_text(&self) -> String {
        self.cuda.concat().replace("KERNEL", self.name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The README says of every kernel what it takes at least.
    #[test]
    fn every_kernel_has_a_bound() {
        let readme = include_str!("../README.md");
        let section = readme.split_once("### Least time\n").unwrap().1;
        let table = section.lines().skip_while(|line| !line.starts_with('|'));
        let rows = table.take_while(|line| line.starts_with('|'));
        let cells = rows.map(|row| row.split('|').nth(1).unwrap());
        let named: Vec<&str> = cells.flat_map(|cell| cell.split(", ")).collect();
        for kernel in all() {
            let is_named = named.iter().any(|name| name.trim() == kernel.name);
            assert!(is_named, "`{}` has no row", kernel.name);
        }
    }
}
