//! The configuration of NVIDIA's ModelOpt: hf_quant_config.json, or the same in config.json.

use super::{Method, Quantization, SchemeGroup, in_key, typed};
use crate::packed::pattern::Pattern;
use crate::packed::scheme::{Inputs, Layout, Nvfp4Names, Scheme};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// Both spellings: keys of hf_quant_config.json and of config.json.
#[derive(Deserialize)]
struct Config {
    quant_algo: Option<String>,
    #[serde(default)]
    exclude_modules: Option<Vec<String>>,
    #[serde(default)]
    ignore: Option<Vec<String>>,
    #[serde(default)]
    quantized_layers: Option<Map<String, Value>>,
}

/// Where layers have algorithms of their own.
const MIXED: &str = "MIXED_PRECISION";

/// Reads the object, or the one under its key `quantization`.
pub fn parse(value: &Value) -> Result<Quantization> {
    let config: Config = typed(value.get("quantization").unwrap_or(value))?;
    let mut groups: Vec<SchemeGroup> = Vec::new();
    let mut targets = Vec::new();
    let mut group = |algorithm: &str| -> Result<usize> {
        let known = groups.iter().position(|group| group.name == algorithm);
        if let Some(known) = known {
            return Ok(known);
        }
        groups.push(SchemeGroup {
            name: algorithm.to_owned(),
            scheme: scheme(algorithm)?,
        });
        Ok(groups.len().saturating_sub(1))
    };
    match config.quant_algo.as_deref() {
        Some(MIXED) => {
            for (module, layer) in config.quantized_layers.iter().flatten() {
                let key = || in_key(format!("quantization.quantized_layers.{module}"));
                let algorithm = layer.get("quant_algo").and_then(Value::as_str);
                let algorithm = algorithm
                    .ok_or_else(|| Error::malformed("has no `quant_algo`"))
                    .map_err(key())?;
                targets.push((
                    Pattern::Exact(module.clone()),
                    group(algorithm).map_err(key())?,
                ));
            }
        }
        Some(algorithm) => {
            let group = group(algorithm).map_err(in_key("quantization"))?;
            targets.push((Pattern::Every, group));
        }
        None => {}
    }
    let excluded = config.exclude_modules.or(config.ignore).unwrap_or_default();
    let ignored: Result<Vec<_>> = excluded
        .iter()
        .map(|entry| Pattern::wildcard(entry))
        .collect();
    let ignored = ignored.map_err(in_key("quantization.exclude_modules"))?;
    Ok(Quantization::new(
        Method::ModelOpt,
        groups,
        targets,
        ignored,
    ))
}

fn scheme(algorithm: &str) -> Result<Scheme> {
    let float8 = |inputs| Scheme::float8("weight_scale", inputs);
    Ok(match algorithm {
        "FP8" => float8(Inputs::Float8PerTensor),
        "FP8_PER_CHANNEL_PER_TOKEN" => float8(Inputs::Float8PerToken),
        "FP8_PB_WO" => float8(Inputs::AsTheyAre),
        "NVFP4" => Scheme {
            layout: Layout::Nvfp4(Nvfp4Names::ModelOpt),
            inputs: Inputs::Nvfp4,
        },
        "W4A16_NVFP4" => Scheme {
            layout: Layout::Nvfp4(Nvfp4Names::ModelOpt),
            inputs: Inputs::AsTheyAre,
        },
        other => {
            let what = format!(
                "quant_algo is `{other}`; known are FP8, FP8_PER_CHANNEL_PER_TOKEN, FP8_PB_WO, NVFP4, W4A16_NVFP4 and {MIXED}"
            );
            return Err(Error::unsupported(what));
        }
    })
}
