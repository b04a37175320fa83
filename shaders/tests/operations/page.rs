//! A page of times, for whatever devices there are.

#![allow(clippy::print_stdout, reason = "the page is what this is for")]

use std::time::Instant;

use nemoconv_device::{
    Array, AttentionLayout, ConvLayout, Device, FEEDBACK_CHUNK, LogitRows, MatmulLayout, Packing,
    Rounding, ScanLayout, Splitting, kernels,
};
use nemoconv_formats::GgmlType;

use super::feedback::{Q4_0, Q4_K, identity};
use crate::drivers::all;
use crate::numbers;

/// Runs of which the fastest counts, after one that compiles.
const RUNS: usize = 5;

/// Sizes: those of Nemotron-H-8B, or for processors that stand in for a GPU a sixteenth of them.
#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    hidden: usize,
    intermediate: usize,
    heads: usize,
}

impl Sizes {
    fn of(device: &Device) -> Self {
        match device.description().is_software {
            false => Self {
                tokens: 512,
                hidden: 4096,
                intermediate: 21504,
                heads: 128,
            },
            true => Self {
                tokens: 64,
                hidden: 256,
                intermediate: 1344,
                heads: 8,
            },
        }
    }
}

/// Milliseconds of one run, waited for.
fn time(device: &Device, mut run: impl FnMut() -> Array) -> f64 {
    let mut once = || {
        let begun = Instant::now();
        let out = run();
        device.download(&out, 0..1).unwrap();
        begun.elapsed().as_secs_f64() * 1e3
    };
    once();
    (0..RUNS).map(|_| once()).fold(f64::INFINITY, f64::min)
}

fn line(kernel: &str, shape: &str, ms: f64, flop: f64, bytes: f64) {
    let (gflops, gbytes) = (flop / ms / 1e6, bytes / ms / 1e6);
    println!("| {kernel} | {shape} | {ms:.3} | {gflops:.0} | {gbytes:.1} |");
}

fn page(device: &Device) {
    let Sizes {
        tokens,
        hidden,
        intermediate,
        heads,
    } = Sizes::of(device);
    let upload = |count: usize, seed| device.upload(&numbers(count, seed)).unwrap();
    let product = (tokens * hidden * intermediate) as f64;
    let x = upload(tokens * hidden, 1);
    let w = upload(intermediate * hidden, 2);

    let layout = MatmulLayout::linear(tokens, hidden, intermediate, 0, intermediate);
    let mut out = device.uninitialized(tokens * intermediate).unwrap();
    let shape = format!("{tokens} x {hidden} x {intermediate}");
    let whole = device.clone().with_splitting(Splitting::Never);
    let whole = whole.with_library_from(u64::MAX);
    for (which, device) in [
        ("matmul, as chosen", device),
        ("matmul, by the kernel for values in one piece", &whole),
    ] {
        let ms = time(device, || {
            device.matmul(&layout, &x, &w, &mut out).unwrap();
            device.zeros(1).unwrap()
        });
        line(which, &shape, ms, 2.0 * product, 0.0);
    }

    let mut sums = [(0..hidden, device.zeros(2 * hidden * hidden).unwrap())];
    let ms = time(device, || {
        whole.gram(&x, hidden, &mut sums).unwrap();
        device.zeros(1).unwrap()
    });
    let flop = (tokens * hidden * hidden) as f64;
    line("gram", &format!("{tokens} x {hidden}"), ms, flop, 0.0);

    let norm = upload(hidden, 3);
    let ms = time(device, || device.rms_norm(&x, &norm, 1e-5).unwrap());
    let moved = 8.0 * (tokens * hidden) as f64;
    line("rms_norm", &format!("{tokens} x {hidden}"), ms, 0.0, moved);

    let ms = time(device, || {
        device.round_activation(&x, hidden, Rounding::Q8_0).unwrap()
    });
    line(
        "round_activation",
        &format!("{tokens} x {hidden}"),
        ms,
        0.0,
        moved,
    );

    drop((x, w, out));
    transfers(device, intermediate * hidden);
    decoders(device, intermediate, hidden);
    stored_products(device, Sizes::of(device));
    products_in_parts(device, Sizes::of(device));
    if device.has_f64() {
        rotation(device, tokens, hidden);
    }
    rounding(device, intermediate);
    mixers(device, tokens, heads);
    logits(device, 32 * hidden);
}

