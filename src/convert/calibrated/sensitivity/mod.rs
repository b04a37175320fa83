//! How much each tensor's rounding costs the network: local losses per type, and the divergence that they lead to.
//!
//! Enters: the original weights, samples, groups of tensors that share a type. Leaves: per group and type an estimate of
//! the KL divergence. Forward passes only. Decides nothing about types.
//!
//! A group is rounded alone, at its lowest type and at one of about four bits, and the network is run on text that the
//! rounding has not seen: `KL = a l`, l the local loss `tr(E M E^T) / tr(W M W^T)`. Local losses of all other types come
//! from a sample of rows. Everything before a group's block is run once for all. Weights are those after their rewrites;
//! behind the block that is looked at the stream is turned back and the stored network goes on.
//!
//! [`trial`] then rounds all groups at once, with the types that were chosen, and measures what that does.

mod batches;
mod curve;
mod local_losses;
mod predictions;
mod probing;
pub mod trial;

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv_formats::GgmlType;

use super::Rounding;
use crate::backend::Machines;
use crate::backend::cpu::kernels::Isa;
use crate::calibrate::samples::Samples;
use crate::convert::Progress;
use crate::error::{Error, Result};
use crate::forward::required;
use crate::rewrite::RewrittenModel;
use probing::Probing;

/// Bits of the second probe.
const MIDDLE_BITS: f64 = 4.5;

/// Tensors that share a type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Group {
    /// What they have in common.
    pub name: String,
    /// GGUF names, all of one block.
    pub tensors: Vec<String>,
    /// Types to look at, by size.
    pub types: Vec<GgmlType>,
}

/// What one type costs a group.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TypeLoss {
    /// The type.
    pub ty: GgmlType,
    /// `tr(E M E^T) / tr(W M W^T)`, summed over the tensors.
    pub loss: f64,
    /// What that adds to the KL divergence, nats.
    pub kl_divergence: f64,
}

/// What every type costs a group.
#[derive(Debug, Clone, PartialEq)]
pub struct Sensitivity {
    /// KL divergence per local loss, where losses are small.
    pub gain: f64,
    /// One per type of the group.
    pub types: Vec<TypeLoss>,
}

/// A measurement about to be made.
pub struct Measurement<'a> {
    /// Where the network is run.
    pub machines: &'a Machines,
    /// The original weights after their rewrites, by GGUF name.
    pub weights: &'a RewrittenModel,
    /// What the network reads.
    pub samples: &'a Samples,
    /// How weights will be rounded.
    pub rounding: Rounding,
    /// What is looked at.
    pub groups: &'a [Group],
    /// Told how far the work is, in bytes of the original weights.
    pub progress: &'a dyn Progress,
    /// Raised to stop.
    pub stop: &'a AtomicBool,
}

impl Measurement<'_> {
    /// Measures every group, in order.
    ///
    /// # Errors
    /// A weight cannot be read, a block computes something that is not a number, a raised `stop`.
    pub fn run(&self) -> Result<Vec<Sensitivity>> {
        let mut bytes = 0;
        for tensor in self.groups.iter().flat_map(|group| &group.tensors) {
            bytes += required(self.weights.stored(), tensor)?.bytes();
        }
        self.progress.begin("measuring", bytes);
        let mut probing = Probing::begin(self)?;
        let mut measured: BTreeMap<&str, Sensitivity> = BTreeMap::new();
        probing.embedding(&mut measured)?;
        for block in 0..self.weights.stored().config().pattern.kinds().len() {
            probing.block(block, &mut measured)?;
        }
        probing.head(&mut measured)?;
        self.progress.end();
        let found = self
            .groups
            .iter()
            .map(|group| measured.remove(group.name.as_str()));
        Ok(found.map(Option::unwrap_or_default).collect())
    }

    fn isa(&self) -> Isa {
        Isa::detect()
    }

    fn check_stop(&self) -> Result<()> {
        match self.stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    }
}

impl Sensitivity {
    /// With every divergence multiplied by a factor.
    pub fn scaled(&self, factor: f64) -> Self {
        let scaled = |found: &TypeLoss| TypeLoss {
            kl_divergence: found.kl_divergence * factor,
            ..*found
        };
        Self {
            gain: self.gain * factor,
            types: self.types.iter().map(scaled).collect(),
        }
    }
}

impl Default for Sensitivity {
    /// Of a tensor that nothing reads.
    fn default() -> Self {
        Self {
            gain: 0.0,
            types: Vec::new(),
        }
    }
}
/// Types that a group is probed with: its lowest, and one of about four bits.
fn probe_types(group: &Group) -> Vec<GgmlType> {
    let middle = group
        .types
        .iter()
        .find(|ty| ty.bits_per_weight() >= MIDDLE_BITS);
    let mut types: Vec<GgmlType> = group.types.iter().take(1).chain(middle).copied().collect();
    types.dedup();
    types
}
