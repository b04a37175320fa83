//! Sums of outer products of inputs: what rounding with error feedback minimizes against.

use super::cells::{Merge, Tree};
use crate::backend::cpu::gram::second_moments;
use crate::backend::cpu::kernels::Isa;
use crate::backend::{Backend, Machine, MachineBuffer, ProductSums};
use crate::error::Result;
use crate::parallel;

/// `sum of w u^T u` over inputs u of a matrix, and what else is known of them.
#[derive(Debug, Clone, PartialEq)]
pub struct SecondMoments {
    /// `in_features`.
    pub n: usize,
    /// `[n, n]`, row-major; the part with column >= row is meant.
    pub sums: Vec<f64>,
    /// Sum of w.
    pub weight: f64,
    /// Inputs seen with a weight above 0.
    pub tokens: u64,
}

impl SecondMoments {
    /// Nothing seen.
    pub fn empty(n: usize) -> Self {
        Self {
            n,
            sums: vec![0.0; n * n],
            weight: 0.0,
            tokens: 0,
        }
    }

    /// Sees `rows [_, n]` of this computer, each of which counts 1.
    pub fn add(&mut self, isa: Isa, rows: &[f32]) {
        second_moments(isa, rows, self.n, &mut self.sums);
        self.count(rows.len() / self.n, None);
    }

    /// Sees `rows [_, n]` that lie on a machine, each with its weight; without weights each counts 1.
    ///
    /// # Errors
    /// The machine fails.
    pub fn add_on<B: Backend>(
        &mut self,
        machine: &B,
        rows: &B::Buffer,
        weights: Option<&[f32]>,
    ) -> Result<()> {
        let scaled = weighted(machine, rows, self.n, weights)?;
        let scaled = scaled.as_ref().unwrap_or(rows);
        machine.gram(scaled, self.n, &mut self.sums)?;
        self.count(machine.len(rows) / self.n, weights);
        Ok(())
    }

    /// What is seen of so many rows but for the sums, which are elsewhere.
    pub fn without_sums(n: usize, rows: usize, weights: Option<&[f32]>) -> Self {
        let mut moments = Self::empty(0);
        moments.n = n;
        moments.count(rows, weights);
        moments
    }

    fn count(&mut self, count: usize, weights: Option<&[f32]>) {
        let seen = |weight: f32| (f64::from(weight), u64::from(weight > 0.0));
        let (weight, tokens) = match weights {
            None => (count as f64, count as u64),
            Some(weights) => weights.iter().fold((0.0, 0), |(sum, tokens), weight| {
                (sum + seen(*weight).0, tokens + seen(*weight).1)
            }),
        };
        self.weight += weight;
        self.tokens += tokens;
    }

    /// `E[u^T u]`: `[n, n]`; zero where nothing was seen.
    pub fn mean(&self) -> Vec<f64> {
        let per_weight = self.per_weight();
        self.sums.iter().map(|sum| sum * per_weight).collect()
    }

    /// The same in the place of the sums.
    pub fn into_mean(self) -> Vec<f64> {
        let per_weight = self.per_weight();
        let mut mean = self.sums;
        mean.iter_mut().for_each(|sum| *sum *= per_weight);
        mean
    }

    fn per_weight(&self) -> f64 {
        match self.weight > 0.0 {
            true => 1.0 / self.weight,
            false => 0.0,
        }
    }

    /// `E[u_j^2]`, `[n]`.
    pub fn mean_squares(&self) -> Vec<f32> {
        let per_weight = self.per_weight();
        (0..self.n)
            .map(|j| (self.sums[j * self.n + j] * per_weight) as f32)
            .collect()
    }
}

impl Merge for SecondMoments {
    fn merge(&mut self, later: Self) {
        add_sums(&mut self.sums, &later.sums);
        self.weight += later.weight;
        self.tokens += later.tokens;
    }
}

/// Second moments of rows that come cell by cell: summed up on the machine if it keeps such sums, else here in the tree of cells.
pub struct MomentsOfCells<'m> {
    machine: &'m Machine,
    n: usize,
    tree: Tree<SecondMoments>,
    kept: Option<Box<dyn ProductSums<MachineBuffer> + 'm>>,
}

/// What a cell adds to [`MomentsOfCells`].
pub enum MomentsOfCell {
    /// Sums of its own.
    Summed(SecondMoments),
    /// Rows, for sums that the machine keeps.
    Rows(MachineBuffer),
}

impl<'m> MomentsOfCells<'m> {
    /// Nothing seen of rows of length `n`.
    ///
    /// # Errors
    /// The machine fails.
    pub fn new(machine: &'m Machine, n: usize) -> Result<Self> {
        Ok(Self {
            machine,
            n,
            tree: Tree::default(),
            kept: machine.gram_sums(n)?,
        })
    }

