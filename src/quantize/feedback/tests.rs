use super::*;
use crate::formats::block::dequantize;

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

fn types() -> impl Iterator<Item = GgmlType> {
    GgmlType::all().filter(|ty| can_feed_back(*ty))
}

fn rounded(
    isa: Isa,
    ty: GgmlType,
    rows: &[f32],
    moments: &InputMoments,
    passes: usize,
) -> (Vec<u8>, Rounded) {
    let mut out = vec![0; ty.bytes_for(rows.len() as u64).unwrap() as usize];
    let rounded = quantize_rows(isa, ty, rows, moments, passes, &mut out);
    (out, rounded)
}

fn direct_loss(n: usize, rows: &[f32], bytes: &[u8], ty: GgmlType, moments: &InputMoments) -> f64 {
    let mut values = vec![0.0; rows.len()];
    dequantize(ty, bytes, &mut values).unwrap();
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
    for ty in types() {
        let (bytes, found) = rounded(Isa::detect(), ty, &rows, &moments, 2);
        let direct = direct_loss(n, &rows, &bytes, ty, &moments);
        assert!(
            (found.loss / direct - 1.0).abs() < 1e-4,
            "{ty}: {} and {direct}",
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
    for ty in types() {
        let mut searched = vec![0; ty.bytes_for(rows.len() as u64).unwrap() as usize];
        let _ = super::super::quantize_rows(ty, n, &rows, Some(&importance), &mut searched);
        let searched = direct_loss(n, &rows, &searched, ty, &moments);
        let losses: Vec<f64> = [0, 1, 3]
            .map(|passes| rounded(Isa::detect(), ty, &rows, &moments, passes).1.loss)
            .to_vec();
        eprintln!(
            "{ty}: {:.3} {:.3} {:.3}",
            losses[0] / searched,
            losses[1] / searched,
            losses[2] / searched
        );
        assert!(
            losses[0] < 0.8 * searched,
            "{ty}: {losses:?} and {searched}"
        );
        assert!(
            losses[1] < losses[0] && losses[2] <= losses[1],
            "{ty}: {losses:?}"
        );
    }
}
