//! How large an error each type explains.
//!
//! Enters: a type. Leaves: ceilings. Computes nothing.
//!
//! An error is measured by a yardstick: the largest magnitude of the reference's block, plus what the smallest step of
//! an F16 scale amounts to. Against it rounding is bounded whatever the weights are, while the error relative to the
//! weights themselves grows with every outlier.

use nemoconv_formats::GgmlType;
use nemoconv_formats::packed::{Group, Layout, Scheme};

/// What the type of a tensor explains.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Expectation {
    /// Weights that share all of a block's scales.
    pub block: usize,
    /// Weights that share one scale: the smallest part whose error is looked at.
    pub unit: usize,
    /// ||w - w_ref|| / ||w_ref|| of normally distributed weights.
    pub typical: f64,
    /// Root mean square error of one unit, by the yardstick.
    pub unit_ceiling: f64,
    /// The same of the whole tensor.
    pub tensor_ceiling: f64,
    /// A row with a larger relative error is another row.
    pub bad_row: f64,
    /// Share of codes at the ends of their range.
    pub ends_ceiling: f64,
    /// Least and largest factor by which a unit may be off as a whole.
    pub unit_gain: (f64, f64),
    /// The same of a whole block.
    pub block_gain: (f64, f64),
    /// A block is judged by those of its row too, where they are larger: error feedback lets a small one repair what they
    /// lost.
    pub by_row: bool,
    /// Largest value by which a scale of F16 is multiplied.
    multiplier: f64,
}

impl Expectation {
    /// What the yardstick owes to the step of subnormal F16 numbers.
    pub fn quantum(&self) -> f64 {
        self.step() / self.unit_ceiling
    }

    /// What the step of subnormal F16 numbers, 2^-24, amounts to in a weight.
    pub fn step(&self) -> f64 {
        self.multiplier / f64::from(1 << 24)
    }

    /// The same where the reference is rounded too.
    pub fn against(mut self, reference: &Self) -> Self {
        if reference.ends_ceiling < 1.0 || reference.block > FLOAT_BLOCK {
            self.unit_ceiling += reference.unit_ceiling;
            self.tensor_ceiling += reference.tensor_ceiling;
            self.unit_gain = wider(self.unit_gain, reference.unit_gain);
            self.block_gain = wider(self.block_gain, reference.block_gain);
            self.by_row |= reference.by_row;
        }
        self
    }

    /// Gains of a block that is judged by a yardstick `slack` times its own.
    pub fn loosened(gain: (f64, f64), slack: f64) -> (f64, f64) {
        (1.0 - (1.0 - gain.0) * slack, 1.0 + (gain.1 - 1.0) * slack)
    }
}

fn wider(one: (f64, f64), other: (f64, f64)) -> (f64, f64) {
    let least = 1.0 - (1.0 - one.0) - (1.0 - other.0);
    (least, one.1 * other.1)
}

/// Floats have no blocks; errors are looked at by so many weights.
const FLOAT_BLOCK: usize = 32;

/// The ceilings of one way to round.
struct Ceilings {
    unit: f64,
    tensor: f64,
    unit_gain: (f64, f64),
    block_gain: (f64, f64),
}

/// How the artifact says its weights were rounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rounding {
    /// To the nearest.
    Nearest,
    /// Steered by an importance matrix, which gives up weights that the model hardly uses: they may round to nothing, and
    /// only a block that grows is out of line.
    Steered,
    /// With error feedback: a weight moves on purpose where that repairs what others and the blocks before it lost.
    FedBack,
}

fn ceilings(rounding: Rounding, nearest: [f64; 4], steered: [f64; 2]) -> Ceilings {
    let [unit, tensor, unit_gain, block_gain] = nearest;
    let (unit, tensor) = match rounding {
        Rounding::Nearest => (unit, tensor),
        Rounding::Steered => (steered[0], steered[1]),
        Rounding::FedBack => (
            (3.0 * steered[0]).max(MOVED[0]),
            (2.0 * steered[1]).max(MOVED[1]),
        ),
    };
    match rounding {
        Rounding::Nearest => Ceilings {
            unit,
            tensor,
            unit_gain: (1.0 - unit_gain, 1.0 + unit_gain),
            block_gain: (1.0 - block_gain, 1.0 + block_gain),
        },
        Rounding::Steered => Ceilings {
            unit,
            tensor,
            unit_gain: (-0.05, 1.0 + unit_gain.max(0.6)),
            block_gain: (-0.05, 1.0 + block_gain.max(0.3)),
        },
        Rounding::FedBack => Ceilings {
            unit,
            tensor,
            unit_gain: (-0.2, 1.0 + unit_gain.max(1.2)),
            block_gain: (-0.2, 1.0 + block_gain.max(0.6)),
        },
    }
}

