//! Metadata: what a runtime asks for is there, in the type it asks for, and agrees with the tensors.
//!
//! Enters: the headers of all parts. Leaves: findings, and the sizes if they can be read.
//!
//! Source: llama.cpp b11434, keys of `nemotron_h` and `nemotron_h_moe`; it refuses a number of another width.

use nemoconv_formats::gguf::{Array, Metadata, Value};

use super::{Part, layer_of, of_fault};
use crate::artifact::{StoredTensor, gguf, gguf_config};
use crate::model::config::NemotronHConfig;
use crate::report::{Finding, Rule, Severity};
use crate::validate::Found;

/// What a value must be.
#[derive(Debug, Clone, Copy)]
enum Kind {
    U32,
    F32,
    Bool,
    Text,
    Texts,
    I32s,
    /// A u32, or one integer per block.
    PerBlock,
}

use Kind::{Bool, F32, I32s, PerBlock, Text, Texts, U32};

impl Kind {
    fn holds(self, value: &Value) -> bool {
        matches!(
            (self, value),
            (U32 | PerBlock, Value::U32(_))
                | (F32, Value::F32(_))
                | (Bool, Value::Bool(_))
                | (Text, Value::String(_))
                | (Texts, Value::Array(Array::String(_)))
                | (I32s | PerBlock, Value::Array(Array::I32(_)))
                | (PerBlock, Value::Array(Array::U32(_)))
        )
    }

    fn name(self) -> &'static str {
        match self {
            U32 => "a u32",
            F32 => "an f32",
            Bool => "a boolean",
            Text => "a string",
            Texts => "an array of strings",
            I32s => "an array of i32",
            PerBlock => "a u32 or one integer per block",
        }
    }
}

/// Keys of every file: name, type, whether its absence is an error.
const GENERAL: &[(&str, Kind, bool)] = &[
    ("general.architecture", Text, true),
    ("general.alignment", U32, false),
    ("general.file_type", U32, false),
    ("general.quantization_version", U32, false),
    ("tokenizer.ggml.model", Text, true),
    ("tokenizer.ggml.pre", Text, true),
    ("tokenizer.ggml.tokens", Texts, true),
    ("tokenizer.ggml.token_type", I32s, true),
    ("tokenizer.ggml.merges", Texts, true),
    ("tokenizer.ggml.bos_token_id", U32, false),
    ("tokenizer.ggml.eos_token_id", U32, false),
    ("tokenizer.ggml.unknown_token_id", U32, false),
    ("tokenizer.ggml.seperator_token_id", U32, false),
    ("tokenizer.ggml.padding_token_id", U32, false),
    ("tokenizer.ggml.mask_token_id", U32, false),
    ("tokenizer.ggml.eot_token_id", U32, false),
    ("tokenizer.ggml.eom_token_id", U32, false),
    ("tokenizer.ggml.add_bos_token", Bool, false),
    ("tokenizer.ggml.add_eos_token", Bool, false),
    ("tokenizer.ggml.add_sep_token", Bool, false),
    ("tokenizer.chat_template", Text, false),
    ("tokenizer.chat_templates", Texts, false),
];

/// Keys under the architecture's name.
const SIZES: &[(&str, Kind, bool)] = &[
    ("block_count", U32, true),
    ("context_length", U32, true),
    ("embedding_length", U32, true),
    ("feed_forward_length", PerBlock, true),
    ("attention.head_count", PerBlock, true),
    ("attention.head_count_kv", PerBlock, true),
    ("attention.layer_norm_rms_epsilon", F32, false),
    ("attention.layer_norm_epsilon", F32, true),
    ("attention.key_length", U32, true),
    ("attention.value_length", U32, false),
    ("rope.freq_base", F32, false),
    ("rope.dimension_count", U32, false),
    ("rope.scaling.finetuned", Bool, false),
    ("ssm.conv_kernel", U32, true),
    ("ssm.state_size", U32, true),
    ("ssm.group_count", U32, true),
    ("ssm.inner_size", U32, true),
    ("ssm.time_step_rank", U32, true),
    ("vocab_size", U32, false),
    ("nextn_predict_layers", U32, false),
];

/// Keys of models with experts.
const EXPERTS: &[(&str, Kind, bool)] = &[
    ("expert_count", U32, true),
    ("expert_used_count", PerBlock, true),
    ("expert_group_count", U32, false),
    ("expert_group_used_count", U32, false),
    ("expert_feed_forward_length", PerBlock, true),
    ("expert_shared_feed_forward_length", PerBlock, true),
    ("expert_shared_count", U32, true),
    ("expert_weights_norm", Bool, false),
    ("expert_weights_scale", F32, false),
    ("moe_latent_size", U32, false),
];

