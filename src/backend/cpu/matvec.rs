//! One token: rows are multiplied as they are stored or unpacked, since no other token would share their panels.
//!
//! Enters: stored rows, one packed token. Leaves: the sums of a panel, bit for bit those of [`super::matmul`].

use bytemuck::{Pod, cast_slice};
use nemoconv_formats::GgmlType;

use super::input::{Input, TokenTile};
use super::kernels::{self, BlockInput, FLOAT_ROWS, Isa, LANES, SuperInput};
use super::panel::{Part, Rows, UnpackedRows};

/// 32 rows of F32, or of a type that is dequantized.
pub fn floats(
    isa: Isa,
    unpacked: &mut UnpackedRows,
    rows: Rows,
    part: Part,
    (input, token): (&Input, TokenTile),
) -> [f32; FLOAT_ROWS] {
    let input = cast_slice(input.floats(token, part.first, part.count));
    let words = unpacked.floats(rows, part);
    kernels::float_rows(isa, words, input, rows.ahead(part, FLOAT_ROWS))
}

/// 32 rows of BF16.
pub fn bf16(
    isa: Isa,
    unpacked: &mut UnpackedRows,
    rows: Rows,
    part: Part,
    (input, token): (&Input, TokenTile),
) -> [f32; FLOAT_ROWS] {
    let input = input.bf16(token, part.first, part.count);
    let words = unpacked.bf16(rows, part);
    kernels::bf16_rows(isa, words, input, rows.ahead(part, FLOAT_ROWS))
}

/// 16 rows of a type with blocks of 32.
pub fn blocks(
    isa: Isa,
    unpacked: &mut UnpackedRows,
    rows: Rows,
    part: Part,
    (input, token): (&Input, TokenTile),
) -> [f32; LANES] {
    let input = input.blocks(token, part.first, part.count);
    if let Some(sums) = stored_blocks(isa, rows, part, input) {
        return sums;
    }
    kernels::block_rows(isa, unpacked.blocks(isa, rows, part), input)
}

/// 16 rows of a type with super-blocks.
pub fn super_blocks(
    isa: Isa,
    unpacked: &mut UnpackedRows,
    rows: Rows,
    part: Part,
    (input, token): (&Input, TokenTile),
) -> [f32; LANES] {
    let input = input.super_blocks(token, part.first, part.count);
    if let Some(sums) = stored_super_blocks(isa, rows, part, input) {
        return sums;
    }
    kernels::super_rows(isa, unpacked.super_blocks(isa, rows, part), input)
}

fn stored_blocks(isa: Isa, rows: Rows, part: Part, input: BlockInput) -> Option<[f32; LANES]> {
    let ahead = rows.ahead(part, LANES);
    match rows.ty {
        GgmlType::Q8_0 => kernels::q8_0_rows(isa, stored(rows, part)?, input, ahead),
        _ => None,
    }
}

fn stored_super_blocks(
    isa: Isa,
    rows: Rows,
    part: Part,
    input: SuperInput,
) -> Option<[f32; LANES]> {
    let ahead = rows.ahead(part, LANES);
    match rows.ty {
        GgmlType::Q4_K => kernels::q4_k_rows(isa, stored(rows, part)?, input, ahead),
        GgmlType::Q6_K => kernels::q6_k_rows(isa, stored(rows, part)?, input, ahead),
        _ => None,
    }
}

