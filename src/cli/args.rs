//! Flags as the user types them, and their translation into settings.

use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand};
use nemoconv::convert::calibrated::Method;
use nemoconv::eval::shard::Shard;
use nemoconv::eval::tasks::Task;
use nemoconv::formats::gguf::Value;
use nemoconv::forward::numerics::TimeStepRule;
use nemoconv::model::tokenizer::runtime_splits::is_runtime_name;
use nemoconv::plan::packed::entries::PackedEntries;
use nemoconv::plan::packed::scheme::NamedScheme;
use nemoconv::plan::phase::Phase;
use nemoconv::plan::recipe::{
    CalibrationEntries, OutType, RecipeEntries, RewriteEntries, WantedRotation, parse_size,
};
use nemoconv::plan::types::{TensorTypeRule, WantedType};
use nemoconv::report::{FailOn, Gates};
use nemoconv::write::gguf::parts::SplitLimits;
use regex::Regex;

use super::calibrate_args::Calibrate;
use super::device::{DeviceArgs, Devices};
use super::inputs;
use super::safetensors_args::ToSafetensors;

const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    could not do the work (input, output, internal)
  2    done, but a gate of `validate` failed, or a finding is at or above --fail-on
  64   wrong usage
  70   no driver of the device that was asked for; 71 no such device; 72 no CUDA compiler (NVRTC)
  73   the device is too old; 74 out of device memory; 75 device lost; 76 its limits are too small
  130  interrupted; nothing is left under a final name";

/// Converts NVIDIA Nemotron-H hybrids (Mamba-2 + attention + MLP/MoE) into quantized GGUF files and packed
/// safetensors.
#[derive(Debug, Parser)]
#[command(version, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
    /// Only errors on stderr
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// More on stderr: the fate of every source tensor
    #[arg(short, long, global = true)]
    pub verbose: bool,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Convert a Hugging Face checkpoint to GGUF
    ToGguf(Box<ToGguf>),
    /// Convert a Hugging Face checkpoint to packed safetensors that vLLM and transformers load
    ToSafetensors(Box<ToSafetensors>),
    /// Show what `to-gguf` would write, without reading a weight
    Plan(Box<ToGguf>),
    /// Let a model read samples: statistics for `to-gguf`, llama.cpp's importance matrix, what each expert saw
    Calibrate(Box<Calibrate>),
    /// Check an artifact: container, weights, tokenizer, logits against a reference; exit code 2 when a gate fails
    Validate(Box<Validate>),
    /// Show keys, tensors, types and offsets of a GGUF file, a checkpoint or an importance matrix
    Inspect(Inspect),
    /// Score benchmarks as lm-evaluation-harness does, alone or beside a baseline
    Eval(Box<Eval>),
    /// List GPUs that networks can run on, with their limits
    Devices(Devices),
}

#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, after_help = EVAL_HELP)]
pub struct Eval {
    #[command(subcommand)]
    pub command: Option<EvalCommand>,
    #[command(flatten)]
    pub run: EvalRun,
}

const EVAL_HELP: &str = "\
Data: DIR/TASK/SPLIT.jsonl or .parquet, with the fields of the published data sets. SPLIT is `test`
for arc_easy, arc_challenge and wikitext, `validation` for piqa, winogrande and hellaswag.

Written with --output, below DIR/MODEL: results_DATE.json and samples_TASK_DATE.jsonl as lm-eval
writes them, performance_DATE.json and, with --baseline, comparison_DATE.json. A run that was
stopped goes on where it was. SOURCE_DATE_EPOCH sets the date: equal runs then write equal results,
in parts and merged or not.

Exit codes: 0 done, 1 bad data, model or output, 64 wrong usage, 130 interrupted";

#[derive(Debug, Subcommand)]
pub enum EvalCommand {
    /// Put the parts of a sharded run together
    Merge(EvalMerge),
}

