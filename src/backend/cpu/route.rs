//! The choice of experts: sigmoid scores, a bias that steers the choice alone, groups, top-k, weights.
//!
//! Source: `NemotronHTopkRouter` of transformers; llama.cpp computes the same.

use super::elementwise::exp_f64;
use crate::backend::{ExpertRows, RouteShape};
use crate::parallel;

/// Keeps the sum of weights from being zero.
const TINY: f32 = 1e-20;

/// One entry per expert, rows ascending.
pub fn route(logits: &[f32], bias: &[f32], shape: RouteShape) -> Vec<ExpertRows> {
    let rows = logits.chunks_exact(shape.experts);
    let choices = parallel::map(rows, |row| choose(row, bias, shape));
    let mut experts = vec![ExpertRows::default(); shape.experts];
    for (row, choice) in choices.iter().enumerate() {
        for &(expert, weight) in choice {
            experts[expert].rows.push(row as u32);
            experts[expert].weights.push(weight);
        }
    }
    experts
}

/// The chosen experts of one token with their weights, best first. Scores are compared in f64: rounding them to f32 made
/// ties of experts that the reference tells apart.
fn choose(logits: &[f32], bias: &[f32], shape: RouteShape) -> Vec<(usize, f32)> {
    let exact: Vec<f64> = logits
        .iter()
        .map(|x| 1.0 / (1.0 + exp_f64(-f64::from(*x))))
        .collect();
    let scores: Vec<f32> = exact.iter().map(|s| *s as f32).collect();
    // A NaN is as low as can be.
    let or_lowest = |score: f64| {
        if score.is_nan() {
            f64::NEG_INFINITY
        } else {
            score
        }
    };
    let steered: Vec<f64> = exact
        .iter()
        .zip(bias)
        .map(|(s, b)| or_lowest(s + f64::from(*b)))
        .collect();
    let mut candidates = candidates(&steered, shape);
    // Ties go to the lower index.
    candidates.sort_by(|a, b| steered[*b].total_cmp(&steered[*a]).then(a.cmp(b)));
    candidates.truncate(shape.chosen);
    let sum: f32 = candidates.iter().map(|expert| scores[*expert]).sum();
    let divisor = if shape.normalize { sum + TINY } else { 1.0 };
    candidates
        .into_iter()
        .map(|expert| (expert, scores[expert] / divisor * shape.scale))
        .collect()
}

/// Experts of the groups whose two best scores have the largest sums.
fn candidates(steered: &[f64], shape: RouteShape) -> Vec<usize> {
    let size = shape.experts / shape.groups;
    let mut groups: Vec<(usize, f64)> = steered
        .chunks_exact(size)
        .map(|group| {
            let mut best = [f64::NEG_INFINITY; 2];
            for &score in group {
                if score > best[0] {
                    best = [score, best[0]];
                } else if score > best[1] {
                    best[1] = score;
                }
            }
            if size == 1 {
                best[0]
            } else {
                best[0] + best[1]
            }
        })
        .enumerate()
        .collect();
    groups.sort_by(|a, b| b.1.total_cmp(&a.1).then(a.0.cmp(&b.0)));
    groups.truncate(shape.chosen_groups);
    groups
        .iter()
        .flat_map(|(group, _)| group * size..(group + 1) * size)
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const SHAPE: RouteShape = RouteShape {
        experts: 4,
        chosen: 2,
        groups: 1,
        chosen_groups: 1,
        normalize: true,
        scale: 2.5,
    };

    fn sigmoid(x: f32) -> f32 {
        1.0 / (1.0 + (-x).exp())
    }

    #[test]
    fn the_bias_steers_the_choice_but_not_the_weights() {
        let found = choose(&[0.0, 1.0, 2.0, 3.0], &[1.0, 0.0, 0.0, 0.0], SHAPE);
        let sum = sigmoid(0.0) + sigmoid(3.0);
        assert_eq!([found[0].0, found[1].0], [0, 3]);
        assert!((found[0].1 - 2.5 * sigmoid(0.0) / sum).abs() < 1e-6);
    }

    #[test]
    fn groups_compete_with_their_two_best() {
        // Group 1 has the best expert, group 0 the best pair.
        let shape = RouteShape { groups: 2, ..SHAPE };
        let found = choose(&[1.0, 1.0, 1.5, -4.0], &[0.0; 4], shape);
        assert_eq!([found[0].0, found[1].0], [0, 1]);
    }

    #[test]
    fn every_row_has_its_experts() {
        let experts = route(&[0.0, 1.0, 2.0, 3.0, 3.0, 2.0, 1.0, 0.0], &[0.0; 4], SHAPE);
        let rows: Vec<_> = experts.iter().map(|expert| expert.rows.clone()).collect();
        assert_eq!(rows, [vec![1], vec![1], vec![0], vec![0]]);
    }
}
