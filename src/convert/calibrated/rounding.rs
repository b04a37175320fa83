//! One tensor to its stored bytes, by the method that fits what is known of its inputs.

use super::collector::{Seen, SeenInputs};
use super::{Calibrated, ExpertTokens, Method, TensorOutcome, Treatment};
use crate::artifact::StoredTensor;
use crate::backend::magnitudes::Magnitudes;
use crate::backend::{Backend, Machine};
use crate::calibrate::cells::Merge;
use crate::calibrate::experts::own_share;
use crate::calibrate::second_moments::SecondMoments;
use crate::error::Result;
use crate::parallel;
use crate::plan::PlannedTensor;
use crate::quantize::feedback::{self, Correction, Damping, Feedback, InputMoments, OutputFactor};
use crate::quantize::form::Form;
use crate::quantize::input_scale::least_error_clip;

/// Added to the diagonal of gradients' second moments, as a share of its mean.
const OUTPUT_DAMPING: Damping = Damping {
    first: 0.02,
    last: 1.0,
};

/// Rounds a tensor whose inputs are not known.
pub fn plain(job: &Calibrated, tensor: &PlannedTensor) -> Result<(Vec<u8>, TensorOutcome)> {
    let shape = crate::forward::required(job.weights.stored(), &tensor.name)?.clone();
    let form = job.form(tensor);
    let mut outcome = empty_outcome(tensor, form, shape.columns);
    let mut bytes = Vec::new();
    for matrix in 0..shape.matrices {
        let values = job.weights.matrix(&tensor.name, matrix)?;
        outcome.nonfinite += nonfinite(&values);
        let (stored, overflows) = form.nearest(shape.columns, &values, None);
        outcome.overflows += overflows.0;
        bytes.extend(stored);
    }
    Ok((bytes, outcome))
}

/// What stands in for second moments of an expert that saw little.
#[derive(Debug)]
pub enum Prior {
    /// Every token was seen.
    None,
    /// Inputs of all experts together.
    Pool(SecondMoments),
    /// Its own mean diagonal: inputs of writers lie in a basis of their own.
    OwnDiagonal,
}

/// A tensor on its way, one matrix after the other.
pub struct TensorRounding<'a> {
    job: &'a Calibrated<'a>,
    tensor: &'a PlannedTensor,
    form: Form,
    shape: StoredTensor,
    /// The tensor under whose name its inputs are seen.
    input: String,
    prior: Option<Prior>,
    done: usize,
    sums: Sums,
    magnitudes: Magnitudes,
    outcome: TensorOutcome,
    bytes: Vec<u8>,
}

impl<'a> TensorRounding<'a> {
    /// Nothing is rounded yet; `input`: the tensor under whose name the inputs are seen.
    pub fn begin(
        job: &'a Calibrated<'a>,
        tensor: &'a PlannedTensor,
        input: String,
    ) -> Result<Self> {
        let shape = crate::forward::required(job.weights.stored(), &tensor.name)?.clone();
        let form = job.form(tensor);
        let outcome = empty_outcome(tensor, form, shape.columns);
        let prior = match (shape.matrices > 1, is_writer(&tensor.name)) {
            (false, _) => Some(Prior::None),
            (true, true) => Some(Prior::OwnDiagonal),
            (true, false) => None,
        };
        Ok(Self {
            job,
            tensor,
            form,
            shape,
            input,
            prior,
            done: 0,
            sums: Sums::default(),
            magnitudes: Magnitudes::default(),
            outcome,
            bytes: Vec::new(),
        })
    }

    /// The input whose second moments over all experts are needed, and are not all in `seen`.
    pub fn missing_pool(&self, seen: usize) -> Option<&str> {
        let is_missing = self.prior.is_none() && seen < self.shape.matrices;
        is_missing.then_some(&self.input)
    }

    /// Gives inputs of all experts together.
    pub fn set_pool(&mut self, pool: &SecondMoments) {
        self.prior = Some(Prior::Pool(pool.clone()));
    }

    /// The tensor under whose name its inputs are seen.
    pub fn input(&self) -> &str {
        &self.input
    }

