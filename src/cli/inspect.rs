//! `inspect`: what is in a GGUF file, a checkpoint or an importance matrix, by headers alone.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use nemoconv::error::Result;
use nemoconv::formats::checkpoint::{Checkpoint, TensorEntry};
use nemoconv::formats::gguf::{Array, Gguf, Header, Value};
use nemoconv::formats::packed::Quantization;
use nemoconv::formats::packed::config::SchemeGroup;
use nemoconv::formats::{Error, Imatrix};
use serde_json::{Map, json};

use super::args::Inspect;
use super::output::{human_bytes, print_stdout, shape, table};

/// Longest text and most array elements in the table; `--json` has everything.
const SHOWN_CHARS: usize = 60;
const SHOWN_ELEMENTS: usize = 6;

/// Prints a table or JSON.
pub fn inspect(args: &Inspect) -> Result<()> {
    let text = match kind_of(&args.path)? {
        Kind::Gguf => gguf(&args.path, args.json)?,
        Kind::Imatrix => imatrix(&args.path, args.json)?,
        Kind::Checkpoint => checkpoint(&args.path, args.json)?,
    };
    print_stdout(text);
    Ok(())
}

enum Kind {
    Gguf,
    Imatrix,
    Checkpoint,
}

/// Folders and `.safetensors` are checkpoints, `GGUF` is the magic of one, `.dat` the old importance matrix.
fn kind_of(path: &Path) -> Result<Kind> {
    if path.is_dir()
        || path
            .extension()
            .is_some_and(|extension| extension == "safetensors")
    {
        return Ok(Kind::Checkpoint);
    }
    let mut magic = Vec::new();
    let file = File::open(path).map_err(|error| Error::from(error).in_file(path))?;
    file.take(4)
        .read_to_end(&mut magic)
        .map_err(|error| Error::from(error).in_file(path))?;
    if magic != b"GGUF" {
        return Ok(Kind::Imatrix);
    }
    let gguf = Gguf::open(path)?;
    let is_imatrix = gguf.header().metadata.get("general.type") == Some(&Value::from("imatrix"));
    Ok(if is_imatrix {
        Kind::Imatrix
    } else {
        Kind::Gguf
    })
}

fn gguf(path: &Path, as_json: bool) -> Result<String> {
    let gguf = Gguf::open(path)?;
    let header = gguf.header();
    let bytes: u64 = header.tensors.iter().map(|tensor| tensor.bytes()).sum();
    let weights: u64 = header.tensors.iter().map(|tensor| tensor.elements()).sum();
    let bits_per_weight = if weights == 0 {
        0.0
    } else {
        bytes as f64 * 8.0 / weights as f64
    };
    if as_json {
        let file_bytes = gguf.file().bytes().len();
        return Ok(format!(
            "{:#}",
            gguf_json(header, file_bytes, weights, bits_per_weight)
        ));
    }
    let keys: Vec<_> = header
        .metadata
        .iter()
        .map(|(key, value)| vec![key.to_string(), brief(value)])
        .collect();
    let mut rows = vec![
        ["tensor", "shape", "type", "bytes", "offset"]
            .map(String::from)
            .to_vec(),
    ];
    rows.extend(header.tensors.iter().map(|tensor| {
        vec![
            tensor.name.clone(),
            shape(&tensor.dims),
            tensor.ty.to_string(),
            tensor.bytes().to_string(),
            format!("{:#x}", header.data_offset + tensor.offset),
        ]
    }));
    Ok(format!(
        "{}\n\n{}\n\nGGUF v{}: {} keys, {} tensors, {weights} weights, {} of tensors, {bits_per_weight:.3} bits per weight",
        table(&keys, &[false, false]),
        table(&rows, &[false, false, false, true, true]),
        header.version,
        header.metadata.iter().len(),
        header.tensors.len(),
        human_bytes(bytes),
    ))
}

fn gguf_json(
    header: &Header,
    file_bytes: usize,
    weights: u64,
    bits_per_weight: f64,
) -> serde_json::Value {
    let metadata: Map<_, _> = header
        .metadata
        .iter()
        .map(|(key, value)| (key.to_string(), value_json(value)))
        .collect();
    let tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|tensor| {
            json!({
                "name": tensor.name, "dims": tensor.dims, "type": tensor.ty.name(),
                "bytes": tensor.bytes(), "offset": header.data_offset + tensor.offset,
            })
        })
        .collect();
    json!({
        "format": "gguf", "version": header.version, "alignment": header.alignment,
        "file_bytes": file_bytes, "weights": weights, "bits_per_weight": bits_per_weight,
        "metadata": metadata, "tensors": tensors,
    })
}