    /// Looks at the rows of a cell: cells may be looked at side by side.
    ///
    /// # Errors
    /// The machine fails.
    pub fn look(&self, rows: MachineBuffer) -> Result<MomentsOfCell> {
        if self.kept.is_some() {
            return Ok(MomentsOfCell::Rows(rows));
        }
        let mut moments = SecondMoments::empty(self.n);
        moments.add_on(self.machine, &rows, None)?;
        Ok(MomentsOfCell::Summed(moments))
    }

    /// Adds the next cell.
    ///
    /// # Errors
    /// The machine fails.
    pub fn push(&mut self, cell: MomentsOfCell) -> Result<()> {
        self.tree.push(match cell {
            MomentsOfCell::Summed(moments) => moments,
            MomentsOfCell::Rows(rows) => {
                if let Some(kept) = &mut self.kept {
                    kept.add(&rows, &rows)?;
                }
                SecondMoments::without_sums(self.n, self.machine.len(&rows) / self.n, None)
            }
        });
        Ok(())
    }

    /// The sum over all cells.
    ///
    /// # Errors
    /// The machine fails.
    pub fn finish(self) -> Result<SecondMoments> {
        let none = || SecondMoments::empty(self.n);
        let mut moments = self.tree.finish().unwrap_or_else(none);
        if let Some(kept) = self.kept {
            moments.sums = vec![0.0; self.n * self.n];
            kept.finish(&mut moments.sums)?;
        }
        Ok(moments)
    }
}

fn add_sums(sums: &mut [f64], later: &[f64]) {
    const PART: usize = 1 << 14;
    let parts = sums.chunks_mut(PART).zip(later.chunks(PART));
    parallel::for_each(parts, |(sums, later)| {
        let pairs = sums.iter_mut().zip(later);
        pairs.for_each(|(sum, later)| *sum += later);
    });
}

/// Rows times the square roots of their weights, if they have any: products of them count with the weights.
///
/// # Errors
/// The machine fails.
pub fn weighted<B: Backend>(
    machine: &B,
    rows: &B::Buffer,
    n: usize,
    weights: Option<&[f32]>,
) -> Result<Option<B::Buffer>> {
    let scaled = weights.map(|weights| machine.scale_rows(rows, n, &roots(weights)));
    scaled.transpose()
}

fn roots(weights: &[f32]) -> Vec<f32> {
    weights.iter().map(|weight| weight.sqrt()).collect()
}

/// `sum of v^T u` over pairs of rows: u the inputs of a matrix of the rounded network, v something of the same tokens.
#[derive(Debug, Clone, PartialEq)]
pub struct CrossMoments {
    /// Width of u.
    pub n: usize,
    /// `[width of v, n]`, row-major.
    pub sums: Vec<f64>,
    /// Pairs seen.
    pub tokens: u64,
}

impl CrossMoments {
    /// Sees pairs of rows `[_, width]` and `[_, n]` that lie on a machine.
    ///
    /// # Errors
    /// The machine fails.
    pub fn of_on<B: Backend>(
        machine: &B,
        v: (&B::Buffer, usize),
        u: (&B::Buffer, usize),
    ) -> Result<Self> {
        let mut cross = Self::empty(v.1, u.1, machine.len(u.0) / u.1);
        machine.cross_gram(v, u, &mut cross.sums)?;
        Ok(cross)
    }

    /// What is seen of so many pairs but for the sums, which are elsewhere.
    pub fn without_sums(n: usize, pairs: usize) -> Self {
        Self::empty(0, n, pairs)
    }

    fn empty(width: usize, n: usize, pairs: usize) -> Self {
        Self {
            n,
            sums: vec![0.0; width * n],
            tokens: pairs as u64,
        }
    }
}

impl Merge for CrossMoments {
    fn merge(&mut self, later: Self) {
        add_sums(&mut self.sums, &later.sums);
        self.tokens += later.tokens;
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::artifact::StoredModel;
    use crate::backend::cpu::{Cpu, Residence};

    fn cpu() -> Cpu {
        let model = StoredModel::open(nemoconv_fixtures::nano().to_str().unwrap());
        Cpu::new(Arc::new(model.unwrap()), Residence::Mapped)
    }

    #[test]
    fn weights_count_and_unseen_rows_do_not() {
        let rows = [1.0, 2.0, 3.0, 5.0, 7.0, 11.0];
        let mut moments = SecondMoments::empty(2);
        let weights = Some(&[1.0, 0.0, 4.0][..]);
        moments.add_on(&cpu(), &rows.to_vec(), weights).unwrap();
        assert_eq!((moments.weight, moments.tokens), (5.0, 2));
        assert_eq!(moments.sums[..2], [1.0 + 4.0 * 49.0, 2.0 + 4.0 * 77.0]);
        assert_eq!(
            moments.mean_squares(),
            [197.0 / 5.0, (4.0 + 4.0 * 121.0) / 5.0]
        );
    }

    #[test]
    fn pairs_are_ordered() {
        let (v, u) = (vec![1.0, 2.0], vec![10.0, 100.0]);
        let cross = CrossMoments::of_on(&cpu(), (&v, 2), (&u, 2)).unwrap();
        assert_eq!(cross.sums, [10.0, 100.0, 20.0, 200.0]);
    }
}