    /// As it is planned.
    pub fn planned(&self) -> &'a PlannedTensor {
        self.tensor
    }

    /// Rounds the next `count` matrices, which must be all where the prior is still to be made of `seen`.
    pub fn round(&mut self, count: usize, seen: &SeenInputs) -> Result<()> {
        let prior = self.prior.take().unwrap_or_else(|| pool(&self.input, seen));
        // Each machine rounds a matrix at a time; what comes of them is kept in order.
        let end = self.done + count;
        for first in (self.done..end).step_by(self.job.machines.count()) {
            let matrices = first..end.min(first + self.job.machines.count());
            let one = |matrix| self.matrix(matrix, &prior, seen);
            let rounded = parallel::try_map(matrices.clone(), one)?;
            for (matrix, rounded) in matrices.zip(rounded) {
                self.keep(seen.get(&(self.input.clone(), matrix)), rounded);
            }
        }
        self.done = end;
        self.prior = Some(prior);
        Ok(())
    }

    fn matrix(&self, matrix: usize, prior: &Prior, seen: &SeenInputs) -> Result<RoundedMatrix> {
        let values = self.job.weights.matrix(&self.tensor.name, matrix)?;
        let seen = seen.get(&(self.input.clone(), matrix));
        let outputs = outputs_of(self.job, &self.tensor.name, matrix, self.shape.rows);
        let machine = self.job.machine(matrix);
        let rows = Rows {
            job: self.job,
            machine: &machine,
            form: self.form,
            outputs: &outputs,
            columns: self.shape.columns,
            values: &values,
        };
        Ok(RoundedMatrix {
            nonfinite: nonfinite(&values),
            ..rows.round(seen, prior)?
        })
    }

    /// Takes the next matrix down.
    fn keep(&mut self, seen: Option<&Seen>, rounded: RoundedMatrix) {
        let outcome = &mut self.outcome;
        outcome.nonfinite += rounded.nonfinite;
        outcome.overflows += rounded.overflows;
        outcome.dead_inputs = outcome.dead_inputs.max(rounded.dead_inputs);
        self.sums.add(&rounded);
        if self.shape.matrices > 1 {
            let moments = seen.map(|seen| &seen.moments);
            outcome.experts.push(ExpertTokens {
                tokens: moments.map_or(0, |moments| moments.tokens),
                weight: moments.map_or(0.0, |moments| moments.weight),
                treatment: rounded.treatment,
            });
        }
        let largest = seen.map(|seen| seen.largest);
        outcome.largest_input = match (outcome.largest_input, largest) {
            (Some(a), Some(b)) => Some(f32::max(a, b)),
            (a, b) => a.or(b),
        };
        if let Some(seen) = seen {
            self.magnitudes.merge(seen.magnitudes.clone());
        }
        outcome.tokens =
            Some(outcome.tokens.unwrap_or(0) + seen.map_or(0, |seen| seen.moments.tokens));
        self.bytes.extend(rounded.bytes);
    }

    /// Whether every matrix is rounded.
    pub fn is_complete(&self) -> bool {
        self.done == self.shape.matrices
    }

    /// What is stored, and what became of it.
    pub fn finish(mut self) -> (Vec<u8>, TensorOutcome) {
        self.sums.write(&mut self.outcome);
        let bins = self.magnitudes.bins();
        let largest = self.outcome.largest_input;
        self.outcome.input_clip = largest.map(|largest| least_error_clip(bins, largest));
        (self.bytes, self.outcome)
    }
}

pub fn empty_outcome(tensor: &PlannedTensor, form: Form, columns: usize) -> TensorOutcome {
    TensorOutcome {
        tensor: tensor.name.clone(),
        ty: form.to_string(),
        bits_per_weight: form.bits_per_weight(columns),
        treatment: match form.is_searched() {
            false => Treatment::Kept,
            true => Treatment::Rtn,
        },
        rtn_loss: None,
        loss: None,
        damping: None,
        tokens: None,
        dead_inputs: 0,
        largest_input: None,
        input_clip: None,
        nonfinite: 0,
        overflows: 0,
        experts: Vec::new(),
    }
}

fn nonfinite(values: &[f32]) -> u64 {
    values
        .iter()
        .map(|value| u64::from(!value.is_finite()))
        .sum()
}

fn is_writer(name: &str) -> bool {
    name.contains("ffn_down_exps")
}

/// All experts' inputs together.
fn pool(input: &str, seen: &SeenInputs) -> Prior {
    let mut pool: Option<SecondMoments> = None;
    for (_, seen) in seen.iter().filter(|((name, _), _)| name == input) {
        add_to_pool(&mut pool, seen);
    }
    pool.map_or(Prior::None, Prior::Pool)
}

