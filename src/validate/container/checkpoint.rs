//! A Hugging Face folder as container: shards, index, config.json, the tensors it implies, and which of them are
//! packed.
//!
//! Enters: a path. Leaves: findings. Looks at no weight.

use std::path::Path;

use nemoconv_formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv_formats::packed::{Layout, PackedLinear};
use nemoconv_formats::{Dtype, Error as FormatError, ErrorKind};

use super::{of_error, of_fault, unreadable};
use crate::error::{Error, Result};
use crate::model::config::NemotronHConfig;
use crate::model::nemotron_h::{ExpectedTensor, Presence, Storage, Widths, expected_tensors};
use crate::plan::packing::Packing;
use crate::plan::sources::{self, Piece, Sources};
use crate::report::{Finding, Rule, Severity};
use crate::validate::Found;

const CONFIG: &str = "config.json";
/// The only matrix that is no linear.
const EMBEDDING: &str = "token_embd.weight";
const HEAD: &str = "output.weight";

pub fn inspect(path: &Path, found: &mut Found) -> Result<()> {
    let checkpoint = match Checkpoint::open(path) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return refused(path, error, found),
    };
    found.looked_at("files", checkpoint.shards().len());
    found.looked_at("tensors", checkpoint.tensors().len());
    let config_path = checkpoint.folder().join(CONFIG);
    let in_config = |finding: Finding| finding.in_file(config_path.display().to_string());
    let json = match checkpoint.read_json(CONFIG) {
        Ok(Some(json)) => json,
        Ok(None) => {
            let message = "there is no config.json beside the weights";
            found.push(in_config(Finding::new(Rule::MissingKey, message)));
            return Ok(());
        }
        Err(error) => return unreadable(error.into(), found),
    };
    match NemotronHConfig::parse(&json) {
        Ok(config) => tensors(&checkpoint, &config, found),
        Err(fault) => {
            let rule = match fault.what.contains("`architectures`") {
                true => Rule::UnsupportedArchitecture,
                false => Rule::ContradictingKey,
            };
            found.push(in_config(of_fault(rule, &fault)));
        }
    }
    Ok(())
}

/// What is not there at all is the user's error; what is there and wrong is a finding.
fn refused(path: &Path, error: FormatError, found: &mut Found) -> Result<()> {
    match &error.kind {
        ErrorKind::Missing(_) if path.exists() && error.place.path.as_deref() != Some(path) => {
            let rule = match error.place.tensor {
                Some(_) => Rule::MissingTensor,
                None => Rule::SplitPartMissing,
            };
            found.push(of_error(rule, &error.into()));
            Ok(())
        }
        ErrorKind::Missing(_) | ErrorKind::Unsupported(_) if !path.exists() || path.is_dir() => {
            Err(error.into())
        }
        _ => unreadable(error.into(), found),
    }
}

fn tensors(checkpoint: &Checkpoint, config: &NemotronHConfig, found: &mut Found) {
    let packing = match Packing::new(checkpoint) {
        Ok(packing) => packing,
        Err(error @ Error::Input(_)) => {
            return found.push(of_error(Rule::QuantizationConfig, &error));
        }
        Err(error) => return found.push(unexplained(&error)),
    };
    let error = match sources::resolve(checkpoint, config, true) {
        Ok(sources) => {
            plain_linears(checkpoint, &packing, config, found);
            return alike(&sources, found);
        }
        Err(error) => error,
    };
    // It stops at the first; here all of them are wanted.
    let widths = Widths::of(config);
    let mut explained = false;
    for expected in expected_tensors(config, true) {
        let stacked = expected.stacked_source.as_ref();
        if stacked.is_some_and(|name| packing.position(name).is_some()) {
            continue;
        }
        let shape = expected.rule.shape.iter();
        let shape: Vec<_> = shape.map(|dim| dim.size(config, &widths)).collect();
        for name in &expected.sources {
            let entry = match packing.linear(name, &shape) {
                Ok(Some(_)) => continue,
                Ok(None) => packing.position(name).map(|at| &checkpoint.tensors()[at]),
                Err(error) => {
                    explained = true;
                    found.push(of_error(Rule::PackedLinear, &error));
                    continue;
                }
            };
            let finding = match entry {
                None if expected.rule.presence == Presence::Required => {
                    let message = format!("the tensor is missing; its shape would be {shape:?}");
                    let finding = Finding::new(Rule::MissingTensor, message).in_tensor(name);
                    finding.in_file(checkpoint.folder().display().to_string())
                }
                Some(entry) if entry.shape != shape => {
                    let message = format!(
                        "its shape must be {shape:?} by config.json, found {:?}",
                        entry.shape
                    );
                    of_entry(checkpoint, entry, Rule::WrongShape, message)
                }
                _ => continue,
            };
            explained = true;
            found.push(finding);
        }
    }
    if !explained {
        found.push(unexplained(&error));
    }
}

