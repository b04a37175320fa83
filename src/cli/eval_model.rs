//! A model opened for evaluation: network, tokenizer, names, memory and speed.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::cpu::Residence;
use nemoconv::backend::{Machine, Machines};
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::checkpoint::config_json;
use nemoconv::formats::gguf::Value as GgufValue;
use nemoconv::formats::positioned::read_exact_at;
use nemoconv::forward::network::{Network, Sequence};
use nemoconv::forward::numerics::{Numerics, TimeStepRule};
use nemoconv::forward::observer::Silent;
use nemoconv::forward::scoring::NetworkScorer;
use nemoconv::model::tokenizer::{TextEncoder, TokenizerFiles};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// Tokens that the network takes together.
const BATCH_TOKENS: usize = 1024;
/// Where neither model nor tokenizer say how long an input may be; lm-eval's default.
const DEFAULT_MAX_LENGTH: usize = 2048;
/// Tokens of the speed measurement.
const PREFILL_TOKENS: usize = 512;
const DECODE_TOKENS: usize = 32;

/// A model that can be asked.
pub struct OpenModel {
    /// As users know it.
    pub name: String,
    /// Digest of the artifact and of the arithmetic.
    pub identity: String,
    pub encoder: TextEncoder,
    pub scorer: NetworkScorer<Machine>,
    /// The model's own longest input.
    pub max_length: usize,
    pub stored: Arc<StoredModel>,
    pub file_bytes: u64,
}

/// What a model takes and how fast it is.
#[derive(Debug, Clone)]
pub struct Performance {
    pub model: String,
    pub file_bytes: u64,
    pub weight_bytes: u64,
    /// Of the process while the model was asked; known on Linux.
    pub peak_memory_bytes: Option<u64>,
    pub prefill_tokens_per_second: f64,
    pub decode_tokens_per_second: f64,
    pub evaluation_tokens: usize,
    pub evaluation_seconds: f64,
}

/// Opens an artifact, with its own tokenizer or that of another folder.
pub fn open_scorer(
    machines: &Machines,
    artifact: &str,
    tokenizer: Option<&Path>,
    time_step: TimeStepRule,
) -> Result<OpenModel> {
    let stored = Arc::new(StoredModel::open(artifact)?);
    let numerics = Numerics {
        time_step,
        ..Numerics::of_target(&stored)
    };
    let vocab_size = stored.config().vocab_size;
    let encoder = open_encoder(&stored, tokenizer, vocab_size)?;
    let all = machines.all(&stored, Residence::Mapped);
    let network = Network::open_on(&stored, all, &numerics)?;
    let files = files_of(&stored);
    let (file_bytes, digest) = digest_of(&files)?;
    Ok(OpenModel {
        name: name_of(artifact),
        identity: format!("{digest}-{time_step:?}-{}", machines.name()).to_lowercase(),
        max_length: max_length(&stored)?
            .or(encoder.max_length())
            .unwrap_or(DEFAULT_MAX_LENGTH),
        encoder,
        scorer: NetworkScorer::new(network, BATCH_TOKENS),
        stored,
        file_bytes,
    })
}

/// The tokenizer of a model, or that of another folder.
pub fn open_encoder(
    stored: &StoredModel,
    tokenizer: Option<&Path>,
    vocab_size: usize,
) -> Result<TextEncoder> {
    let own = stored.checkpoint().map(|checkpoint| checkpoint.folder());
    let Some(folder) = tokenizer.or(own) else {
        let keys = stored
            .metadata()
            .ok_or_else(|| Error::Model(Fault::new("has no tokenizer").in_file(stored.path())))?;
        let encoder = TextEncoder::of_gguf(keys);
        return Ok(encoder.map_err(|error| error.in_file(stored.path()))?);
    };
    let files = TokenizerFiles::read(folder)?;
    let encoder = TextEncoder::of_files(&files, vocab_size);
    Ok(encoder.map_err(|error| error.in_folder(folder))?)
}

