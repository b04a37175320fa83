use super::super::form::Form;
use super::super::integer::ScaleFloat;
use super::*;
use crate::calibrate::second_moments::{CrossMoments, SecondMoments};

/// Numbers that look like noise.
struct Noise(u64);

impl Noise {
    fn uniform(&mut self) -> f64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}

/// Correlated inputs: a few directions carry most of the energy.
fn moments(n: usize) -> Vec<f64> {
    let mut noise = Noise(11);
    let mixing: Vec<f64> = (0..n * n)
        .map(|at| noise.normal() / (1.0 + (at / n) as f64).sqrt())
        .collect();
    let mut m = vec![0.0; n * n];
    for (i, row) in m.chunks_exact_mut(n).enumerate() {
        for (j, value) in row.iter_mut().enumerate() {
            *value = (0..n).map(|k| mixing[k * n + i] * mixing[k * n + j]).sum();
        }
    }
    m
}

fn weights(rows: usize, n: usize) -> Vec<f32> {
    let mut noise = Noise(5);
    (0..rows * n)
        .map(|_| (0.02 * noise.normal()) as f32)
        .collect()
}

fn prepared(n: usize) -> InputMoments {
    InputMoments::new(Isa::detect(), n, &moments(n), Damping::default()).unwrap()
}

fn forms() -> impl Iterator<Item = Form> {
    let types = GgmlType::all().filter(|ty| can_feed_back(*ty));
    types.map(Form::Block).chain(grids().map(Form::Integer))
}

fn grids() -> impl Iterator<Item = IntegerGrid> {
    let sizes = [32, 64, 128].into_iter();
    let four = sizes.flat_map(|size| [false, true].map(|zero| (Width::Four, Some(size), zero)));
    let eight = [None, Some(64)].map(|size| (Width::Eight, size, false));
    let all = four.chain(eight);
    all.zip([ScaleFloat::Bf16, ScaleFloat::F16].into_iter().cycle())
        .map(|((width, group_size, has_zero_point), scale)| IntegerGrid {
            width,
            group_size,
            has_zero_point,
            scale,
        })
}

fn rounded(
    isa: Isa,
    form: Form,
    rows: &[f32],
    moments: &InputMoments,
    passes: usize,
) -> (Vec<u8>, Rounded) {
    let how = Feedback::of_inputs(moments, passes);
    form.feed_back(isa, rows, how)
}

fn direct_loss(n: usize, rows: &[f32], bytes: &[u8], form: Form, moments: &InputMoments) -> f64 {
    let mut values = vec![0.0; rows.len()];
    form.dequantize(n, bytes, &mut values).unwrap();
    let mut loss = 0.0;
    for (row, values) in rows.chunks(n).zip(values.chunks(n)) {
        let e: Vec<f64> = row
            .iter()
            .zip(values)
            .map(|(x, y)| f64::from(*x) - f64::from(*y))
            .collect();
        for i in 0..n {
            let g: f64 = (0..n)
                .map(|j| f64::from(moments.matrix.at(i, j)) * e[j])
                .sum();
            loss += e[i] * g;
        }
    }
    loss
}

#[test]
fn the_loss_is_that_of_the_bytes() {
    let n = 512;
    let (rows, moments) = (weights(37, n), prepared(n));
    for form in forms() {
        let (bytes, found) = rounded(Isa::detect(), form, &rows, &moments, 2);
        let direct = direct_loss(n, &rows, &bytes, form, &moments);
        assert!(
            (found.loss / direct - 1.0).abs() < 1e-4,
            "{form}: {} and {direct}",
            found.loss
        );
        assert_eq!(found.overflow, 0);
    }
}

