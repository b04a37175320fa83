//! A mixture of experts backwards. Which experts a token reaches and with what weights is held fixed: the router gets no
//! gradient and passes none on.

use super::block::{BlockWeights, Pass};
use super::matrix::Matrix;
use super::mlp::{Hidden, Mlp};
use crate::backend::{Backend, ExpertRows, RouteShape};
use crate::error::Result;
use crate::forward::mixers::route_shape;

/// Twin of [`crate::forward::mixers::Moe`].
pub struct Moe {
    router: Matrix,
    router_bias: Vec<f32>,
    route: RouteShape,
    experts: Mlp,
    /// Into the latent space and back.
    latent: Option<(Matrix, Matrix)>,
    shared: Mlp,
}

/// An expert's share of the tokens.
struct Share {
    expert: usize,
    rows: ExpertRows,
    input: Vec<f32>,
    hidden: Hidden,
}

impl Moe {
    /// Opens the weights.
    pub fn open(weights: &BlockWeights) -> Result<Self> {
        let moe = weights.config().moe.as_ref();
        let is_latent = moe.is_some_and(|moe| moe.moe_latent_size.is_some());
        let latent = match is_latent {
            true => Some((
                weights.matrix("ffn_latent_down")?,
                weights.matrix("ffn_latent_up")?,
            )),
            false => None,
        };
        Ok(Self {
            router: weights.matrix("ffn_gate_inp")?,
            router_bias: weights.vector("exp_probs_b.bias")?,
            route: moe.map(route_shape).unwrap_or_default(),
            experts: Mlp::open(weights, "ffn_up_exps", "ffn_down_exps")?,
            latent,
            shared: Mlp::open(weights, "ffn_up_shexp", "ffn_down_shexp")?,
        })
    }

    /// The gradient at `input [rows, hidden]`.
    pub fn back(&self, mut pass: Pass, input: &Vec<f32>, gradient: &[f32]) -> Result<Vec<f32>> {
        let hidden = self.shared.hidden(&pass, 0, input)?;
        let mut sum = self
            .shared
            .back_from(&mut pass, 0, (input, &hidden), gradient)?;
        let logits = self.router.apply(pass.backend, 0, input)?;
        let experts = pass.backend.route(&logits, &self.router_bias, self.route)?;
        let routed = match &self.latent {
            None => {
                let shares = self.shares(&pass, experts, input)?;
                self.back_experts(&mut pass, &shares, gradient)?
            }
            Some(latent) => self.back_latent(&mut pass, latent, experts, input, gradient)?,
        };
        pass.backend.add(&mut sum, &routed)?;
        Ok(sum)
    }

    fn back_latent(
        &self,
        pass: &mut Pass,
        (down, up): &(Matrix, Matrix),
        experts: Vec<ExpertRows>,
        input: &Vec<f32>,
        gradient: &[f32],
    ) -> Result<Vec<f32>> {
        let narrowed = down.apply(pass.backend, 0, input)?;
        let shares = self.shares(pass, experts, &narrowed)?;
        let mixed = self.mix(pass, &shares, narrowed.len())?;
        let at_mixed = pass.back(up, 0, &mixed, gradient)?;
        let at_narrowed = self.back_experts(pass, &shares, &at_mixed)?;
        pass.back(down, 0, input, &at_narrowed)
    }

    /// What the experts that are reached compute on their way.
    fn shares(
        &self,
        pass: &Pass,
        experts: Vec<ExpertRows>,
        input: &Vec<f32>,
    ) -> Result<Vec<Share>> {
        let reached = experts.into_iter().enumerate();
        let reached = reached.filter(|(_, rows)| !rows.rows.is_empty());
        let share = |(expert, rows): (usize, ExpertRows)| {
            let input = pass.backend.gather(input, self.experts.width(), &rows.rows)?;
            Ok(Share {
                expert,
                hidden: self.experts.hidden(pass, expert, &input)?,
                rows,
                input,
            })
        };
        reached.map(share).collect()
    }

    /// The weighted sum of what experts give, `len` values.
    fn mix(&self, pass: &Pass, shares: &[Share], len: usize) -> Result<Vec<f32>> {
        let mut sum = vec![0.0; len];
        for share in shares {
            let out = self.experts.output(pass, share.expert, &share.hidden)?;
            let backend = pass.backend;
            backend.scatter_add(&mut sum, self.experts.width(), &out, &share.rows)?;
        }
        Ok(sum)
    }

    /// From the gradient at the weighted sum of experts to that at what they read, `[rows, width]` both.
    fn back_experts(
        &self,
        pass: &mut Pass,
        shares: &[Share],
        gradient: &[f32],
    ) -> Result<Vec<f32>> {
        let width = self.experts.width();
        let mut sum = vec![0.0; gradient.len()];
        for share in shares {
            let at_output = weighted(gradient, width, &share.rows);
            let inside = (&share.input[..], &share.hidden);
            let at_input = self
                .experts
                .back_from(pass, share.expert, inside, &at_output)?;
            let ones = ExpertRows {
                rows: share.rows.rows.clone(),
                weights: vec![1.0; share.rows.rows.len()],
            };
            pass.backend.scatter_add(&mut sum, width, &at_input, &ones)?;
        }
        Ok(sum)
    }
}

/// Some rows of `values [_, width]`, each times its weight.
fn weighted(values: &[f32], width: usize, rows: &ExpertRows) -> Vec<f32> {
    let rows = rows.rows.iter().zip(&rows.weights);
    let rows = rows.flat_map(|(row, weight)| {
        let row = &values[*row as usize * width..][..width];
        row.iter().map(move |value| value * weight)
    });
    rows.collect()
}