/// A hub id as it is; of a path the last part.
pub fn name_of(artifact: &str) -> String {
    let path = Path::new(artifact);
    if !path.exists() {
        return artifact.to_string();
    }
    let absolute = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let name = absolute.file_name().unwrap_or(absolute.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Every file that holds weights.
pub fn files_of(stored: &StoredModel) -> Vec<PathBuf> {
    match stored.checkpoint() {
        Some(checkpoint) => {
            let shards = checkpoint.shards().iter();
            shards.map(|shard| shard.path().to_owned()).collect()
        }
        None => stored
            .parts()
            .iter()
            .map(|part| part.file().path().to_owned())
            .collect(),
    }
}

/// Bytes of all files, and a digest of their lengths and of samples of their content: the whole of a large model takes
/// minutes to read, and two models that differ do so in every tensor.
fn digest_of(files: &[PathBuf]) -> Result<(u64, String)> {
    const SAMPLES: u64 = 64;
    const SAMPLE_BYTES: u64 = 16 << 10;
    let mut hasher = Sha256::new();
    let mut total = 0;
    for path in files {
        let failed = |error| Error::from(nemoconv::formats::Error::from(error).in_file(path));
        let file = File::open(path).map_err(failed)?;
        let bytes = file.metadata().map_err(failed)?.len();
        total += bytes;
        hasher.update(bytes.to_le_bytes());
        let mut sample = vec![0; SAMPLE_BYTES.min(bytes) as usize];
        for index in 0..SAMPLES {
            let last = bytes - sample.len() as u64;
            let offset = (u128::from(last) * u128::from(index) / u128::from(SAMPLES - 1)) as u64;
            read_exact_at(&file, &mut sample, offset).map_err(failed)?;
            hasher.update(&sample);
        }
    }
    let digest = hasher.finalize();
    Ok((
        total,
        digest.iter().map(|byte| format!("{byte:02x}")).collect(),
    ))
}

/// The model's longest input as its config states it, under the names that lm-eval asks for, in its order.
fn max_length(stored: &StoredModel) -> Result<Option<usize>> {
    let number = match stored.checkpoint() {
        Some(checkpoint) => {
            let path = checkpoint.folder().join("config.json");
            let text = std::fs::read_to_string(&path)
                .map_err(|error| nemoconv::formats::Error::from(error).in_file(&path))?;
            let config: Value = config_json::parse(&text).map_err(|error| error.in_file(&path))?;
            ["n_positions", "max_position_embeddings", "n_ctx"]
                .into_iter()
                .find_map(|key| config.get(key)?.as_u64())
        }
        None => stored.metadata().and_then(|metadata| {
            let mut keys = metadata.iter();
            let length = keys.find(|(key, _)| key.ends_with(".context_length"))?.1;
            match length {
                GgufValue::U32(length) => Some(u64::from(*length)),
                GgufValue::U64(length) => Some(*length),
                _ => None,
            }
        }),
    };
    Ok(number
        .filter(|number| *number > 0)
        .and_then(|number| usize::try_from(number).ok()))
}

impl OpenModel {
    /// The type that holds most of the weights.
    pub fn dtype(&self) -> String {
        let mut weights = std::collections::BTreeMap::new();
        for tensor in self.stored.tensors() {
            *weights.entry(self.stored.stored_as(tensor)).or_insert(0) += tensor.weights();
        }
        let most = weights.into_iter().max_by_key(|(_, weights)| *weights);
        most.map_or_else(String::new, |(name, _)| name)
    }

    /// Number of weights.
    pub fn parameters(&self) -> u64 {
        let tensors = self.stored.tensors().iter();
        tensors.map(|tensor| tensor.weights()).sum()
    }

    /// Revision of a checkpoint from the hub.
    pub fn revision(&self) -> Option<String> {
        let checkpoint = self.stored.checkpoint()?;
        checkpoint.revision().map(str::to_string)
    }

    /// Tokens per second of a long input and of one token after the other.
    pub fn speed(&self) -> Result<(f64, f64)> {
        let network = self.scorer.network();
        let vocab_size = network.config().vocab_size;
        let length = PREFILL_TOKENS.min(self.max_length);
        // Different tokens: a router would send equal ones to the same experts.
        let tokens: Vec<u32> = (0..length)
            .map(|index| ((index * 7919 + 13) % vocab_size) as u32)
            .collect();
        let mut state = network.empty_state()?;
        let begun = Instant::now();
        self.step(&tokens, &mut state)?;
        let prefill = length as f64 / begun.elapsed().as_secs_f64();
        let begun = Instant::now();
        for index in 0..DECODE_TOKENS {
            self.step(&tokens[index % length..][..1], &mut state)?;
        }
        let decode = DECODE_TOKENS as f64 / begun.elapsed().as_secs_f64();
        Ok((prefill, decode))
    }

    /// Runs tokens and asks for the logits after the last.
    fn step(
        &self,
        tokens: &[u32],
        state: &mut nemoconv::forward::state::State<Machine>,
    ) -> Result<()> {
        let network = self.scorer.network();
        let normed = network.run(&mut [Sequence { tokens, state }], &mut Silent)?;
        network.logits(&normed, &[tokens.len() as u32 - 1], &mut Silent)?;
        Ok(())
    }
}

/// Begins a new measurement of the peak, where the system can.
pub fn reset_peak_memory() {
    // Linux: 5 resets the high-water mark. Elsewhere there is no such file, and no peak is reported.
    let _ = std::fs::write("/proc/self/clear_refs", "5");
}

/// Peak memory of the process in bytes.
pub fn peak_memory_bytes() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kilobytes: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kilobytes * 1024)
}

impl Performance {
    pub fn json(&self) -> Value {
        json!({
            "model": self.model,
            "file_bytes": self.file_bytes,
            "weight_bytes": self.weight_bytes,
            "peak_memory_bytes": self.peak_memory_bytes,
            "prefill_tokens_per_second": self.prefill_tokens_per_second,
            "decode_tokens_per_second": self.decode_tokens_per_second,
            "evaluation_tokens": self.evaluation_tokens,
            "evaluation_seconds": self.evaluation_seconds,
        })
    }
}