#[derive(Debug, Args)]
pub struct EvalMerge {
    /// Result files of all parts, or folders that hold them
    #[arg(required = true)]
    pub parts: Vec<PathBuf>,
    /// Where to write; a folder with the model's name is made there
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,
    /// Results to compare with: a results_*.json with its samples, or a folder that holds one
    #[arg(long, value_name = "RESULTS")]
    pub baseline: Option<PathBuf>,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct EvalRun {
    /// Model folder, .safetensors or .gguf file, or `org/name[@revision]` in the hub's cache
    #[arg(required = true)]
    pub artifact: Option<String>,
    /// Tasks, separated by commas: arc_easy, arc_challenge, piqa, winogrande, hellaswag, wikitext
    #[arg(long, value_delimiter = ',', required = true, value_name = "TASKS", value_parser = Task::from_str)]
    pub tasks: Vec<Task>,
    /// Folder of the data
    #[arg(long, required = true, value_name = "DIR")]
    pub data: Option<PathBuf>,
    /// Model to compare with, or its results: a results_*.json (lm-eval's too) with its samples
    #[arg(long, value_name = "ARTIFACT_OR_RESULTS")]
    pub baseline: Option<String>,
    /// Where to write results; without it they are only shown
    #[arg(long, value_name = "DIR")]
    pub output: Option<PathBuf>,
    /// Only the first N documents of each task
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub limit: Option<u32>,
    /// Only part I of N, counted from 1; `eval merge` puts the parts together
    #[arg(long, value_name = "I/N", value_parser = Shard::from_str, requires = "output")]
    pub shard: Option<Shard>,
    /// Whether to add special tokens. Default: as the tokenizer does
    #[arg(long, value_name = "true|false")]
    pub add_bos: Option<bool>,
    /// Longest input in tokens. Default: the model's
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub max_length: Option<u32>,
    /// Folder whose tokenizer is used instead of the model's own
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Bounds of the Mamba-2 time step; `minimum` is what transformers, and so lm-eval, computes
    #[arg(long, value_name = "limit|minimum", default_value = "limit", value_parser = time_step_rule)]
    pub time_step: TimeStepRule,
    /// Worker threads; the scores do not depend on it. Default: all cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

fn probability(text: &str) -> Result<f64, String> {
    let number = text.parse().ok();
    let number = number.filter(|number| (0.0..1.0).contains(number));
    number.ok_or_else(|| "expected a number from 0 up, below 1".into())
}

fn pre_tokenizer(name: &str) -> Result<String, String> {
    let known = is_runtime_name(name).then(|| name.to_owned());
    known.ok_or_else(|| {
        "llama.cpp b11434 has none of this name; Nemotron-H files carry pixtral, llama-bpe or tekken, and all names are in \
         its src/llama-vocab.cpp"
            .into()
    })
}

fn time_step_rule(text: &str) -> Result<TimeStepRule, String> {
    match text {
        "limit" => Ok(TimeStepRule::Limit),
        "minimum" => Ok(TimeStepRule::Minimum),
        _ => Err("expected limit or minimum".into()),
    }
}

const VALIDATE_HELP: &str = "\
Reports are written whatever the verdict; files of the same names are replaced.

Exit codes: 0 passed, 1 nothing could be judged (no such file, another model, output), 2 a gate
failed or a finding is at or above --fail-on, 64 wrong usage, 130 interrupted";

#[derive(Debug, Args)]
#[command(after_help = VALIDATE_HELP)]
pub struct Validate {
    /// Model folder, .safetensors or .gguf file, or `org/name[@revision]` in the hub's cache
    pub artifact: String,
    /// What it was made from: a model, a file of `--save-reference`, or a base file of llama-perplexity
    #[arg(long, value_name = "MODEL|FILE")]
    pub reference: Option<String>,
    /// Text on which logits are compared
    #[arg(long, value_name = "FILE")]
    pub text: Option<PathBuf>,
    /// Tokens of a chunk of the text
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(3..))]
    pub context: u32,
    /// Only the first N chunks
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub chunks: Option<u32>,
    /// How inputs of matrix products are taken; target = as the artifact's runtime does
    #[arg(long, value_name = "SCHEME", default_value = "target")]
    pub act: Act,
    /// Bounds of the Mamba-2 time step; `minimum` is what transformers computes
    #[arg(long, value_name = "limit|minimum", default_value = "limit", value_parser = time_step_rule)]
    pub time_step: TimeStepRule,
    /// Folder whose tokenizer is used instead of the model's own
    #[arg(long, value_name = "DIR")]
    pub tokenizer: Option<PathBuf>,
    /// Gates as YAML; the keys are the flags below without dashes
    #[arg(long, value_name = "FILE", help_heading = "Gates")]
    pub gates: Option<PathBuf>,
    /// Largest mean KL divergence, nats
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_kld: Option<f64>,
    /// Largest 99th percentile of the KL divergence, nats
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_kld_p99: Option<f64>,
    /// Smallest share of positions with the same most likely token
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub min_top1: Option<f64>,
    /// Largest perplexity over the reference's
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_ppl_ratio: Option<f64>,
    /// Largest relative error of a block's output
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_layer_error: Option<f64>,
    /// Largest relative error of an SSM state
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_state_drift: Option<f64>,
    /// Largest share of tokens whose expert set changes
    #[arg(long, value_name = "X", help_heading = "Gates")]
    pub max_expert_changes: Option<f64>,
    /// Findings that fail: note, warning, error, never, or a finding's id; repeatable. Default: error
    #[arg(long, value_name = "SEVERITY|ID", help_heading = "Gates", value_parser = FailOn::from_str)]
    pub fail_on: Vec<FailOn>,
    /// The report as JSON on stdout
    #[arg(long, help_heading = "Output")]
    pub json: bool,
    /// The report as JUnit XML
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub junit: Option<PathBuf>,
    /// The report as SARIF
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub sarif: Option<PathBuf>,
    /// The report as one HTML page with plots
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub html: Option<PathBuf>,
    /// Instead of validating, write ARTIFACT's predictions on the text, for use as --reference; a name that ends in
    /// .kld gives llama.cpp's format
    #[arg(long, value_name = "FILE", help_heading = "Output")]
    pub save_reference: Option<PathBuf>,
    /// Probability that a saved reference may leave to tokens it does not keep
    #[arg(
        long,
        value_name = "P",
        default_value_t = 1e-3,
        value_parser = probability,
        help_heading = "Output"
    )]
    pub tail_mass: f64,
    /// Most tokens that a saved reference keeps per position
    #[arg(long, value_name = "N", help_heading = "Output", value_parser = clap::value_parser!(u32).range(1..))]
    pub top_k: Option<u32>,
    /// Memory to stay under, such as 16G; weights that do not fit are streamed
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_ram: Option<u64>,
    /// Worker threads; results do not depend on it. Default: all cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// `--act`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Act {
    /// As the artifact's runtime does
    Target,
    /// f32
    None,
    /// 8 bit per block of 32
    #[value(name = "q8_0")]
    Q8_0,
    /// 8 bit per block of 256
    #[value(name = "q8_k")]
    Q8K,
    /// 8 bit, one scale per token
    TokenInt8,
    /// 8 bit, one scale per tensor, measured on the reference
    StaticInt8,
}