/// 16 rows of blocks where they lie, if all are there.
fn stored<B: Pod>(rows: Rows<'_>, part: Part) -> Option<[&[B]; LANES]> {
    let mut parts = rows.parts(part);
    let mut stored: [&[B]; LANES] = [&[]; LANES];
    for row in &mut stored {
        *row = cast_slice(parts.next()?);
    }
    Some(stored)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::activation::Activation;
    use crate::backend::cpu::kernels::MAX_TOKENS;
    use crate::backend::cpu::panel::{Form, Panels};
    use crate::quantize::quantize_rows;

    const TYPES: [GgmlType; 16] = [
        GgmlType::F32,
        GgmlType::F16,
        GgmlType::BF16,
        GgmlType::Q8_0,
        GgmlType::Q4_0,
        GgmlType::Q4_1,
        GgmlType::Q5_0,
        GgmlType::Q5_1,
        GgmlType::IQ4_NL,
        GgmlType::MXFP4,
        GgmlType::Q2_K,
        GgmlType::Q3_K,
        GgmlType::Q4_K,
        GgmlType::Q5_K,
        GgmlType::Q6_K,
        GgmlType::IQ4_XS,
    ];

    /// The sums of the panel kernels for the same rows and token.
    fn by_panel(isa: Isa, rows: Rows, form: Form, part: Part, input: &Input) -> Vec<f32> {
        let (mut panels, token) = (Panels::default(), input.tiles()[0]);
        let (first, count) = (part.first, part.count);
        let mut floats = [[0.0; FLOAT_ROWS]; MAX_TOKENS];
        let mut codes = [[0.0; LANES]; MAX_TOKENS];
        match form {
            Form::Float => {
                let panel = panels.floats(isa, rows, part);
                let input = input.floats(token, first, count);
                kernels::float(isa, 1, panel, input, &mut floats);
            }
            Form::Bf16 => {
                let panel = panels.bf16(isa, rows, part);
                kernels::bf16(isa, 1, panel, input.bf16(token, first, count), &mut floats);
            }
            Form::Blocks { .. } => {
                let panel = panels.blocks(isa, rows, part);
                let input = input.blocks(token, first, count);
                kernels::blocks(isa, 1, panel, input, &mut codes);
                return codes[0].to_vec();
            }
            Form::SuperBlocks { .. } => {
                let panel = panels.super_blocks(isa, rows, part);
                let input = input.super_blocks(token, first, count);
                kernels::super_blocks(isa, 1, panel, input, &mut codes);
                return codes[0].to_vec();
            }
        }
        floats[0].to_vec()
    }

    fn by_row(isa: Isa, rows: Rows, form: Form, part: Part, input: &Input) -> Vec<f32> {
        let (mut unpacked, token) = (UnpackedRows::default(), (input, input.tiles()[0]));
        match form {
            Form::Float => floats(isa, &mut unpacked, rows, part, token).to_vec(),
            Form::Bf16 => bf16(isa, &mut unpacked, rows, part, token).to_vec(),
            Form::Blocks { .. } => blocks(isa, &mut unpacked, rows, part, token).to_vec(),
            Form::SuperBlocks { .. } => {
                super_blocks(isa, &mut unpacked, rows, part, token).to_vec()
            }
        }
    }

    #[test]
    fn one_token_has_the_sums_of_panels_bit_for_bit() {
        let (columns, height) = (768, 39);
        let wave = |i: usize| ((i * 7919 % 1009) as f32 - 504.0) / 300.0;
        let weights: Vec<f32> = (0..height * columns).map(wave).collect();
        let token: Vec<f32> = (0..columns).map(|i| wave(i + 31)).collect();
        for (isa, ty) in Isa::all()
            .into_iter()
            .flat_map(|isa| TYPES.map(|ty| (isa, ty)))
        {
            let row_bytes = columns / ty.block_elements() * ty.block_bytes();
            let mut bytes = vec![0; height * row_bytes];
            let _ = quantize_rows(ty, columns, &weights, None, &mut bytes);
            let rows = Rows {
                bytes: &bytes,
                ty,
                columns,
                row_bytes,
            };
            let activation = Activation::of_runtime(ty);
            let form = Form::of(ty, activation, columns);
            let input = Input::pack(isa, &token, columns, form, activation);
            for (row, first, count) in [(0, 0, 512), (0, 512, 256), (32, 0, 512)] {
                let part = Part { row, first, count };
                let expected = by_panel(isa, rows, form, part, &input);
                let found = by_row(isa, rows, form, part, &input);
                let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected), "{isa:?} {ty:?} {part:?}");
            }
        }
    }
}
