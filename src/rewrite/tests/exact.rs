//! In f64, on small random networks.

use std::path::Path;

use serde_json::json;

use super::network::{Network, difference};
use crate::artifact::{MemoryTensor, StoredModel};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{Presence, Widths, expected_tensors};
use crate::rewrite::random::SplitMix64;
use crate::rewrite::{Balance, Magnitude, RewriteSettings, Rewrites, Rotation};

/// Relative error of the logits that rewrites may cause.
const EXACT: f64 = 1e-12;
/// What is no rewrite causes more.
const WRONG: f64 = 1e-3;

/// What a test asks for.
#[derive(Clone, Copy, Default)]
struct Model {
    pattern: &'static str,
    latent: bool,
    biases: bool,
    tied: bool,
}

impl Model {
    fn of(pattern: &'static str) -> Self {
        Self {
            pattern,
            ..Self::default()
        }
    }

    fn config(self) -> NemotronHConfig {
        let mut json = json!({
            "model_type": "nemotron_h", "hybrid_override_pattern": self.pattern, "vocab_size": 16,
            "hidden_size": 20, "intermediate_size": 36, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 6, "mamba_num_heads": 4, "mamba_head_dim": 6,
            "n_groups": 2, "ssm_state_size": 5, "conv_kernel": 4, "layer_norm_epsilon": 1e-3,
            "n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 14,
            "moe_shared_expert_intermediate_size": 18, "routed_scaling_factor": 2.5,
            "tie_word_embeddings": self.tied
        });
        if self.latent {
            json["moe_latent_size"] = json!(12);
        }
        NemotronHConfig::parse(&json).unwrap()
    }

    /// Random values, norms and gains far from 1.
    fn stored(self) -> StoredModel {
        let config = self.config();
        let widths = Widths::of(&config);
        let mut random = SplitMix64::new(11);
        let mut tensors = Vec::new();
        for expected in expected_tensors(&config, false) {
            let is_bias = expected.rule.presence == Presence::Optional;
            if is_bias && !self.biases && expected.name != "output.weight"
                || self.tied && expected.name == "output.weight"
            {
                continue;
            }
            let dims = expected.rule.reshape.unwrap_or(expected.rule.shape);
            let dims: Vec<usize> = dims.iter().map(|dim| dim.size(&config, &widths)).collect();
            let (rows, columns) = match dims.as_slice() {
                [columns] => (1, *columns),
                [rows, rest @ ..] => (*rows, rest.iter().product()),
                [] => (1, 1),
            };
            let shape = [expected.sources.len(), rows, columns];
            let is_norm = expected.name.ends_with("norm.weight");
            let values: Vec<f32> = (0..shape.iter().product())
                .map(|_| {
                    let x = random.next_uniform();
                    match expected.name.as_str() {
                        _ if is_norm => (3.0 * x).exp(),
                        name if name.ends_with("ssm_a") => -1.5 - x,
                        name if name.ends_with("bias") => 0.3 * x,
                        _ => 1.5 * x / (columns as f64).sqrt(),
                    }
                })
                .map(|x| x as f32)
                .collect();
            tensors.push(MemoryTensor::of_f32(&expected.name, shape, &values));
        }
        StoredModel::in_memory(Path::new("random"), config, tensors).unwrap()
    }
}

const TOKENS: [usize; 9] = [3, 1, 4, 1, 5, 9, 2, 6, 0];

/// The logits before and after, and the rewrites.
fn compare(model: Model, settings: &RewriteSettings) -> (f64, Rewrites) {
    let stored = model.stored();
    let (expected, seen) = Network::new(&stored, &Rewrites::none()).run(&TOKENS);
    let rewrites = Rewrites::choose(&stored, settings, &seen.statistics()).unwrap();
    rewrites.check(stored.config()).unwrap();
    let (found, _) = Network::new(&stored, &rewrites).run(&TOKENS);
    (difference(&expected, &found), rewrites)
}

fn check(model: Model, settings: &RewriteSettings) {
    let (error, rewrites) = compare(model, settings);
    assert!(
        error <= EXACT,
        "{}: {error:.2e} by {:#?}",
        model.pattern,
        rewrites.describe()
    );
    assert!(!rewrites.is_none());
}