/// Calls `$body` with the elements of whatever array it is.
macro_rules! with_elements {
    ($array:expr, $elements:ident => $body:expr) => {
        match $array {
            Array::U8($elements) => $body,
            Array::I8($elements) => $body,
            Array::U16($elements) => $body,
            Array::I16($elements) => $body,
            Array::U32($elements) => $body,
            Array::I32($elements) => $body,
            Array::F32($elements) => $body,
            Array::Bool($elements) => $body,
            Array::String($elements) => $body,
            Array::U64($elements) => $body,
            Array::I64($elements) => $body,
            Array::F64($elements) => $body,
        }
    };
}

fn value_json(value: &Value) -> serde_json::Value {
    match value {
        Value::U8(v) => json!(v),
        Value::I8(v) => json!(v),
        Value::U16(v) => json!(v),
        Value::I16(v) => json!(v),
        Value::U32(v) => json!(v),
        Value::I32(v) => json!(v),
        Value::F32(v) => json!(v),
        Value::Bool(v) => json!(v),
        Value::String(v) => json!(v),
        Value::U64(v) => json!(v),
        Value::I64(v) => json!(v),
        Value::F64(v) => json!(v),
        Value::Array(array) => with_elements!(array, elements => json!(elements)),
    }
}

fn brief(value: &Value) -> String {
    let text = match value {
        Value::Array(array) => with_elements!(array, elements => {
            let shown: Vec<_> = elements.iter().take(SHOWN_ELEMENTS).map(|e| json!(e).to_string()).collect();
            let more = if elements.len() > SHOWN_ELEMENTS { ", ..." } else { "" };
            return format!("{} x [{}{more}]", elements.len(), cut(&shown.join(", ")));
        }),
        Value::String(text) => json!(text).to_string(),
        other => value_json(other).to_string(),
    };
    cut(&text)
}

fn cut(text: &str) -> String {
    match text.char_indices().nth(SHOWN_CHARS) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text.to_string(),
    }
}

fn imatrix(path: &Path, as_json: bool) -> Result<String> {
    let imatrix = Imatrix::open(path)?;
    if as_json {
        let entries: Vec<_> = imatrix
            .entries()
            .map(|(name, values)| json!({ "name": name, "columns": values.len() }))
            .collect();
        let json = json!({
            "format": "imatrix", "datasets": imatrix.datasets, "chunk_count": imatrix.chunk_count,
            "entries": entries,
        });
        return Ok(format!("{json:#}"));
    }
    let mut rows = vec![
        ["tensor", "columns", "mean", "largest / mean"]
            .map(String::from)
            .to_vec(),
    ];
    rows.extend(imatrix.entries().map(|(name, values)| {
        let mean =
            values.iter().map(|value| f64::from(*value)).sum::<f64>() / values.len().max(1) as f64;
        let largest = f64::from(values.iter().copied().fold(0.0, f32::max));
        let ratio = if mean > 0.0 { largest / mean } else { 0.0 };
        vec![
            name.to_string(),
            values.len().to_string(),
            format!("{mean:.4e}"),
            format!("{ratio:.1}"),
        ]
    }));
    Ok(format!(
        "{}\n\nimportance matrix: {} entries, {} chunks of {}",
        table(&rows, &[false, true, true, true]),
        imatrix.entries().len(),
        imatrix.chunk_count,
        imatrix.datasets.join(", "),
    ))
}