/// Every linear that is not packed must be listed as such, or runtimes look for its codes.
fn plain_linears(
    checkpoint: &Checkpoint,
    packing: &Packing,
    config: &NemotronHConfig,
    found: &mut Found,
) {
    let quantization = packing.quantization();
    let Some(quantization) = quantization.filter(|q| q.lists_ignored()) else {
        return;
    };
    let is_linear = |expected: &ExpectedTensor| {
        let rule = expected.rule;
        rule.storage == Storage::OutType && rule.shape.len() == 2 && expected.name != EMBEDDING
    };
    for expected in expected_tensors(config, true).into_iter().filter(is_linear) {
        let positions = expected.sources.iter();
        for position in positions.filter_map(|name| packing.position(name)) {
            let entry = &checkpoint.tensors()[position];
            let is_plain = matches!(entry.dtype, Dtype::F32 | Dtype::F16 | Dtype::Bf16);
            let module = entry.name.strip_suffix(".weight").unwrap_or(&entry.name);
            if !is_plain || quantization.ignores(module) {
                continue;
            }
            let (message, severity) = match quantization.scheme_of(module) {
                // Some runtimes take the class `Linear` to mean the head, others do not.
                Some(scheme) if expected.name == HEAD => (
                    format!(
                        "some runtimes expect {scheme}; its weights are plain: list it in `ignore`"
                    ),
                    Severity::Warning,
                ),
                Some(scheme) => (
                    format!(
                        "the configuration wants {scheme}, its weights are plain {}",
                        entry.dtype
                    ),
                    Severity::Error,
                ),
                None => (
                    "is neither packed nor listed in `ignore`".to_owned(),
                    Severity::Warning,
                ),
            };
            let finding = of_entry(checkpoint, entry, Rule::QuantizationConfig, message);
            found.push(finding.severity(severity));
        }
    }
}

/// What runtimes fuse must be stored alike: query, key and value, and all experts of a layer, whose scheme they look up by
/// the name of the first.
fn alike(sources: &Sources, found: &mut Found) {
    let wrong = |linear: &PackedLinear, message: &str| {
        Finding::new(Rule::QuantizationConfig, message).in_tensor(linear.module())
    };
    let of_name = |name: &str| {
        let mut tensors = sources.tensors.iter();
        tensors.find(|tensor| tensor.expected.name == name)
    };
    let all = sources.tensors.iter().flat_map(|tensor| &tensor.pieces);
    let has_packed = all.filter_map(packed).any(|linear| {
        let layout = linear.scheme().layout;
        matches!(
            layout,
            Layout::PackQuantized { .. } | Layout::IntQuantized { .. }
        )
    });
    for tensor in &sources.tensors {
        let (pieces, name) = (&tensor.pieces, &tensor.expected.name);
        let Some(first) = pieces.iter().find_map(packed) else {
            if has_packed && tensor.expected.rule.is_stacked() {
                let message = "beside packed linears transformers looks for packed experts alone, and leaves these at \
                               random values; vLLM and SGLang read them";
                let finding = Finding::new(Rule::QuantizationConfig, message).in_tensor(name);
                found.push(finding.severity(Severity::Warning));
            }
            continue;
        };
        let scheme = first.scheme();
        let differs = |piece: &Piece| packed(piece).map(PackedLinear::scheme) != Some(scheme);
        if pieces.iter().any(differs) {
            let message = "the experts of a layer are not stored alike; runtimes read all as they read the first";
            found.push(wrong(first, message));
        } else if tensor.expected.rule.is_stacked()
            && let Some(message) = unread_by_transformers(scheme.layout)
        {
            found.push(wrong(first, message).severity(Severity::Warning));
        }
        let fused = [
            ("attn_k.", "attn_q."),
            ("attn_v.", "attn_q."),
            ("ffn_down_exps.", "ffn_up_exps."),
        ];
        let partners = fused
            .iter()
            .filter(|(part, _)| name.contains(part))
            .filter_map(|(part, with)| of_name(&name.replace(part, with)));
        for partner in partners {
            if partner.pieces.iter().any(differs) {
                let other = &partner.expected.name;
                let message =
                    format!("is not stored as `{other}` is; runtimes read the two as one");
                found.push(wrong(first, &message));
            }
        }
    }
}

/// What becomes of experts of this layout in transformers, if it does not read them. vLLM and SGLang do.
fn unread_by_transformers(experts: Layout) -> Option<&'static str> {
    match experts {
        Layout::IntQuantized { .. } => Some(
            "transformers leaves experts in int-quantized at random values and says nothing; vLLM and SGLang read them",
        ),
        Layout::PackQuantized {
            symmetric: false, ..
        } => Some("transformers refuses experts with zero points; vLLM and SGLang read them"),
        _ => None,
    }
}

fn packed(piece: &Piece) -> Option<&PackedLinear> {
    match piece {
        Piece::Packed(linear) => Some(linear),
        Piece::Tensor { .. } | Piece::SecondScale(_) | Piece::Zeros => None,
    }
}

fn of_entry(checkpoint: &Checkpoint, entry: &TensorEntry, rule: Rule, message: String) -> Finding {
    let path = checkpoint.shards()[entry.shard].path();
    let finding = Finding::new(rule, message).in_tensor(&entry.name);
    finding.in_file(path.display().to_string()).at(entry.offset)
}

fn unexplained(error: &Error) -> Finding {
    of_error(Rule::UnknownTensor, error).severity(Severity::Error)
}
