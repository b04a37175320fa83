//! What does not fit views, and comes in parts: the same to the bit, of as few launches as views allow.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use nemoconv_device::{
    Array, AttentionLayout, ConvLayout, Description, Device, DeviceError, Driver, Handle, Launch,
    LogitRows, MagnitudeBins, MatmulLayout, Packing, Result, Rounding, ScanLayout, View,
};
use nemoconv_formats::GgmlType;

use crate::drivers::drivers;
use crate::numbers;

/// Bytes of a narrow view: some more than 64 rows of tests, which are whole alignments whatever their width.
const VIEW_BYTES: u64 = 16 << 10;
/// Where a narrow view may begin: the largest that WebGPU asks for.
const VIEW_ALIGNMENT: u64 = 256;

/// A driver whose launches are counted.
struct Counted {
    driver: Box<dyn Driver>,
    description: Description,
    launches: Arc<AtomicUsize>,
}

impl Counted {
    fn new(driver: Box<dyn Driver>) -> Self {
        let description = driver.description().clone();
        Self {
            driver,
            description,
            launches: Arc::default(),
        }
    }

    fn narrow(driver: Box<dyn Driver>) -> Self {
        let mut narrow = Self::new(driver);
        let limits = &mut narrow.description.limits;
        limits.view_bytes = VIEW_BYTES;
        limits.view_alignment = limits.view_alignment.max(VIEW_ALIGNMENT);
        narrow
    }

    /// What an operation gives, and of how many launches.
    fn run<T>(self, operation: impl Fn(&Device) -> Result<T>) -> (T, usize) {
        let launches = Arc::clone(&self.launches);
        let found = operation(&Device::new(Box::new(self), None));
        (found.unwrap(), launches.load(Ordering::Relaxed))
    }
}

impl Driver for Counted {
    fn description(&self) -> &Description {
        &self.description
    }

    fn allocate(&self, bytes: u64) -> Result<Handle> {
        self.driver.allocate(bytes)
    }

    fn free(&self, memory: Handle) {
        self.driver.free(memory);
    }

    fn write(&self, memory: Handle, offset: u64, bytes: &[u8]) -> Result<()> {
        self.driver.write(memory, offset, bytes)
    }

    fn read(&self, memory: Handle, offset: u64, bytes: &mut [u8]) -> Result<()> {
        self.driver.read(memory, offset, bytes)
    }

    fn copy(
        &self,
        from: Handle,
        from_offset: u64,
        to: Handle,
        to_offset: u64,
        bytes: u64,
    ) -> Result<()> {
        self.driver.copy(from, from_offset, to, to_offset, bytes)
    }

    fn clear(&self, memory: Handle, offset: u64, bytes: u64) -> Result<()> {
        self.driver.clear(memory, offset, bytes)
    }

    fn launch(&self, launch: &Launch) -> Result<()> {
        self.launches.fetch_add(1, Ordering::Relaxed);
        self.driver.launch(launch)
    }

    fn gemm(&self, layout: &MatmulLayout, views: &[View; 3]) -> Option<Result<()>> {
        self.driver.gemm(layout, views)
    }
}

/// An operation gives the same in wide views and in narrow ones, of so many launches each.
#[track_caller]
fn check<T: PartialEq + Debug>(
    launches: [usize; 2],
    operation: impl Fn(&Device) -> Result<T> + Copy,
) {
    for ((name, wide), (_, narrow)) in drivers().into_iter().zip(drivers()) {
        let (expected, whole) = Counted::new(wide).run(operation);
        let (found, parts) = Counted::narrow(narrow).run(operation);
        assert!(found == expected, "{name}");
        assert_eq!([whole, parts], launches, "{name}");
    }
}

/// All bits of arrays in which something is.
fn bits(device: &Device, arrays: &[&Array]) -> Result<Vec<u32>> {
    let mut all = Vec::new();
    for array in arrays {
        let values = device.download_all(array)?;
        assert!(values.iter().any(|x| *x != 0.0) && values.iter().all(|x| x.is_finite()));
        all.extend(values.iter().map(|x| x.to_bits()));
    }
    Ok(all)
}

#[test]
fn products_with_stored_weights() {
    let (rows, columns, out_row) = (150, 300, 400);
    for (ty, packing, inner, launches) in [
        (GgmlType::BF16, Packing::Bf16, 31, [2, 32]),
        (GgmlType::F16, Packing::F16, 31, [2, 32]),
        (GgmlType::BF16, Packing::Parts, 31, [2, 33]),
        (GgmlType::Q8_0, Packing::Q8_0, 96, [2, 34]),
    ] {
        let row_bytes = inner / ty.block_elements() * ty.block_bytes();
        // Any bits but those of numbers that are none: exponents of 16 bits are below 0x40.
        let weights: Vec<u8> = (0..columns * row_bytes + 2)
            .map(|i| (i * 37 % 59) as u8)
            .collect();
        check(launches, |device| {
            let x = device.upload(&numbers(rows * inner, 1))?;
            let bytes = device.upload_bytes(&weights)?;
            let packed = device.pack(&x, rows, inner, packing)?;
            let mut out = device.zeros(rows * out_row)?;
            device.matmul_stored(&packed, &bytes, 2, columns, [1, out_row], &mut out)?;
            bits(device, &[&out])
        });
    }
}

