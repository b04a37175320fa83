//! Flags of `calibrate`.

use std::path::{Path, PathBuf};

use clap::Args;
use nemoconv::calibrate::samples::SampleSettings;
use nemoconv::plan::recipe::parse_size;

use super::device::DeviceArgs;

const HELP: &str = "\
A dataset has one document per line: {\"text\": \"...\"}, or {\"messages\": [...]} for the model's own chat
template. Documents are packed into sequences in order; longer ones are cut.

Experts that saw fewer tokens than they have inputs are marked with `*`: their second moments are
drawn towards those of all experts, and an expert that no token chose is shown all of them.

Exit codes: 0 done, 1 bad model, text or output, 64 wrong usage, 130 interrupted";

#[derive(Debug, Args)]
#[command(after_help = HELP)]
pub struct Calibrate {
    /// Model folder, .safetensors or .gguf file, or `org/name[@revision]` in the hub's cache
    pub model: String,
    /// Text that the model reads, cut into whole sequences as llama-imatrix cuts it
    #[arg(long, value_name = "FILE", required_unless_present = "dataset")]
    pub text: Option<PathBuf>,
    /// Documents that the model reads, one JSON object per line
    #[arg(long, value_name = "FILE.jsonl", conflicts_with = "text")]
    pub dataset: Option<PathBuf>,
    /// Where to write the statistics, for `to-gguf --statistics`; a file of that name is replaced. Default, without
    /// --imatrix: a name made from the model, in this folder
    #[arg(short, long, value_name = "FILE.safetensors")]
    pub outfile: Option<PathBuf>,
    /// Where to write llama.cpp's importance matrix; a file of that name is replaced
    #[arg(long, value_name = "FILE.gguf")]
    pub imatrix: Option<PathBuf>,
    /// Put output.weight into the importance matrix too
    #[arg(long, requires = "imatrix")]
    pub process_output: bool,
    /// Tokens per sequence
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(8..=1 << 20))]
    pub calibration_context: u32,
    /// Sequences at most; of more a seeded choice is read
    #[arg(long, default_value_t = 512, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub calibration_sequences: u32,
    /// Seed of the choice
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
    /// Memory to stay within, such as 16G: residual streams that do not fit are kept in a temporary file. Default: three
    /// quarters of what is free
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub max_ram: Option<u64>,
    /// Worker threads; the numbers do not depend on it. Default: all cores
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// One JSON document on stdout
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub device: DeviceArgs,
}

impl Calibrate {
    /// How much is read.
    pub fn samples(&self) -> SampleSettings {
        SampleSettings {
            context_tokens: self.calibration_context as usize,
            max_sequences: self.calibration_sequences as usize,
            seed: self.seed,
        }
    }

    /// What is read.
    pub fn source(&self) -> &Path {
        let given = self.text.as_deref().or(self.dataset.as_deref());
        given.expect("the parser wants one of them")
    }

    /// Where statistics go; nowhere if only an importance matrix is asked for.
    pub fn outfile(&self, model_name: &str) -> Option<PathBuf> {
        let default = || PathBuf::from(format!("{model_name}.statistics.safetensors"));
        let wanted = self.outfile.is_some() || self.imatrix.is_none();
        wanted.then(|| self.outfile.clone().unwrap_or_else(default))
    }
}
