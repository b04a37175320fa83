//! Looking into a block while it runs: copies of the inputs of some matrices, and where tokens were routed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::backend::{Backend, ExpertRows, Machine, MachineBuffer};
use crate::error::Result;
use crate::forward::observer::Observer;

/// Inputs of one matrix in one pass.
#[derive(Debug, Clone, Default)]
pub struct Captured {
    /// `[rows, in_features]`.
    pub rows: Vec<f32>,
    /// Their length.
    pub in_features: usize,
    /// What each row counts; empty where all count 1.
    pub weights: Vec<f32>,
}

/// Copies what it is asked for.
#[derive(Debug, Default)]
pub struct Capture<'a> {
    wanted: BTreeMap<&'a str, Range<usize>>,
    routing: Option<&'a [ExpertRows]>,
    left_out: BTreeSet<&'a str>,
    /// By tensor and matrix.
    pub inputs: BTreeMap<(String, usize), Captured>,
    /// Which rows went to which expert.
    pub routes: Vec<ExpertRows>,
}

impl<'a> Capture<'a> {
    /// Copies inputs of the tensors `wanted`; with `routing`, tokens go where it says.
    pub fn new(wanted: &[&'a str], routing: Option<&'a [ExpertRows]>) -> Self {
        let all = wanted.iter().map(|tensor| (*tensor, 0..usize::MAX));
        Self::of_matrices(&all.collect(), routing)
    }

    /// Copies inputs of some matrices of the tensors `wanted`.
    pub fn of_matrices(
        wanted: &BTreeMap<&'a str, Range<usize>>,
        routing: Option<&'a [ExpertRows]>,
    ) -> Self {
        Self {
            wanted: wanted.clone(),
            routing,
            ..Self::default()
        }
    }

    /// Leaves out the products of these tensors, whose outputs nothing that is wanted depends on.
    pub fn leaving_out(mut self, tensors: impl IntoIterator<Item = &'a str>) -> Self {
        self.left_out = tensors.into_iter().collect();
        self
    }

    /// An expert's output is multiplied with its weight, and so is its error: the square counts. Where no token chose an
    /// expert it is shown all of them, with weight 0: they count alike.
    fn weights_of(&self, tensor: &str, matrix: usize) -> Vec<f32> {
        if !tensor.contains("_exps") {
            return Vec::new();
        }
        let weights = &self.routes[matrix].weights;
        match weights.iter().all(|weight| *weight == 0.0) {
            true => Vec::new(),
            false => weights.iter().map(|weight| weight * weight).collect(),
        }
    }
}

impl Observer<Machine> for Capture<'_> {
    fn experts(&mut self, _: usize, experts: &[ExpertRows]) {
        self.routes = experts.to_vec();
    }

    fn routing(&mut self, _: usize) -> Option<Vec<ExpertRows>> {
        self.routing.map(<[ExpertRows]>::to_vec)
    }

    fn needs(&mut self, tensor: &str) -> bool {
        !self.left_out.contains(tensor)
    }

    fn input(
        &mut self,
        tensor: &str,
        matrix: usize,
        machine: &Machine,
        input: &MachineBuffer,
        rows: usize,
    ) -> Result<()> {
        // A cell without sequences shows nothing, not even how wide inputs are.
        let wanted = self.wanted.get(tensor);
        if rows > 0 && wanted.is_some_and(|matrices| matrices.contains(&matrix)) {
            let input = machine.download(input, 0..machine.len(input))?;
            let captured = Captured {
                in_features: input.len() / rows,
                rows: input,
                weights: self.weights_of(tensor, matrix),
            };
            self.inputs.insert((tensor.to_string(), matrix), captured);
        }
        Ok(())
    }
}
