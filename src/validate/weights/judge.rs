//! From the figures of a tensor to findings.
//!
//! Enters: [`Statistics`]. Leaves: findings that say which tensor, expert, row and block. Measures nothing but the
//! order of rows that are wrong.

use super::expectation::Expectation;
use super::order::{self, Order, Run};
use super::statistics::{At, Measure, Statistics};
use super::{Found, Job, Pair, Pairing, layer_of};
use crate::artifact::{StoredModel, StoredTensor};
use crate::error::Result;
use crate::model::nemotron_h::is_bias_behind_ssm_in;
use crate::report::{Finding, Rule, Severity};

/// Without a reference: a block so many times larger than the median of its tensor has a broken scale.
const BLOCK_OUT_OF_LINE: f64 = 4096.0;
/// Fewer blocks have no median to speak of.
const MIN_BLOCKS: u64 = 16;
/// What a bias takes back is small beside it: a change of this part of it is another bias.
const LARGEST_ABSORBED: f64 = 0.5;
/// Runs of rows that a message names.
const MAX_RUNS_NAMED: usize = 4;

pub struct Judge<'a> {
    artifact: &'a StoredModel,
    pairing: Option<&'a Pairing<'a>>,
    /// Biases behind `ssm_in` took back its mean errors.
    absorbs_biases: bool,
    /// Tensors whose weights are other weights altogether, of how many that were quantized or compared.
    strangers: Vec<Finding>,
    matrices_compared: usize,
}

impl<'a> Judge<'a> {
    pub fn new(
        artifact: &'a StoredModel,
        pairing: Option<&'a Pairing<'a>>,
        absorbs_biases: bool,
    ) -> Self {
        Self {
            artifact,
            pairing,
            absorbs_biases,
            strangers: Vec::new(),
            matrices_compared: 0,
        }
    }

    fn finding(&self, tensor: &StoredTensor, rule: Rule, message: String) -> Finding {
        let mut finding = Finding::new(rule, message).in_tensor(&tensor.name);
        finding.place.layer = layer_of(&tensor.name);
        finding
    }

    /// The same with the offset of a weight's row.
    fn finding_at(
        &self,
        tensor: &StoredTensor,
        rule: Rule,
        message: String,
        at: Option<At>,
    ) -> Finding {
        let mut finding = self.finding(tensor, rule, message);
        finding.place.offset = at.and_then(|at| {
            let row = self.artifact.file_offset(tensor, at.matrix, at.row)?;
            let block = at.column / tensor.ty.block_elements();
            Some(row + (block * tensor.ty.block_bytes()) as u64)
        });
        finding
    }

    /// Judges a tensor by itself.
    pub fn alone(
        &mut self,
        tensor: &StoredTensor,
        measure: &Measure,
        statistics: &Statistics,
        found: &mut Found,
    ) {
        if self.pairing.is_some() {
            let message = "the reference has no such tensor, or none that can be decoded".into();
            found.push(self.finding(tensor, Rule::NotComparable, message));
        }
        self.own(tensor, measure, statistics, found);
        self.empty_experts(tensor, statistics, found);
        let Some(median) = statistics.block_sizes.median() else {
            return;
        };
        if let Some((size, at)) = statistics.largest_block
            && statistics.block_sizes.count() >= MIN_BLOCKS
            && size > BLOCK_OUT_OF_LINE * median
        {
            let message = format!(
                "{} reaches {size:.3e}, half of all blocks stay near or below {:.3e}",
                block_name(tensor, at),
                2.0 * median
            );
            let finding = self.finding_at(tensor, Rule::ScaleOutOfRange, message, Some(at));
            found.push(finding.severity(Severity::Warning));
        }
    }

