//! What rounding does to the outputs of one matrix, without running the network.

use std::collections::BTreeMap;

use nemoconv_formats::GgmlType;
use nemoconv_formats::block::dequantize;

use super::{Group, Measurement, probe_types};
use crate::artifact::{MemoryTensor, StoredTensor};
use crate::calibrate::second_moments::SecondMoments;
use crate::convert::calibrated::{Method, stages};
use crate::error::Result;
use crate::forward::required;
use crate::quantize::feedback::{self, Damping, Feedback, InputMoments, can_feed_back};
use crate::quantize::quantize_rows;

/// Rows of a tensor that local losses are measured on, and of each matrix of a stack.
const SAMPLE_ROWS: usize = 256;
const SAMPLE_ROWS_OF_STACK: usize = 32;

/// Inputs of one matrix.
pub struct Inputs {
    moments: InputMoments,
    mean_squares: Vec<f32>,
    /// Sum of what its tokens count.
    weight: f64,
}

/// Sums of local losses, one per type.
pub struct LocalLosses {
    pub energy: f64,
    pub losses: Vec<f64>,
}

impl LocalLosses {
    /// `tr(E M E^T) / tr(W M W^T)` per type.
    pub fn relative(&self) -> Vec<f64> {
        self.losses
            .iter()
            .map(|loss| loss / self.energy.max(f64::MIN_POSITIVE))
            .collect()
    }
}

/// What was found without running the network.
pub struct Looked {
    pub local: LocalLosses,
    /// Per type of the probes, the tensors of the group.
    pub probes: Vec<Vec<MemoryTensor>>,
}

impl Measurement<'_> {
    /// Local losses of a group's types, and its tensors in the types of the probes.
    pub fn look_at(
        &self,
        group: &Group,
        seen: &BTreeMap<(String, usize), SecondMoments>,
    ) -> Result<Looked> {
        let types = probe_types(group);
        let mut looked = Looked {
            local: LocalLosses {
                energy: 0.0,
                losses: vec![0.0; group.types.len()],
            },
            probes: vec![Vec::new(); types.len()],
        };
        for name in &group.tensors {
            let tensor = required(self.weights.stored(), name)?;
            let mut stored: Vec<Vec<u8>> = vec![Vec::new(); types.len()];
            for matrix in 0..tensor.matrices {
                self.check_stop()?;
                let values = self.weights.matrix(name, matrix)?;
                let inputs = seen
                    .get(&(stages::input_of(name), matrix))
                    .and_then(|seen| self.inputs(seen));
                if let Some(inputs) = &inputs {
                    self.add_losses(group, tensor, &values, inputs, &mut looked.local);
                }
                for (ty, bytes) in types.iter().zip(&mut stored) {
                    bytes.extend(self.round(*ty, tensor.columns, &values, inputs.as_ref()));
                }
            }
            for ((ty, bytes), probe) in types.iter().zip(stored).zip(&mut looked.probes) {
                probe.push(memory_tensor(tensor, *ty, bytes));
            }
        }
        Ok(looked)
    }

    /// Adds the losses of one matrix, measured on evenly spaced rows and scaled up to all.
    fn add_losses(
        &self,
        group: &Group,
        tensor: &StoredTensor,
        values: &[f32],
        inputs: &Inputs,
        sums: &mut LocalLosses,
    ) {
        let columns = tensor.columns;
        let most = if tensor.matrices > 1 {
            SAMPLE_ROWS_OF_STACK
        } else {
            SAMPLE_ROWS
        };
        let count = tensor.rows.min(most);
        let row = |index: usize| index * tensor.rows / count * columns;
        let rows: Vec<f32> = (0..count)
            .flat_map(|index| &values[row(index)..][..columns])
            .copied()
            .collect();
        let scale = inputs.weight * inputs.moments.unit * tensor.rows as f64 / count as f64;
        sums.energy += scale * feedback::loss(self.isa(), &rows, &inputs.moments);
        let mut errors = vec![0.0; rows.len()];
        for (ty, loss) in group.types.iter().zip(&mut sums.losses) {
            let bytes = self.round(*ty, columns, &rows, Some(inputs));
            dequantize(*ty, &bytes, &mut errors).expect("the type was written just now");
            errors
                .iter_mut()
                .zip(&rows)
                .for_each(|(error, row)| *error -= row);
            *loss += scale * feedback::loss(self.isa(), &errors, &inputs.moments);
        }
    }

    /// Rounds rows as the conversion will, with one pass of descent at most.
    pub fn round(
        &self,
        ty: GgmlType,
        columns: usize,
        rows: &[f32],
        inputs: Option<&Inputs>,
    ) -> Vec<u8> {
        let mut out = vec![0; ty.bytes_for(rows.len() as u64).unwrap_or(0) as usize];
        match (self.rounding.method, inputs) {
            (Method::Gptq, Some(inputs)) if can_feed_back(ty) => {
                let how = Feedback::of_inputs(&inputs.moments, self.rounding.passes.min(1));
                feedback::quantize_rows(self.isa(), ty, rows, how, &mut out);
            }
            (Method::Gptq | Method::Imatrix, Some(inputs)) => {
                let _ = quantize_rows(ty, columns, rows, Some(&inputs.mean_squares), &mut out);
            }
            _ => {
                let _ = quantize_rows(ty, columns, rows, None, &mut out);
            }
        }
        out
    }

    /// What is known of the inputs of a matrix, damped the more the fewer tokens were seen.
    pub fn inputs(&self, seen: &SecondMoments) -> Option<Inputs> {
        let scarcity = seen.n as f64 / (2 * seen.tokens.max(1)) as f64;
        let damping = Damping {
            first: self.rounding.damp_percent + scarcity,
            ..Damping::default()
        };
        Some(Inputs {
            moments: InputMoments::new(self.isa(), seen.n, &seen.mean(), damping)?,
            mean_squares: seen.mean_squares(),
            weight: seen.weight,
        })
    }
}

/// A tensor of the network with other bytes.
pub fn memory_tensor(tensor: &StoredTensor, ty: GgmlType, bytes: Vec<u8>) -> MemoryTensor {
    MemoryTensor {
        name: tensor.name.clone(),
        ty,
        matrices: tensor.matrices,
        rows: tensor.rows,
        columns: tensor.columns,
        bytes: bytes.into(),
    }
}

/// In order.
pub fn sum_of_squares(values: &[f32]) -> f64 {
    values
        .iter()
        .map(|value| f64::from(*value) * f64::from(*value))
        .sum()
}
