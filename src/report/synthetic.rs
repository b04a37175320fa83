//! One report that has everything, with names that try to break out of every format.

use super::*;

/// A tensor name that no format may take at its word.
pub const HOSTILE: &str = "blk.0.<script>alert(\"x\")</script>&]]>\u{1}.weight";

/// Failed: two gates, one error, two warnings, a note.
pub fn report() -> ValidationReport {
    let mut report = ValidationReport::new(artifact(), Some(reference()));
    report.tool.version = "0.0.0".into();
    report.levels = levels();
    report.findings = findings();
    report.tensors = tensors();
    report.layers = layers(1.0);
    report.logits = Some(logits(0.02262, 1.0));
    report.noise_floor = Some(NoiseFloor {
        what: "BF16 rounding of the reference".into(),
        logits: logits(0.0000226, 0.001),
        layers: layers(0.02),
    });
    report.judge(&Gates {
        max_kld: Some(0.01),
        min_top1: Some(0.8),
        max_ppl_ratio: Some(1.02),
        ..Gates::default()
    });
    report
}

fn artifact() -> Subject {
    Subject {
        path: "out dir/nano-Q4_0.gguf".into(),
        format: "GGUF".into(),
        name: Some("Nemotron-H <nano> & friends".into()),
        architecture: Some("nemotron_h_moe".into()),
        file_type: Some("Q4_0".into()),
        bytes: Some(1_310_720),
        weights: Some(2_097_152),
    }
}

fn reference() -> Subject {
    Subject {
        path: "nemotron-h-nano".into(),
        format: "checkpoint".into(),
        file_type: Some("BF16".into()),
        bytes: Some(4_357_416),
        ..Subject::default()
    }
}

fn levels() -> Vec<LevelReport> {
    let ran = |level, scope: &[(&str, &str)]| LevelReport {
        scope: scope
            .iter()
            .map(|(what, count)| (what.to_string(), count.to_string()))
            .collect(),
        ..LevelReport::ran(level)
    };
    vec![
        ran(Level::Container, &[("tensors", "53"), ("keys", "41")]),
        ran(Level::Weights, &[("tensors", "53")]),
        LevelReport::skipped(Level::Tokenizer, "the reference has no tokenizer"),
        ran(Level::Logits, &[("positions", "1020"), ("chunks", "4")]),
    ]
}

fn findings() -> Vec<Finding> {
    let file = "out dir/nano-Q4_0.gguf";
    vec![
        Finding::new(Rule::TrailingBytes, "17 bytes follow the last tensor")
            .in_file(file)
            .at(0x140000),
        Finding::new(
            Rule::ErrorAboveExpectation,
            "relative error 0.31, expected at most 0.09 for Q4_0",
        )
        .in_file(file)
        .in_tensor(HOSTILE)
        .in_layer(0),
        Finding::new(Rule::MissingExpert, "expert 3 of 8 is all zeros")
            .in_file(file)
            .in_tensor("blk.4.ffn_up_exps.weight")
            .in_layer(4),
        Finding::new(Rule::StateDriftGrows, "heads 3 and 7 grow, slope 0.62")
            .severity(Severity::Note)
            .in_layer(2),
    ]
}

fn tensors() -> Vec<TensorError> {
    let tensor = |name: &str, ty: &str, relative_error, expected| TensorError {
        name: name.into(),
        ty: ty.into(),
        weights: 65_536,
        relative_error,
        max_abs_error: relative_error / 10.0,
        expected,
    };
    let mut tensors = vec![
        tensor("token_embd.weight", "Q8_0", 0.0055, Some(0.006)),
        tensor("output.weight", "Q6_K", 0.0182, Some(0.019)),
        tensor(HOSTILE, "Q4_0", 0.31, Some(0.09)),
        tensor("output_norm.weight", "F32", 0.0, None),
    ];
    for layer in 1..12 {
        let error = 0.08 + 0.003 * ((layer * 7) % 5) as f64;
        let name = format!("blk.{layer}.ssm_in.weight");
        tensors.push(tensor(&name, "Q4_0", error, Some(0.09)));
        let name = format!("blk.{layer}.ssm_out.weight");
        tensors.push(tensor(&name, "Q8_0", error / 16.0, Some(0.006)));
    }
    tensors
}