    /// What is wrong whatever the reference says.
    fn own(
        &self,
        tensor: &StoredTensor,
        measure: &Measure,
        statistics: &Statistics,
        found: &mut Found,
    ) {
        let nonfinite = &statistics.nonfinite;
        if let Some(at) = nonfinite.first {
            let mut message = format!(
                "{} weights are NaN or infinite, the first in {}",
                nonfinite.count,
                block_name(tensor, at)
            );
            if statistics.facts.nonfinite > 0 {
                message.push_str(&format!(
                    "; {} scales are NaN or infinite",
                    statistics.facts.nonfinite
                ));
            }
            if statistics.reference_nonfinite > 0 {
                let count = statistics.reference_nonfinite;
                message.push_str(&format!("; {count} weights of the reference are too"));
            }
            found.push(self.finding_at(tensor, Rule::NotFinite, message, Some(at)));
        } else if statistics.facts.nonfinite > 0 {
            // Codes of 0 can hide such a scale.
            let message = format!(
                "{} scales are NaN or infinite, the first of block {}",
                statistics.facts.nonfinite,
                statistics.facts.first_nonfinite.unwrap_or_default()
            );
            found.push(self.finding(tensor, Rule::ScaleOutOfRange, message));
        }
        let facts = &statistics.facts;
        let share = facts.at_ends as f64 / facts.codes.max(1) as f64;
        if share > measure.expectation.ends_ceiling {
            let message = format!(
                "{:.1} % of the codes are at the ends of their range, {:.0} % at most are usual for {}",
                100.0 * share,
                100.0 * measure.expectation.ends_ceiling,
                self.artifact.stored_as(tensor)
            );
            found.push(self.finding(tensor, Rule::Saturation, message));
        }
    }

    /// Experts without a weight other than 0.
    fn empty_experts(
        &self,
        tensor: &StoredTensor,
        statistics: &Statistics,
        found: &mut Found,
    ) -> bool {
        if tensor.matrices < 2 {
            return false;
        }
        let compared = statistics.weights > 0;
        let empty: Vec<usize> = statistics
            .matrices
            .iter()
            .enumerate()
            .filter(|(_, sums)| sums.largest == 0.0 && (!compared || sums.reference2 > 0.0))
            .map(|(expert, _)| expert)
            .collect();
        let Some(first) = empty.first() else {
            return false;
        };
        let message = format!(
            "expert {} of {} holds zeros only",
            list(&empty),
            tensor.matrices
        );
        let at = At {
            matrix: *first,
            row: 0,
            column: 0,
        };
        found.push(self.finding_at(tensor, Rule::MissingExpert, message, Some(at)));
        true
    }

    /// Judges a tensor against its counterpart.
    pub fn compared(
        &mut self,
        tensor: &StoredTensor,
        pair: &Pair,
        measure: &Measure,
        statistics: &Statistics,
        found: &mut Found,
    ) -> Result<()> {
        self.own(tensor, measure, statistics, found);
        if tensor.rows > 1 && tensor.columns > 1 {
            self.matrices_compared += 1;
        }
        if let Some(at) = statistics.padding.first {
            let message = format!(
                "{} rows are not 0 where widening appended zeros, the first in {}",
                statistics.padding.count,
                block_name(tensor, at)
            );
            found.push(self.finding_at(tensor, Rule::BytesDiffer, message, Some(at)));
        }
        let empty = self.empty_experts(tensor, statistics, found);
        if !empty
            && statistics.bad_row_count > 0
            && self.reordered(tensor, pair, measure, statistics, found)?
        {
            return Ok(());
        }
        if measure.lossless {
            self.differing(tensor, statistics, found);
        } else if !empty {
            self.error(tensor, measure, statistics, found);
        }
        Ok(())
    }

    /// Rows that are nothing like the reference's: from elsewhere, or from nowhere.
    fn reordered(
        &mut self,
        tensor: &StoredTensor,
        pair: &Pair,
        measure: &Measure,
        statistics: &Statistics,
        found: &mut Found,
    ) -> Result<bool> {
        let job = Job {
            artifact: self.artifact,
            tensor,
            pair: Some(*pair),
            measure: *measure,
        };
        let (message, at) = match order::find(&job, pair, statistics)? {
            Order::Experts(experts) => {
                let at = experts[0].0;
                let named: Vec<_> = experts
                    .iter()
                    .take(MAX_RUNS_NAMED)
                    .map(|(expert, from)| format!("expert {expert} holds expert {from}"))
                    .collect();
                let more = experts.len().saturating_sub(named.len());
                let at = At {
                    matrix: at,
                    row: 0,
                    column: 0,
                };
                (named.join(", ") + &and_more(more, "experts"), at)
            }
            Order::Rows(runs) => (self.rows_message(tensor, &runs), order::place(&runs[0])),
            Order::Unknown
                if mostly_bad(tensor, statistics) && same_values(measure, statistics) =>
            {
                let message = "the values are those of the reference in another order".to_owned();
                (message, statistics.bad_rows[0])
            }
            Order::Unknown => {
                return Ok(self.strange(tensor, statistics));
            }
        };
        found.push(self.finding_at(tensor, Rule::PermutedRowsSuspected, message, Some(at)));
        Ok(true)
    }

