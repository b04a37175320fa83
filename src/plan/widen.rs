//! Exact widening: zeros appended to widths so that every row fills whole super-blocks.
//!
//! With `H'` columns instead of `H`, the residual stream is stored as `[x, 0] * sqrt(H'/H)`: its mean square,
//! and with it both norm epsilons, stay what they were. Everything that writes to the stream takes the factor
//! `sqrt(H'/H)`, every norm over it `sqrt(H/H')`. MLP and expert widths grow by dead units: rows of zeros in
//! the up projection (`relu(0)^2 = 0`) and columns of zeros in the down projection.

use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{Stream, Widths};

/// The super-block of K-quants and IQ4_XS.
const SUPER_BLOCK: usize = 256;

/// Widths before and after.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Widening {
    /// The widths of the checkpoint.
    pub from: Widths,
    /// The widths of the artifact.
    pub to: Widths,
}

impl Widening {
    /// Nothing changes.
    pub fn none(config: &NemotronHConfig) -> Self {
        let widths = Widths::of(config);
        Self {
            from: widths,
            to: widths,
        }
    }

    /// Every width rounded up to a multiple of 256.
    ///
    /// # Errors
    /// The hidden width cannot grow together with a multi-token-prediction head: the head ends in a norm
    /// that subtracts the mean, which appended zeros would change.
    pub fn to_super_blocks(config: &NemotronHConfig, with_mtp: bool) -> Result<Self> {
        let from = Widths::of(config);
        let up = |width: usize| width.next_multiple_of(SUPER_BLOCK);
        let to = Widths {
            hidden: up(from.hidden),
            intermediate: up(from.intermediate),
            expert_intermediate: up(from.expert_intermediate),
            shared_intermediate: up(from.shared_intermediate),
            latent: up(from.latent),
        };
        if to.hidden != from.hidden && with_mtp && config.nextn_predict_layers > 0 {
            let fault = Fault::new(format!(
                "cannot widen hidden_size {} with a multi-token-prediction head in the file",
                from.hidden
            ));
            return Err(Error::Plan(fault.hint("drop the head with `--no-mtp`")));
        }
        Ok(Self { from, to })
    }

    /// Whether any width changes.
    pub fn is_widened(&self) -> bool {
        self.from != self.to
    }

    /// Sizes of the network after widening.
    pub fn widened(&self, config: &NemotronHConfig) -> NemotronHConfig {
        let mut config = config.clone();
        config.hidden_size = self.to.hidden;
        if self.to.intermediate > 0 {
            config.intermediate_size = Some(self.to.intermediate);
        }
        if let Some(moe) = &mut config.moe {
            moe.moe_intermediate_size = self.to.expert_intermediate;
            moe.moe_shared_expert_intermediate_size = self.to.shared_intermediate;
            moe.moe_latent_size = moe.moe_latent_size.map(|_| self.to.latent);
        }
        config
    }

    /// The factor a tensor takes for the way it meets the residual stream.
    pub fn factor(&self, stream: Stream) -> f32 {
        let growth = self.to.hidden as f64 / self.from.hidden as f64;
        match stream {
            Stream::Apart => 1.0,
            Stream::Writes => growth.sqrt() as f32,
            Stream::Norm => (1.0 / growth).sqrt() as f32,
            Stream::NormOfTiedHead => (1.0 / growth) as f32,
        }
    }

    /// Name, old and new width of everything that changed, for metadata and reports.
    pub fn changes(&self) -> Vec<(&'static str, usize, usize)> {
        let (from, to) = (self.from, self.to);
        [
            ("hidden_size", from.hidden, to.hidden),
            ("intermediate_size", from.intermediate, to.intermediate),
            (
                "moe_intermediate_size",
                from.expert_intermediate,
                to.expert_intermediate,
            ),
            (
                "moe_shared_expert_intermediate_size",
                from.shared_intermediate,
                to.shared_intermediate,
            ),
            ("moe_latent_size", from.latent, to.latent),
        ]
        .into_iter()
        .filter(|(_, from, to)| from != to)
        .collect()
    }
}
