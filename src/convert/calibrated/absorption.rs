//! Mean errors of `ssm_in` that the biases behind it take back: at no cost when the network runs.
//!
//! Enters: the rounded rows, sums of their inputs in both networks. Leaves: the bias of the convolution, for the rows of x, B
//! and C, and that of the time step. Rows of z have no bias behind them.
//!
//! Every tap of the convolution sees the same mean, so a row's error counts with the sum of its taps; the first tokens of a
//! sequence, which have fewer of them, are left out of account.
//!
//! Source: bias correction of Data-Free Quantization, arXiv:1906.04721, section 4.2, with measured means.

use super::collector::Seen;
use super::{Calibrated, rounding};
use crate::error::Result;
use crate::model::nemotron_h::{CONVOLUTION_BIAS, TIME_STEP_BIAS};
use crate::plan::PlannedTensor;

/// The matrix whose errors are absorbed.
const SOURCE: &str = "ssm_in.weight";

/// Biases with what they absorb of `tensor`, rounded to `bytes`: stored bytes by tensor. None of another matrix.
///
/// # Errors
/// A weight cannot be read.
pub fn absorbed<'a>(
    job: &'a Calibrated,
    tensor: &PlannedTensor,
    bytes: &[u8],
    seen: &Seen,
) -> Result<Vec<(&'a PlannedTensor, Vec<u8>)>> {
    let Some(prefix) = tensor.name.strip_suffix(SOURCE) else {
        return Ok(Vec::new());
    };
    let errors = mean_errors(job, tensor, bytes, seen)?;
    let config = job.weights.stored().config();
    let (inner, channels) = (config.inner_size(), config.conv_dim());
    let taps = job
        .weights
        .matrix(&format!("{prefix}ssm_conv1d.weight"), 0)?;
    let taps = taps.chunks_exact(config.conv_kernel);
    let taps = taps.map(|taps| taps.iter().map(|tap| f64::from(*tap)).sum::<f64>());
    let convolved = errors[inner..][..channels].iter().zip(taps);
    let convolved: Vec<f64> = convolved.map(|(error, taps)| error * taps).collect();
    let mut absorbed = Vec::new();
    for (name, added) in [
        (CONVOLUTION_BIAS, &convolved[..]),
        (TIME_STEP_BIAS, &errors[inner + channels..]),
    ] {
        let name = format!("{prefix}{name}");
        let Some(bias) = job.tensor(&name) else {
            continue;
        };
        let values = job.weights.matrix(&name, 0)?;
        let values = values.iter().zip(added);
        let values: Vec<f32> = values
            .map(|(value, added)| (f64::from(*value) + added) as f32)
            .collect();
        let (bytes, _) = job.form(bias).nearest(values.len(), &values, None);
        absorbed.push((bias, bytes));
    }
    Ok(absorbed)
}

/// What is missing of each output on average: `W E[v] - Q E[u]`, v the inputs of the original network, u the present ones.
fn mean_errors(
    job: &Calibrated,
    tensor: &PlannedTensor,
    bytes: &[u8],
    seen: &Seen,
) -> Result<Vec<f64>> {
    let columns = seen.moments.n;
    let wanted = job.weights.matrix(&tensor.name, 0)?;
    let mut stored = vec![0.0; wanted.len()];
    job.form(tensor).dequantize(columns, bytes, &mut stored)?;
    let per_token = 1.0 / seen.moments.tokens.max(1) as f64;
    let present = &seen.sums;
    let original = seen.original_sums.as_ref().unwrap_or(present);
    let dot = |row: &[f32], sums: &[f64]| {
        let products = row.iter().zip(sums).map(|(w, sum)| f64::from(*w) * sum);
        products.sum::<f64>() * per_token
    };
    let rows = wanted
        .chunks_exact(columns)
        .zip(stored.chunks_exact(columns));
    Ok(rows
        .map(|(wanted, stored)| dot(wanted, original) - dot(stored, present))
        .collect())
}

