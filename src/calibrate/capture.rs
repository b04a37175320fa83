//! Looking into a block while it runs: copies of the inputs of some matrices, and where tokens were routed.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use crate::backend::{Backend, ExpertRows, Machine, MachineBuffer};
use crate::error::Result;
use crate::forward::observer::Observer;

/// Inputs of one matrix in one pass.
pub struct Captured {
    rows: Rows,
    /// How many there are.
    pub count: usize,
    /// Their length.
    pub in_features: usize,
    /// What each row counts; empty where all count 1.
    pub weights: Vec<f32>,
}

/// `[rows, in_features]`.
enum Rows {
    /// On the machine that ran the block.
    There(MachineBuffer),
    /// Here, where there is no room for them.
    Here(Vec<f32>),
}

impl Captured {
    /// Inputs that all count 1.
    pub fn unweighted(machine: &Machine, rows: MachineBuffer, in_features: usize) -> Self {
        Self {
            count: machine.len(&rows) / in_features,
            rows: Rows::There(rows),
            in_features,
            weights: Vec::new(),
        }
    }

    /// Does something with the rows `[_, in_features]` on the machine that ran the block.
    ///
    /// # Errors
    /// The machine fails; whatever `run` returns.
    pub fn with_rows<T>(
        &self,
        machine: &Machine,
        run: impl FnOnce(&MachineBuffer) -> Result<T>,
    ) -> Result<T> {
        match &self.rows {
            Rows::There(rows) => run(rows),
            Rows::Here(values) => run(&machine.upload(values.clone())?),
        }
    }

    /// What rows count, where they do not all count 1.
    pub fn weights(&self) -> Option<&[f32]> {
        (!self.weights.is_empty()).then_some(self.weights.as_slice())
    }
}

/// What rows of a matrix count; empty where all count 1.
///
/// An expert's output is multiplied with its weight, and so is its error: the square counts. Where no token chose an expert it
/// is shown all of them, with weight 0: they count alike.
pub fn weights_of(routes: &[ExpertRows], tensor: &str, matrix: usize) -> Vec<f32> {
    if !tensor.contains("_exps") {
        return Vec::new();
    }
    let weights = &routes[matrix].weights;
    match weights.iter().all(|weight| *weight == 0.0) {
        true => Vec::new(),
        false => weights.iter().map(|weight| weight * weight).collect(),
    }
}

/// Keeps what it is asked for, where the machine has it and room for it.
#[derive(Default)]
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
    /// Keeps inputs of the tensors `wanted`; with `routing`, tokens go where it says.
    pub fn new(wanted: &[&'a str], routing: Option<&'a [ExpertRows]>) -> Self {
        let all = wanted.iter().map(|tensor| (*tensor, 0..usize::MAX));
        Self::of_matrices(&all.collect(), routing)
    }

    /// Keeps inputs of some matrices of the tensors `wanted`.
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
            let kept = match machine.kept_copy(input)? {
                Some(rows) => Rows::There(rows),
                None => Rows::Here(machine.download(input, 0..machine.len(input))?),
            };
            let captured = Captured {
                rows: kept,
                count: rows,
                in_features: machine.len(input) / rows,
                weights: weights_of(&self.routes, tensor, matrix),
            };
            self.inputs.insert((tensor.to_string(), matrix), captured);
        }
        Ok(())
    }
}
