//! One token: rows are multiplied as they are stored or unpacked, since no other token would share their panels.
//!
//! Enters: stored rows, one packed token. Leaves: the sums of a panel, bit for bit those of [`super::matmul`].

use bytemuck::{Pod, cast_slice};
use nemoconv_formats::GgmlType;

use super::input::{Input, TokenTile};
use super::kernels::{self, BlockInput, FLOAT_ROWS, Isa, LANES, SuperInput};
use super::panel::{Part, Rows, UnpackedRows};

/// One token and the panel of rows it meets.
#[derive(Debug, Clone, Copy)]
pub struct OneToken<'a> {
    /// Instructions.
    pub isa: Isa,
    /// Stored rows.
    pub rows: Rows<'a>,
    /// Which of them, and which columns.
    pub part: Part,
    /// Where the token is packed.
    pub input: &'a Input,
    /// Its tile.
    pub token: TokenTile,
}

impl OneToken<'_> {
    /// Sums of 32 rows of F32, or of a type that is dequantized.
    pub fn floats(&self, unpacked: &mut UnpackedRows) -> [f32; FLOAT_ROWS] {
        let Part { first, count, .. } = self.part;
        let input = cast_slice(self.input.floats(self.token, first, count));
        let words = unpacked.floats(self.rows, self.part);
        kernels::float_rows(
            self.isa,
            words,
            input,
            self.rows.ahead(self.part, FLOAT_ROWS),
        )
    }

    /// Sums of 32 rows of BF16.
    pub fn bf16(&self, unpacked: &mut UnpackedRows) -> [f32; FLOAT_ROWS] {
        let Part { first, count, .. } = self.part;
        let input = self.input.bf16(self.token, first, count);
        let words = unpacked.bf16(self.rows, self.part);
        kernels::bf16_rows(
            self.isa,
            words,
            input,
            self.rows.ahead(self.part, FLOAT_ROWS),
        )
    }

    /// Sums of 16 rows of a type with blocks of 32.
    pub fn blocks(&self, unpacked: &mut UnpackedRows) -> [f32; LANES] {
        let Part { first, count, .. } = self.part;
        let input = self.input.blocks(self.token, first, count);
        self.stored_blocks(input).unwrap_or_else(|| {
            let rows = unpacked.blocks(self.isa, self.rows, self.part);
            kernels::block_rows(self.isa, rows, input)
        })
    }

    /// Sums of 16 rows of a type with super-blocks.
    pub fn super_blocks(&self, unpacked: &mut UnpackedRows) -> [f32; LANES] {
        let Part { first, count, .. } = self.part;
        let input = self.input.super_blocks(self.token, first, count);
        self.stored_super_blocks(input).unwrap_or_else(|| {
            let rows = unpacked.super_blocks(self.isa, self.rows, self.part);
            kernels::super_rows(self.isa, rows, input)
        })
    }

    fn stored_blocks(&self, input: BlockInput) -> Option<[f32; LANES]> {
        let ahead = self.rows.ahead(self.part, LANES);
        match self.rows.ty {
            GgmlType::Q8_0 => kernels::q8_0_rows(self.isa, self.stored()?, input, ahead),
            _ => None,
        }
    }

    fn stored_super_blocks(&self, input: SuperInput) -> Option<[f32; LANES]> {
        let ahead = self.rows.ahead(self.part, LANES);
        match self.rows.ty {
            GgmlType::Q4_K => kernels::q4_k_rows(self.isa, self.stored()?, input, ahead),
            GgmlType::Q6_K => kernels::q6_k_rows(self.isa, self.stored()?, input, ahead),
            _ => None,
        }
    }

    /// 16 rows of blocks where they lie, if all are there.
    fn stored<B: Pod>(&self) -> Option<[&[B]; LANES]> {
        let mut parts = self.rows.parts(self.part);
        let mut stored: [&[B]; LANES] = [&[]; LANES];
        for row in &mut stored {
            *row = cast_slice(parts.next()?);
        }
        Some(stored)
    }
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

    fn by_row(form: Form, token: OneToken) -> Vec<f32> {
        let mut unpacked = UnpackedRows::default();
        match form {
            Form::Float => token.floats(&mut unpacked).to_vec(),
            Form::Bf16 => token.bf16(&mut unpacked).to_vec(),
            Form::Blocks { .. } => token.blocks(&mut unpacked).to_vec(),
            Form::SuperBlocks { .. } => token.super_blocks(&mut unpacked).to_vec(),
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
                let token = OneToken {
                    isa,
                    rows,
                    part,
                    input: &input,
                    token: input.tiles()[0],
                };
                let found = by_row(form, token);
                let bits = |sums: &[f32]| sums.iter().map(|sum| sum.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&found), bits(&expected), "{isa:?} {ty:?} {part:?}");
            }
        }
    }
}