/// Of the values of a matrix, to the device and back.
fn transfers(device: &Device, count: usize) {
    let (values, shape, moved) = (numbers(count, 11), count.to_string(), 4.0 * count as f64);
    let ms = time(device, || device.upload(&values).unwrap());
    line("upload", &shape, ms, 0.0, moved);
    let there = device.upload(&values).unwrap();
    let ms = time(device, || {
        device.download_all(&there).unwrap();
        device.zeros(1).unwrap()
    });
    line("download", &shape, ms, 0.0, moved);
}

/// Of a matrix in every type.
fn decoders(device: &Device, rows: usize, columns: usize) {
    let (count, shape) = (rows * columns, format!("{rows} x {columns}"));
    let mut decoded = device.uninitialized(count).unwrap();
    for ty in kernels::decoded_types() {
        let bytes = ty.bytes_for(count as u64).unwrap();
        let stored = device.upload_bytes(&vec![0x5a; bytes as usize]).unwrap();
        let ms = time(device, || {
            device
                .dequantize(*ty, &stored, 0, count, &mut decoded)
                .unwrap();
            device.zeros(1).unwrap()
        });
        let kernel = kernels::dequantize(*ty).unwrap().name;
        line(kernel, &shape, ms, 0.0, bytes as f64 + 4.0 * count as f64);
    }
}

/// A product, and how its inputs come to it.
struct StoredProduct {
    kernel: &'static str,
    ty: GgmlType,
    packing: Packing,
    /// Bytes that an input has before and after it is packed.
    packed_bytes: f64,
}

const STORED_PRODUCTS: [StoredProduct; 4] = [
    StoredProduct {
        kernel: "matmul_bf16",
        ty: GgmlType::BF16,
        packing: Packing::Bf16,
        packed_bytes: 4.0 + 2.0,
    },
    StoredProduct {
        kernel: "matmul_f16",
        ty: GgmlType::F16,
        packing: Packing::F16,
        packed_bytes: 4.0 + 2.0,
    },
    StoredProduct {
        kernel: "matmul_q8_0",
        ty: GgmlType::Q8_0,
        packing: Packing::Q8_0,
        packed_bytes: 4.0 + 1.0 + 4.0 / 32.0,
    },
    StoredProduct {
        kernel: "matmul_split_bf16",
        ty: GgmlType::BF16,
        packing: Packing::Parts,
        packed_bytes: 4.0 + 6.0,
    },
];

/// With weights as they are stored, on tensor cores where there are some.
fn stored_products(device: &Device, sizes: Sizes) {
    let Sizes {
        tokens,
        hidden,
        intermediate,
        ..
    } = sizes;
    let x = device.upload(&numbers(tokens * hidden, 12)).unwrap();
    let mut out = device.uninitialized(tokens * intermediate).unwrap();
    let shape = format!("{tokens} x {hidden} x {intermediate}");
    let flop = 2.0 * (tokens * hidden * intermediate) as f64;
    for product in STORED_PRODUCTS {
        let bytes = product.ty.bytes_for((intermediate * hidden) as u64);
        // Bytes that are numbers of moderate size in each type.
        let weights = vec![0x3c; bytes.unwrap() as usize];
        let weights = device.upload_bytes(&weights).unwrap();
        let pack = || device.pack(&x, tokens, hidden, product.packing).unwrap();
        let ms = time(device, || {
            pack();
            device.zeros(1).unwrap()
        });
        line(
            &format!("inputs of {}", product.kernel),
            &format!("{tokens} x {hidden}"),
            ms,
            0.0,
            product.packed_bytes * (tokens * hidden) as f64,
        );
        let packed = pack();
        let ms = time(device, || {
            let place = [0, intermediate];
            device
                .matmul_stored(&packed, &weights, 0, intermediate, place, &mut out)
                .unwrap();
            device.zeros(1).unwrap()
        });
        line(product.kernel, &shape, ms, flop, 0.0);
    }
}