fn smoothing() -> RewriteSettings {
    RewriteSettings {
        smoothing: true,
        ..RewriteSettings::default()
    }
}

fn rotation(rotation: Rotation) -> RewriteSettings {
    RewriteSettings {
        rotation,
        ..RewriteSettings::default()
    }
}

fn everything() -> RewriteSettings {
    RewriteSettings {
        rotation: Rotation::Klt,
        smoothing: true,
        sort: true,
        seed: 5,
        ..RewriteSettings::default()
    }
}

/// One model per kind of block, and hybrids of all.
fn models() -> Vec<Model> {
    let latent = |pattern| Model {
        latent: true,
        ..Model::of(pattern)
    };
    let biased = Model {
        biases: true,
        ..Model::of("M-*-")
    };
    let plain = ["M", "*", "-", "E", "M-M*-"].map(Model::of);
    let others = [latent("E"), latent("ME*EM"), Model::of("ME*E"), biased];
    plain.into_iter().chain(others).collect()
}

#[test]
fn folding_and_rotating_the_stream_are_exact() {
    for model in models() {
        check(model, &rotation(Rotation::Hadamard));
        check(model, &rotation(Rotation::Klt));
    }
}

#[test]
fn smoothing_is_exact_at_any_balance() {
    for model in models() {
        for quarters in 0..=4 {
            let settings = RewriteSettings {
                balance: Balance::quarters(quarters).unwrap(),
                ..smoothing()
            };
            check(model, &settings);
        }
        let settings = RewriteSettings {
            magnitude: Magnitude::Maximum,
            ..smoothing()
        };
        check(model, &settings);
    }
}

#[test]
fn reordering_is_exact() {
    let settings = RewriteSettings {
        sort: true,
        ..RewriteSettings::default()
    };
    for model in models().into_iter().filter(|model| model.pattern != "*") {
        check(model, &settings);
    }
}

#[test]
fn all_together_are_exact() {
    models()
        .into_iter()
        .for_each(|model| check(model, &everything()));
}

/// Whether BF16 holds a value.
fn is_short(value: f64) -> bool {
    (value as f32).to_bits() & 0xffff == 0
}

#[test]
fn norms_beside_floats_that_stay_are_short_and_all_is_exact() {
    for model in models() {
        let settings = RewriteSettings {
            floats: Some(vec!["output.weight".into()]),
            sort: true,
            ..smoothing()
        };
        check(model, &settings);
        let (_, rewrites) = compare(model, &settings);
        assert_eq!(rewrites.space("output_norm"), None);
        let network = Network::new(&model.stored(), &rewrites);
        for (name, tensor) in &network.tensors {
            let is_rewritten = |norm| rewrites.space(norm).is_some();
            let norm = name.strip_suffix(".weight");
            if norm.is_some_and(|norm| norm.ends_with("norm") && is_rewritten(norm)) {
                let values = tensor.iter().flatten().flatten();
                assert!(values.copied().all(is_short), "{} {name}", model.pattern);
            }
        }
    }
}

#[test]
fn a_router_and_biases_change_by_powers_of_two() {
    let settings = RewriteSettings {
        floats: Some(vec![]),
        ..smoothing()
    };
    let biased = Model {
        biases: true,
        ..Model::of("*-")
    };
    let are_powers = |model: Model, producer: &str| {
        let (_, rewrites) = compare(model, &settings);
        let space = rewrites.space(producer).unwrap();
        let scales = space.scale.as_ref().unwrap();
        scales.iter().all(|scale| scale.to_bits() << 12 == 0)
    };
    for producer in ["blk.0.attn_k", "blk.0.attn_v", "blk.1.ffn_up"] {
        assert!(are_powers(biased, producer), "{producer}");
        assert!(!are_powers(Model::of("*-"), producer), "{producer}");
    }
    assert!(are_powers(Model::of("E"), "blk.0.attn_norm"));
}