/// A bias that absorbed something, as the ledger takes it.
pub fn outcome(job: &Calibrated, tensor: &PlannedTensor) -> super::TensorOutcome {
    rounding::empty_outcome(tensor, job.form(tensor), tensor.stored.columns)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Backend;
    use crate::calibrate::capture::Captured;
    use crate::convert::calibrated::collector::seen;
    use crate::convert::calibrated::tests::Scene;
    use crate::convert::calibrated::{Rounding, Treatment};
    use crate::model::nemotron_h::is_bias_behind_ssm_in;
    use crate::rewrite::RewrittenModel;

    const TOKENS: usize = 400;

    /// Mean of what the convolution makes of rows of `in_proj`, behind the first tokens.
    fn mean_outputs(weights: &RewrittenModel, in_proj: &[f32], inputs: &[f32]) -> Vec<f64> {
        let config = weights.stored().config();
        let taps = weights.matrix("blk.0.ssm_conv1d.weight", 0).unwrap();
        let taps: Vec<&[f32]> = taps.chunks_exact(config.conv_kernel).collect();
        let hidden = config.hidden_size;
        let rows = in_proj.chunks_exact(hidden).skip(config.inner_size());
        let dot = |a: &[f32], b: &[f32]| {
            a.iter()
                .zip(b)
                .map(|(a, b)| f64::from(*a) * f64::from(*b))
                .sum()
        };
        let of_channel = |(row, taps): (&[f32], &&[f32])| {
            let values: Vec<f64> = inputs.chunks_exact(hidden).map(|u| dot(row, u)).collect();
            let windows = values.windows(taps.len());
            let count = windows.len() as f64;
            let outputs = windows.map(|window| {
                let products = window.iter().zip(*taps);
                products.map(|(x, tap)| x * f64::from(*tap)).sum::<f64>()
            });
            outputs.sum::<f64>() / count
        };
        rows.zip(&taps).map(of_channel).collect()
    }

    #[test]
    fn mean_errors_of_convolution_and_time_step_are_gone() {
        let scene = Scene::new(&Default::default());
        let rounding = Rounding {
            bias_absorption: true,
            ..Rounding::default()
        };
        let job = scene.job(rounding);
        let hidden = scene.weights.stored().config().hidden_size;
        let noise = |at: usize| ((at * 7919) % 1009) as f32 / 1009.0;
        let inputs: Vec<f32> = (0..TOKENS * hidden).map(|at| 0.5 + noise(at)).collect();
        let machine = job.machine(0);
        let rows = machine.upload(inputs.clone()).unwrap();
        let captured = Captured::unweighted(&machine, rows, hidden);
        let seen = seen(&machine, &captured, None).unwrap();
        let name = "blk.0.ssm_in.weight";
        let tensor = job.tensor(name).unwrap();
        let wanted = scene.weights.matrix(name, 0).unwrap();
        let (bytes, _) = job.form(tensor).nearest(hidden, &wanted, None);
        let mut stored = vec![0.0; wanted.len()];
        job.form(tensor)
            .dequantize(hidden, &bytes, &mut stored)
            .unwrap();
        let absorbed = absorbed(&job, tensor, &bytes, &seen).unwrap();
        assert_eq!(absorbed.len(), 2);
        let added = |index: usize| -> Vec<f64> {
            let (bias, bytes) = &absorbed[index];
            assert_eq!(outcome(&job, bias).treatment, Treatment::Kept);
            let before = scene.weights.matrix(&bias.name, 0).unwrap();
            let after = bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|x| f32::from_le_bytes(*x));
            let pairs = after.zip(before);
            pairs
                .map(|(after, before)| f64::from(after) - f64::from(before))
                .collect()
        };
        let wanted_means = mean_outputs(&scene.weights, &wanted, &inputs);
        let stored_means = mean_outputs(&scene.weights, &stored, &inputs);
        let (mut before, mut after) = (0.0, 0.0);
        for ((wanted, stored), added) in wanted_means.iter().zip(&stored_means).zip(added(0)) {
            before += (wanted - stored).abs();
            after += (wanted - stored - added).abs();
        }
        assert!(before > 0.0 && after < 0.1 * before, "{before} {after}");
        assert!(added(1).iter().any(|added| *added != 0.0));
    }

    #[test]
    fn other_matrices_absorb_nothing() {
        for name in ["blk.3.ssm_conv1d.bias", "blk.3.ssm_dt.bias"] {
            assert!(is_bias_behind_ssm_in(name), "{name}");
        }
        for name in ["blk.3.ssm_conv1d.weight", "blk.3.ffn_up.bias"] {
            assert!(!is_bias_behind_ssm_in(name), "{name}");
        }
    }
}