    fn rows_message(&self, tensor: &StoredTensor, runs: &[Run]) -> String {
        let matched: usize = runs.iter().map(|run| run.count).sum();
        let mut parts = vec![format!("{matched} rows hold other rows of the reference")];
        for run in runs.iter().take(MAX_RUNS_NAMED) {
            let expert = match tensor.matrices {
                1 => String::new(),
                _ => format!("expert {} ", run.matrix),
            };
            let at = self.row_range(tensor, run.at, run.count);
            let from = self.row_range(tensor, run.from, run.count);
            parts.push(format!("{expert}{at} hold {from}"));
        }
        let more = runs.len().saturating_sub(MAX_RUNS_NAMED);
        parts.join(", ") + &and_more(more, "runs of rows")
    }

    /// `rows 0..512`, in `ssm_in` with the part of the projection.
    fn row_range(&self, tensor: &StoredTensor, first: usize, count: usize) -> String {
        let range = format!("rows {first}..{}", first + count);
        if !tensor.name.ends_with(".ssm_in.weight") {
            return range;
        }
        let config = self.artifact.config();
        let inner = config.inner_size();
        let state = config.n_groups * config.ssm_state_size;
        let parts = [
            ("z", inner),
            ("x", inner),
            ("B", state),
            ("C", state),
            ("dt", config.mamba_num_heads),
        ];
        let (mut begin, mut named) = (0, Vec::new());
        for (name, rows) in parts {
            if first < begin + rows && begin < first + count {
                named.push(name);
            }
            begin += rows;
        }
        format!("{range} ({})", named.join(", "))
    }

    /// A tensor most of whose rows are unlike any of the reference.
    fn strange(&mut self, tensor: &StoredTensor, statistics: &Statistics) -> bool {
        if !mostly_bad(tensor, statistics) {
            return false;
        }
        let message = format!(
            "its weights are not those of the reference: cosine {:.3}, relative error {:.3}",
            statistics.cosine(),
            statistics.relative_error()
        );
        let finding = self.finding(tensor, Rule::ErrorAboveExpectation, message);
        self.strangers.push(finding.severity(Severity::Error));
        true
    }

    fn differing(&self, tensor: &StoredTensor, statistics: &Statistics, found: &mut Found) {
        let Some(at) = statistics.differing.first else {
            return;
        };
        if self.absorbs_biases && is_bias_behind_ssm_in(&tensor.name) {
            found.push(self.absorbed(tensor, statistics));
            return;
        }
        let message = format!(
            "{} of {} weights differ from the reference although {} holds them exactly, the first in {}; largest difference {:.3e}",
            statistics.differing.count,
            statistics.weights,
            tensor.ty,
            block_name(tensor, at),
            statistics.max_abs_error
        );
        found.push(self.finding_at(tensor, Rule::BytesDiffer, message, Some(at)));
    }

    /// A bias that was changed on purpose: by how much, and whether that can be what rounding lost.
    fn absorbed(&self, tensor: &StoredTensor, statistics: &Statistics) -> Finding {
        let change = statistics.relative_error();
        let message = format!(
            "{} of {} biases took back mean rounding errors of `ssm_in`: changed by {:.1} %, at most by {:.3e}",
            statistics.differing.count,
            statistics.weights,
            100.0 * change,
            statistics.max_abs_error
        );
        let finding = self.finding(tensor, Rule::BiasAbsorbed, message);
        match change > LARGEST_ABSORBED {
            true => finding.severity(Severity::Warning),
            false => finding,
        }
    }