#[test]
fn products() {
    let (rows, columns, inner) = (200, 5, 40);
    let layout = MatmulLayout::linear(rows, inner, columns, 1, columns + 2);
    check([1, 3], |device| {
        let a = device.upload(&numbers(rows * inner, 1))?;
        let b = device.upload(&numbers(columns * inner, 2))?;
        let mut out = device.zeros(rows * (columns + 2))?;
        device.matmul(&layout, &a, &b, &mut out)?;
        bits(device, &[&out])
    });
}

#[test]
fn norms_and_biases() {
    let rows = 300;
    for (width, launches) in [(37, [2, 10]), (48, [2, 8])] {
        check(launches, |device| {
            let mut x = device.upload(&numbers(rows * width, 1))?;
            let weight = device.upload(&numbers(width, 2))?;
            device.add_bias(&mut x, &weight)?;
            let normed = device.rms_norm(&x, &weight, 1e-5)?;
            bits(device, &[&x, &normed])
        });
    }
    let (groups, inner, stride) = (3, 30, 41);
    check([1, 5], |device| {
        let mut y = device.upload(&numbers(rows * inner, 1))?;
        let z = device.upload(&numbers(rows * stride, 2))?;
        let weight = device.upload(&numbers(inner, 3))?;
        device.gated_rms_norm(&mut y, &z, stride, &weight, groups, 1e-5)?;
        bits(device, &[&y])
    });
}

#[test]
fn chosen_rows() {
    let (rows, width) = (300, 37);
    let ascending: Vec<u32> = (0..rows as u32).filter(|row| row % 6 != 1).collect();
    let near: Vec<u32> = ascending.iter().map(|row| 299 - (row ^ 1)).collect();
    let far: Vec<u32> = (0..8).map(|i| i % 2 * 299).collect();
    for (list, launches) in [(&ascending, 3), (&near, 3), (&far, 8)] {
        check([1, launches], |device| {
            let x = device.upload(&numbers(rows * width, 1))?;
            let gathered = device.gather(&x, width, list)?;
            bits(device, &[&gathered])
        });
    }
    for list in [&ascending, &near] {
        let weights = numbers(list.len(), 2);
        check([1, 3], |device| {
            let mut sum = device.upload(&numbers(rows * width, 1))?;
            let values = device.upload(&numbers(list.len() * width, 3))?;
            device.scatter_add(&mut sum, width, &values, list, &weights)?;
            bits(device, &[&sum])
        });
    }
}

#[test]
fn rounding() {
    for (rounding, rows, width, launches) in [
        (Rounding::Bf16, 21, 411, 3),
        (Rounding::StaticInt8(0.02), 21, 411, 3),
        (Rounding::RowInt8, 300, 37, 5),
        (Rounding::RowFloat8, 20, 496, 3),
        (Rounding::BlockFloat8(9), 21, 450, 3),
        (Rounding::Q8_0, 20, 480, 3),
        (Rounding::Q8K, 20, 512, 3),
        (Rounding::Nvfp4(0.01), 20, 528, 3),
    ] {
        check([1, launches], |device| {
            let x = device.upload(&numbers(rows * width, 1))?;
            let rounded = device.round_activation(&x, width, rounding)?;
            bits(device, &[&rounded])
        });
    }
    check([1, 3], |device| {
        let x = device.upload(&numbers(300 * 32, 1))?;
        let remainders = device.q8_1_remainders(&x)?;
        bits(device, &[&remainders])
    });
}

/// Sequences of a batch: the first row of none but the first is where a view may begin.
const SEQUENCES: [usize; 4] = [3, 130, 2, 65];

#[test]
fn convolutions() {
    let layout = ConvLayout {
        stride: 45,
        first: 7,
        channels: 31,
        taps: 4,
    };
    let (rows, channels) = (SEQUENCES.iter().sum::<usize>(), layout.channels);
    check([8, 12], |device| {
        let input = device.upload(&numbers(rows * layout.stride, 1))?;
        let weight = device.upload(&numbers(channels * layout.taps, 2))?;
        let bias = device.upload(&numbers(channels, 3))?;
        let mut out = device.zeros(rows * channels)?;
        let (mut found, mut first) = (Vec::new(), 0);
        for count in SEQUENCES {
            let rows = first..first + count;
            let mut state = device.upload(&numbers((layout.taps - 1) * channels, 4))?;
            device.conv1d_silu(layout, rows, &input, &mut state, &weight, &bias, &mut out)?;
            found.extend(bits(device, &[&state])?);
            first += count;
        }
        found.extend(bits(device, &[&out])?);
        Ok(found)
    });
}