/// From which relative error on a row is another row. Rows of elsewhere are about sqrt(2) away; feedback with few samples
/// moves weights of inputs that were hardly seen nearly as far.
fn bad_row(typical: f64, rounding: Rounding) -> f64 {
    match rounding {
        Rounding::Nearest | Rounding::Steered => (4.0 * typical).clamp(0.05, 1.2),
        Rounding::FedBack => 1.2,
    }
}

/// How far error feedback moves units and tensors of fine types, whose own steps say nothing of what they make up for:
/// about 1.6 times the largest on trained models, with full correction of targets.
const MOVED: [f64; 2] = [0.15, 0.06];

/// The expectation of a type, `None` for types that cannot be decoded.
///
/// Ceilings of rounding to the nearest are about 1.6 times, gains 2 to 3 times as far from 1 as the largest of 3000
/// tensors: trained models (one with outlier channels 100 times the rest) and random ones, plain and widened. Those of
/// steered rounding are about 1.6 times the largest that importance matrices of these models gave, the outliers the
/// worst. NVFP4, Q1_0 and Q2_0, which are not written here, follow from their grids.
pub fn of(ty: GgmlType, rounding: Rounding) -> Option<Expectation> {
    use GgmlType as T;
    let row = |unit, typical, ends, multiplier, nearest, searched| {
        Some((unit, typical, ends, multiplier, nearest, searched))
    };
    // unit, typical, ends, multiplier; nearest: unit, tensor, gain of units, gain of blocks; steered: unit, tensor
    let (unit, typical, ends_ceiling, multiplier, nearest, searched) = match ty {
        T::F32 => row(32, 0.0, 1.0, 0.0, [1e-6, 1e-6, 0.01, 0.01], [1e-6, 1e-6]),
        T::F16 => row(32, 2e-4, 1.0, 1.0, [5e-4, 2e-4, 0.01, 0.01], [5e-4, 2e-4]),
        T::BF16 => row(
            32,
            1.7e-3,
            1.0,
            0.0,
            [3e-3, 1.2e-3, 0.02, 0.02],
            [3e-3, 1.2e-3],
        ),
        T::Q8_0 => row(
            32,
            6.8e-3,
            0.15,
            127.0,
            [5e-3, 3.5e-3, 0.05, 0.05],
            [5e-3, 3.5e-3],
        ),
        T::Q6_K => row(
            16,
            0.022,
            0.15,
            4064.0,
            [0.02, 0.01, 0.05, 0.03],
            [0.22, 0.018],
        ),
        T::Q5_0 => row(32, 0.054, 0.2, 16.0, [0.05, 0.028, 0.1, 0.1], [0.2, 0.05]),
        T::Q5_1 => row(
            32,
            0.045,
            0.25,
            31.0,
            [0.037, 0.026, 0.1, 0.1],
            [0.27, 0.03],
        ),
        T::Q5_K => row(
            32,
            0.042,
            0.25,
            1953.0,
            [0.03, 0.02, 0.08, 0.03],
            [0.25, 0.022],
        ),
        T::Q4_0 => row(32, 0.11, 0.25, 8.0, [0.11, 0.055, 0.2, 0.2], [0.27, 0.095]),
        T::Q4_1 => row(32, 0.093, 0.3, 15.0, [0.075, 0.05, 0.15, 0.15], [0.4, 0.08]),
        T::Q4_K => row(
            32,
            0.084,
            0.3,
            945.0,
            [0.06, 0.037, 0.1, 0.05],
            [0.35, 0.045],
        ),
        T::IQ4_NL => row(
            32,
            0.094,
            0.2,
            127.0,
            [0.09, 0.055, 0.15, 0.15],
            [0.26, 0.16],
        ),
        T::IQ4_XS => row(
            32,
            0.09,
            0.2,
            3937.0,
            [0.075, 0.045, 0.15, 0.08],
            [0.25, 0.065],
        ),
        T::MXFP4 => row(32, 0.13, 0.3, 0.0, [0.17, 0.085, 0.5, 0.5], [0.17, 0.085]),
        T::NVFP4 => row(16, 0.1, 0.3, 0.0, [0.15, 0.08, 0.3, 0.3], [0.15, 0.08]),
        T::Q3_K => row(
            16,
            0.185,
            0.4,
            124.0,
            [0.22, 0.08, 0.35, 0.15],
            [0.36, 0.085],
        ),
        T::Q2_K => row(16, 0.33, 0.7, 45.0, [0.35, 0.15, 0.5, 0.2], [0.55, 0.16]),
        T::Q2_0 => row(32, 0.5, 1.0, 2.0, [0.5, 0.35, 1.0, 1.0], [0.5, 0.35]),
        T::TQ1_0 | T::TQ2_0 => row(32, 0.83, 1.0, 1.0, [0.6, 0.42, 1.5, 1.2], [0.6, 0.42]),
        T::Q1_0 => row(32, 0.6, 1.0, 1.0, [0.9, 0.6, 1.5, 1.2], [0.9, 0.6]),
        _ => None,
    }?;
    // Floats have one nearest value for everything, and nothing moves them.
    let rounding = match (ty, rounding) {
        (T::F32 | T::F16 | T::BF16, Rounding::FedBack) => Rounding::Nearest,
        (_, rounding) => rounding,
    };
    let ceilings = ceilings(rounding, nearest, searched);
    Some(Expectation {
        block: ty.block_elements().max(FLOAT_BLOCK),
        unit,
        typical,
        unit_ceiling: ceilings.unit,
        tensor_ceiling: ceilings.tensor,
        bad_row: bad_row(typical, rounding),
        ends_ceiling,
        unit_gain: ceilings.unit_gain,
        block_gain: ceilings.block_gain,
        by_row: rounding == Rounding::FedBack,
        multiplier,
    })
}

