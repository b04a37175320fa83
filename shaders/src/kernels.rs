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
    /// WGSL, pieces to be joined.
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
/// What rows of packed checkpoints share.
const WGSL_PACKED: &str = include_str!("../shared/packed.wgsl");
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
const CUDA_PACKED: &str = include_str!("../shared/packed.cuh");
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

        /// Every kernel but those of stored weights.
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
    /// Integers of compressed-tensors as values. Views: codes, scales, zero points, out.
    DEQUANTIZE_INTEGERS = "dequantize_integers", 256 threads, 4 views, [WGSL_PACKED], [CUDA_BYTES, CUDA_PACKED];
    /// FP8 and NVFP4 of packed checkpoints as values. Views: codes, scales, out.
    DEQUANTIZE_FLOATS = "dequantize_floats", 256 threads, 3 views, [WGSL_PACKED], [CUDA_BYTES, CUDA_PACKED];
}

stored_products! {
    /// `x W^T` in BF16, sums in F32. Views: bytes, x, out.
    MATMUL_BF16 = "matmul_bf16", 3 views, [WGSL_HALVES], [CUDA_HALVES];
    /// `x W^T` in F16, sums in F32. Views: bytes, x, out.
    MATMUL_F16 = "matmul_f16", 3 views, [WGSL_HALVES], [CUDA_HALVES];
    /// `x W^T` of blocks of Q8_0, dots in integers. Views: bytes, codes of x, scales of x, out.
    MATMUL_Q8_0 = "matmul_q8_0", 4 views, [], [];
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
    let plain = PLAIN.iter().chain(STORED_PRODUCTS).copied();
    plain.chain(decoders)
}

/// Every type that can be decoded.
pub fn decoded_types() -> &'static [GgmlType] {
    DECODED
}

impl Kernel {
    /// The whole WGSL text.
    pub fn wgsl_text(&self) -> String {
        self.wgsl.concat().replace("KERNEL", self.name)
    }

    /// The whole CUDA text.
    #[cfg(feature = "cuda")]
    pub fn cuda_text(&self) -> String {
        self.cuda.concat().replace("KERNEL", self.name)
    }
}