#[test]
fn feedback_loses_less_than_the_search_and_passes_lose_less_still() {
    let n = 512;
    let (rows, moments) = (weights(32, n), prepared(n));
    let importance: Vec<f32> = (0..n).map(|j| moments.matrix.at(j, j)).collect();
    for form in forms() {
        let (searched, _) = form.nearest(n, &rows, Some(&importance));
        let searched = direct_loss(n, &rows, &searched, form, &moments);
        let losses: Vec<f64> = [0, 1, 3]
            .map(|passes| rounded(Isa::detect(), form, &rows, &moments, passes).1.loss)
            .to_vec();
        assert!(
            losses[0] < 0.8 * searched,
            "{form}: {losses:?} and {searched}"
        );
        assert!(
            losses[1] < losses[0] && losses[2] <= losses[1],
            "{form}: {losses:?}"
        );
    }
}

/// GPTQ as it is published: the upper Cholesky factor of the inverse, the error of each column spread over all later ones.
/// `rows` are rounded in place to `step * value - offset` with the scales given; gives the values.
fn textbook(
    n: usize,
    damped: &[f64],
    row: &mut [f64],
    scales: impl Fn(usize) -> (f64, f64),
    nearest: impl Fn(f64) -> f64,
) -> Vec<f64> {
    let inverse = inverse_of(n, damped);
    let upper = upper_cholesky(n, &inverse);
    let mut values = vec![0.0; n];
    for j in 0..n {
        let (step, offset) = scales(j);
        values[j] = nearest((row[j] + offset) / step);
        let error = (row[j] - (step * values[j] - offset)) / upper[j * n + j];
        for k in j..n {
            row[k] -= error * upper[j * n + k];
        }
    }
    values
}

/// Gauss-Jordan.
fn inverse_of(n: usize, matrix: &[f64]) -> Vec<f64> {
    let (mut a, mut inverse) = (matrix.to_vec(), vec![0.0; n * n]);
    (0..n).for_each(|i| inverse[i * n + i] = 1.0);
    for pivot in 0..n {
        let scale = 1.0 / a[pivot * n + pivot];
        for k in 0..n {
            a[pivot * n + k] *= scale;
            inverse[pivot * n + k] *= scale;
        }
        for i in (0..n).filter(|i| *i != pivot) {
            let factor = a[i * n + pivot];
            for k in 0..n {
                a[i * n + k] -= factor * a[pivot * n + k];
                inverse[i * n + k] -= factor * inverse[pivot * n + k];
            }
        }
    }
    inverse
}

/// U with `matrix = U^T U`.
fn upper_cholesky(n: usize, matrix: &[f64]) -> Vec<f64> {
    let mut u = vec![0.0; n * n];
    for i in 0..n {
        for j in i..n {
            let sum: f64 = (0..i).map(|k| u[k * n + i] * u[k * n + j]).sum();
            let rest = matrix[i * n + j] - sum;
            u[i * n + j] = if i == j {
                rest.sqrt()
            } else {
                rest / u[i * n + i]
            };
        }
    }
    u
}

#[test]
fn codes_are_those_of_textbook_gptq_on_the_same_grid() {
    fn check(grid: &dyn CompiledGrid, nearest: impl Fn(f64) -> f64) {
        let (n, sub) = (256, grid.sub());
        let (rows, moments) = (weights(16, n), prepared(n));
        let damped: Vec<f64> = (0..n * n)
            .map(|at| f64::from(moments.matrix.at(at / n, at % n)))
            .collect();
        let job = Job::here(Isa::detect(), Feedback::of_inputs(&moments, 0));
        let rows: Vec<&[f32]> = rows.chunks(n).collect();
        let mut halves = halves_of(&rows).map(|rows| Half::new(rows, n, sub));
        for half in &mut halves {
            grid.preset(half, &moments.factor.pivots);
        }
        let nothing = [(); 2].map(|()| vec![[0.0; ROWS]; n]);
        job.first_pass(grid, &mut halves, 0..n, nothing);
        for (lane, row) in rows.iter().enumerate() {
            let scales = |j: usize| {
                let [d, dmin, scale, min] = halves[0].scales[j / sub].map(|part| part[lane]);
                (f64::from(d * scale), f64::from(dmin * min))
            };
            let mut row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            let expected = textbook(n, &damped, &mut row, scales, &nearest);
            let found: Vec<f64> = halves[0]
                .values
                .iter()
                .map(|values| f64::from(values[lane]))
                .collect();
            assert_eq!(found, expected, "row {lane}");
        }
    }
    let whole = |low: f64, high: f64| move |x: f64| x.clamp(low, high).round_ties_even();
    let of = |ty| grid_of(ty).unwrap();
    check(of(GgmlType::Q4_0), whole(-8.0, 7.0));
    check(of(GgmlType::Q8_0), whole(-127.0, 127.0));
    check(of(GgmlType::Q4_K), whole(0.0, 15.0));
    check(of(GgmlType::Q6_K), whole(-32.0, 31.0));
    for grid in grids() {
        let nearest = match grid.width {
            Width::Eight => whole(-128.0, 127.0),
            Width::Four => whole(-8.0, 7.0),
        };
        check(integer_grid_of(grid).as_ref(), nearest);
    }
}