fn layers(scale: f64) -> Vec<LayerDrift> {
    let kinds = ["mamba2", "mlp", "mamba2", "attention", "moe"];
    (0..20)
        .map(|layer| {
            let kind = kinds[layer % 5];
            let relative_error = scale * (0.0115 + 0.004 * layer as f64);
            LayerDrift {
                layer,
                kind: kind.into(),
                tokens: 2048,
                non_finite_tokens: 0,
                relative_error,
                max_relative_error: relative_error * 3.0,
                state: (kind == "mamba2").then(|| state(layer, scale)),
                experts: (kind == "moe").then(|| ExpertDrift {
                    tokens: 2048,
                    changed_tokens: scale * (0.05 + layer as f64 / 19.0 * 0.075),
                    changed_experts: scale * 0.02,
                }),
            }
        })
        .collect()
}

fn state(layer: usize, scale: f64) -> StateDrift {
    let times = (1..=8).map(|eighth| eighth * 64).collect();
    let growth = if layer == 2 { 0.62 } else { 0.02 };
    let errors = |at_end: f64, growth: f64| -> Vec<f64> {
        (1..=8)
            .map(|eighth| scale * at_end * (f64::from(eighth) / 8.0).powf(growth))
            .collect()
    };
    StateDrift {
        times,
        relative_error: errors(0.03 + 0.06 * layer as f64 / 17.0, growth),
        heads: 8,
        growing: (layer == 2 && scale == 1.0)
            .then(|| {
                [7, 3].map(|head| HeadDrift {
                    head,
                    relative_error: errors(0.12, 0.62),
                    growth: 0.62,
                })
            })
            .into_iter()
            .flatten()
            .collect(),
    }
}

fn logits(kl: f64, scale: f64) -> LogitsDrift {
    let estimate = |value: f64, error: f64| Estimate { value, error };
    let kl_divergence = Distribution {
        mean: estimate(kl, scale * 0.000609),
        min: scale * 0.00037,
        p0_1: scale * 0.000495,
        p1: scale * 0.001513,
        p5: scale * 0.005235,
        p10: scale * 0.00703,
        p25: scale * 0.0112,
        median: scale * 0.016845,
        p75: scale * 0.0281,
        p90: scale * 0.043984,
        p95: scale * 0.056927,
        p99: scale * 0.089393,
        p99_9: scale * 0.178044,
        max: scale * 0.212735,
    };
    let bucket = |from, to, kl| BucketDrift {
        from,
        to,
        positions: 510,
        kl_divergence: estimate(kl, kl * 0.04),
        kl_p99: kl * 4.0,
        top1_agreement: estimate(1.0 - 0.151 * scale, 0.016),
        perplexity: estimate(38.1 + from as f64 / 100.0, 4.4),
        perplexity_reference: estimate(36.1 + from as f64 / 100.0, 4.1),
        perplexity_ratio: estimate(1.0 + 0.0566 * scale, 0.013),
    };
    let peak = (kl.log10() * 4.0) as i32 + 36;
    let counts = (0..48).map(|bin: i32| (220 - 30 * (bin - peak).pow(2)).max(0) as u64);
    LogitsDrift {
        positions: 1020,
        non_finite_positions: 0,
        chunks: 4,
        context_tokens: 512,
        vocab_size: 1024,
        kl_divergence,
        kl_bounds: None,
        kl_unchanged_routing: Some(estimate(kl * 0.7, scale * 0.0005)),
        kl_histogram: Histogram {
            edges: (0..=48)
                .map(|edge| 10f64.powf(-9.0 + f64::from(edge) / 4.0))
                .collect(),
            counts: counts.collect(),
        },
        top1_agreement: estimate(1.0 - 0.15098 * scale, 0.01122 * scale),
        delta_p: Distribution {
            mean: estimate(-0.00477 * scale, 0.00087 * scale),
            min: -0.30635 * scale,
            max: 0.15374 * scale,
            ..Distribution::default()
        },
        delta_p_rms: estimate(0.02804 * scale, 0.00213 * scale),
        perplexity: estimate(38.134972, 3.126397),
        perplexity_reference: estimate(36.091166, 2.881214),
        perplexity_ratio: estimate(1.0 + 0.056629 * scale, 0.009348 * scale),
        ln_perplexity_ratio: estimate(0.055084 * scale, 0.008847 * scale),
        perplexity_difference: estimate(2.043805 * scale, 0.401843 * scale),
        correlation: Some(0.9944),
        buckets: vec![bucket(256, 384, kl * 0.95), bucket(384, 511, kl * 1.05)],
    }
}