impl Validate {
    /// The gates given by flags.
    pub fn gates(&self) -> Gates {
        Gates {
            max_kld: self.max_kld,
            max_kld_p99: self.max_kld_p99,
            min_top1: self.min_top1,
            max_ppl_ratio: self.max_ppl_ratio,
            max_layer_error: self.max_layer_error,
            max_state_drift: self.max_state_drift,
            max_expert_changes: self.max_expert_changes,
            fail_on: self.fail_on.clone(),
        }
    }
}

#[derive(Debug, Args)]
pub struct Inspect {
    /// GGUF file, safetensors file or folder, importance matrix (.gguf, .dat)
    pub path: PathBuf,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct ToGguf {
    /// Model folder, .safetensors file, hub-cache folder, or `org/name[@revision]` in the hub's cache
    pub model: String,
    /// Where to write; `{ftype}` stands for the type. A file of that name is replaced once the new one is whole. Default: a
    /// name made from the model, in this folder
    #[arg(short, long, value_name = "FILE")]
    pub outfile: Option<PathBuf>,
    /// f32, f16, bf16, q8_0, q4_k_m, ... ; auto = the checkpoint's own float type. Default: auto
    #[arg(short = 't', long, value_name = "TYPE", value_parser = OutType::from_str, group = "aim")]
    pub outtype: Option<OutType>,
    /// 1: 8-bit weights; 2: 4-bit weights; 3: 4 bits in Mamba-2 mixers, 8 in MLP, MoE and attention. Activations are taken
    /// as 8 bits by the runtime
    #[arg(long, value_name = "1|2|3", value_parser = Phase::from_str, group = "aim")]
    pub phase: Option<Phase>,
    /// Allocate types by measured sensitivity: bits per weight over all weights. Needs --calibration
    #[arg(long, value_name = "B", group = "aim")]
    pub target_bpw: Option<f64>,
    /// The same: bytes of the whole artifact at most (K, M, G: powers of 1000)
    #[arg(long, value_name = "SIZE", value_parser = parse_size, group = "aim")]
    pub target_size: Option<u64>,
    /// Settings as YAML; keys are flags without dashes, and flags override them
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Print the resolved recipe on stdout and write nothing
    #[arg(long)]
    pub print_recipe: bool,
    /// Importance matrix of llama-imatrix (GGUF or .dat): steers the rounding
    #[arg(long, value_name = "FILE", conflicts_with = "calibration")]
    pub imatrix: Option<PathBuf>,
    /// Write a packed folder for vLLM, SGLang and transformers too, from the same pass over the samples: its errors are fed
    /// back by what the network of the GGUF file shows
    #[arg(long, value_name = "DIR", requires = "calibration", conflicts_with_all = ["widen", "target_bpw", "target_size"])]
    pub also_safetensors: Option<PathBuf>,
    /// Scheme of every linear of that folder, see `to-safetensors`. Default: by the phase or `packed` in the recipe, else w4a16
    #[arg(long, value_name = "NAME", requires = "also_safetensors", value_parser = NamedScheme::from_str)]
    pub also_scheme: Option<NamedScheme>,
    /// Type of the tensors whose GGUF name matches; repeatable, the first match wins
    #[arg(long, value_name = "REGEX=TYPE", value_parser = tensor_type_rule)]
    pub tensor_type: Vec<TensorTypeRule>,
    /// File with one REGEX=TYPE per line, after the rules given by flag
    #[arg(long, value_name = "FILE")]
    pub tensor_type_file: Option<PathBuf>,
    /// Type of output.weight; keep = the checkpoint's
    #[arg(long, value_name = "TYPE", value_parser = WantedType::from_str)]
    pub output_tensor_type: Option<WantedType>,
    /// Type of token_embd.weight; keep = the checkpoint's
    #[arg(long, value_name = "TYPE", value_parser = WantedType::from_str)]
    pub token_embedding_type: Option<WantedType>,
    /// The same as --output-tensor-type keep
    #[arg(long, conflicts_with = "output_tensor_type")]
    pub leave_output_tensor: bool,
    /// Give every matrix the base type instead of the named mix
    #[arg(long)]
    pub pure: bool,
    /// Where a type cannot hold a row, store llama.cpp's substitute instead of stopping
    #[arg(long)]
    pub allow_fallback: bool,
    /// Widen the model exactly, to multiples of 256, so that every row fits
    #[arg(long)]
    pub widen: bool,
    /// Drop the multi-token-prediction head
    #[arg(long)]
    pub no_mtp: bool,
    /// Name of the pre-tokenizer, where the tokenizer is not recognised
    #[arg(long, value_name = "NAME", value_parser = pre_tokenizer)]
    pub pre_tokenizer: Option<String>,
    /// Name of the model, for general.name
    #[arg(long, value_name = "NAME")]
    pub model_name: Option<String>,
    /// Set a metadata key; TYPE is int, float, bool or str; repeatable
    #[arg(long, value_name = "KEY=TYPE:VALUE", value_parser = key_override)]
    pub override_kv: Vec<KeyOverride>,
    /// Start a new file before this many bytes of tensors (K, M, G: powers of 1000)
    #[arg(long, value_name = "N(M|G)", value_parser = parse_size)]
    pub split_max_size: Option<u64>,
    /// Start a new file after this many tensors
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub split_max_tensors: Option<u32>,
    /// Write NaN and infinite weights as they are
    #[arg(long)]
    pub allow_nonfinite: bool,
    /// Write infinities where a value or a block's scale does not fit F16
    #[arg(long)]
    pub allow_f16_overflow: bool,
    /// Worker threads; the bytes do not depend on it. Default: all cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Show the plan and write nothing
    #[arg(long)]
    pub dry_run: bool,
    /// Print the plan or the result as JSON on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub calibration: CalibrationArgs,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// What the model reads before it is rounded, and how it is rounded then.
#[derive(Debug, Args)]
#[command(next_help_heading = "Calibration")]
pub struct CalibrationArgs {
    /// Text that the model reads, or documents (.jsonl): rounding then minimizes the error of its outputs
    #[arg(long, value_name = "FILE")]
    pub calibration: Option<PathBuf>,
    /// Statistics that `calibrate` wrote of this model and these samples: rewrites are chosen without reading again
    #[arg(long, value_name = "FILE", requires = "calibration")]
    pub statistics: Option<PathBuf>,
    /// Tokens per sequence of the calibration. Default: 512
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    pub calibration_context: Option<u32>,
    /// Sequences at most; of more a seeded choice is read. Default: 512
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub calibration_sequences: Option<u32>,
    /// Seed of every choice. Default: 0
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,
    /// How weights are rounded: with error feedback, by the search that weighs inputs, or to the nearest. Default: gptq
    #[arg(long, value_enum)]
    pub method: Option<MethodArg>,
    /// Passes of coordinate descent over scales and codes after the first. Default: 3
    #[arg(long, value_name = "N")]
    pub passes: Option<u8>,
    /// Sequences that run through the network and back, such as 32: by the gradients at the outputs rows then repair each
    /// other, which takes memory with the square of `out_features`. Default: 0, rows apart
    #[arg(long, value_name = "N")]
    pub gradient_sequences: Option<u32>,
    /// Share of the correction towards the original outputs on the inputs of the rounded network, 0 to 1. Default: 1
    #[arg(long, value_name = "BETA")]
    pub target_correction: Option<f64>,
    /// Rotate the residual stream: principal axes and Hadamard, Hadamard alone, not, or as loses least when a few blocks
    /// are rounded each way. Default: auto
    #[arg(long, value_name = "HOW")]
    pub rotate: Option<RotationArg>,
    /// Leave all other exact rewrites out too: scales, folded norms, order
    #[arg(long)]
    pub no_rewrites: bool,
    /// Leave scales out
    #[arg(long)]
    pub no_smoothing: bool,
    /// Sort hidden units and head channels by their mean square
    #[arg(long)]
    pub sort: bool,
    /// Quarters of a channel's size that go to its activation, the rest to its weights. Default: 1, in folders whose
    /// inputs are not rounded 0
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..=4))]
    pub balance: Option<u8>,
    /// Added to the diagonal of second moments, as a share of its mean. Default: 0.01
    #[arg(long, value_name = "SHARE")]
    pub damp_percent: Option<f64>,
    /// Let the biases of the convolution and of the time step take back the mean errors of ssm_in; `validate` then says
    /// by how much they were changed
    #[arg(long)]
    pub bias_absorption: bool,
    /// Memory to stay within, such as 16G: what does not fit is kept in a file or collected in several passes, with the
    /// same bytes. Default: three quarters of what is free
    #[arg(long, value_name = "SIZE", value_parser = parse_size, requires = "calibration")]
    pub max_ram: Option<u64>,
}

