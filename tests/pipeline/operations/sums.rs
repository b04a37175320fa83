//! What is summed up over rows: columns, magnitudes, products.

use nemoconv::backend::{Backend, Machine, MachineBuffer, ProductSums};

use super::reference::{TOLERANCE, check, f64s, numbers};
use super::{on_each, upload, with};

/// Rows, and columns of two kinds: more rows than are summed up in f32 at a time.
const SHAPES: [(usize, usize, usize); 5] = [
    (0, 5, 3),
    (1, 1, 1),
    (7, 33, 70),
    (513, 40, 9),
    (1100, 3, 65),
];
/// Largest difference of a sum of values, as a share of the sum of their magnitudes.
const SUM: f64 = 1e-12;
/// The same of products, of which each is rounded to f32 and some hundred are summed up so.
const PRODUCTS: f64 = 5e-6;

#[track_caller]
fn check_sums(name: &str, found: f64, terms: impl Iterator<Item = f64>, tolerance: f64) {
    let (sum, magnitude) = terms.fold((0.0, 0.0), |(sum, magnitude), term| {
        (sum + term, magnitude + term.abs())
    });
    let is_same = (found - sum).abs() <= tolerance * magnitude;
    // A sum is no number where a term is none.
    assert!(
        is_same || !found.is_finite() && !sum.is_finite(),
        "{name}: {found}, expected {sum}"
    );
}

#[test]
fn columns() {
    on_each(|name, machine| {
        for (rows, n, _) in SHAPES {
            for odd in [0.5, f32::NAN, f32::INFINITY] {
                let x = match rows {
                    0 => Vec::new(),
                    _ => with(odd, rows / 2 * n + n - 1, rows * n, 1),
                };
                let found = machine.column_sums(&upload(machine, &x), n).unwrap();
                let name = format!("{name}, {rows} x {n}, {odd}");
                for column in 0..n {
                    let of = || x.iter().skip(column).step_by(n).map(|x| f64::from(*x));
                    check_sums(&name, found.sums[column], of(), SUM);
                    check_sums(&name, found.squares[column], of().map(|x| x * x), PRODUCTS);
                    let largest = of().fold(0.0, |max: f64, x| max.max(x.abs()));
                    assert_eq!(f64::from(found.max_abs[column]), largest, "{name}");
                }
            }
        }
    });
}

#[test]
fn magnitudes() {
    on_each(|name, machine| {
        for len in [0, 1, 255, 70_001] {
            let mut x = numbers(len, 1);
            let oddities = [f32::NAN, f32::INFINITY, 0.0, 1e-40, -3e38];
            x.iter_mut().zip(oddities).for_each(|(x, odd)| *x = odd);
            let found = machine.magnitudes(&upload(machine, &x)).unwrap();
            let mut left: Vec<f64> = x.iter().map(|x| f64::from(x.abs())).collect();
            left.retain(|x| x.is_finite());
            for (low, high, count) in found.bins() {
                let before = left.len();
                // Those beyond 2^40 are in the last bin.
                let is_within = |x: f64| low <= x && (x < high || high >= 2.0_f64.powi(40));
                left.retain(|x| !is_within(*x));
                assert_eq!((before - left.len()) as u64, count, "{name}, {low}");
            }
            assert!(left.is_empty(), "{name}: {left:?} are nowhere");
        }
    });
}

#[test]
fn rows_by_a_factor() {
    on_each(|name, machine| {
        for (rows, width, _) in SHAPES {
            let (x, factors) = (numbers(rows * width, 1), numbers(rows, 2));
            let values = f64s(&x).into_iter().enumerate();
            let expected: Vec<f64> = values
                .map(|(i, x)| x * f64::from(factors[i / width]))
                .collect();
            let scaled = machine.scale_rows(&upload(machine, &x), width, &factors);
            let found = machine.download_all(scaled.unwrap()).unwrap();
            check(name, &found, &expected, TOLERANCE);
        }
    });
}

/// Rows of both kinds.
struct Pairs {
    rows: usize,
    v: (Vec<f32>, usize),
    u: (Vec<f32>, usize),
}

impl Pairs {
    /// With what is not a number in one row, where there is one.
    fn new((rows, n, width): (usize, usize, usize), odd: f32) -> Self {
        let odd = |columns: usize, seed| match rows {
            0 => Vec::new(),
            _ => with(odd, rows / 2 * columns, rows * columns, seed),
        };
        Self {
            rows,
            v: (odd(width, 1), width),
            u: (odd(n, 2), n),
        }
    }

    fn on(&self, machine: &Machine) -> [MachineBuffer; 2] {
        [&self.v.0, &self.u.0].map(|values| upload(machine, values))
    }

    /// `times` those of `a` with `u`; of second moments what lies on the diagonal and to its right.
    #[track_caller]
    fn check(&self, name: &str, found: &[f64], a: &(Vec<f32>, usize), times: f64, is_gram: bool) {
        let ((a, width), (u, n)) = (a, &self.u);
        assert_eq!(found.len(), width * n, "{name}");
        for i in 0..*width {
            for j in if is_gram { i..*n } else { 0..*n } {
                let product =
                    |row: usize| f64::from(a[row * width + i]) * f64::from(u[row * n + j]);
                let terms = (0..self.rows).map(|row| times * product(row));
                check_sums(
                    &format!("{name}, {i} {j}"),
                    found[i * n + j],
                    terms,
                    PRODUCTS,
                );
            }
        }
    }
}

#[test]
fn products_of_rows() {
    on_each(|name, machine| {
        for shape in SHAPES {
            for odd in [0.5, f32::NAN] {
                let pairs = Pairs::new(shape, odd);
                let ([v, u], (_, n, width)) = (pairs.on(machine), shape);
                let mut gram = vec![0.0; n * n];
                machine.gram(&u, n, &mut gram).unwrap();
                pairs.check(
                    &format!("{name}, {shape:?}, gram"),
                    &gram,
                    &pairs.u,
                    1.0,
                    true,
                );
                let mut cross = vec![0.0; width * n];
                machine
                    .cross_gram((&v, width), (&u, n), &mut cross)
                    .unwrap();
                pairs.check(
                    &format!("{name}, {shape:?}, cross"),
                    &cross,
                    &pairs.v,
                    1.0,
                    false,
                );
            }
        }
    });
}

/// Sums that stay on the machine, where it keeps any.
#[test]
fn kept_products_of_rows() {
    on_each(|name, machine| {
        for shape in SHAPES {
            let pairs = Pairs::new(shape, 0.5);
            let ([v, u], (_, n, width)) = (pairs.on(machine), shape);
            let kept = |sums: Option<Box<dyn ProductSums<MachineBuffer> + '_>>, len: usize| {
                assert_eq!(sums.is_some(), name != "cpu", "{name}");
                let mut sums = sums?;
                sums.add(&v, &u).unwrap();
                sums.add(&v, &u).unwrap();
                let mut found = vec![0.0; len];
                sums.finish(&mut found).unwrap();
                Some(found)
            };
            if let Some(gram) = kept(machine.gram_sums(n).unwrap(), n * n) {
                pairs.check(
                    &format!("{name}, {shape:?}, gram"),
                    &gram,
                    &pairs.u,
                    2.0,
                    true,
                );
            }
            if let Some(cross) = kept(machine.cross_gram_sums(width, n).unwrap(), width * n) {
                pairs.check(
                    &format!("{name}, {shape:?}, cross"),
                    &cross,
                    &pairs.v,
                    2.0,
                    false,
                );
            }
        }
    });
}
