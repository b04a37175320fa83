//! Linears that are incomplete or lie.

use super::*;

const PACKED: Layout = Layout::PackQuantized {
    width: Width::Four,
    group: Group::Columns(8),
    symmetric: false,
};

const GPTQ: Layout = Layout::Gptq {
    width: Width::Four,
    group: Group::Columns(8),
    symmetric: false,
    zeros: GptqZeros::MinusOne,
};

#[test]
fn incomplete_linears_are_refused() {
    let whole = Sample::new(Width::Four, 8, 16, 8).compressed(Width::Four);
    let without = |name: &str| -> Vec<Tensor> {
        whole
            .iter()
            .filter(|tensor| tensor.0 != name)
            .cloned()
            .collect()
    };
    let scheme = "which its scheme needs (W4A16 g8 asymmetric, pack-quantized) (DIR)";
    for part in [
        "weight_scale",
        "weight_shape",
        "weight_zero_point",
        "weight_packed",
    ] {
        let name = format!("m.{part}");
        let expected = format!("`m`: has no `{part}`, {scheme}");
        check_refused(&without(&name), PACKED, [8, 16], &expected);
    }
}

#[test]
fn lies_of_linears() {
    let whole = Sample::new(Width::Four, 8, 16, 8).compressed(Width::Four);
    let with = |tensor: Tensor| -> Vec<Tensor> {
        let name = tensor.0;
        let others = whole.iter().filter(|old| old.0 != name).cloned();
        others.chain([tensor]).collect()
    };
    let check = |tensor, expected: &str| {
        check_refused(&with(tensor), PACKED, [8, 16], expected);
    };
    check(
        ("m.weight_shape", Theirs::I64, vec![2], shape_bytes(16, 8)),
        "`m.weight_shape`: says [16, 8], expected [8, 16] (DIR/model.safetensors",
    );
    check(
        (
            "m.weight_shape",
            Theirs::I64,
            vec![2],
            shape_bytes(-1, i64::MAX),
        ),
        "`m.weight_shape`: says [-1, 9223372036854775807], expected [8, 16] (DIR/model.safetensors",
    );
    check(
        ("m.weight_scale", Theirs::BF16, vec![16], vec![0; 32]),
        "`m.weight_scale`: shape must be [8, 2], found [16] (DIR/model.safetensors",
    );
    check(
        ("m.weight_scale", Theirs::I32, vec![8, 2], vec![0; 64]),
        "`m.weight_scale`: dtype must be BF16 or F16 or F32, found I32 (DIR/model.safetensors",
    );
    check(
        ("m.weight_packed", Theirs::I32, vec![2, 8], vec![0; 64]),
        "`m.weight_packed`: shape must be [8, 2], found [2, 8] (DIR/model.safetensors",
    );
    check(
        ("m.weight_g_idx", Theirs::I32, vec![16], vec![0; 64]),
        "`m.weight_g_idx`: columns are quantized in the order of activations, which is not read (DIR/model.safetensors",
    );
    let group = |size| Layout::PackQuantized {
        width: Width::Four,
        group: Group::Columns(size),
        symmetric: true,
    };
    for size in [0, 5, 32, usize::MAX] {
        let expected = format!("`m`: groups of {size} do not divide rows of 16 (DIR)");
        check_refused(&whole, group(size), [8, 16], &expected);
    }
}

#[test]
fn lies_of_gptq_linears() {
    let sample = Sample::new(Width::Four, 8, 16, 8);
    let mut tensors = sample.gptq(Width::Four, GptqZeros::MinusOne);
    check_refused(
        &tensors,
        GPTQ,
        [12, 16],
        "`m`: a matrix of 12 x 16 does not fill words of 8 codes (DIR)",
    );
    let order = (0..16i32).flat_map(|column| (column % 2).to_le_bytes());
    tensors[3] = ("m.g_idx", Theirs::I32, vec![16], order.collect());
    check_refused(
        &tensors,
        GPTQ,
        [8, 16],
        "`m.g_idx`: columns are quantized in the order of activations, which is not read (DIR/model.safetensors",
    );
    tensors.remove(3);
    let folder = folder(&tensors);
    check(
        folder.path(),
        "m",
        &plain(GPTQ),
        [8, 16],
        &sample.values(false),
    );
}