#[test]
fn matrices_that_stay_floats_are_left_alone() {
    let floats = ["blk.0.ssm_in.weight", "blk.1.ffn_down.weight"];
    let settings = RewriteSettings {
        floats: Some(floats.map(String::from).to_vec()),
        ..smoothing()
    };
    let (_, rewrites) = compare(Model::of("M-*"), &settings);
    for (producer, is_left) in [
        ("blk.0.attn_norm", true),
        ("blk.0.ssm_norm", false),
        ("blk.1.attn_norm", false),
        ("blk.1.ffn_up", true),
        ("blk.2.attn_v", false),
    ] {
        assert_eq!(rewrites.space(producer).is_none(), is_left, "{producer}");
    }
}

#[test]
fn folded_norms_are_exactly_one() {
    let (_, rewrites) = compare(Model::of("M-"), &rotation(Rotation::Hadamard));
    let network = Network::new(&Model::of("M-").stored(), &rewrites);
    for norm in ["blk.0.attn_norm.weight", "output_norm.weight"] {
        assert!(
            network.tensors[norm][0][0]
                .iter()
                .all(|weight| *weight == 1.0)
        );
    }
}

#[test]
fn a_rotated_stream_is_even_in_the_pool() {
    let model = Model::of("-");
    let stored = model.stored();
    let (_, seen) = Network::new(&stored, &Rewrites::none()).run(&TOKENS);
    let statistics = seen.statistics();
    let rewrites = Rewrites::choose(&stored, &rotation(Rotation::Klt), &statistics).unwrap();
    let (_, seen) = Network::new(&stored, &rewrites).run(&TOKENS);
    let statistics = seen.statistics();
    let moments = statistics.residual[0].read().unwrap();
    let diagonal = moments.iter().step_by(20 + 1);
    for square in diagonal {
        assert!(
            (square - moments.iter().step_by(21).sum::<f64>() / 20.0).abs() < 1e-12,
            "{square}"
        );
    }
}

#[test]
fn a_tied_head_keeps_the_final_norm_and_the_stream() {
    let tied = Model {
        tied: true,
        ..Model::of("M*-")
    };
    check(tied, &smoothing());
    let (_, rewrites) = compare(tied, &smoothing());
    assert_eq!(rewrites.space("output_norm"), None);
    let stored = tied.stored();
    let error = Rewrites::choose(&stored, &everything(), &Default::default()).unwrap_err();
    assert!(
        error.to_string().contains("tied to the embedding"),
        "{error}"
    );
    assert!(error.hint().is_some());
}

#[test]
fn a_multi_token_prediction_head_forbids_rotation() {
    let settings = RewriteSettings {
        with_mtp: true,
        ..everything()
    };
    let stored = Model::of("M*E").stored();
    let error = Rewrites::choose(&stored, &settings, &Default::default()).unwrap_err();
    assert!(error.hint().unwrap().contains("--no-mtp"));
    let settings = RewriteSettings {
        rotation: Rotation::None,
        ..settings
    };
    let (error, rewrites) = compare(Model::of("M*E"), &settings);
    assert!(error <= EXACT);
    assert_eq!(rewrites.space("output_norm"), None);
}

#[test]
fn missing_statistics_are_named() {
    let stored = Model::of("M").stored();
    let error = Rewrites::choose(&stored, &smoothing(), &Default::default()).unwrap_err();
    assert!(
        error
            .to_string()
            .contains("`blk.0.ssm_out.weight`: there are no statistics"),
        "{error}"
    );
    let error = Rewrites::choose(&stored, &rotation(Rotation::Klt), &Default::default());
    assert!(error.unwrap_err().to_string().contains("`blk.0.attn_norm`"));
}

#[test]
fn nothing_asked_is_nothing_done() {
    let stored = Model::of("M-").stored();
    let rewrites = Rewrites::choose(&stored, &Default::default(), &Default::default()).unwrap();
    assert!(rewrites.is_none());
    assert_eq!(rewrites, Rewrites::none());
}

