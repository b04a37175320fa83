//! How large an error each type explains.
//!
//! Enters: a type. Leaves: ceilings. Computes nothing.
//!
//! An error is measured by a yardstick: the largest magnitude of the reference's block, plus what the smallest step of
//! an F16 scale amounts to. Against it rounding is bounded whatever the weights are, while the error relative to the
//! weights themselves grows with every outlier.

use nemoconv_formats::GgmlType;

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
    /// Largest value by which a scale of F16 is multiplied.
    multiplier: f64,
}

impl Expectation {
    /// What the yardstick owes to the step of subnormal F16 numbers, 2^-24.
    pub fn quantum(&self) -> f64 {
        self.multiplier / f64::from(1 << 24) / self.unit_ceiling
    }
}

/// The expectation of a type, `None` for types that cannot be decoded.
pub fn of(ty: GgmlType) -> Option<Expectation> {
    use GgmlType as T;
    // type, unit, typical, unit ceiling, tensor ceiling, ends ceiling, multiplier
    let (unit, typical, unit_ceiling, tensor_ceiling, ends_ceiling, multiplier) = match ty {
        T::F32 => (32, 0.0, 1e-6, 1e-6, 1.0, 0.0),
        T::F16 => (32, 2.1e-4, 5e-4, 5e-4, 1.0, 1.0),
        T::BF16 => (32, 1.7e-3, 4e-3, 4e-3, 1.0, 0.0),
        T::Q8_0 => (32, 5.5e-3, 4e-3, 4e-3, 0.2, 127.0),
        T::Q6_K => (16, 0.019, 0.06, 0.03, 0.2, 4064.0),
        T::Q5_0 => (32, 0.04, 0.06, 0.03, 0.3, 16.0),
        T::Q5_1 => (32, 0.035, 0.06, 0.03, 0.3, 31.0),
        T::Q5_K => (32, 0.035, 0.06, 0.03, 0.3, 1953.0),
        T::Q4_0 => (32, 0.09, 0.12, 0.06, 0.3, 8.0),
        T::Q4_1 => (32, 0.075, 0.12, 0.06, 0.4, 15.0),
        T::Q4_K => (32, 0.073, 0.12, 0.06, 0.4, 945.0),
        T::IQ4_NL => (32, 0.075, 0.12, 0.06, 0.3, 127.0),
        T::IQ4_XS => (32, 0.077, 0.12, 0.06, 0.3, 3937.0),
        T::MXFP4 => (32, 0.13, 0.2, 0.1, 0.5, 0.0),
        T::NVFP4 => (16, 0.1, 0.2, 0.1, 0.5, 0.0),
        T::Q3_K => (16, 0.16, 0.25, 0.12, 0.6, 124.0),
        T::Q2_K => (16, 0.3, 0.4, 0.2, 0.9, 45.0),
        T::Q2_0 => (32, 0.5, 0.6, 0.4, 1.0, 2.0),
        T::TQ1_0 | T::TQ2_0 => (32, 0.8, 0.6, 0.4, 1.0, 1.0),
        T::Q1_0 => (32, 0.6, 0.9, 0.6, 1.0, 1.0),
        _ => return None,
    };
    Some(Expectation {
        block: ty.block_elements().max(32),
        unit,
        typical,
        unit_ceiling,
        tensor_ceiling,
        bad_row: (4.0 * typical).clamp(0.05, 1.2),
        ends_ceiling,
        multiplier,
    })
}
