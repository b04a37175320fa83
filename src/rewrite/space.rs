//! A space between two matrices of the network, and how it is rewritten.

use std::sync::Arc;

use super::map::AxisMap;
use super::matrix::SquareMatrix;

/// The values between the tensor that produces them and the one that consumes them: `u` becomes `(u / scale) Q`, or
/// `(u / scale)[order]`. Spaces of a stack have one part per expert, which share Q.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Space {
    /// Parts of a stack; 1 for everything but routed experts.
    pub matrices: usize,
    /// Channels of a part.
    pub width: usize,
    /// What every channel is divided by, `[matrices * width]`.
    pub scale: Option<Vec<f64>>,
    /// Orthogonal; the same for every run of its size.
    pub rotation: Option<Arc<SquareMatrix>>,
    /// Which channel comes where, within each part: `[matrices * width]`.
    pub order: Option<Vec<u32>>,
}

impl Space {
    /// A space in which nothing changes.
    pub fn unchanged(matrices: usize, width: usize) -> Self {
        Self {
            matrices,
            width,
            ..Self::default()
        }
    }

    /// Scales of one part.
    pub fn scale_of(&self, matrix: usize) -> Option<&[f64]> {
        let scale = self.scale.as_ref()?;
        scale.get(matrix * self.width..(matrix + 1) * self.width)
    }

    /// Order of one part.
    pub fn order_of(&self, matrix: usize) -> Option<&[u32]> {
        let order = self.order.as_ref()?;
        order.get(matrix * self.width..(matrix + 1) * self.width)
    }

    /// What happens to the columns of the consumer: `W diag(scale) Q`.
    pub fn consumer(&self, matrix: usize) -> AxisMap<'_> {
        AxisMap {
            before: self.scale_of(matrix).map(Into::into),
            mix: self.rotation.as_deref(),
            after: None,
            order: self.order_of(matrix).map(Into::into),
        }
    }

    /// What happens to the rows of a producer that is linear: `Q^T diag(1 / scale) W`.
    pub fn producer(&self, matrix: usize) -> AxisMap<'_> {
        let scale = self.scale_of(matrix);
        AxisMap {
            before: scale.map(|scale| scale.iter().map(|s| 1.0 / s).collect()),
            mix: self.rotation.as_deref(),
            after: None,
            order: self.order_of(matrix).map(Into::into),
        }
    }

    /// The same where `relu(x)^2` lies between producer and space: `relu(x / sqrt(s))^2 = relu(x)^2 / s`.
    pub fn producer_before_relu2(&self, matrix: usize) -> AxisMap<'_> {
        let scale = self.scale_of(matrix);
        AxisMap {
            before: scale.map(|scale| scale.iter().map(|s| 1.0 / s.sqrt()).collect()),
            mix: None,
            after: None,
            order: self.order_of(matrix).map(Into::into),
        }
    }

    /// Scales as consumers see them that repeat each run of `run` channels `times` times: query heads of a key-value
    /// head.
    pub fn repeated_scale(&self, run: usize, times: usize) -> Option<Vec<f64>> {
        let runs = self.scale.as_ref()?.chunks(run);
        let repeated = runs.flat_map(|run| std::iter::repeat_n(run, times).flatten());
        Some(repeated.copied().collect())
    }
}