#[test]
fn what_was_applied_where_is_said() {
    let (_, rewrites) = compare(Model::of("M-M*-"), &everything());
    let expected = [
        "residual stream of 20 rotated: principal axes, random signs, a Hadamard matrix, seed 5",
        "6 norm weights folded into their readers",
        "inputs of readers smoothed: blocks 0, 1, 2, 3, 4",
        "input of the head smoothed",
        "inputs of ssm_out smoothed: blocks 0, 2",
        "inputs of ssm_out sorted by loudness: blocks 0, 2",
        "keys and queries smoothed: block 3",
        "values of attention heads smoothed: block 3",
        "values of attention heads rotated: block 3",
        "hidden units of MLPs smoothed: blocks 1, 4",
        "hidden units of MLPs sorted by loudness: blocks 1, 4",
    ];
    assert_eq!(rewrites.describe().applied, expected);
    let summary = "klt x hadamard rotation, 1 spaces rotated, 12 smoothed, 4 ordered, seed 5";
    assert_eq!(rewrites.summary(), summary);
}

/// The model rotated, after `spoil`: how far the logits are from what they were.
fn spoiled(spoil: impl Fn(&mut Network, &Network)) -> f64 {
    let stored = Model::of("M-").stored();
    let original = Network::new(&stored, &Rewrites::none());
    let (expected, seen) = original.run(&TOKENS);
    let settings = rotation(Rotation::Hadamard);
    let rewrites = Rewrites::choose(&stored, &settings, &seen.statistics()).unwrap();
    let mut network = Network::new(&stored, &rewrites);
    spoil(&mut network, &original);
    difference(&expected, &network.run(&TOKENS).0)
}

#[test]
fn rotation_without_folding_is_wrong() {
    assert!(spoiled(|_, _| ()) <= EXACT);
    // Readers without the weights, norms with them.
    let error = spoiled(|network, original| {
        for (norm, readers) in [
            ("blk.0.attn_norm", "blk.0.ssm_in"),
            ("blk.1.attn_norm", "blk.1.ffn_up"),
        ] {
            let name = format!("{norm}.weight");
            let unweighted = unit_norms(original);
            network
                .tensors
                .insert(name.clone(), original.tensors[&name].clone());
            let reader = format!("{readers}.weight");
            network
                .tensors
                .insert(reader.clone(), unweighted.tensors[&reader].clone());
        }
    });
    assert!(error > WRONG, "{error}");
}

/// The rotated network of a model whose norms weigh nothing.
fn unit_norms(original: &Network) -> Network {
    let mut tensors = Vec::new();
    for (name, matrices) in &original.tensors {
        let shape = [matrices.len(), matrices[0].len(), matrices[0][0].len()];
        let values = matrices.iter().flatten().flatten();
        let values: Vec<f32> = match name.ends_with("attn_norm.weight") {
            true => values.map(|_| 1.0).collect(),
            false => values.map(|x| *x as f32).collect(),
        };
        tensors.push(MemoryTensor::of_f32(name, shape, &values));
    }
    let stored = StoredModel::in_memory(Path::new(""), original.config.clone(), tensors).unwrap();
    let settings = rotation(Rotation::Hadamard);
    let rewrites = Rewrites::choose(&stored, &settings, &Default::default()).unwrap();
    Network::new(&stored, &rewrites)
}

#[test]
fn scaling_gates_is_wrong() {
    let error = spoiled(|network, _| {
        let inner = network.config.inner_size();
        let scale = |index: usize| 1.0 + 0.5 * (index % 3) as f64;
        let rows = &mut network.tensors.get_mut("blk.0.ssm_in.weight").unwrap()[0];
        for (index, row) in rows[..inner].iter_mut().enumerate() {
            row.iter_mut().for_each(|w| *w *= scale(index));
        }
        for row in &mut network.tensors.get_mut("blk.0.ssm_out.weight").unwrap()[0] {
            row.iter_mut()
                .enumerate()
                .for_each(|(index, w)| *w /= scale(index));
        }
    });
    assert!(error > WRONG, "{error}");
}

#[test]
fn scaling_the_inputs_of_the_state_is_wrong() {
    let error = spoiled(|network, _| {
        let (inner, states) = (network.config.inner_size(), network.config.ssm_state_size);
        let groups = network.config.n_groups;
        let rows = &mut network.tensors.get_mut("blk.0.ssm_in.weight").unwrap()[0];
        for (index, row) in rows[2 * inner..][..2 * groups * states]
            .iter_mut()
            .enumerate()
        {
            let factor = if index < groups * states { 2.0 } else { 0.5 };
            row.iter_mut().for_each(|w| *w *= factor);
        }
    });
    assert!(error > WRONG, "{error}");
}