/// Of decoded weights, and second moments.
fn products_in_parts(device: &Device, sizes: Sizes) {
    let Sizes {
        tokens,
        hidden,
        intermediate,
        ..
    } = sizes;
    let device = device.clone().with_splitting(Splitting::Always);
    let upload = |count: usize, seed| device.upload(&numbers(count, seed)).unwrap();
    let (x, w) = (
        upload(tokens * hidden, 13),
        upload(intermediate * hidden, 14),
    );
    let split = |values: &Array, rows| {
        let parts = device.try_split(values, [0, hidden, 1], rows, hidden);
        parts.unwrap().expect("there is room for parts")
    };
    let ms = time(&device, || {
        split(&w, intermediate);
        device.zeros(1).unwrap()
    });
    let moved = 10.0 * (intermediate * hidden) as f64;
    line(
        "split_floats",
        &format!("{intermediate} x {hidden}"),
        ms,
        0.0,
        moved,
    );
    let (left, right) = (split(&x, tokens), split(&w, intermediate));
    let mut out = device.uninitialized(tokens * intermediate).unwrap();
    let ms = time(&device, || {
        let place = [0, intermediate];
        device
            .matmul_split(&left, 0..tokens, &right, [1.0, 0.0], place, &mut out)
            .unwrap();
        device.zeros(1).unwrap()
    });
    let flop = 2.0 * (tokens * hidden * intermediate) as f64;
    let shape = format!("{tokens} x {hidden} x {intermediate}");
    line("matmul_split", &shape, ms, flop, 0.0);
    let mut sums = [(0..hidden, device.zeros(2 * hidden * hidden).unwrap())];
    let ms = time(&device, || {
        device.gram(&x, hidden, &mut sums).unwrap();
        device.zeros(1).unwrap()
    });
    let flop = (tokens * hidden * hidden) as f64;
    line(
        "gram_split, with split_floats",
        &format!("{tokens} x {hidden}"),
        ms,
        flop,
        0.0,
    );
}

/// Of some rows of weights, in F64.
fn rotation(device: &Device, rows: usize, width: usize) {
    let upload = |count: usize, seed| {
        let values: Vec<f64> = numbers(count, seed).into_iter().map(f64::from).collect();
        device.upload_doubles(&values).unwrap()
    };
    let (x, q, ones) = (
        upload(rows * width, 15),
        upload(width * width, 16),
        upload(width, 17),
    );
    let ms = time(device, || {
        device.mix_columns(&x, &q, &ones, &ones).unwrap();
        device.zeros(1).unwrap()
    });
    let flop = 2.0 * (rows * width * width) as f64;
    line(
        "matmul_f64",
        &format!("{rows} x {width} x {width}"),
        ms,
        flop,
        0.0,
    );
}

/// Of 32 rows over a vocabulary.
fn logits(device: &Device, vocabulary: usize) {
    let rows = 32;
    let [x, y] = [9, 10].map(|seed| device.upload(&numbers(rows * vocabulary, seed)).unwrap());
    let shape = format!("{rows} x {vocabulary}");
    let moved = 4.0 * (rows * vocabulary) as f64;
    let ms = time(device, || {
        device.softmax_sums(&x, vocabulary).unwrap();
        device.zeros(1).unwrap()
    });
    line("softmax_sums", &shape, ms, 0.0, moved);
    let ms = time(device, || {
        let [x, y] = [&x, &y].map(|logits| LogitRows {
            logits,
            stride: vocabulary,
        });
        device.kl_divergence(x, y, vocabulary).unwrap();
        device.zeros(1).unwrap()
    });
    line(
        "kl_divergence, with both sums",
        &shape,
        ms,
        0.0,
        2.0 * moved,
    );
}

/// A chunk of all rows of the widest matrix.
fn rounding(device: &Device, rows: usize) {
    let width = FEEDBACK_CHUNK;
    let upload = |values: &[f32]| device.upload(values).unwrap();
    let wanted = numbers(rows * width, 9);
    let repairs = device.zeros(rows * width).unwrap();
    let (matrix, pivots) = (upload(&identity(width)), upload(&vec![1.0; width]));
    for (name, grid) in [("Q4_0", Q4_0), ("Q4_K", Q4_K)] {
        let mut state = device.feedback_rows(rows, width, grid.sub).unwrap();
        device
            .feedback_begin(&mut state, rows, &wanted, None)
            .unwrap();
        let shape = format!("{rows} x {width} to {name}");
        let codes = (rows * width) as f64;
        let sweep = time(device, || {
            device
                .feedback_sweep(&grid, &mut state, 0..width, &repairs, (&matrix, 0), &pivots)
                .unwrap();
            device.zeros(1).unwrap()
        });
        line("feedback_sweep", &shape, sweep, 0.0, 16.0 * codes);
        let descent = time(device, || {
            device
                .feedback_descent(&grid, &mut state, 0..width, &repairs, (&matrix, 0))
                .unwrap();
            device.zeros(1).unwrap()
        });
        line("feedback_descent", &shape, descent, 0.0, 24.0 * codes);
    }
}