#[test]
fn scans() {
    for (heads, head_dim, groups, state_size, dt_stride, launches) in
        [(6, 3, 3, 5, 9, [4, 6]), (2, 6, 1, 66, 64, [4, 16])]
    {
        let layout = ScanLayout {
            heads,
            head_dim,
            groups,
            state_size,
            dt_stride,
            time_step: (0.0, 1.5),
        };
        let (rows, inner) = (SEQUENCES.iter().sum::<usize>(), heads * head_dim);
        check(launches, |device| {
            let xbc = device.upload(&numbers(rows * (inner + 2 * groups * state_size), 1))?;
            let dt = device.upload(&numbers(rows * dt_stride, 2))?;
            let a: Vec<f32> = numbers(heads, 3).iter().map(|x| -x.abs() - 0.1).collect();
            let a = device.upload(&a)?;
            let d = device.upload(&numbers(heads, 4))?;
            let dt_bias = device.upload(&numbers(heads, 5))?;
            let inputs = [&xbc, &dt, &a, &d, &dt_bias];
            let mut out = device.zeros(rows * inner)?;
            let (mut found, mut first) = (Vec::new(), 0);
            for count in SEQUENCES {
                let rows = first..first + count;
                let mut state = device.upload(&numbers(inner * state_size, 6))?;
                device.selective_scan(layout, rows, inputs, &mut state, &mut out)?;
                found.extend(bits(device, &[&state])?);
                first += count;
            }
            found.extend(bits(device, &[&out])?);
            Ok(found)
        });
    }
}

const ATTENTION: AttentionLayout = AttentionLayout {
    heads: 6,
    key_value_heads: 2,
    head_dim: 7,
    is_f16: false,
};

#[test]
fn attention() {
    let position = 20;
    let (rows, width) = (SEQUENCES.iter().sum::<usize>(), 6 * 7);
    check([4, 5], |device| {
        let query = device.upload(&numbers(rows * width, 1))?;
        let mut out = device.zeros(rows * width)?;
        let mut first = 0;
        for count in SEQUENCES {
            let cached = (position + count) * 2 * 7;
            let [keys, values] = [2, 3].map(|seed| device.upload(&numbers(cached, seed)));
            let inputs = [&query, &keys?, &values?];
            device.attention(ATTENTION, first..first + count, position, inputs, &mut out)?;
            first += count;
        }
        bits(device, &[&out])
    });
}

#[test]
fn distributions() {
    let (rows, strides, width) = (30, [501, 508], 500);
    check([1, 4], |device| {
        let logits = device.upload(&numbers(rows * width, 1))?;
        device.softmax_sums(&logits, width)
    });
    check([3, 15], |device| {
        let [x, y] = strides.map(|stride| device.upload(&numbers(rows * stride, 1)));
        let (x, y) = (x?, y?);
        let [x, y] = [(&x, strides[0]), (&y, strides[1])]
            .map(|(logits, stride)| LogitRows { logits, stride });
        device.kl_divergence(x, y, width)
    });
}

/// An operation says that it needs a view of so many bytes.
#[track_caller]
fn check_refused(needed_bytes: u64, operation: impl Fn(&Device) -> Result<Array>) {
    for (name, driver) in drivers() {
        let narrow = Device::new(Box::new(Counted::narrow(driver)), None);
        let error = operation(&narrow).err();
        let Some(DeviceError::LimitTooSmall { found, needed, .. }) = error else {
            panic!("{name}: {error:?}");
        };
        assert_eq!((found, needed), (VIEW_BYTES, needed_bytes), "{name}");
    }
}

#[test]
fn rows_that_no_view_spans_are_refused() {
    let norm = |device: &Device, rows: usize, width: usize| {
        let weight = device.upload(&vec![1.0; width])?;
        let x = device.zeros(rows * width)?;
        device.rms_norm(&x, &weight, 1e-5)
    };
    check_refused(20_000, |device| norm(device, 1, 5000));
    // A view begins with every 64th row.
    check_refused(64 * 4 * 65, |device| norm(device, 100, 65));
    check_refused(20_000, |device| {
        device.gather(&device.zeros(5000)?, 5000, &[0])
    });
    // Keys of all positions are seen by one row.
    check_refused(4 * 14 * 301, |device| {
        let query = device.zeros(42)?;
        let keys = device.zeros(14 * 301)?;
        let mut out = device.zeros(42)?;
        let inputs = [&query, &keys, &keys];
        device.attention(ATTENTION, 0..1, 300, inputs, &mut out)?;
        Ok(out)
    });
}

#[test]
fn columns_and_magnitudes() {
    let (rows, n) = (300, 37);
    check([1, 3], |device| {
        let x = device.upload(&numbers(rows * n, 1))?;
        let found = device.column_sums(&x, n)?;
        // Other parts of rows are other sums of parts: the same but for what f64 shows.
        let sums = found.sums.iter().chain(&found.squares);
        let sums: Vec<f32> = sums.map(|sum| *sum as f32).collect();
        Ok((sums, found.max_abs))
    });
    let bins = MagnitudeBins {
        shift: 19,
        least: 0,
    };
    check([1, 3], |device| {
        let x = device.upload(&numbers(rows * n, 1))?;
        device.magnitude_counts(&x, bins)
    });
}