#[test]
fn rows_give_the_same_bytes_alone_and_together_and_on_any_number_of_threads() {
    let n = 512;
    let (rows, moments) = (weights(70, n), prepared(n));
    let types = [GgmlType::Q4_0, GgmlType::Q4_K, GgmlType::IQ4_XS].map(Form::Block);
    for form in types.into_iter().chain(grids().map(Form::Integer)) {
        let (together, _) = rounded(Isa::detect(), form, &rows, &moments, 2);
        let alone: Vec<u8> = rows
            .chunks(n)
            .flat_map(|row| rounded(Isa::detect(), form, row, &moments, 2).0)
            .collect();
        assert!(alone == together, "{form}");
        let pool = rayon::ThreadPoolBuilder::new()
            .num_threads(3)
            .build()
            .unwrap();
        let threaded = pool.install(|| rounded(Isa::detect(), form, &rows, &moments, 2).0);
        assert!(threaded == together, "{form}");
    }
}

#[test]
fn moments_that_say_nothing_are_refused() {
    let n = 32;
    let isa = Isa::detect();
    let mut m = moments(n);
    assert!(InputMoments::new(isa, n, &vec![0.0; n * n], Damping::default()).is_none());
    m[5] = f64::NAN;
    assert!(InputMoments::new(isa, n, &m, Damping::default()).is_none());
    // Inputs that were never seen are no reason to give up.
    let mut m = moments(n);
    for k in 0..n {
        m[3 * n + k] = 0.0;
        m[k * n + 3] = 0.0;
    }
    let prepared = InputMoments::new(isa, n, &m, Damping::default()).unwrap();
    assert_eq!((prepared.dead_inputs, prepared.damping), (1, 0.01));
}

/// `tr(G E M E^T)` in f64.
fn two_sided_loss(
    n: usize,
    outputs: &[f64],
    rows: &[f32],
    bytes: &[u8],
    form: Form,
    moments: &InputMoments,
) -> f64 {
    let mut values = vec![0.0; rows.len()];
    form.dequantize(n, bytes, &mut values).unwrap();
    let errors: Vec<f64> = rows
        .iter()
        .zip(&values)
        .map(|(x, y)| f64::from(*x) - f64::from(*y))
        .collect();
    let count = rows.len() / n;
    let images: Vec<f64> = errors
        .chunks(n)
        .flat_map(|row| {
            (0..n).map(|j| {
                (0..n)
                    .map(|i| row[i] * f64::from(moments.matrix.at(i, j)))
                    .sum::<f64>()
            })
        })
        .collect();
    let pairs = (0..count).flat_map(|a| (0..count).map(move |b| (a, b)));
    pairs
        .map(|(a, b)| {
            let rows = images[a * n..][..n].iter().zip(&errors[b * n..][..n]);
            outputs[a.min(b) * count + a.max(b)] * rows.map(|(x, y)| x * y).sum::<f64>()
        })
        .sum()
}

