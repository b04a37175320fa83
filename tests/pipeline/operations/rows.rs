//! Norms, rows that are taken and added, experts, distributions.

use nemoconv::backend::{Backend, ExpertRows, Exponentials, LogitRows, RouteShape, SoftmaxSums};

use super::reference::{self, DIVERGENCE, EXPONENTIALS, TOLERANCE, check, f64s, numbers};
use super::{on_each, upload, with};

#[test]
fn norms() {
    on_each(|name, machine| {
        for (rows, width) in [(0, 8), (1, 1), (3, 63), (9, 200), (2, 4100)] {
            for odd in [0.5, f32::NAN, f32::INFINITY] {
                let weight = numbers(width, 2);
                let x = match rows {
                    0 => Vec::new(),
                    _ => with(odd, rows / 2 * width + width - 1, rows * width, 1),
                };
                let expected = reference::rms_norm(&x, &weight, 1e-5);
                let [x, weight] = [&x, &weight].map(|values| upload(machine, values));
                let out = machine.rms_norm(&x, &weight, 1e-5).unwrap();
                let found = machine.download_all(out).unwrap();
                check(&format!("{name}, {odd}"), &found, &expected, TOLERANCE);
            }
        }
    });
}

#[test]
fn gated_norms_of_groups() {
    on_each(|name, machine| {
        for (rows, groups, group, stride) in
            [(0, 2, 8, 20), (1, 1, 3, 3), (9, 2, 70, 150), (6, 5, 9, 61)]
        {
            for odd in [0.5, f32::NAN, f32::INFINITY] {
                let inner = groups * group;
                let weight = numbers(inner, 3);
                let (y, z) = match rows {
                    0 => (Vec::new(), Vec::new()),
                    _ => (
                        with(odd, inner - 1, rows * inner, 1),
                        with(odd, rows / 2 * stride, rows * stride, 2),
                    ),
                };
                let expected = reference::gated_rms_norm(&y, (&z, stride), &weight, groups, 1e-5);
                let [y, z, weight] = [&y, &z, &weight].map(|values| upload(machine, values));
                let out = machine.gated_rms_norm(y, &z, stride, &weight, groups, 1e-5);
                let found = machine.download_all(out.unwrap()).unwrap();
                check(&format!("{name}, {odd}"), &found, &expected, TOLERANCE);
            }
        }
    });
}

#[test]
fn rows_that_are_taken_and_added() {
    let (rows, width) = (37, 19);
    on_each(|name, machine| {
        for (chosen, to, weights) in [
            (vec![], vec![], vec![]),
            (vec![36_u32, 0, 7], vec![1_u32, 5, 36], vec![2.0, -1.0, 0.5]),
            // Row 4 is none, and neither is the last weight.
            (vec![3, 4, 0], vec![0, 2, 9], vec![0.5, -2.0, f32::NAN]),
        ] {
            let x = with(f32::NAN, 4 * width + 2, rows * width, 1);
            let taken = machine
                .gather(&upload(machine, &x), width, &chosen)
                .unwrap();
            let row = |row: &u32| x[*row as usize * width..][..width].to_vec();
            let expected = f64s(&chosen.iter().flat_map(row).collect::<Vec<_>>());
            let found = machine.download(&taken, 0..machine.len(&taken)).unwrap();
            check(name, &found, &expected, 0.0);

            let before = numbers(rows * width, 2);
            let mut after = f64s(&before);
            for (i, (row, weight)) in to.iter().zip(&weights).enumerate() {
                for c in 0..width {
                    after[*row as usize * width + c] +=
                        f64::from(*weight) * expected[i * width + c];
                }
            }
            let mut sum = upload(machine, &before);
            let to = ExpertRows { rows: to, weights };
            machine.scatter_add(&mut sum, width, &taken, &to).unwrap();
            let found = machine.download_all(sum).unwrap();
            check(name, &found, &after, TOLERANCE);
        }
    });
}

/// The experts of a row and their weights, best first: scores, the groups whose two best are the best, the best of these.
fn chosen(logits: &[f32], bias: &[f32], shape: RouteShape) -> Vec<(usize, f64)> {
    let scores: Vec<f64> = logits
        .iter()
        .map(|x| 1.0 / (1.0 + (-f64::from(*x)).exp()))
        .collect();
    let steered: Vec<f64> = scores
        .iter()
        .zip(bias)
        .map(|(s, b)| {
            if s.is_nan() {
                f64::NEG_INFINITY
            } else {
                s + f64::from(*b)
            }
        })
        .collect();
    let best_first = |of: &[f64]| {
        let mut order: Vec<usize> = (0..of.len()).collect();
        order.sort_by(|a, b| of[*b].total_cmp(&of[*a]));
        order
    };
    let size = shape.experts / shape.groups;
    let worth = |group: &[f64]| {
        best_first(group)[..size.min(2)]
            .iter()
            .map(|i| group[*i])
            .sum()
    };
    let groups: Vec<f64> = steered.chunks(size).map(worth).collect();
    let groups = &best_first(&groups)[..shape.chosen_groups];
    let mut experts = best_first(&steered);
    experts.retain(|expert| groups.contains(&(expert / size)));
    experts.truncate(shape.chosen);
    let sum: f64 = experts.iter().map(|expert| scores[*expert]).sum();
    let divisor = if shape.normalize { sum } else { 1.0 };
    let weight = |expert: usize| scores[expert] / divisor * f64::from(shape.scale);
    experts
        .into_iter()
        .map(|expert| (expert, weight(expert)))
        .collect()
}

