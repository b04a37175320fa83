//! Matrices of packed checkpoints on a device: codes, scales and zero points as the checkpoint has them.

use std::ops::Range;

use nemoconv_device::{Array, Bytes, Device, FloatLayout, IntegerLayout};
use nemoconv_formats::packed::{IntegerCodes, StoredFloats, StoredIntegers, StoredLinear};

use crate::artifact::PackedMatrix;
use crate::error::Result;

/// A matrix whose values are decoded when they are multiplied.
pub(super) enum Matrix {
    Integers {
        layout: IntegerLayout,
        codes: Bytes,
        scales: Bytes,
        zeros: Option<Bytes>,
    },
    Floats {
        layout: FloatLayout,
        codes: Bytes,
        scales: Bytes,
    },
}

/// Bytes that are seen together, be rows decoded one by one: those of GPTQ's codes lie all over them.
pub(super) fn bytes_in_a_view(linear: &StoredLinear) -> u64 {
    match linear {
        StoredLinear::Integers(StoredIntegers {
            storage: IntegerCodes::Transposed(_),
            codes,
            ..
        }) => codes.len() as u64,
        _ => 0,
    }
}

impl Matrix {
    /// Sends a matrix with rows of so many columns.
    pub(super) fn send(device: &Device, matrix: &PackedMatrix, columns: usize) -> Result<Self> {
        match &matrix.linear {
            StoredLinear::Integers(stored) => {
                Self::send_integers(device, stored, columns, matrix.head_rows)
            }
            StoredLinear::Floats(stored) => {
                Self::send_floats(device, stored, columns, matrix.head_rows)
            }
        }
    }

    fn send_integers(
        device: &Device,
        stored: &StoredIntegers,
        columns: usize,
        head_rows: usize,
    ) -> Result<Self> {
        Ok(Self::Integers {
            layout: IntegerLayout {
                codes: stored.storage,
                columns,
                group: stored.group,
                scales: stored.scale_dtype,
                head_rows,
            },
            codes: device.upload_bytes(stored.codes)?,
            scales: device.upload_bytes(&stored.scales)?,
            zeros: match &stored.zeros {
                Some(zeros) => Some(device.upload_bytes(zeros)?),
                None => None,
            },
        })
    }

    fn send_floats(
        device: &Device,
        stored: &StoredFloats,
        columns: usize,
        head_rows: usize,
    ) -> Result<Self> {
        Ok(Self::Floats {
            layout: FloatLayout {
                codes: stored.storage,
                columns,
                block: stored.block,
                scales: stored.scale_dtype,
                second_scale: stored.second_scale,
                head_rows,
            },
            codes: device.upload_bytes(stored.codes)?,
            scales: device.upload_bytes(stored.scales)?,
        })
    }

    /// Decodes rows to the first values of `out`.
    pub(super) fn decode(
        &self,
        device: &Device,
        rows: Range<usize>,
        out: &mut Array,
    ) -> Result<()> {
        match self {
            Self::Integers {
                layout,
                codes,
                scales,
                zeros,
            } => device.dequantize_integers(layout, codes, scales, zeros.as_ref(), rows, out)?,
            Self::Floats {
                layout,
                codes,
                scales,
            } => device.dequantize_floats(layout, codes, scales, rows, out)?,
        }
        Ok(())
    }
}