    fn error(
        &self,
        tensor: &StoredTensor,
        measure: &Measure,
        statistics: &Statistics,
        found: &mut Found,
    ) {
        let expectation = &measure.expectation;
        self.scales(tensor, expectation, statistics, found);
        let error = statistics.yardstick_error();
        if error > expectation.tensor_ceiling {
            let message = format!(
                "relative error {:.4} ({:.1} dB), {:.1} times what {} explains for these weights",
                statistics.relative_error(),
                statistics.snr_db(),
                error / expectation.tensor_ceiling,
                self.artifact.stored_as(tensor)
            );
            let mut finding = self.finding(tensor, Rule::ErrorAboveExpectation, message);
            if mostly_bad(tensor, statistics) {
                finding = finding.severity(Severity::Error);
            }
            found.push(finding);
        }
    }

    /// Blocks whose scale does not fit the weights.
    fn scales(
        &self,
        tensor: &StoredTensor,
        expectation: &Expectation,
        statistics: &Statistics,
        found: &mut Found,
    ) {
        let gain = statistics.out_of_gain;
        let (message, at) = match (statistics.worst, gain.first) {
            (Some((worst, at)), _) if statistics.outliers.count > 0 => (
                format!(
                    "the error of {} parts of blocks is above what {} explains, the worst in {}: {:.1} times the ceiling",
                    statistics.outliers.count,
                    self.artifact.stored_as(tensor),
                    block_name(tensor, at),
                    worst / expectation.unit_ceiling
                ),
                at,
            ),
            (_, Some(at)) => (
                format!(
                    "{} parts of blocks decode to too much or too little of the reference, the first in {}; factors range from {:.2} to {:.2}",
                    gain.count,
                    block_name(tensor, at),
                    statistics.gain_range().0,
                    statistics.gain_range().1
                ),
                at,
            ),
            _ => return,
        };
        found.push(self.finding_at(tensor, Rule::ScaleOutOfRange, message, Some(at)));
    }

    /// Nearly all weights are other weights: then it is the reference that is wrong.
    pub fn finish(self, found: &mut Found) {
        if self.strangers.len() > 2 && 2 * self.strangers.len() > self.matrices_compared {
            let message = format!(
                "{} of {} matrices hold other weights than the reference, beginning with `{}`",
                self.strangers.len(),
                self.matrices_compared,
                self.strangers[0]
                    .place
                    .tensor
                    .as_deref()
                    .unwrap_or_default()
            );
            found.push(Finding::new(Rule::DifferentModels, message));
            return;
        }
        self.strangers
            .into_iter()
            .for_each(|finding| found.push(finding));
    }
}

/// Most rows are nothing like the reference's. One broken scale can spoil every figure of a whole tensor, but not this.
fn mostly_bad(tensor: &StoredTensor, statistics: &Statistics) -> bool {
    2 * statistics.bad_row_count > (tensor.rows * tensor.matrices) as u64
}

/// Sums over all values tell an order from other values where rounding hardly changes them.
fn same_values(measure: &Measure, statistics: &Statistics) -> bool {
    let typical = match measure.lossless {
        true => 0.0,
        false => measure.expectation.typical,
    };
    let chance = 8.0 * typical / (statistics.weights.max(1) as f64).sqrt();
    let near = |a: f64, b: f64| (a - b).abs() <= (4.0 * typical * typical + chance + 1e-6) * b;
    typical < 0.02
        && near(statistics.sums.artifact2, statistics.sums.reference2)
        && near(statistics.magnitudes.0, statistics.magnitudes.1)
}

/// `row 3, block 1`, and the expert in a stack.
fn block_name(tensor: &StoredTensor, at: At) -> String {
    let block = tensor.ty.block_elements();
    let within = match block {
        1 => format!("column {}", at.column),
        _ => format!("block {}", at.column / block),
    };
    match tensor.matrices {
        1 => format!("row {}, {within}", at.row),
        _ => format!("expert {}, row {}, {within}", at.matrix, at.row),
    }
}

fn list(experts: &[usize]) -> String {
    let named: Vec<_> = experts.iter().take(8).map(usize::to_string).collect();
    named.join(", ") + &and_more(experts.len().saturating_sub(8), "experts")
}

fn and_more(count: usize, what: &str) -> String {
    match count {
        0 => String::new(),
        _ => format!(", and {count} more {what}"),
    }
}
