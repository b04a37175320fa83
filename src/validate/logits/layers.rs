//! Per block: how far its output, its SSM state and its choice of experts are from the reference.
//!
//! Enters: slices of both, token by token. Leaves: [`LayerDrift`]s. Runs no network.

use crate::report::{ExpertDrift, HeadDrift, LayerDrift, StateDrift};

/// The slope of log error against log time from which a head counts as growing: half again as much in four times the
/// time.
const GROWING_SLOPE: f64 = 0.3;
/// Below this relative error growth does not matter.
const MIN_GROWING_ERROR: f64 = 1e-3;
/// How often a state is measured.
const STATE_MEASUREMENTS: usize = 8;

/// The numbers of tokens after which SSM states are compared: T/8, 2T/8 .. T, without repeats.
pub fn state_times(context_tokens: usize) -> Vec<usize> {
    let eighths = 1..=STATE_MEASUREMENTS;
    let mut times: Vec<_> = eighths
        .map(|eighth| context_tokens * eighth / STATE_MEASUREMENTS)
        .collect();
    times.retain(|&time| time > 0);
    times.dedup();
    times
}

/// ||artifact - reference|| / ||reference||. Where the reference is zero: 0 if the artifact is too, else 1. `None` if a
/// value is not finite.
pub fn relative_error(reference: &[f32], artifact: &[f32]) -> Option<f64> {
    assert_eq!(reference.len(), artifact.len(), "the same shape");
    let pairs = reference.iter().zip(artifact);
    let (error, norm) = pairs.fold((0.0, 0.0), |(error, norm), (&r, &a)| {
        let (r, a) = (f64::from(r), f64::from(a));
        (error + (a - r) * (a - r), norm + r * r)
    });
    let both: f64 = error + norm;
    if !both.is_finite() {
        None
    } else if norm > 0.0 {
        Some((error / norm).sqrt())
    } else {
        Some(if error > 0.0 { 1.0 } else { 0.0 })
    }
}

/// Collects the drift of all blocks.
#[derive(Debug, Clone)]
pub struct LayerAccumulator {
    layers: Vec<Layer>,
    state_times: Vec<usize>,
}

#[derive(Debug, Clone, Default)]
struct Layer {
    kind: String,
    tokens: u64,
    non_finite_tokens: u64,
    sum: f64,
    max: f64,
    /// By time, then head.
    states: Vec<Vec<Mean>>,
    experts: Experts,
}

#[derive(Debug, Clone, Copy, Default)]
struct Mean {
    sum: f64,
    count: u64,
}

impl Mean {
    fn push(&mut self, value: f64) {
        self.sum += value;
        self.count += 1;
    }

