//! The configuration of GPTQ, of GPTQModel 7.7 and of what came before it.

use super::{Method, Quantization, SchemeGroup, in_key, typed};
use crate::packed::bits::Width;
use crate::packed::pattern::Pattern;
use crate::packed::scheme::{GptqZeros, Group, Inputs, Layout, Scheme};
use crate::{Error, Result};
use serde::Deserialize;
use serde_json::{Map, Value};

/// The keys that decide how tensors are read.
#[derive(Deserialize)]
struct Config {
    bits: u64,
    group_size: i64,
    #[serde(default)]
    desc_act: bool,
    #[serde(default = "yes")]
    sym: bool,
    checkpoint_format: Option<String>,
    format: Option<String>,
    #[serde(default)]
    dynamic: Option<Map<String, Value>>,
}

const fn yes() -> bool {
    true
}

/// What a pattern of `dynamic` changes.
#[derive(Deserialize)]
struct Override {
    bits: Option<u64>,
    group_size: Option<i64>,
    desc_act: Option<bool>,
    sym: Option<bool>,
}

/// Reads the object.
pub fn parse(value: &Value) -> Result<Quantization> {
    let config: Config = typed(value)?;
    let zeros = match config
        .checkpoint_format
        .as_deref()
        .or(config.format.as_deref())
    {
        None | Some("gptq") => GptqZeros::MinusOne,
        Some("gptq_v2") => GptqZeros::AsTheyAre,
        Some(other) => {
            let what = format!("format is `{other}`; known are `gptq` and `gptq_v2`");
            return Err(Error::unsupported(what).in_tensor("quantization_config"));
        }
    };
    let base = Override {
        bits: None,
        group_size: None,
        desc_act: None,
        sym: None,
    };
    let mut groups = vec![SchemeGroup {
        name: "default".to_owned(),
        scheme: scheme(&config, &base, zeros).map_err(in_key("quantization_config"))?,
    }];
    let mut targets = Vec::new();
    let mut ignored = Vec::new();
    for (pattern, changes) in config.dynamic.iter().flatten() {
        let key = || in_key(format!("quantization_config.dynamic.{pattern}"));
        if let Some(pattern) = pattern.strip_prefix("-:") {
            ignored.push(Pattern::from_start(pattern).map_err(key())?);
            continue;
        }
        let name = pattern.strip_prefix("+:").unwrap_or(pattern);
        targets.push((Pattern::from_start(name).map_err(key())?, groups.len()));
        let changes = typed(changes).map_err(key())?;
        groups.push(SchemeGroup {
            name: name.to_owned(),
            scheme: scheme(&config, &changes, zeros).map_err(key())?,
        });
    }
    targets.push((Pattern::Every, 0));
    Ok(Quantization::new(Method::Gptq, groups, targets, ignored))
}

fn scheme(config: &Config, changes: &Override, zeros: GptqZeros) -> Result<Scheme> {
    let bits = changes.bits.unwrap_or(config.bits);
    let size = changes.group_size.unwrap_or(config.group_size);
    if changes.desc_act.unwrap_or(config.desc_act) {
        return Err(Error::unsupported(
            "columns in the order of activations (`desc_act`) are not read",
        )
        .hint("quantize again with desc_act false, as current runtimes want it too"));
    }
    let width = Width::from_bits(bits)
        .ok_or_else(|| Error::unsupported(format!("bits must be 4 or 8, found {bits}")))?;
    let group = match usize::try_from(size) {
        Ok(size @ 1..) => Group::Columns(size),
        _ if size == -1 => Group::Row,
        _ => {
            let what = format!("group_size must be -1 or positive, found {size}");
            return Err(Error::malformed(what));
        }
    };
    Ok(Scheme {
        layout: Layout::Gptq {
            width,
            group,
            symmetric: changes.sym.unwrap_or(config.sym),
            zeros,
        },
        inputs: Inputs::AsTheyAre,
    })
}