/// In the order of experts, however many of them are seen at a time.
pub fn add_to_pool(pool: &mut Option<SecondMoments>, seen: &Seen) {
    match pool {
        None => *pool = Some(seen.moments.clone()),
        Some(pool) => pool.merge(seen.moments.clone()),
    }
}

/// Losses of all matrices of a tensor.
#[derive(Default)]
struct Sums {
    energy: f64,
    rtn_loss: f64,
    loss: f64,
    damping: Option<f64>,
    treatments: Vec<Treatment>,
}

impl Sums {
    fn add(&mut self, rounded: &RoundedMatrix) {
        self.energy += rounded.energy;
        self.rtn_loss += rounded.rtn_loss;
        self.loss += rounded.loss;
        self.damping = match (self.damping, rounded.damping) {
            (Some(a), Some(b)) => Some(f64::max(a, b)),
            (a, b) => a.or(b),
        };
        self.treatments.push(rounded.treatment);
    }

    fn write(self, outcome: &mut TensorOutcome) {
        let count = |treatment: &&Treatment| {
            self.treatments
                .iter()
                .filter(|other| other == treatment)
                .count()
        };
        if let Some(treatment) = self.treatments.iter().max_by_key(count) {
            outcome.treatment = *treatment;
        }
        outcome.damping = self.damping;
        if self.energy > 0.0 {
            outcome.rtn_loss = Some(self.rtn_loss / self.energy);
            outcome.loss = Some(self.loss / self.energy);
        }
    }
}

/// What became of one matrix.
struct RoundedMatrix {
    bytes: Vec<u8>,
    treatment: Treatment,
    /// `tr(W M W^T)`.
    energy: f64,
    rtn_loss: f64,
    loss: f64,
    damping: Option<f64>,
    dead_inputs: usize,
    overflows: u64,
    /// Weights that are no numbers.
    nonfinite: u64,
}

/// How rows of a matrix repair each other; nothing where that is not known of all of them.
fn outputs_of(job: &Calibrated, tensor: &str, matrix: usize, rows: usize) -> Vec<OutputFactor> {
    let blocks = job.outputs.and_then(|outputs| outputs.of(tensor, matrix));
    let factors = blocks.unwrap_or_default().iter().map(|block| {
        let mean = towards_diagonal(&block.moments);
        OutputFactor::new(job.isa(), block.rows.len(), &mean, OUTPUT_DAMPING)
    });
    let factors: Vec<OutputFactor> = factors.collect::<Option<_>>().unwrap_or_default();
    let known = factors.iter().map(OutputFactor::rows).sum::<usize>();
    match known == rows {
        true => factors,
        false => Vec::new(),
    }
}

/// Second moments of few tokens, their mean diagonal mixed in.
fn towards_diagonal(moments: &SecondMoments) -> Vec<f64> {
    let n = moments.n;
    let share = own_share(moments.tokens, n);
    let mut mean = moments.mean();
    let diagonal = (0..n).map(|i| mean[i * n + i]).sum::<f64>() / n as f64;
    mean.iter_mut().for_each(|value| *value *= share);
    (0..n).for_each(|i| mean[i * n + i] += (1.0 - share) * diagonal);
    mean
}

/// One matrix about to be rounded.
struct Rows<'a> {
    job: &'a Calibrated<'a>,
    machine: &'a Machine,
    form: Form,
    outputs: &'a [OutputFactor],
    columns: usize,
    values: &'a [f32],
}

