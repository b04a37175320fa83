//! The Mamba-2 mixer backwards.

use super::block::{BlockWeights, Pass, segments};
use super::matrix::Matrix;
use super::vjp::{self, Assembly, Channels, Scan};
use crate::backend::{Backend, ScanShape, ScanWeights};
use crate::error::Result;
use crate::forward::mixers::scan_shape;
use crate::forward::numerics::Numerics;

/// Twin of [`crate::forward::mixers::Mamba2`].
pub struct Mamba2 {
    in_proj: Matrix,
    conv_weight: Vec<f32>,
    conv_bias: Vec<f32>,
    a: Vec<f32>,
    d: Vec<f32>,
    dt_bias: Vec<f32>,
    norm: Vec<f32>,
    out_proj: Matrix,
    shape: ScanShape,
    eps: f32,
}

/// What the forward pass computes on its way.
struct Kept {
    /// z, x B C, dt: `[rows, in_proj.out_features]`.
    projected: Vec<f32>,
    /// Behind the convolution, `[rows, conv_dim]`.
    xbc: Vec<f32>,
    /// Behind the scan, `[rows, inner]`.
    y: Vec<f32>,
    /// What `out_proj` reads, `[rows, inner]`.
    gated: Vec<f32>,
}

impl Kept {
    fn channels(&self, stride: usize, first: usize) -> Channels<'_> {
        Channels {
            values: &self.projected,
            stride,
            first,
        }
    }
}

impl Mamba2 {
    /// Opens the weights.
    pub fn open(weights: &BlockWeights) -> Result<Self> {
        Ok(Self {
            in_proj: weights.matrix("ssm_in")?,
            conv_weight: weights.vector("ssm_conv1d.weight")?,
            conv_bias: weights.vector("ssm_conv1d.bias")?,
            a: weights.vector("ssm_a")?,
            d: weights.vector("ssm_d")?,
            dt_bias: weights.vector("ssm_dt.bias")?,
            norm: weights.vector("ssm_norm.weight")?,
            out_proj: weights.matrix("ssm_out")?,
            shape: scan_shape(weights.config(), &Numerics::EXACT),
            eps: weights.config().norm_epsilon(),
        })
    }

    /// The gradient at `input [rows, hidden]`.
    pub fn back(&self, mut pass: Pass, input: &Vec<f32>, gradient: &[f32]) -> Result<Vec<f32>> {
        let kept = self.run(&pass, input)?;
        let at_gated = pass.back(&self.out_proj, 0, &kept.gated, gradient)?;
        let at_projected = self.back_inside(&pass, &kept, &at_gated);
        pass.back(&self.in_proj, 0, input, &at_projected)
    }

    fn run(&self, pass: &Pass, input: &Vec<f32>) -> Result<Kept> {
        let (backend, shape) = (pass.backend, self.shape);
        let (inner, width) = (shape.inner(), self.in_proj.out_features());
        let projected = self.in_proj.apply(backend, 0, input)?;
        let raw_rows = self.conv_weight.len() - self.conv_bias.len();
        let mut conv_states = pass.fresh(vec![0.0; raw_rows]);
        let xbc = backend.conv1d_silu(
            &projected,
            width,
            inner,
            &self.conv_weight,
            &self.conv_bias,
            &mut segments(pass.sequences, &mut conv_states),
        )?;
        let mut states = pass.fresh(vec![0.0; shape.state_len()]);
        let y = backend.selective_scan(
            &xbc,
            &projected,
            width,
            self.scan_weights(),
            shape,
            &mut segments(pass.sequences, &mut states),
        )?;
        let gated = backend.gated_rms_norm(
            y.clone(),
            &projected,
            width,
            &self.norm,
            shape.groups,
            self.eps,
        )?;
        Ok(Kept {
            projected,
            xbc,
            y,
            gated,
        })
    }

    /// From the gradient behind the gated norm to that at what `in_proj` gives.
    fn back_inside(&self, pass: &Pass, kept: &Kept, gradient: &[f32]) -> Vec<f32> {
        let (shape, width) = (self.shape, self.in_proj.out_features());
        let inner = shape.inner();
        let gate = kept.channels(width, 0);
        let (at_y, at_gate) =
            vjp::gated_rms_norm(&kept.y, gate, &self.norm, shape.groups, self.eps, gradient);
        let scan = Scan {
            xbc: &kept.xbc,
            dt: &kept.projected,
            dt_stride: width,
            weights: self.scan_weights(),
            shape,
            gradient: &at_y,
        };
        let at_scan = vjp::selective_scan(&scan, pass.sequences);
        let raw = kept.channels(width, inner);
        let (weight, bias) = (&self.conv_weight, &self.conv_bias);
        let at_raw = vjp::conv1d_silu(raw, weight, bias, pass.sequences, &at_scan.xbc);
        let mut all = Assembly::new(kept.y.len() / inner, width);
        all.add(0, 0, &at_gate, inner);
        all.add(0, inner, &at_raw, shape.conv_dim());
        all.add(0, width - shape.heads, &at_scan.dt, shape.heads);
        all.values
    }

    fn scan_weights(&self) -> ScanWeights<'_, Vec<f32>> {
        ScanWeights {
            a: &self.a,
            d: &self.d,
            dt_bias: &self.dt_bias,
        }
    }
}
