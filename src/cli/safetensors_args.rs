//! Flags of `to-safetensors`.

use std::path::PathBuf;
use std::str::FromStr;

use clap::Args;
use nemoconv::plan::packed::entries::PackedEntries;
use nemoconv::plan::packed::readers::Reader;
use nemoconv::plan::packed::scheme::NamedScheme;
use nemoconv::plan::packed::{ActivationClip, LinearRule};
use nemoconv::plan::phase::Phase;
use nemoconv::plan::recipe::{RecipeEntries, parse_size};
use nemoconv::quantize::integer::Nearest;

use super::args::{CalibrationArgs, ToGguf};
use super::device::DeviceArgs;

const HELP: &str = "\
Schemes: w4a16 (4-bit groups), w4a16-asym (with zero points), w8a16, w8a8 (int8 inputs per token),
w8a8-static (int8 inputs, calibrated scale), w4a8, gptq-4, gptq-8. Groups are the largest of 128, 64
and 32 that divides each row. Router, convolution, norms and SSM parameters are never quantized;
embedding, head and latent projections only where --linear names them (the embedding never).

Exit codes: 0 done, 1 bad model, scheme or output, 64 wrong usage, 130 interrupted; nothing is left
under a final name";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct ToSafetensors {
    /// Model folder, .safetensors file, hub-cache folder, or `org/name[@revision]` in the hub's cache
    pub model: String,
    /// Folder to write; it must not exist or be empty. Default: a name made from the model, in this folder
    #[arg(short, long, value_name = "DIR")]
    pub outdir: Option<PathBuf>,
    /// Scheme of every linear. Default: w4a16
    #[arg(short, long, value_name = "NAME", value_parser = NamedScheme::from_str, group = "aim")]
    pub scheme: Option<NamedScheme>,
    /// 1: w8a8; 2: w4a8; 3: w4a8 in Mamba-2 mixers, w8a8 in MLP, MoE and attention
    #[arg(long, value_name = "1|2|3", value_parser = Phase::from_str, group = "aim")]
    pub phase: Option<Phase>,
    /// Scheme of the linears whose module name matches, or `keep`; repeatable, the first match wins
    #[arg(long, value_name = "REGEX=SCHEME", value_parser = LinearRule::from_str)]
    pub linear: Vec<LinearRule>,
    /// Columns that share a scale: 128, 64 or 32. Default: for each matrix the largest that divides its rows
    #[arg(long, value_name = "N")]
    pub group_size: Option<usize>,
    /// What the largest code of static inputs (w8a8-static) stands for: the largest input of the samples, or where the
    /// squared error over all of them is least. Default: mse
    #[arg(long, value_name = "max|mse", value_parser = ActivationClip::from_str)]
    pub activation_clip: Option<ActivationClip>,
    /// Programs that must load the folder; what one of them would misread is an error. Default: vllm,transformers
    #[arg(long, value_name = "NAMES", value_delimiter = ',', value_parser = Reader::from_str)]
    pub readers: Vec<Reader>,
    /// Settings as YAML; keys are flags without dashes, and flags override them
    #[arg(long, value_name = "FILE")]
    pub recipe: Option<PathBuf>,
    /// Print the resolved recipe on stdout and write nothing
    #[arg(long)]
    pub print_recipe: bool,
    /// How codes are chosen without a calibration; llmcompressor computes in BF16 as that tool does and loses more
    #[arg(long, value_name = "HOW", value_enum, default_value_t = RoundingArg::Nearest, conflicts_with = "calibration")]
    pub rounding: RoundingArg,
    /// Start a new shard before this many bytes of tensors (K, M, G: powers of 1000). Default: 5G
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_shard_size: Option<u64>,
    /// Write NaN and infinite weights as they are; what they become in quantized matrices is unspecified
    #[arg(long)]
    pub allow_nonfinite: bool,
    /// Write the largest F16 where a scale of GPTQ's layout does not fit
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

/// `--rounding`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum RoundingArg {
    Nearest,
    Llmcompressor,
}

impl From<RoundingArg> for Nearest {
    fn from(rounding: RoundingArg) -> Self {
        match rounding {
            RoundingArg::Nearest => Self::ToStoredScale,
            RoundingArg::Llmcompressor => Self::InBf16Steps,
        }
    }
}

impl ToSafetensors {
    /// The flags as a recipe.
    pub fn entries(&self) -> RecipeEntries {
        RecipeEntries {
            phase: self.phase,
            packed: PackedEntries {
                scheme: self.scheme,
                group_size: self.group_size,
                readers: self.readers.clone(),
                activation_clip: self.activation_clip,
                linears: self.linear.clone(),
            },
            ..self.calibration.entries()
        }
    }

    /// Worker threads.
    pub fn thread_count(&self) -> usize {
        ToGguf::threads_or_all(self.threads)
    }
}