#[test]
fn rows_repair_each_other_where_outputs_are_alike() {
    let (n, count) = (64, 256);
    let (rows, inputs) = (weights(count, n), prepared(n));
    // Four directions and some noise.
    let mut noise = Noise(3);
    let directions: Vec<f64> = (0..4 * count).map(|_| noise.normal()).collect();
    let outputs: Vec<f64> = (0..count * count)
        .map(|at| {
            let (a, b) = (at / count, at % count);
            let shared = (0..4).map(|d| directions[d * count + a] * directions[d * count + b]);
            shared.sum::<f64>() + if a == b { 1.0 } else { 0.0 }
        })
        .collect();
    let isa = Isa::detect();
    let factor = OutputFactor::new(isa, count, &outputs, Damping::default()).unwrap();
    for form in [
        Form::Block(GgmlType::Q4_0),
        Form::Integer(grids().next().unwrap()),
    ] {
        let loss = |outputs_known: &[OutputFactor]| {
            let how = Feedback {
                moments: &inputs,
                outputs: outputs_known,
                passes: 1,
            };
            let (bytes, _) = form.feed_back(isa, &rows, how);
            two_sided_loss(n, &outputs, &rows, &bytes, form, &inputs)
        };
        let (apart, together) = (loss(&[]), loss(std::slice::from_ref(&factor)));
        assert!(together < 0.5 * apart, "{form}: {together} and {apart}");
    }
}

#[test]
fn outputs_that_have_nothing_in_common_change_nothing() {
    let (n, count) = (64, 40);
    let (rows, inputs) = (weights(count, n), prepared(n));
    let mut alone = vec![0.0; count * count];
    (0..count).for_each(|i| alone[i * count + i] = 1.0 + i as f64);
    let isa = Isa::detect();
    let factor = OutputFactor::new(isa, count, &alone, Damping::default()).unwrap();
    let form = Form::Block(GgmlType::Q4_0);
    let round = |outputs| {
        let how = Feedback {
            moments: &inputs,
            outputs,
            passes: 1,
        };
        form.feed_back(isa, &rows, how).0
    };
    assert!(round(&[]) == round(&[factor]));
    alone.fill(0.0);
    assert!(OutputFactor::new(isa, count, &alone, Damping::default()).is_none());
}

/// Multiplies errors in f64, so that sums are rounded otherwise than here.
struct Twin;

struct TwinRows {
    rows: usize,
    values: Vec<f32>,
}

impl RowProducts for Twin {
    fn hold(&self, rows: usize, columns: usize) -> Result<Option<Box<dyn HeldRows + '_>>> {
        let values = vec![0.0; rows * columns];
        Ok(Some(Box::new(TwinRows { rows, values })))
    }
}

impl HeldRows for TwinRows {
    fn set(&mut self, first: usize, errors: &[f32]) -> Result<()> {
        self.values[first * self.rows..][..errors.len()].copy_from_slice(errors);
        Ok(())
    }

    fn times(&mut self, inputs: Range<usize>, part: &[f32], width: usize) -> Result<Vec<f32>> {
        let sum = |j: usize, row: usize| {
            let terms = inputs.clone().enumerate().map(|(at, k)| {
                f64::from(self.values[k * self.rows + row]) * f64::from(part[at * width + j])
            });
            terms.sum::<f64>() as f32
        };
        let places = (0..width).flat_map(|j| (0..self.rows).map(move |row| (j, row)));
        Ok(places.map(|(j, row)| sum(j, row)).collect())
    }
}