/// `--rotate`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RotationArg {
    Auto,
    None,
    Hadamard,
    Klt,
}

/// `--method`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum MethodArg {
    Rtn,
    Imatrix,
    Gptq,
}

impl From<RotationArg> for WantedRotation {
    fn from(rotation: RotationArg) -> Self {
        match rotation {
            RotationArg::Auto => Self::Auto,
            RotationArg::None => Self::None,
            RotationArg::Hadamard => Self::Hadamard,
            RotationArg::Klt => Self::Klt,
        }
    }
}

impl From<MethodArg> for Method {
    fn from(method: MethodArg) -> Self {
        match method {
            MethodArg::Rtn => Self::Rtn,
            MethodArg::Imatrix => Self::Imatrix,
            MethodArg::Gptq => Self::Gptq,
        }
    }
}

/// `--override-kv`.
#[derive(Debug, Clone)]
pub struct KeyOverride {
    pub key: String,
    pub value: Value,
}

impl ToGguf {
    /// The flags as a recipe; `rules` are those of the file, after those of the flags.
    pub fn entries(&self, rules: Vec<TensorTypeRule>) -> RecipeEntries {
        let given = |flag: bool| flag.then_some(true);
        RecipeEntries {
            phase: self.phase,
            outtype: self.outtype,
            target_bpw: self.target_bpw,
            target_size: self.target_size,
            rules: self.tensor_type.iter().cloned().chain(rules).collect(),
            output_tensor_type: self
                .output_tensor_type
                .or(self.leave_output_tensor.then_some(WantedType::Keep)),
            token_embedding_type: self.token_embedding_type,
            pure: given(self.pure),
            allow_fallback: given(self.allow_fallback),
            widen: given(self.widen),
            mtp: self.no_mtp.then_some(false),
            packed: PackedEntries {
                scheme: self.also_scheme,
                ..PackedEntries::default()
            },
            ..self.calibration.entries()
        }
    }