    fn value(self) -> f64 {
        if self.count == 0 {
            0.0
        } else {
            self.sum / self.count as f64
        }
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Experts {
    tokens: u64,
    changed_tokens: u64,
    chosen: u64,
    changed: u64,
}

impl LayerAccumulator {
    /// One block per kind (`mamba2`, `attention`, `mlp`, `moe`), for chunks of `context_tokens`.
    pub fn new<S: Into<String>>(kinds: impl IntoIterator<Item = S>, context_tokens: usize) -> Self {
        let layer = |kind: S| Layer {
            kind: kind.into(),
            ..Layer::default()
        };
        Self {
            layers: kinds.into_iter().map(layer).collect(),
            state_times: state_times(context_tokens),
        }
    }

    /// The numbers of tokens after which states are to be pushed.
    pub fn state_times(&self) -> &[usize] {
        &self.state_times
    }

    /// Adds the output of a block for one or more tokens: `[tokens, width]`, row-major.
    ///
    /// # Panics
    /// If there is no such layer, the shapes differ or are no multiple of `width`.
    pub fn push_output(&mut self, layer: usize, width: usize, reference: &[f32], artifact: &[f32]) {
        assert_eq!(reference.len(), artifact.len(), "the same tokens");
        assert_eq!(reference.len() % width, 0, "whole tokens");
        let layer = &mut self.layers[layer];
        let rows = reference
            .chunks_exact(width)
            .zip(artifact.chunks_exact(width));
        for (reference, artifact) in rows {
            match relative_error(reference, artifact) {
                Some(error) => {
                    layer.tokens += 1;
                    layer.sum += error;
                    layer.max = layer.max.max(error);
                }
                None => layer.non_finite_tokens += 1,
            }
        }
    }

    /// Counts tokens whose output a block cannot give.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn push_non_finite(&mut self, layer: usize, tokens: usize) {
        self.layers[layer].non_finite_tokens += tokens as u64;
    }

    /// Adds the SSM state of a block after `state_times()[time]` tokens of a chunk: `[heads, elements]`, row-major.
    /// Heads that are not finite are left out.
    ///
    /// # Panics
    /// If there is no such layer or time, or the shapes are no multiple of `heads`.
    pub fn push_state(
        &mut self,
        layer: usize,
        time: usize,
        heads: usize,
        reference: &[f32],
        artifact: &[f32],
    ) {
        assert_eq!(reference.len() % heads, 0, "whole heads");
        let states = &mut self.layers[layer].states;
        states.resize(self.state_times.len(), vec![Mean::default(); heads]);
        let elements = reference.len() / heads;
        let rows = reference
            .chunks_exact(elements)
            .zip(artifact.chunks_exact(elements));
        for (mean, (reference, artifact)) in states[time].iter_mut().zip(rows) {
            if let Some(error) = relative_error(reference, artifact) {
                mean.push(error);
            }
        }
    }

    /// Adds the experts that a token is routed to, in any order. Says whether the sets differ.
    ///
    /// # Panics
    /// If there is no such layer.
    pub fn push_experts(&mut self, layer: usize, reference: &[u32], artifact: &[u32]) -> bool {
        let experts = &mut self.layers[layer].experts;
        let is_new = |expert: &&u32| !artifact.contains(expert);
        let gone = reference.iter().filter(is_new).count();
        let changed = gone > 0 || reference.len() != artifact.len();
        experts.tokens += 1;
        experts.changed_tokens += u64::from(changed);
        experts.chosen += reference.len() as u64;
        experts.changed += gone as u64;
        changed
    }

    /// The figures of every block.
    pub fn finish(&self) -> Vec<LayerDrift> {
        let layers = self.layers.iter().enumerate();
        layers
            .map(|(index, layer)| LayerDrift {
                layer: index,
                kind: layer.kind.clone(),
                tokens: layer.tokens,
                non_finite_tokens: layer.non_finite_tokens,
                relative_error: layer.sum / layer.tokens.max(1) as f64,
                max_relative_error: layer.max,
                state: layer.state(&self.state_times),
                experts: layer.experts.finish(),
            })
            .collect()
    }
}

impl Layer {
    fn state(&self, times: &[usize]) -> Option<StateDrift> {
        let heads = self.states.first()?.len();
        let measured: Vec<(u64, &[Mean])> = times
            .iter()
            .zip(&self.states)
            .filter(|(_, means)| means.iter().any(|mean| mean.count > 0))
            .map(|(&time, means)| (time as u64, means.as_slice()))
            .collect();
        let times: Vec<u64> = measured.iter().map(|&(time, _)| time).collect();
        let average =
            |means: &[Mean]| means.iter().map(|mean| mean.value()).sum::<f64>() / heads as f64;
        let mut growing: Vec<_> = (0..heads)
            .filter_map(|head| growing_head(head, &times, &measured))
            .collect();
        growing.sort_by(|a, b| b.growth.total_cmp(&a.growth));
        Some(StateDrift {
            relative_error: measured.iter().map(|(_, means)| average(means)).collect(),
            times,
            heads,
            growing,
        })
    }
}

impl Experts {
    fn finish(&self) -> Option<ExpertDrift> {
        (self.tokens > 0).then(|| ExpertDrift {
            tokens: self.tokens,
            changed_tokens: self.changed_tokens as f64 / self.tokens as f64,
            changed_experts: self.changed as f64 / self.chosen.max(1) as f64,
        })
    }
}

fn growing_head(head: usize, times: &[u64], measured: &[(u64, &[Mean])]) -> Option<HeadDrift> {
    let relative_error: Vec<f64> = measured
        .iter()
        .map(|(_, means)| means[head].value())
        .collect();
    let growth = log_slope(times, &relative_error)?;
    let matters = relative_error
        .last()
        .is_some_and(|&error| error > MIN_GROWING_ERROR);
    (growth > GROWING_SLOPE && matters).then_some(HeadDrift {
        head,
        relative_error,
        growth,
    })
}

/// Least-squares slope of ln error against ln time; `None` with fewer than three errors above zero.
fn log_slope(times: &[u64], errors: &[f64]) -> Option<f64> {
    let points: Vec<(f64, f64)> = times
        .iter()
        .zip(errors)
        .filter(|(_, error)| **error > 0.0)
        .map(|(&time, error)| ((time as f64).ln(), error.ln()))
        .collect();
    if points.len() < 3 {
        return None;
    }
    let count = points.len() as f64;
    let mean_x = points.iter().map(|point| point.0).sum::<f64>() / count;
    let mean_y = points.iter().map(|point| point.1).sum::<f64>() / count;
    let products = points.iter().map(|(x, y)| (x - mean_x) * (y - mean_y));
    let squares = points.iter().map(|(x, _)| (x - mean_x).powi(2));
    Some(products.sum::<f64>() / squares.sum::<f64>())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_relative_error_is_a_ratio_of_norms() {
        let check = |reference: &[f32], artifact: &[f32], expected| {
            assert_eq!(relative_error(reference, artifact), expected);
        };
        check(&[3.0, 4.0], &[3.0, 4.5], Some(0.1));
        check(&[0.0, 0.0], &[0.0, 0.0], Some(0.0));
        check(&[0.0, 0.0], &[0.0, 1.0], Some(1.0));
        check(&[1.0, 0.0], &[f32::NAN, 1.0], None);
        check(&[f32::INFINITY, 0.0], &[1.0, 1.0], None);
    }

    #[test]
    fn outputs_average_over_tokens() {
        let mut layers = LayerAccumulator::new(["mamba2", "mlp"], 512);
        layers.push_output(1, 2, &[3.0, 4.0, 1.0, 0.0], &[3.0, 4.5, 1.0, 0.5]);
        layers.push_output(1, 2, &[1.0, 1.0], &[1.0, f32::NAN]);
        let found = layers.finish();
        assert_eq!((found[1].tokens, found[1].non_finite_tokens), (2, 1));
        assert!((found[1].relative_error - 0.3).abs() < 1e-12);
        assert_eq!(found[1].max_relative_error, 0.5);
        assert_eq!((found[0].tokens, found[0].relative_error), (0, 0.0));
        assert!(found[0].state.is_none() && found[0].experts.is_none());
    }

    #[test]
    fn states_are_measured_at_eighths() {
        assert_eq!(state_times(512), [64, 128, 192, 256, 320, 384, 448, 512]);
        assert_eq!(state_times(3), [1, 2, 3]);
        assert!(state_times(0).is_empty());
    }

    #[test]
    fn heads_that_grow_are_named() {
        let mut layers = LayerAccumulator::new(["mamba2"], 800);
        for time in 0..8 {
            let t = (time + 1) as f32;
            // Head 0 is steady, head 1 grows as the square root, head 2 grows but stays tiny, head 3 with time.
            let errors = [0.05, 0.01 * t.sqrt(), 1e-5 * t, 0.01 * t];
            let artifact: Vec<f32> = errors.iter().flat_map(|error| [1.0 + error, 0.0]).collect();
            layers.push_state(0, time, 4, &[1.0, 0.0].repeat(4), &artifact);
        }
        let found = layers.finish()[0].state.clone().unwrap();
        assert_eq!((found.heads, found.times.len()), (4, 8));
        let heads: Vec<_> = found.growing.iter().map(|head| head.head).collect();
        assert_eq!(heads, [3, 1]);
        assert!((found.growing[0].growth - 1.0).abs() < 1e-4);
        assert!((found.growing[1].growth - 0.5).abs() < 1e-4);
        let expected = (0.05 + 0.01 + 1e-5 + 0.01) / 4.0;
        assert!((found.relative_error[0] - expected).abs() < 1e-6);
    }

    #[test]
    fn times_that_were_not_reached_are_left_out() {
        let mut layers = LayerAccumulator::new(["mamba2"], 800);
        layers.push_state(0, 0, 1, &[1.0], &[1.5]);
        layers.push_state(0, 1, 1, &[1.0], &[1.25]);
        layers.push_state(0, 1, 1, &[1.0], &[1.75]);
        let found = layers.finish()[0].state.clone().unwrap();
        assert_eq!(found.times, [100, 200]);
        assert_eq!(found.relative_error, [0.5, 0.5]);
    }

    #[test]
    fn experts_are_sets() {
        let mut layers = LayerAccumulator::new(["moe"], 512);
        assert!(!layers.push_experts(0, &[1, 2], &[2, 1]));
        assert!(layers.push_experts(0, &[1, 2], &[1, 3]));
        assert!(layers.push_experts(0, &[1, 2], &[1, 2, 3]));
        assert!(!layers.push_experts(0, &[5, 6], &[5, 6]));
        let found = layers.finish()[0].experts.clone().unwrap();
        assert_eq!((found.tokens, found.changed_tokens), (4, 0.5));
        assert_eq!(found.changed_experts, 0.125);
    }
}
