//! What the inputs of matrices are like, summed up over cells: here in one fixed tree, or on a device that keeps its sums.
//!
//! Enters: inputs of some matrices, cell by cell. Leaves: their second moments and what else rounding wants of them.

use std::collections::BTreeMap;

use crate::backend::magnitudes::Magnitudes;
use crate::backend::{Backend, Machine, MachineBuffer, ProductSums};
use crate::calibrate::capture::Captured;
use crate::calibrate::cells::{Merge, Tree};
use crate::calibrate::second_moments::{CrossMoments, SecondMoments, weighted};
use crate::error::Result;

/// An input: the tensor under whose name it is seen, and the matrix.
pub type Key = (String, usize);

/// What is known of the inputs of one matrix.
#[derive(Debug)]
pub struct Seen {
    /// Of the rounded network.
    pub moments: SecondMoments,
    /// Inputs of the original network with them.
    pub cross: Option<CrossMoments>,
    /// Their largest magnitude.
    pub largest: f32,
    /// How often they are how large.
    pub magnitudes: Magnitudes,
    /// Sums of the inputs themselves.
    pub sums: Vec<f64>,
    /// The same of the original network, where it is looked at.
    pub original_sums: Option<Vec<f64>>,
}

impl Merge for Seen {
    fn merge(&mut self, later: Self) {
        self.moments.merge(later.moments);
        self.largest = self.largest.max(later.largest);
        add(&mut self.sums, &later.sums);
        self.magnitudes.merge(later.magnitudes);
        if let (Some(sums), Some(later)) = (&mut self.original_sums, &later.original_sums) {
            add(sums, later);
        }
        if let (Some(cross), Some(later)) = (&mut self.cross, later.cross) {
            cross.merge(later);
        }
    }
}

/// By tensor whose input it is, and matrix.
pub type SeenInputs = BTreeMap<(String, usize), Seen>;

/// Sums up what is seen of every input.
pub struct Collector<'m> {
    machine: &'m Machine,
    trees: BTreeMap<Key, Tree<Seen>>,
    /// Sums that stay on the machine, of inputs that have some there.
    kept: BTreeMap<Key, Kept<'m>>,
}

/// Sums of one input on a machine.
struct Kept<'m> {
    moments: Box<dyn ProductSums<MachineBuffer> + 'm>,
    cross: Option<Box<dyn ProductSums<MachineBuffer> + 'm>>,
}

impl<'m> Collector<'m> {
    /// Nothing seen.
    pub fn new(machine: &'m Machine) -> Self {
        Self {
            machine,
            trees: BTreeMap::new(),
            kept: BTreeMap::new(),
        }
    }

    /// Sees inputs of the next cell, and those of the original network with them.
    ///
    /// # Errors
    /// The machine fails.
    pub fn see(
        &mut self,
        key: Key,
        captured: &Captured,
        original: Option<&Captured>,
    ) -> Result<()> {
        // Of experts the few tokens they see would be corrected for noise.
        let original = original.filter(|_| captured.weights.is_empty());
        if !self.trees.contains_key(&key)
            && let Some(kept) = self.keep(captured.in_features, original)?
        {
            self.kept.insert(key.clone(), kept);
        }
        let seen = match self.kept.get_mut(&key) {
            Some(kept) => kept.see(self.machine, captured, original)?,
            None => seen(self.machine, captured, original)?,
        };
        self.trees.entry(key).or_default().push(seen);
        Ok(())
    }

    fn keep(&self, n: usize, original: Option<&Captured>) -> Result<Option<Kept<'m>>> {
        let Some(moments) = self.machine.gram_sums(n)? else {
            return Ok(None);
        };
        let cross = match original {
            Some(_) => self.machine.cross_gram_sums(n, n)?,
            None => None,
        };
        let is_whole = original.is_none() || cross.is_some();
        Ok(is_whole.then_some(Kept { moments, cross }))
    }

    /// What was seen of every input.
    ///
    /// # Errors
    /// The machine fails.
    pub fn finish(self) -> Result<SeenInputs> {
        let mut all = SeenInputs::new();
        for (key, tree) in self.trees {
            let Some(mut seen) = tree.finish() else {
                continue;
            };
            if let Some(kept) = self.kept.get(&key) {
                kept.finish(&mut seen)?;
            }
            all.insert(key, seen);
        }
        Ok(all)
    }
}

impl Kept<'_> {
    /// Everything but the products, which stay on the machine.
    fn see(
        &mut self,
        machine: &Machine,
        captured: &Captured,
        original: Option<&Captured>,
    ) -> Result<Seen> {
        let (n, weights) = (captured.in_features, captured.weights());
        captured.with_rows(machine, |rows| {
            let scaled = weighted(machine, rows, n, weights)?;
            let scaled = scaled.as_ref().unwrap_or(rows);
            self.moments.add(scaled, scaled)
        })?;
        if let (Some(cross), Some(original)) = (&mut self.cross, original) {
            with_both(machine, [original, captured], |v, u| cross.add(v, u))?;
        }
        let moments = SecondMoments::without_sums(n, captured.count, weights);
        let cross = original.map(|_| CrossMoments::without_sums(n, captured.count));
        seen_beside(machine, captured, original, moments, cross)
    }

    fn finish(&self, seen: &mut Seen) -> Result<()> {
        let n = seen.moments.n;
        seen.moments.sums = vec![0.0; n * n];
        self.moments.finish(&mut seen.moments.sums)?;
        if let (Some(kept), Some(cross)) = (&self.cross, &mut seen.cross) {
            cross.sums = vec![0.0; n * n];
            kept.finish(&mut cross.sums)?;
        }
        Ok(())
    }
}

/// What is known of some inputs, and of those of the original network with them.
///
/// # Errors
/// The machine fails.
pub fn seen(machine: &Machine, captured: &Captured, original: Option<&Captured>) -> Result<Seen> {
    let n = captured.in_features;
    let mut moments = SecondMoments::empty(n);
    captured.with_rows(machine, |rows| {
        moments.add_on(machine, rows, captured.weights())
    })?;
    let cross = original.map(|original| {
        with_both(machine, [original, captured], |v, u| {
            CrossMoments::of_on(machine, (v, n), (u, n))
        })
    });
    seen_beside(machine, captured, original, moments, cross.transpose()?)
}

/// Does something with the rows of two.
fn with_both<T>(
    machine: &Machine,
    [v, u]: [&Captured; 2],
    run: impl FnOnce(&MachineBuffer, &MachineBuffer) -> Result<T>,
) -> Result<T> {
    v.with_rows(machine, |v| u.with_rows(machine, |u| run(v, u)))
}

/// Products with all that is summed up beside them.
fn seen_beside(
    machine: &Machine,
    captured: &Captured,
    original: Option<&Captured>,
    moments: SecondMoments,
    cross: Option<CrossMoments>,
) -> Result<Seen> {
    let columns =
        |of: &Captured| of.with_rows(machine, |rows| machine.column_sums(rows, of.in_features));
    let present = columns(captured)?;
    let original = original.map(columns).transpose()?;
    Ok(Seen {
        moments,
        cross,
        largest: present.max_abs.into_iter().fold(0.0, f32::max),
        magnitudes: captured.with_rows(machine, |rows| machine.magnitudes(rows))?,
        sums: present.sums,
        original_sums: original.map(|columns| columns.sums),
    })
}

fn add(sums: &mut [f64], later: &[f64]) {
    let pairs = sums.iter_mut().zip(later);
    pairs.for_each(|(sum, later)| *sum += later);
}