#[test]
fn products_of_another_machine_give_the_same_codes_but_for_ties() {
    let (n, count) = (512, 37);
    let (rows, moments) = (weights(count, n), prepared(n));
    for ty in [
        GgmlType::Q4_0,
        GgmlType::Q4_K,
        GgmlType::Q6_K,
        GgmlType::Q8_0,
    ] {
        for passes in [0, 2] {
            let how = Feedback::of_inputs(&moments, passes);
            let bytes = ty.bytes_for(rows.len() as u64).unwrap() as usize;
            let (mut here, mut there) = (vec![0; bytes], vec![0; bytes]);
            let expected = quantize_rows(Isa::detect(), ty, &rows, how, &mut here);
            let found = quantize_rows_on(&Twin, ty, &rows, how, &mut there).unwrap();
            let differing = here.iter().zip(&there).filter(|(a, b)| a != b).count();
            assert!(
                differing * 200 <= bytes,
                "{ty}: {differing} of {bytes} bytes differ"
            );
            let change = (found.loss - expected.loss).abs() / expected.loss;
            assert!(change < 1e-4, "{ty}: {} and {}", found.loss, expected.loss);
            let loss = loss_on(&Twin, &rows, &moments).unwrap();
            let expected = super::loss(Isa::detect(), &rows, &moments);
            assert!((loss - expected).abs() < 1e-6 * expected);
        }
    }
}

/// Second moments of a walk that forgets, `[n, n]`.
fn of_neighbours(n: usize, kept: f64) -> Vec<f64> {
    let size = |i: usize| 1.0 + (i % 7) as f64;
    let places = (0..n).flat_map(|i| (0..n).map(move |j| (i, j)));
    places
        .map(|(i, j)| size(i) * size(j) * kept.powi(i.abs_diff(j) as i32))
        .collect()
}

#[test]
fn another_machine_factors_as_this_one() {
    // More than is summed at a time, and no whole number of blocks.
    let n = SUMMED_COLUMNS + 301;
    let matrix = of_neighbours(n, 0.9);
    let here = InputMoments::new(Isa::detect(), n, &matrix, Damping::default()).unwrap();
    let there = InputMoments::on(&Twin, n, &matrix, Damping::default());
    let there = there.unwrap().unwrap();
    for j in 0..n {
        let pivots = [&here, &there].map(|moments| moments.factor.pivots[j]);
        assert!(
            (pivots[0] / pivots[1] - 1.0).abs() < 1e-5,
            "{j}: {pivots:?}"
        );
        for i in 0..n {
            let shares = [&here, &there].map(|moments| moments.factor.feedback.at(i, j));
            assert!((shares[0] - shares[1]).abs() < 1e-5, "{i} {j}: {shares:?}");
        }
    }
    assert_eq!((here.unit, here.damping), (there.unit, there.damping));

    let mut broken = matrix;
    broken[(n / 2) * (n + 1)] *= 1e-3;
    assert!(
        InputMoments::on(&Twin, n, &broken, NO_DAMPING)
            .unwrap()
            .is_none()
    );
    broken[3] = f64::NAN;
    assert!(
        InputMoments::on(&Twin, n, &broken, NO_DAMPING)
            .unwrap()
            .is_none()
    );
}

const NO_DAMPING: Damping = Damping {
    first: 0.0,
    last: 0.0,
};

#[test]
fn another_machine_finds_the_same_targets() {
    let (n, count) = (SUMMED_COLUMNS + 301, 45);
    let (matrix, crossed) = (of_neighbours(n, 0.9), of_neighbours(n, 0.8));
    let moments = InputMoments::new(Isa::detect(), n, &matrix, Damping::default()).unwrap();
    let rows = weights(count, n);
    let mut seen = SecondMoments::empty(n);
    (seen.sums, seen.weight, seen.tokens) = (matrix, 1.0, 1 << 40);
    let cross = CrossMoments {
        n,
        sums: crossed,
        tokens: 1,
    };
    let correction = Correction {
        cross: &cross,
        seen: &seen,
        share: 1.0,
    };
    let here = correction.apply(Isa::detect(), &rows, &moments);
    let there = correction.apply_on(&Twin, &rows, &moments).unwrap();
    let differences = |other: &[f32]| {
        let pairs = here.iter().zip(other);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(differences(&there) < 1e-5 * differences(&rows));
    assert!(differences(&rows) > 1e-3);
    assert!(
        correction
            .apply_on(&Twin, &[], &moments)
            .unwrap()
            .is_empty()
    );
    assert!(correction.apply(Isa::detect(), &[], &moments).is_empty());
}

/// A machine with all its memory taken.
struct Full;

impl RowProducts for Full {
    fn hold(&self, _: usize, _: usize) -> Result<Option<Box<dyn HeldRows + '_>>> {
        Ok(None)
    }
}

