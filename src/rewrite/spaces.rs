//! Which spaces a network has, and whether rewrites are rewrites of that network.

use std::collections::BTreeMap;

use super::Rewrites;
use super::space::Space;
use crate::error::{Error, Fault, Result};
use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;
use crate::model::nemotron_h::Widths;

/// What may happen to a space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Freedom {
    /// Scales only: the normed stream, keys and queries.
    Scale,
    /// Scales, and an order inside runs of this length.
    Order(usize),
    /// Scales, and a rotation of runs of this length.
    Rotation(usize),
}

/// A space that the architecture has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KnownSpace {
    /// Parts of a stack.
    pub matrices: usize,
    /// Channels of a part.
    pub width: usize,
    /// What may happen to it.
    pub freedom: Freedom,
}

/// The final norm's space.
pub const FINAL_NORM: &str = "output_norm";

/// All spaces of a network by the tensor that produces them.
pub fn known_spaces(config: &NemotronHConfig) -> BTreeMap<String, KnownSpace> {
    let widths = Widths::of(config);
    let one = |width, freedom| KnownSpace {
        matrices: 1,
        width,
        freedom,
    };
    let mut spaces = BTreeMap::new();
    spaces.insert(FINAL_NORM.to_owned(), one(widths.hidden, Freedom::Scale));
    for (block, kind) in config.pattern.kinds().iter().enumerate() {
        let mut insert = |name: &str, space| spaces.insert(format!("blk.{block}.{name}"), space);
        insert("attn_norm", one(widths.hidden, Freedom::Scale));
        match kind {
            BlockKind::Mamba => {
                let freedom = Freedom::Order(config.mamba_head_dim);
                insert("ssm_norm", one(config.inner_size(), freedom));
            }
            BlockKind::Attention => {
                let width = config.num_key_value_heads * config.head_dim;
                insert("attn_k", one(width, Freedom::Scale));
                insert("attn_v", one(width, Freedom::Rotation(config.head_dim)));
            }
            BlockKind::Mlp => {
                let width = widths.intermediate;
                insert("ffn_up", one(width, Freedom::Order(width)));
            }
            BlockKind::Moe => {
                let width = widths.expert_intermediate;
                let experts = KnownSpace {
                    matrices: config.moe.as_ref().map_or(0, |moe| moe.n_routed_experts),
                    width,
                    freedom: Freedom::Order(width),
                };
                insert("ffn_up_exps", experts);
                let width = widths.shared_intermediate;
                insert("ffn_up_shexp", one(width, Freedom::Order(width)));
                if widths.latent > 0 {
                    let latent = one(widths.latent, Freedom::Rotation(widths.latent));
                    insert("ffn_latent_down", latent);
                    insert("ffn_down_exps", latent);
                }
            }
        }
    }
    spaces
}

impl Rewrites {
    /// Whether these are rewrites of a network of these sizes, as exact as they claim: every factor positive and finite,
    /// every rotation orthogonal, every order a permutation.
    ///
    /// # Errors
    /// The first that is not.
    pub fn check(&self, config: &NemotronHConfig) -> Result<()> {
        let fault = |what: String, space: &str| {
            let fault = Fault::new(what).in_tensor(space);
            Error::Plan(fault.hint("the rewrites are those of another model"))
        };
        let known = known_spaces(config);
        for (name, space) in &self.spaces {
            let known = known
                .get(name)
                .ok_or_else(|| fault("the network has no such space".into(), name))?;
            check_space(space, known).map_err(|what| fault(what, name))?;
        }
        let Some(rotation) = &self.rotation else {
            return Ok(());
        };
        if rotation.size() != config.hidden_size {
            let what = format!(
                "rotates {} channels, the residual stream has {}",
                rotation.size(),
                config.hidden_size
            );
            return Err(fault(what, "rotation"));
        }
        let is_norm = |name: &&String| name.ends_with("_norm") && !name.ends_with("ssm_norm");
        match known
            .keys()
            .filter(is_norm)
            .find(|norm| self.space(norm).is_none())
        {
            None => Ok(()),
            Some(norm) => Err(fault(
                "the stream is rotated, but this norm keeps its weight".into(),
                norm,
            )),
        }
    }
}

fn check_space(space: &Space, known: &KnownSpace) -> std::result::Result<(), String> {
    let (found, expected) = ([space.matrices, space.width], [known.matrices, known.width]);
    if found != expected {
        return Err(format!(
            "has shape {found:?}, the network implies {expected:?}"
        ));
    }
    if space.order.is_some() {
        let Freedom::Order(run) = known.freedom else {
            return Err("its channels cannot be reordered".into());
        };
        for matrix in 0..space.matrices {
            let order = space.order_of(matrix).unwrap_or_default();
            if !is_order(order, space.width, run) {
                return Err(format!("its order is no permutation inside runs of {run}"));
            }
        }
    }
    match (&space.rotation, known.freedom) {
        (None, _) => Ok(()),
        (Some(rotation), Freedom::Rotation(run)) if rotation.size() == run => Ok(()),
        (Some(rotation), _) => Err(format!("cannot be rotated in runs of {}", rotation.size())),
    }
}

/// Whether every run is permuted within itself.
fn is_order(order: &[u32], width: usize, run: usize) -> bool {
    let mut seen = vec![false; width];
    order.len() == width
        && order.iter().enumerate().all(|(index, source)| {
            let source = *source as usize;
            let inside = source < width && source / run == index / run;
            inside && !std::mem::replace(&mut seen[source], true)
        })
}