/// Checks the keys of the first part.
pub fn inspect(parts: &[Part], found: &mut Found) -> Option<NemotronHConfig> {
    let keys = Keys {
        part: &parts[0],
        metadata: &parts[0].header.metadata,
    };
    for (key, kind, required) in GENERAL {
        keys.check((*key).to_owned(), *kind, *required, found);
    }
    let Some(Value::String(arch)) = keys.metadata.get("general.architecture") else {
        return None;
    };
    if !matches!(arch.as_str(), "nemotron_h" | "nemotron_h_moe") {
        let message = format!("is `{arch}`, expected `nemotron_h` or `nemotron_h_moe`");
        keys.push(
            Rule::UnsupportedArchitecture,
            "general.architecture",
            message,
            found,
        );
        return None;
    }
    let experts = if arch == "nemotron_h_moe" {
        EXPERTS
    } else {
        &[]
    };
    for (key, kind, required) in SIZES.iter().chain(experts) {
        keys.check(format!("{arch}.{key}"), *kind, *required, found);
    }
    let tensors: Vec<_> = parts.iter().flat_map(stored_tensors).collect();
    keys.agree_with_tensors(arch, &tensors, found);
    keys.widths_grew(found);
    match gguf_config::parse(keys.metadata, &tensors) {
        Ok(mut config) => {
            let nextn = keys.number(&format!("{arch}.nextn_predict_layers"));
            config.nextn_predict_layers = nextn.map_or(0, |nextn| nextn as usize);
            Some(config)
        }
        // A key that is missing or mistyped has been named already.
        Err(_) if found.has(Rule::MissingKey) || found.has(Rule::WrongKeyType) => None,
        Err(fault) => {
            found.push(keys.part.place(of_fault(Rule::ContradictingKey, &fault)));
            None
        }
    }
}

fn stored_tensors(part: &Part) -> impl Iterator<Item = StoredTensor> {
    let infos = part.header.tensors.iter();
    infos.map(|info| gguf::stored(info, 0, part.header.data_offset))
}

struct Keys<'a> {
    part: &'a Part,
    metadata: &'a Metadata,
}

impl Keys<'_> {
    fn check(&self, key: String, kind: Kind, required: bool, found: &mut Found) {
        match self.metadata.get(&key) {
            Some(value) if kind.holds(value) => {}
            Some(_) => {
                let message = format!("must be {}", kind.name());
                self.push(Rule::WrongKeyType, &key, message, found);
            }
            None if required => {
                self.push(Rule::MissingKey, &key, "the key is missing".into(), found);
            }
            None => {}
        }
    }

    fn push(&self, rule: Rule, key: &str, message: String, found: &mut Found) {
        found.push(self.part.place(Finding::new(rule, message).in_tensor(key)));
    }

    fn number(&self, key: &str) -> Option<u32> {
        match self.metadata.get(key)? {
            Value::U32(number) => Some(*number),
            _ => None,
        }
    }

    /// The sizes that every tensor set shows by itself.
    fn agree_with_tensors(&self, arch: &str, tensors: &[StoredTensor], found: &mut Found) {
        let blocks = tensors.iter().filter_map(|tensor| layer_of(&tensor.name));
        let blocks = blocks.max().map_or(0, |last| last.saturating_add(1));
        let embedding = tensors.iter().find(|t| t.name == "token_embd.weight");
        let embedding = embedding.map(|tensor| (tensor.rows, tensor.columns));
        let quantized = tensors.iter().any(|tensor| tensor.ty.block_elements() > 1);
        let facts = [
            ("block_count", Some(blocks), "blocks have tensors"),
            (
                "embedding_length",
                embedding.map(|(_, columns)| columns),
                "columns has the embedding",
            ),
            (
                "vocab_size",
                embedding.map(|(rows, _)| rows),
                "rows has the embedding",
            ),
        ];
        for (key, fact, what) in facts {
            let key = format!("{arch}.{key}");
            if let (Some(stored), Some(fact)) = (self.number(&key), fact)
                && stored as usize != fact
            {
                let message = format!("is {stored}, but {fact} {what}");
                self.push(Rule::ContradictingKey, &key, message, found);
            }
        }
        const VERSION: &str = "general.quantization_version";
        if quantized && self.number(VERSION).is_some_and(|version| version != 2) {
            let message = "must be 2: the layout of the blocks is that of version 2".into();
            self.push(Rule::ContradictingKey, VERSION, message, found);
        }
        if quantized && self.metadata.get(VERSION).is_none() {
            let message = "the key is missing although weights are quantized";
            let finding = Finding::new(Rule::MissingKey, message).severity(Severity::Note);
            found.push(self.part.place(finding.in_tensor(VERSION)));
        }
        self.lengths(arch, found);
    }

    /// One entry per block where sizes are given per block.
    fn lengths(&self, arch: &str, found: &mut Found) {
        let Some(blocks) = self.number(&format!("{arch}.block_count")) else {
            return;
        };
        for key in [
            "feed_forward_length",
            "attention.head_count",
            "attention.head_count_kv",
        ] {
            let key = format!("{arch}.{key}");
            let length = match self.metadata.get(&key) {
                Some(Value::Array(Array::I32(sizes))) => sizes.len(),
                Some(Value::Array(Array::U32(sizes))) => sizes.len(),
                _ => continue,
            };
            if length != blocks as usize {
                let message = format!("has {length} entries for {blocks} blocks");
                self.push(Rule::ContradictingKey, &key, message, found);
            }
        }
    }

    /// Widening only ever grows a width.
    fn widths_grew(&self, found: &mut Found) {
        const FROM: &str = "nemoconv.widened_from.hidden_size";
        let Some(from) = self.number(FROM) else {
            return;
        };
        let arch = match self.metadata.get("general.architecture") {
            Some(Value::String(arch)) => arch,
            _ => return,
        };
        let to = self.number(&format!("{arch}.embedding_length"));
        if to.is_some_and(|to| from == 0 || from >= to) {
            let message = format!("is {from}, which is not below the stored width");
            self.push(Rule::ContradictingKey, FROM, message, found);
        }
    }
}