fn mixers(device: &Device, tokens: usize, heads: usize) {
    let upload = |count: usize, seed| device.upload(&numbers(count, seed)).unwrap();
    let (head_dim, groups, state_size) = (64, 8, 128);
    let inner = heads * head_dim;
    let width = inner + 2 * groups * state_size;
    let layout = ScanLayout {
        heads,
        head_dim,
        groups,
        state_size,
        dt_stride: heads,
        time_step: (0.0, f32::INFINITY),
    };
    let (xbc, per_head) = (upload(tokens * width, 4), upload(tokens * heads, 5));
    let mut state = device.zeros(inner * state_size).unwrap();
    let mut out = device.uninitialized(tokens * inner).unwrap();
    let inputs = [&xbc, &per_head, &per_head, &per_head, &per_head];
    let ms = time(device, || {
        device
            .selective_scan(layout, 0..tokens, inputs, &mut state, &mut out)
            .unwrap();
        device.zeros(1).unwrap()
    });
    let flop = 5.0 * (tokens * inner * state_size) as f64;
    let shape = format!("{tokens} x {heads} heads x {head_dim} x {state_size}");
    line("selective_scan", &shape, ms, flop, 0.0);

    let gates = upload(tokens * inner, 18);
    let norm = upload(inner, 19);
    let ms = time(device, || {
        device
            .gated_rms_norm(&mut out, &gates, inner, &norm, groups, 1e-5)
            .unwrap();
        device.zeros(1).unwrap()
    });
    let moved = 12.0 * (tokens * inner) as f64;
    let shape = format!("{tokens} x {inner}, {groups} groups");
    line("gated_rms_norm", &shape, ms, 0.0, moved);

    let layout = ConvLayout {
        stride: width,
        first: 0,
        channels: width,
        taps: 4,
    };
    let (weight, bias) = (upload(4 * width, 6), upload(width, 7));
    let mut state = device.zeros(3 * width).unwrap();
    let mut out = device.uninitialized(tokens * width).unwrap();
    let ms = time(device, || {
        device
            .conv1d_silu(
                layout,
                0..tokens,
                &xbc,
                &mut state,
                &weight,
                &bias,
                &mut out,
            )
            .unwrap();
        device.zeros(1).unwrap()
    });
    let moved = 8.0 * (tokens * width) as f64;
    line(
        "conv1d_silu",
        &format!("{tokens} x {width}"),
        ms,
        0.0,
        moved,
    );

    let (query_heads, head_dim) = (heads / 4, 128);
    let layout = AttentionLayout {
        heads: query_heads,
        key_value_heads: (query_heads / 4).max(1),
        head_dim,
        is_f16: false,
    };
    let query = upload(tokens * query_heads * head_dim, 8);
    let mut out = device.uninitialized(query.len()).unwrap();
    let ms = time(device, || {
        device
            .attention(layout, 0..tokens, 0, [&query, &query, &query], &mut out)
            .unwrap();
        device.zeros(1).unwrap()
    });
    let flop = 2.0 * (tokens * tokens * query_heads * head_dim) as f64;
    line(
        "attention",
        &format!("{tokens} x {query_heads} heads x {head_dim}"),
        ms,
        flop,
        0.0,
    );
}

#[test]
#[ignore = "measures time: `cargo test -p nemoconv-device --release -- --ignored gpu --nocapture`"]
fn gpu_page() {
    for (name, device) in all() {
        let description = device.description();
        println!("\n{name}: {}, {}\n", description.name, description.detail);
        println!("| kernel | shape | ms | GFLOP/s | GB/s |\n|---|---|---:|---:|---:|");
        page(&device);
    }
}