impl Rows<'_> {
    fn round(&self, seen: Option<&Seen>, prior: &Prior) -> Result<RoundedMatrix> {
        let (rtn, rtn_overflows) = self.form.nearest(self.columns, self.values, None);
        let rtn_overflows = rtn_overflows.0;
        let unknown = |bytes, treatment, overflows| RoundedMatrix {
            bytes,
            treatment,
            energy: 0.0,
            rtn_loss: 0.0,
            loss: 0.0,
            damping: None,
            dead_inputs: 0,
            overflows,
            nonfinite: 0,
        };
        if !self.form.is_searched() {
            return Ok(unknown(rtn, Treatment::Kept, rtn_overflows));
        }
        let Some(seen) = seen else {
            return Ok(unknown(rtn, Treatment::Rtn, rtn_overflows));
        };
        let matrix = shrunk(&seen.moments, prior);
        let damping = self.job.rounding.damping();
        let moments = match self.machine.row_products() {
            Some(machine) => InputMoments::on(machine, self.columns, &matrix, damping)?,
            None => InputMoments::new(self.job.isa(), self.columns, &matrix, damping),
        };
        drop(matrix);
        let Some(moments) = moments else {
            return Ok(unknown(rtn, Treatment::Fallback, rtn_overflows));
        };
        let (bytes, treatment, overflows) = match self.job.rounding.method {
            Method::Rtn => (rtn.clone(), Treatment::Rtn, rtn_overflows),
            Method::Gptq if self.form.can_feed_back(self.columns) => {
                let (bytes, overflows) = self.feed_back(seen, &moments)?;
                (bytes, Treatment::Gptq, overflows)
            }
            _ => {
                let importance = seen.moments.mean_squares();
                let (bytes, overflows) =
                    self.form
                        .nearest(self.columns, self.values, Some(&importance));
                (bytes, Treatment::Imatrix, overflows.0)
            }
        };
        Ok(RoundedMatrix {
            energy: self.loss_of(self.values, &moments)?,
            rtn_loss: self.loss(&rtn, &moments)?,
            loss: self.loss(&bytes, &moments)?,
            bytes,
            treatment,
            damping: Some(moments.damping),
            dead_inputs: moments.dead_inputs,
            overflows,
            nonfinite: 0,
        })
    }

    fn feed_back(&self, seen: &Seen, moments: &InputMoments) -> Result<(Vec<u8>, u64)> {
        let beta = self.job.rounding.target_correction;
        let cross = seen.cross.as_ref().filter(|_| beta > 0.0);
        let correction = cross.map(|cross| Correction {
            cross,
            seen: &seen.moments,
            share: beta,
        });
        let machine = self.machine.row_products();
        let corrected = match (correction, machine) {
            (None, _) => None,
            (Some(correction), Some(machine)) => {
                Some(correction.apply_on(machine, self.values, moments)?)
            }
            (Some(correction), None) => {
                Some(correction.apply(self.job.isa(), self.values, moments))
            }
        };
        let rows = corrected.as_deref().unwrap_or(self.values);
        let how = Feedback {
            moments,
            outputs: self.outputs,
            passes: self.job.rounding.passes,
        };
        let (bytes, rounded) = match machine {
            Some(machine) => self.form.feed_back_on(machine, rows, how)?,
            None => self.form.feed_back(self.job.isa(), rows, how),
        };
        Ok((bytes, rounded.overflow))
    }

    /// Of stored bytes against the original weights.
    fn loss(&self, bytes: &[u8], moments: &InputMoments) -> Result<f64> {
        let mut stored = vec![0.0; self.values.len()];
        self.form
            .dequantize(self.columns, bytes, &mut stored)
            .expect("the form was written just now");
        stored
            .iter_mut()
            .zip(self.values)
            .for_each(|(stored, value)| *stored = value - *stored);
        self.loss_of(&stored, moments)
    }

    fn loss_of(&self, errors: &[f32], moments: &InputMoments) -> Result<f64> {
        let loss = match self.machine.row_products() {
            Some(machine) => feedback::loss_on(machine, errors, moments)?,
            None => feedback::loss(self.job.isa(), errors, moments),
        };
        Ok(loss * moments.unit)
    }
}

/// An expert's second moments, drawn towards what stands in for them where it saw little. How far: [`own_share`].
fn shrunk(own: &SecondMoments, prior: &Prior) -> Vec<f64> {
    if matches!(prior, Prior::None) {
        return own.mean();
    }
    let n = own.n;
    // In tokens, since weights of experts are no counts.
    let own_share = own_share(own.tokens, n);
    let prior_share = 1.0 - own_share;
    let mut mean = own.mean();
    mean.iter_mut().for_each(|value| *value *= own_share);
    if let Prior::Pool(pool) = prior {
        let pool = pool.mean();
        mean.iter_mut()
            .zip(pool)
            .for_each(|(value, pool)| *value += prior_share * pool);
        return mean;
    }
    let diagonal = (0..n).map(|j| mean[j * n + j]).sum::<f64>() / n as f64;
    // The mean diagonal was scaled with the rest.
    let own_diagonal = diagonal / own_share.max(f64::MIN_POSITIVE);
    (0..n).for_each(|j| mean[j * n + j] += prior_share * own_diagonal);
    mean
}
