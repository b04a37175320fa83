//! Every layout decodes to its values.

use super::*;

#[test]
fn integers_in_words() {
    for width in [Width::Four, Width::Eight] {
        // 19 rows and 40 columns: neither fills whole words of zero points.
        let sample = Sample::new(width, 19, 40, 8);
        let folder = folder(&sample.compressed(width));
        for symmetric in [true, false] {
            let layout = Layout::PackQuantized {
                width,
                group: Group::Columns(8),
                symmetric,
            };
            check(
                folder.path(),
                "m",
                &plain(layout),
                [19, 40],
                &sample.values(symmetric),
            );
        }
    }
    // The last word of a row of 5 is filled with zeros.
    let sample = Sample::new(Width::Four, 3, 5, 5);
    let layout = Layout::PackQuantized {
        width: Width::Four,
        group: Group::Row,
        symmetric: true,
    };
    let folder = folder(&sample.compressed(Width::Four));
    check(
        folder.path(),
        "m",
        &plain(layout),
        [3, 5],
        &sample.values(true),
    );
}

#[test]
fn integers_in_bytes() {
    let sample = Sample::new(Width::Eight, 11, 12, 12);
    let bytes = |codes: &[i8]| codes.iter().map(|code| code.cast_unsigned()).collect();
    let folder = folder(&[
        ("m.weight", Theirs::I8, vec![11, 12], bytes(&sample.codes)),
        (
            "m.weight_scale",
            Theirs::BF16,
            vec![11, 1],
            bf16_bytes(&sample.scales),
        ),
        (
            "m.weight_zero_point",
            Theirs::I8,
            vec![11, 1],
            bytes(&sample.zeros),
        ),
        ("m.input_scale", Theirs::BF16, vec![1], bf16_bytes(&[0.25])),
    ]);
    for symmetric in [true, false] {
        let layout = Layout::IntQuantized {
            bits: 8,
            group: Group::Row,
            symmetric,
        };
        check(
            folder.path(),
            "m",
            &plain(layout),
            [11, 12],
            &sample.values(symmetric),
        );
    }
    let layout = Layout::IntQuantized {
        bits: 8,
        group: Group::Row,
        symmetric: true,
    };
    let scheme = Scheme {
        layout,
        inputs: Inputs::Int8PerTensor,
    };
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let linear = PackedLinear::resolve(&checkpoint, "m", &scheme, 11, 12).unwrap();
    assert_eq!(linear.input_scale(&checkpoint).unwrap(), Some(0.25));
    assert_eq!(linear.positions().count(), 3);
}

#[test]
fn gptq_in_both_versions() {
    for (width, rows) in [(Width::Four, 24), (Width::Eight, 12)] {
        for zeros in [GptqZeros::MinusOne, GptqZeros::AsTheyAre] {
            let sample = Sample::new(width, rows, 32, 16);
            let folder = folder(&sample.gptq(width, zeros));
            let layout = Layout::Gptq {
                width,
                group: Group::Columns(16),
                symmetric: false,
                zeros,
            };
            check(
                folder.path(),
                "m",
                &plain(layout),
                [rows, 32],
                &sample.values(false),
            );
        }
    }
}

#[test]
fn four_bit_floats_under_both_names() {
    // Every E2M1 code in order, then backwards; scales 0.5 and 448.
    let codes: Vec<u8> = (0..8).map(|i| (2 * i) | ((2 * i + 1) << 4)).collect();
    let codes = [codes.clone(), codes.iter().rev().copied().collect()].concat();
    let e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
    let value = |code: u8| e2m1[usize::from(code & 7)] * if code > 7 { -1.0 } else { 1.0 };
    let unscaled = codes
        .iter()
        .flat_map(|byte| [value(byte & 15), value(byte >> 4)]);
    let scaled: Vec<f32> = unscaled
        .enumerate()
        .map(|(i, x): (usize, f32)| x * [0.5, 448.0][i / 16])
        .collect();
    let scales = vec![0x30, 0x7e];
    let tensors = |codes_name, second_name, second: f32| {
        folder(&[
            (codes_name, Theirs::U8, vec![1, 16], codes.clone()),
            (
                "m.weight_scale",
                Theirs::F8_E4M3,
                vec![1, 2],
                scales.clone(),
            ),
            (second_name, Theirs::F32, vec![], f32_bytes(&[second])),
        ])
    };
    let check = |folder: TempDir, names, expected: Vec<f32>| {
        check(
            folder.path(),
            "m",
            &plain(Layout::Nvfp4(names)),
            [1, 32],
            &expected,
        );
    };
    check(
        tensors("m.weight", "m.weight_scale_2", 0.1),
        Nvfp4Names::ModelOpt,
        scaled.iter().map(|x| x * 0.1).collect(),
    );
    check(
        tensors("m.weight_packed", "m.weight_global_scale", 3.0),
        Nvfp4Names::CompressedTensors,
        scaled.iter().map(|x| x / 3.0).collect(),
    );
}

#[test]
fn eight_bit_floats_find_their_scales() {
    let (rows, columns) = (130, 129);
    let codes: Vec<u8> = (0..rows * columns).map(|i| (i % 0x7f) as u8).collect();
    let mut values = vec![0.0; codes.len()];
    float::to_f32(Dtype::F8E4M3, &codes, &mut values).unwrap();
    let blocks = |at: usize| at / columns / 128 * 2 + at % columns / 128;
    type ScaleOf<'a> = &'a dyn Fn(usize) -> usize;
    let cases: [(Vec<usize>, ScaleOf); 5] = [
        (vec![], &|_| 0),
        (vec![1, 1], &|_| 0),
        (vec![rows], &|at| at / columns),
        (vec![rows, 1], &|at| at / columns),
        (vec![2, 2], &blocks),
    ];
    for (shape, scale_of) in cases {
        let scales: Vec<f32> = (0..shape.iter().product())
            .map(|i| 1.0 + i as f32 / 8.0)
            .collect();
        let folder = folder(&[
            (
                "m.weight",
                Theirs::F8_E4M3,
                vec![rows, columns],
                codes.clone(),
            ),
            ("m.weight_scale_inv", Theirs::F32, shape, f32_bytes(&scales)),
        ]);
        let expected: Vec<f32> = values
            .iter()
            .enumerate()
            .map(|(at, x)| x * scales[scale_of(at)])
            .collect();
        let scheme = Scheme::float8("weight_scale_inv", Inputs::AsTheyAre);
        check(folder.path(), "m", &scheme, [rows, columns], &expected);
    }
}