fn checkpoint(path: &Path, as_json: bool) -> Result<String> {
    let checkpoint = Checkpoint::open(path)?;
    let packed = Quantization::of(&checkpoint)?.map(|q| Packed::new(&checkpoint, q));
    let tensors = checkpoint.tensors();
    let file = |shard: usize| {
        checkpoint.shards()[shard]
            .path()
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    };
    let weights: u64 = match &packed {
        Some(packed) => packed.weights,
        None => tensors.iter().map(|tensor| tensor.elements()).sum(),
    };
    let bytes: u64 = tensors.iter().map(|tensor| tensor.bytes).sum();
    if as_json {
        let tensors: Vec<_> = tensors
            .iter()
            .map(|tensor| {
                json!({
                    "name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype.name(),
                    "bytes": tensor.bytes, "offset": tensor.offset, "file": file(tensor.shard),
                })
            })
            .collect();
        let json = json!({
            "format": "safetensors", "revision": checkpoint.revision(), "weights": weights,
            "tensor_bytes": bytes, "quantization": packed.as_ref().map(Packed::json), "tensors": tensors,
        });
        return Ok(format!("{json:#}"));
    }
    let mut rows = vec![
        ["tensor", "shape", "dtype", "bytes", "offset", "file"]
            .map(String::from)
            .to_vec(),
    ];
    rows.extend(tensors.iter().map(|tensor| {
        vec![
            tensor.name.clone(),
            shape(&tensor.shape),
            tensor.dtype.to_string(),
            tensor.bytes.to_string(),
            format!("{:#x}", tensor.offset),
            file(tensor.shard),
        ]
    }));
    let packed = packed.map_or(String::new(), |packed| format!("\n\n{}", packed.table()));
    Ok(format!(
        "{}{packed}\n\nsafetensors: {} tensors in {} files, {weights} weights, {}",
        table(&rows, &[false, false, false, true, true, false]),
        tensors.len(),
        checkpoint.shards().len(),
        human_bytes(bytes),
    ))
}

/// What the modules of a packed checkpoint hold, by scheme.
struct Packed {
    quantization: Quantization,
    /// Parallel to the configuration's groups.
    groups: Vec<GroupTotals>,
    /// Of all modules, packed or not.
    weights: u64,
}

#[derive(Clone, Copy, Default)]
struct GroupTotals {
    linears: u64,
    weights: u64,
    bytes: u64,
}

impl Packed {
    fn new(checkpoint: &Checkpoint, quantization: Quantization) -> Self {
        let mut groups = vec![GroupTotals::default(); quantization.groups().len()];
        let mut weights = 0;
        let mut by_module: BTreeMap<&str, Vec<&TensorEntry>> = BTreeMap::new();
        for entry in checkpoint.tensors() {
            let (module, _) = entry.name.rsplit_once('.').unwrap_or((&entry.name, ""));
            by_module.entry(module).or_default().push(entry);
        }
        for (module, entries) in by_module {
            let group = quantization.group_of(module);
            let codes = group.and_then(|group| {
                let is_codes = |entry: &&&TensorEntry| group.scheme.layout.is_codes(entry);
                Some((group, *entries.iter().find(is_codes)?))
            });
            let Some((group, codes)) = codes else {
                weights += entries.iter().map(|entry| entry.elements()).sum::<u64>();
                continue;
            };
            let place = quantization
                .groups()
                .iter()
                .position(|g| g.name == group.name);
            let of_linear = codes.elements() * group.scheme.layout.per_element() as u64;
            weights += of_linear;
            if let Some(totals) = place.map(|place| &mut groups[place]) {
                totals.linears += 1;
                totals.weights += of_linear;
                totals.bytes += entries.iter().map(|entry| entry.bytes).sum::<u64>();
            }
        }
        Self {
            quantization,
            groups,
            weights,
        }
    }

    fn groups(&self) -> impl Iterator<Item = (&SchemeGroup, &GroupTotals)> {
        self.quantization.groups().iter().zip(&self.groups)
    }

    fn json(&self) -> serde_json::Value {
        let groups = self.groups().map(|(group, totals)| {
            json!({
                "name": group.name, "scheme": group.scheme.to_string(), "linears": totals.linears,
                "weights": totals.weights, "bytes": totals.bytes, "bits_per_weight": totals.bits_per_weight(),
            })
        });
        json!({ "method": self.quantization.method().name(), "groups": groups.collect::<Vec<_>>() })
    }

    fn table(&self) -> String {
        let mut rows = vec![
            ["group", "linears", "weights", "bits per weight", "scheme"]
                .map(String::from)
                .to_vec(),
        ];
        rows.extend(self.groups().map(|(group, totals)| {
            vec![
                group.name.clone(),
                totals.linears.to_string(),
                totals.weights.to_string(),
                format!("{:.3}", totals.bits_per_weight()),
                group.scheme.to_string(),
            ]
        }));
        let method = self.quantization.method().name();
        let groups = table(&rows, &[false, true, true, true, false]);
        format!("{groups}\n\npacked by {method}")
    }
}

impl GroupTotals {
    fn bits_per_weight(&self) -> f64 {
        match self.weights {
            0 => 0.0,
            weights => self.bytes as f64 * 8.0 / weights as f64,
        }
    }
}
