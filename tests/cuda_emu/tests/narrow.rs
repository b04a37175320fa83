//! Products that do not fit views, and come in parts: the same to the bit.

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::{Device, DeviceError, MatmulLayout, Packing};
use nemoconv_formats::GgmlType;

use crate::numbers;

fn devices() -> [Device; 2] {
    let emulator = || Emulator::new(Order::Ascending);
    [emulator(), emulator().with_view_bytes(2048)]
        .map(|emulator| Device::new(Box::new(emulator), None))
}

#[test]
fn products_with_stored_weights_in_parts() {
    // Two rows of results in a view, and nine rows of weights; inputs are packed whole.
    let (rows, columns, inner, out_row) = (4, 70, 96, 200);
    for (ty, packing) in [
        (GgmlType::BF16, Packing::Bf16),
        (GgmlType::F16, Packing::F16),
        (GgmlType::Q8_0, Packing::Q8_0),
    ] {
        let row_bytes = inner / ty.block_elements() * ty.block_bytes();
        // Any bits but those of numbers that are none: exponents of 16 bits are below 0x40.
        let weights: Vec<u8> = (0..columns * row_bytes + 2)
            .map(|i| (i * 37 % 59) as u8)
            .collect();
        let results = devices().map(|device| {
            let x = device.upload(&numbers(rows * inner, 1)).unwrap();
            let bytes = device.upload_bytes(&weights).unwrap();
            let packed = device.pack(&x, rows, inner, packing).unwrap();
            let mut out = device.zeros(rows * out_row).unwrap();
            let place = [1, out_row];
            device
                .matmul_stored(&packed, &bytes, 2, columns, place, &mut out)
                .unwrap();
            device.download_all(&out).unwrap()
        });
        assert!(results[0].iter().any(|x| *x != 0.0) && results[0].iter().all(|x| x.is_finite()));
        assert!(results[0] == results[1], "{ty}");
    }
}

#[test]
fn products_in_parts() {
    let (rows, columns, inner) = (30, 5, 40);
    let layout = MatmulLayout::linear(rows, inner, columns, 1, columns + 2);
    let results = devices().map(|device| {
        let a = device.upload(&numbers(rows * inner, 1)).unwrap();
        let b = device.upload(&numbers(columns * inner, 2)).unwrap();
        let mut out = device.zeros(rows * (columns + 2)).unwrap();
        device.matmul(&layout, &a, &b, &mut out).unwrap();
        device.download_all(&out).unwrap()
    });
    assert!(results[0] == results[1]);
}

/// What no part of a kernel is made for says so, with both sizes.
#[test]
fn rows_that_no_view_spans_are_refused() {
    let [_, narrow] = devices();
    let weight = narrow.upload(&[1.0; 64]).unwrap();
    let norm = |rows: usize| {
        let x = narrow.zeros(rows * 64).unwrap();
        narrow.rms_norm(&x, &weight, 1e-5).map(drop)
    };
    norm(8).unwrap();
    let error = norm(16).unwrap_err();
    let DeviceError::LimitTooSmall { found, needed, .. } = &error else {
        panic!("{error}");
    };
    assert_eq!((*found, *needed), (2048, 4096));
}
