//! A recipe as YAML that reads back the same.

use std::fmt::{self, Display};

use super::super::types::{Scheme, TensorTypeRule};
use super::{Aim, Recipe, RewriteRecipe, WantedRotation};
use crate::convert::calibrated::Method;

impl Recipe {
    /// The recipe as YAML: read again it gives the same recipe.
    pub fn to_yaml(&self) -> String {
        let mut yaml = self.types_yaml();
        self.push_calibration(&mut yaml);
        self.push_rest(&mut yaml);
        yaml
    }

    /// The same of a recipe that says nothing of a calibration: read again its defaults are in force.
    pub fn to_data_free_yaml(&self) -> String {
        let mut yaml = self.types_yaml();
        self.push_rest(&mut yaml);
        yaml
    }

    fn types_yaml(&self) -> String {
        let mut yaml = String::from(
            "# A recipe of nemoconv, for `--recipe` of to-gguf, to-safetensors and plan\n",
        );
        let mut line = |key: &str, value: &dyn Display| yaml.push_str(&format!("{key}: {value}\n"));
        match self.aim {
            Aim::OwnType => line("outtype", &"auto"),
            Aim::Scheme(Scheme::Mix(file_type)) => line("outtype", &file_type),
            Aim::Scheme(Scheme::Phase(phase)) => line("phase", &phase.number()),
            Aim::BitsPerWeight(bits) => line("target-bpw", &bits),
            Aim::FileBytes(bytes) => line("target-size", &bytes),
        }
        for (key, ty) in [
            ("output-tensor-type", self.output),
            ("token-embedding-type", self.token_embedding),
        ] {
            ty.iter().for_each(|ty| line(key, ty));
        }
        line("pure", &self.pure);
        line("allow-fallback", &self.allow_fallback);
        line("widen", &self.widen);
        line("mtp", &self.mtp);
        yaml
    }

    fn push_calibration(&self, yaml: &mut String) {
        let mut line = |key: &str, value: &dyn Display| yaml.push_str(&format!("{key}: {value}\n"));
        line("method", &self.rounding.method);
        line("passes", &self.rounding.passes);
        line("gradient-sequences", &self.rounding.gradient_sequences);
        line("target-correction", &self.rounding.target_correction);
        line("damp-percent", &self.rounding.damp_percent);
        line("bias-absorption", &self.rounding.bias_absorption);
        yaml.push_str(&format!(
            "calibration:\n  context: {}\n  sequences: {}\n  seed: {}\n",
            self.samples.context_tokens, self.samples.max_sequences, self.samples.seed
        ));
        push_rewrite(yaml, self.rewrite);
    }

    fn push_rest(&self, yaml: &mut String) {
        push_rules(yaml, &self.rules);
        self.packed.push_yaml(yaml);
    }
}

fn push_rewrite(yaml: &mut String, rewrite: Option<RewriteRecipe>) {
    let Some(rewrite) = rewrite else {
        yaml.push_str("rewrite:\n  apply: false\n");
        return;
    };
    let rotation = match rewrite.rotation {
        WantedRotation::Auto => "auto",
        WantedRotation::None => "none",
        WantedRotation::Hadamard => "hadamard",
        WantedRotation::Klt => "klt",
    };
    yaml.push_str(&format!(
        "rewrite:\n  rotation: {rotation}\n  smoothing: {}\n  sort: {}\n",
        rewrite.smoothing, rewrite.sort,
    ));
    if let Some(balance) = rewrite.balance {
        yaml.push_str(&format!("  balance: {}\n", u8::from(balance)));
    }
}

fn push_rules(yaml: &mut String, rules: &[TensorTypeRule]) {
    if !rules.is_empty() {
        yaml.push_str("rules:\n");
    }
    for rule in rules {
        let pattern = rule.pattern.as_str();
        let quoted = match pattern.chars().any(char::is_control) {
            // What JSON quotes, YAML reads.
            true => serde_json::Value::from(pattern).to_string(),
            false => format!("'{}'", pattern.replace('\'', "''")),
        };
        yaml.push_str(&format!("  - {{tensor: {quoted}, type: {}}}\n", rule.ty));
    }
}

impl Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Rtn => "rtn",
            Self::Imatrix => "imatrix",
            Self::Gptq => "gptq",
        })
    }
}