/// Experts, chosen ones, groups, chosen groups, whether weights are divided by their sum.
const ROUTES: [(usize, usize, usize, usize, bool); 4] = [
    (5, 2, 1, 1, true),
    (12, 3, 4, 2, false),
    (8, 2, 8, 3, true),
    (128, 6, 1, 1, true),
];

#[test]
fn experts_are_chosen() {
    on_each(|name, machine| {
        for (experts, chosen_experts, groups, chosen_groups, normalize) in ROUTES {
            let shape = RouteShape {
                experts,
                chosen: chosen_experts,
                groups,
                chosen_groups,
                normalize,
                scale: 2.5,
            };
            for rows in [0, 1, 7] {
                let mut logits = numbers(rows * experts, 1);
                // Of equal ones the first; one that is no number is as low as can be.
                logits.iter_mut().take(experts).for_each(|x| *x = 0.25);
                logits
                    .iter_mut()
                    .skip(experts)
                    .step_by(7)
                    .for_each(|x| *x = f32::NAN);
                let bias: Vec<f32> = match rows {
                    1 => vec![0.0; experts],
                    _ => numbers(experts, 2).iter().map(|x| x / 8.0).collect(),
                };
                let [on_logits, on_bias] = [&logits, &bias].map(|values| upload(machine, values));
                let found = machine.route(&on_logits, &on_bias, shape).unwrap();
                assert_eq!(found.len(), experts, "{name}");
                let mut weights = vec![(Vec::new(), Vec::new()); experts];
                for (row, logits) in logits.chunks(experts).enumerate() {
                    for (expert, weight) in chosen(logits, &bias, shape) {
                        weights[expert].0.push(row as u32);
                        weights[expert].1.push(weight);
                    }
                }
                for (found, (rows, weights)) in found.iter().zip(&weights) {
                    assert_eq!(&found.rows, rows, "{name}, {shape:?}");
                    check(name, &found.weights, weights, TOLERANCE);
                }
            }
        }
    });
}

/// Rows, values of a row that count, and the step to the next row of each side.
const LOGITS: [(usize, usize, [usize; 2]); 6] = [
    (0, 5, [5, 8]),
    (1, 1, [1, 1]),
    (3, 63, [63, 64]),
    (5, 101, [104, 101]),
    (2, 4097, [4097, 4104]),
    (3, 9001, [9008, 9001]),
];

#[track_caller]
fn check_sums(name: &str, found: SoftmaxSums, row: &[f32]) {
    let expected = reference::softmax_sums(row);
    let is_close = (found.sum / expected.sum - 1.0).abs() <= EXPONENTIALS;
    assert!(
        (found.max, found.best) == (expected.max, expected.best) && is_close,
        "{name}: {found:?}, expected {expected:?}"
    );
}

#[test]
fn distributions() {
    on_each(|name, machine| {
        for (rows, width, strides) in LOGITS {
            for scale in [0.01, 1.0, 8.0] {
                let [x, y] = [0, 1].map(|side| {
                    let values = numbers(rows * strides[side], side as u64 + 1);
                    values.iter().map(|x| x * scale).collect::<Vec<f32>>()
                });
                let [on_x, on_y] = [&x, &y].map(|values| upload(machine, values));
                let sums = machine.softmax_sums(&on_x, strides[0]).unwrap();
                assert_eq!(sums.len(), rows, "{name}");
                for (sums, row) in sums.into_iter().zip(x.chunks(strides[0])) {
                    check_sums(name, sums, row);
                }
                for exponentials in [Exponentials::Own, Exponentials::System] {
                    let [reference, other] = [(&on_x, strides[0]), (&on_y, strides[1])]
                        .map(|(logits, stride)| LogitRows { logits, stride });
                    let found = machine.kl_divergence(reference, other, width, exponentials);
                    let found = found.unwrap();
                    assert_eq!(found.len(), rows, "{name}");
                    let pairs = x.chunks(strides[0]).zip(y.chunks(strides[1]));
                    for (found, (x, y)) in found.into_iter().zip(pairs) {
                        let (x, y) = (&x[..width], &y[..width]);
                        check_sums(name, found.reference, x);
                        check_sums(name, found.other, y);
                        let expected = reference::kl_divergence(x, y);
                        let deviation = (found.kl_divergence - expected).abs() / expected.max(1.0);
                        assert!(
                            deviation <= DIVERGENCE,
                            "{name}: {found:?}, expected {expected}"
                        );
                    }
                }
            }
        }
    });
}

#[test]
fn logits_that_are_no_numbers() {
    let width = 5000;
    on_each(|name, machine| {
        for odd in [f32::NAN, f32::INFINITY] {
            let x = with(odd, width + 4999, 3 * width, 8);
            let y = numbers(3 * width, 9);
            let [on_x, on_y] = [&x, &y].map(|values| upload(machine, values));
            let sums = machine.softmax_sums(&on_x, width).unwrap();
            assert!(sums[1].sum.is_nan(), "{name}, {odd}: {sums:?}");
            for row in [0, 2] {
                check_sums(name, sums[row], &x[row * width..][..width]);
            }
            for exponentials in [Exponentials::Own, Exponentials::System] {
                for (reference, other) in [(&on_x, &on_y), (&on_y, &on_x)] {
                    let [reference, other] = [reference, other].map(|logits| LogitRows {
                        logits,
                        stride: width,
                    });
                    let found = machine.kl_divergence(reference, other, width, exponentials);
                    let are_nan = found
                        .unwrap()
                        .into_iter()
                        .map(|row| row.kl_divergence.is_nan());
                    let are_nan: Vec<bool> = are_nan.collect();
                    assert_eq!(are_nan, [false, true, false], "{name}, {odd}");
                }
            }
        }
    });
}