#[test]
fn where_another_machine_has_no_room_all_is_done_here() {
    let (isa, n, count) = (Isa::detect(), 320, 37);
    let (matrix, rows) = (of_neighbours(n, 0.9), weights(count, n));
    let moments = InputMoments::new(isa, n, &matrix, Damping::default()).unwrap();
    let there = InputMoments::on(&Full, n, &matrix, Damping::default());
    assert_eq!(there.unwrap().unwrap().factor.pivots, moments.factor.pivots);

    let mut seen = SecondMoments::empty(n);
    (seen.sums, seen.weight, seen.tokens) = (matrix, 1.0, 1 << 40);
    let cross = CrossMoments {
        n,
        sums: of_neighbours(n, 0.8),
        tokens: 1,
    };
    let correction = Correction {
        cross: &cross,
        seen: &seen,
        share: 1.0,
    };
    let corrected = correction.apply_on(&Full, &rows, &moments).unwrap();
    assert_eq!(corrected, correction.apply(isa, &rows, &moments));

    let how = Feedback::of_inputs(&moments, 1);
    let mut bytes = [(); 2].map(|()| vec![0; rows.len() / 32 * 18]);
    let [here, there] = &mut bytes;
    let rounded = quantize_rows(isa, GgmlType::Q4_0, &rows, how, here);
    let found = quantize_rows_on(&Full, GgmlType::Q4_0, &rows, how, there).unwrap();
    assert_eq!((rounded, here), (found, there));
    let losses = [
        loss_on(&Full, &rows, &moments).unwrap(),
        loss(isa, &rows, &moments),
    ];
    assert_eq!(losses[0], losses[1]);
}

#[test]
fn few_tokens_correct_less() {
    let (n, count) = (64, 3);
    let matrix = of_neighbours(n, 0.9);
    let moments = InputMoments::new(Isa::detect(), n, &matrix, Damping::default()).unwrap();
    let rows = weights(count, n);
    let cross = CrossMoments {
        n,
        sums: of_neighbours(n, 0.8),
        tokens: 1,
    };
    let change = |tokens: u64| {
        let mut seen = SecondMoments::empty(n);
        (seen.sums, seen.weight, seen.tokens) = (matrix.clone(), 1.0, tokens);
        let correction = Correction {
            cross: &cross,
            seen: &seen,
            share: 1.0,
        };
        let corrected = correction.apply(Isa::detect(), &rows, &moments);
        let pairs = corrected.iter().zip(&rows);
        pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    let (few, many) = (change(8 * n as u64), change(1 << 50));
    assert!((few / many - 0.5).abs() < 1e-4, "{few} of {many}");
}

/// Signed groups have a code more on one side, and a scale of either sign.
#[test]
fn groups_reach_their_larger_side_with_either_sign() {
    let (n, step) = (64, 0.5_f32);
    let moments = prepared(n);
    let grid = grids().find(|grid| grid.group_size == Some(64) && !grid.has_zero_point);
    let grid = grid.unwrap();
    for sign in [1.0, -1.0] {
        let value = |at: usize| sign * step * ((at % 16) as f32 - 8.0);
        let rows: Vec<f32> = (0..n).map(value).collect();
        let how = Feedback::of_inputs(&moments, 0);
        let mut out = vec![0; grid.row_bytes(n)];
        let rounded = quantize_integers(Isa::detect(), grid, &rows, how, &mut out);
        assert_eq!(rounded.loss, 0.0, "{sign}");
    }
}
