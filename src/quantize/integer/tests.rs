use super::*;

fn grids() -> impl Iterator<Item = IntegerGrid> {
    let sizes = [None, Some(32), Some(64), Some(128)];
    let kinds = [
        (Width::Four, false),
        (Width::Four, true),
        (Width::Eight, false),
    ];
    let all = sizes.into_iter().flat_map(move |group_size| {
        kinds.map(|(width, has_zero_point)| IntegerGrid {
            width,
            group_size,
            has_zero_point,
            scale: ScaleFloat::Bf16,
        })
    });
    all.flat_map(|grid| {
        [ScaleFloat::Bf16, ScaleFloat::F16].map(|scale| IntegerGrid { scale, ..grid })
    })
}

fn weights(count: usize) -> Vec<f32> {
    let wave = |i: usize| ((i * 37 % 101) as f32 - 47.0) * (1.0 + (i % 7) as f32) * 1e-3;
    (0..count).map(wave).collect()
}

fn quantized(grid: IntegerGrid, columns: usize, rows: &[f32], how: Nearest) -> Vec<u8> {
    let mut out = vec![0xaa; rows.len() / columns * grid.row_bytes(columns)];
    assert_eq!(grid.quantize_rows(columns, rows, how, &mut out).0, 0);
    out
}

/// Every code is the nearest to the weight on the stored scale, in f64.
#[test]
fn codes_are_nearest_on_the_stored_scale() {
    let (columns, rows) = (384, weights(3 * 384));
    for grid in grids() {
        let bytes = quantized(grid, columns, &rows, Nearest::ToStoredScale);
        let stored = bytes.chunks(grid.row_bytes(columns));
        for (row, stored) in rows.chunks(columns).zip(stored) {
            let stored = grid.split(columns, stored);
            for (i, (weight, code)) in row.iter().zip(stored.codes).enumerate() {
                let group = i / grid.group_columns(columns);
                let scale = f64::from(stored.scale(grid.scale, group));
                let zero = f64::from(stored.zero(group));
                let wanted = f64::from(*weight) / scale + zero;
                let clamped = wanted.clamp(lowest(grid.width).into(), highest(grid.width).into());
                let away = (f64::from(*code) - clamped).abs();
                assert!(away <= 0.5 + 1e-5, "{grid} at {i}: {code} for {clamped}");
                assert!(
                    (wanted - clamped).abs() < 0.52,
                    "{grid} at {i}: {wanted} is out of reach"
                );
            }
        }
    }
}

#[test]
fn dequantized_codes_quantize_to_themselves() {
    let (columns, rows) = (256, weights(2 * 256));
    for grid in grids().filter(|grid| !grid.has_zero_point) {
        let bytes = quantized(grid, columns, &rows, Nearest::ToStoredScale);
        let mut values = vec![0.0; rows.len()];
        grid.dequantize(columns, &bytes, &mut values);
        let again = quantized(grid, columns, &values, Nearest::ToStoredScale);
        let mut second = vec![0.0; rows.len()];
        grid.dequantize(columns, &again, &mut second);
        let largest = values.iter().fold(0.0_f32, |a, x| a.max(x.abs()));
        for (a, b) in values.iter().zip(&second) {
            let step = largest / highest(grid.width);
            assert!((a - b).abs() <= 0.51 * step, "{grid}: {a} and {b}");
        }
    }
}

#[test]
fn zeros_and_one_sign_are_stored_exactly_where_the_grid_holds_them() {
    let zeros = vec![0.0; 128];
    for grid in grids() {
        let bytes = quantized(grid, 128, &zeros, Nearest::ToStoredScale);
        let mut values = vec![1.0; 128];
        grid.dequantize(128, &bytes, &mut values);
        assert_eq!(values, zeros, "{grid}");
    }
    let asymmetric = IntegerGrid {
        width: Width::Four,
        group_size: Some(32),
        has_zero_point: true,
        scale: ScaleFloat::Bf16,
    };
    let positive: Vec<f32> = (0..32).map(|i| (i % 16) as f32).collect();
    let bytes = quantized(asymmetric, 32, &positive, Nearest::ToStoredScale);
    let mut values = vec![0.0; 32];
    asymmetric.dequantize(32, &bytes, &mut values);
    assert_eq!(values, positive);
}

/// The rounding in BF16 steps loses more: why nothing is shipped with it.
#[test]
fn bf16_steps_lose_more() {
    let grid = IntegerGrid {
        width: Width::Eight,
        group_size: None,
        has_zero_point: false,
        scale: ScaleFloat::Bf16,
    };
    let rows = weights(4096);
    let loss = |how| {
        let bytes = quantized(grid, 1024, &rows, how);
        let mut values = vec![0.0; rows.len()];
        grid.dequantize(1024, &bytes, &mut values);
        let errors = rows
            .iter()
            .zip(&values)
            .map(|(x, y)| f64::from(x - y).powi(2));
        errors.sum::<f64>()
    };
    assert!(loss(Nearest::ToStoredScale) < 0.95 * loss(Nearest::InBf16Steps));
}

#[test]
fn a_scale_too_large_for_f16_is_counted() {
    let grid = IntegerGrid {
        width: Width::Four,
        group_size: Some(32),
        has_zero_point: false,
        scale: ScaleFloat::F16,
    };
    let mut out = vec![0; grid.row_bytes(32)];
    let overflow = grid.quantize_rows(32, &[1e6; 32], Nearest::ToStoredScale, &mut out);
    assert_eq!(overflow.0, 1);
}