    /// When a new file begins.
    pub fn split_limits(&self) -> SplitLimits {
        SplitLimits {
            max_bytes: self.split_max_size,
            max_tensors: self.split_max_tensors.map(|count| count as usize),
        }
    }

    /// Worker threads.
    pub fn thread_count(&self) -> usize {
        Self::threads_or_all(self.threads)
    }

    /// So many, or one per core.
    pub fn threads_or_all(threads: Option<u16>) -> usize {
        let all = || std::thread::available_parallelism().map_or(1, usize::from);
        threads.map_or_else(all, usize::from)
    }
}

impl CalibrationArgs {
    /// Refuses files that are not there.
    pub fn require_inputs(&self) -> nemoconv::error::Result<()> {
        inputs::require(&[
            ("--calibration", self.calibration.as_deref()),
            ("--statistics", self.statistics.as_deref()),
        ])
    }

    /// The flags as a recipe that says nothing else.
    pub fn entries(&self) -> RecipeEntries {
        RecipeEntries {
            method: self.method.map(Method::from),
            passes: self.passes,
            gradient_sequences: self.gradient_sequences,
            target_correction: self.target_correction,
            damp_percent: self.damp_percent,
            bias_absorption: self.bias_absorption.then_some(true),
            calibration: CalibrationEntries {
                context: self.calibration_context,
                sequences: self.calibration_sequences,
                seed: self.seed,
            },
            rewrite: RewriteEntries {
                apply: self.no_rewrites.then_some(false),
                rotation: self.rotate.map(WantedRotation::from),
                smoothing: self.no_smoothing.then_some(false),
                balance: self.balance,
                sort: self.sort.then_some(true),
            },
            ..RecipeEntries::default()
        }
    }
}