/// The expectation of a packed linear whose rows have `columns` weights.
///
/// Integers: of `n = 2^(bits - 1) - 1` steps from 0 to the largest weight of a group an error of half a step is `0.5 / n`
/// by the yardstick, its root mean square `1 / (n sqrt(12))`; writers that divide by half a step more, round scales to
/// BF16 or search smaller ones take up to 1.6 times that. Normally distributed weights reach about
/// `sqrt(2 ln(2 group))` of their standard deviation. E4M3 has steps of an eighth to a sixteenth of a weight.
pub fn packed(scheme: &Scheme, columns: usize, rounding: Rounding) -> Expectation {
    let block = match scheme.layout.group() {
        Some(Group::Columns(size)) => size,
        Some(Group::Row | Group::Tensor) | None => columns,
    };
    let steps = f64::from((1u32 << (scheme.layout.bits() - 1)) - 1).max(1.0);
    let spread = (2.0 * (2.0 * block as f64).ln()).sqrt();
    let (typical, nearest) = match scheme.layout {
        Layout::Nvfp4(_) => (0.1, [0.15, 0.08, 0.3, 0.3]),
        Layout::Float8 { .. } => (0.026, [0.05, 0.035, 0.1, 0.1]),
        _ => (
            spread / (steps * 12f64.sqrt()),
            [0.8 / steps, 0.47 / steps, 1.8 / steps, 1.8 / steps],
        ),
    };
    // F16 holds small scales in steps, BF16 does not.
    let multiplier = match scheme.layout {
        Layout::Gptq { .. } => steps + 1.0,
        _ => 0.0,
    };
    let ceilings = ceilings(rounding, nearest, [2.5 * nearest[0], 1.7 * nearest[1]]);
    Expectation {
        block,
        unit: block.min(FLOAT_BLOCK),
        typical,
        unit_ceiling: ceilings.unit,
        tensor_ceiling: ceilings.tensor,
        bad_row: bad_row(typical, rounding),
        // Codes are not looked at.
        ends_ceiling: 1.0,
        unit_gain: ceilings.unit_gain,
        block_gain: ceilings.block_gain,
        by_row: rounding == Rounding::FedBack,
        multiplier,
    }
}