/// `REGEX=TYPE`.
pub fn tensor_type_rule(text: &str) -> Result<TensorTypeRule, String> {
    let (pattern, ty) = text.rsplit_once('=').ok_or("expected REGEX=TYPE")?;
    let pattern = Regex::new(pattern).map_err(|error| error.to_string())?;
    Ok(TensorTypeRule {
        pattern,
        ty: ty.parse()?,
    })
}

fn key_override(text: &str) -> Result<KeyOverride, String> {
    let expected = "expected KEY=TYPE:VALUE with TYPE int, float, bool or str";
    let (key, typed) = text.split_once('=').ok_or(expected)?;
    let (ty, value) = typed.split_once(':').ok_or(expected)?;
    let number = |error: &dyn std::fmt::Display| format!("`{value}`: {error}");
    let value = match ty {
        "int" => Value::I64(value.parse().map_err(|e| number(&e))?),
        "float" => Value::F64(value.parse().map_err(|e| number(&e))?),
        "bool" => Value::Bool(value.parse().map_err(|e| number(&e))?),
        "str" => Value::from(value),
        _ => return Err(expected.into()),
    };
    Ok(KeyOverride {
        key: key.into(),
        value,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_parser_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_probability_is_below_1() {
        assert_eq!(probability("0.01"), Ok(0.01));
        for odd in ["1", "-0.1", "NaN", "much"] {
            assert!(probability(odd).is_err(), "{odd}");
        }
    }

    #[test]
    fn rules_need_a_pattern_and_a_type_that_can_be_written() {
        assert!(tensor_type_rule("ffn_.*=q8_0").is_ok());
        assert!(
            tensor_type_rule("ffn_up")
                .unwrap_err()
                .contains("REGEX=TYPE")
        );
        assert!(tensor_type_rule("(=q8_0").is_err());
        assert!(
            tensor_type_rule("x=iq1_s")
                .unwrap_err()
                .contains("cannot be written")
        );
    }
}
