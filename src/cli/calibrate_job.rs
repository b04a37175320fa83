//! `calibrate`: a model reads its samples; statistics, an importance matrix and the ledger of experts come of it.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv::artifact::StoredModel;
use nemoconv::backend::Machines;
use nemoconv::calibrate::cells::CELLS;
use nemoconv::calibrate::experts::{ExpertEntry, ExpertMoments};
use nemoconv::calibrate::samples::{SampleSettings, Samples};
use nemoconv::calibrate::statistics::Statistics;
use nemoconv::calibrate::statistics_file::Origin;
use nemoconv::convert::Progress;
use nemoconv::error::{Error, Result};
use nemoconv::formats::imatrix::ImatrixFile;
use nemoconv::model::tokenizer::{ChatTemplates, TextEncoder, TokenizerFiles};
use nemoconv::write::whole_file::{WholeFile, sha256_of};
use serde_json::{Value, json};

use super::calibrate_args::Calibrate;
use super::eval_model::{files_of, name_of, open_encoder};
use super::inputs;
use super::memory;
use super::output::{Talk, human_bytes, print_stdout, table};
use super::outputs;
use super::progress::Report;
use super::workers::on_workers;

/// Reads the samples, runs the model on them and writes what was asked for.
pub fn calibrate(
    args: &Calibrate,
    machines: &Machines,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<()> {
    inputs::require(&[
        ("--text", args.text.as_deref()),
        ("--dataset", args.dataset.as_deref()),
    ])?;
    let outfile = args.outfile(&name_of(&args.model));
    let read = [
        Some(Path::new(&args.model)),
        args.text.as_deref(),
        args.dataset.as_deref(),
    ];
    inputs::spare(&read, &[outfile.as_deref(), args.imatrix.as_deref()])?;
    outputs::try_file("--outfile", outfile.as_deref())?;
    outputs::try_file("--imatrix", args.imatrix.as_deref())?;
    let stored = Arc::new(StoredModel::open(&args.model)?);
    let settings = args.samples();
    let (encoder, templates) = open_tokenizer(&stored)?;
    let samples = match &args.text {
        Some(text) => Samples::read_text(&encoder, text, settings)?,
        None => Samples::read_documents(&encoder, &templates, args.source(), settings)?,
    };
    samples.check_vocabulary(stored.config().vocab_size)?;
    let outputs = Outputs {
        statistics: outfile.as_deref().map(WholeFile::create).transpose()?,
        imatrix: args.imatrix.as_deref().map(WholeFile::create).transpose()?,
    };
    talk.say("calibrating");
    let statistics = collect(args, machines, &stored, &samples, talk, stop)?;
    let origin = Origin::new(model_sha256(&stored)?, &samples, settings);
    let written = outputs.write(args, &statistics, &origin)?;
    let experts = statistics.experts();
    if args.json {
        print_stdout(format_args!("{:#}", document(&origin, &written, &experts)));
        return Ok(());
    }
    print_stdout(summary(&samples));
    if !experts.is_empty() {
        print_stdout(format_args!("\n{}\n", ledger(&experts)));
    }
    written.iter().for_each(|file| print_stdout(&file.path));
    Ok(())
}

/// The samples of a conversion: a text, or documents where the name ends in `.jsonl`.
pub fn read_samples(
    stored: &StoredModel,
    path: &Path,
    settings: SampleSettings,
) -> Result<Samples> {
    let (encoder, templates) = open_tokenizer(stored)?;
    let samples = Samples::read(&encoder, &templates, path, settings)?;
    samples.check_vocabulary(stored.config().vocab_size)?;
    Ok(samples)
}

/// SHA-256 of every file of a model's weights.
pub fn model_sha256(stored: &StoredModel) -> Result<Vec<String>> {
    files_of(stored)
        .iter()
        .map(|path| sha256_of(path))
        .collect()
}

/// The model's own tokenizer and its chat templates.
fn open_tokenizer(stored: &StoredModel) -> Result<(TextEncoder, ChatTemplates)> {
    let encoder = open_encoder(stored, None, stored.config().vocab_size)?;
    let templates = match (stored.checkpoint(), stored.metadata()) {
        (Some(checkpoint), _) => {
            ChatTemplates::of_folder(&TokenizerFiles::read(checkpoint.folder())?)?
        }
        (None, Some(metadata)) => ChatTemplates::of_gguf(metadata),
        (None, None) => ChatTemplates::default(),
    };
    Ok((encoder, templates))
}

fn collect(
    args: &Calibrate,
    machines: &Machines,
    stored: &Arc<StoredModel>,
    samples: &Samples,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<Statistics> {
    let config = stored.config();
    let needs = Statistics::arrange(stored, samples, memory::limit(args.max_ram))?;
    talk.say(format_args!(
        "about {} of memory",
        human_bytes(needs.peak_bytes)
    ));
    let stream_bytes = samples.tokens() * config.hidden_size * size_of::<f32>();
    let streams = config.pattern.kinds().len() + 1;
    let progress = Report::new(*talk);
    progress.begin("calibrating", (stream_bytes * streams) as u64);
    // Streams are read cell by cell, about as long as each other.
    let watch = || {
        progress.advance((stream_bytes / CELLS) as u64);
        match stop.load(Ordering::Relaxed) {
            true => Err(Error::Interrupted),
            false => Ok(()),
        }
    };
    let statistics = on_workers(args.threads, || {
        Statistics::collect(machines, stored, samples, needs.streams_in_file, &watch)
    })?;
    progress.end();
    Ok(statistics)
}

/// Files that do not exist yet; they were tried before the work began.
struct Outputs {
    statistics: Option<WholeFile>,
    imatrix: Option<WholeFile>,
}

/// A file that was written.
struct Written {
    kind: &'static str,
    path: String,
    sha256: String,
}

impl Outputs {
    fn write(
        self,
        args: &Calibrate,
        statistics: &Statistics,
        origin: &Origin,
    ) -> Result<Vec<Written>> {
        let mut written = Vec::new();
        if let Some(file) = self.statistics {
            let path = file.path().display().to_string();
            let sha256 = file.publish(|out| statistics.write(origin, out))?;
            written.push(Written {
                kind: "statistics",
                path,
                sha256,
            });
        }
        if let Some(file) = self.imatrix {
            let path = file.path().display().to_string();
            let dataset = args.source().to_string_lossy().into_owned();
            let entries = statistics.importance(args.process_output);
            let chunks = u32::try_from(origin.sequences).unwrap_or(u32::MAX);
            let imatrix =
                ImatrixFile::new(vec![dataset], chunks, args.calibration_context, &entries)?;
            let sha256 = file.publish(|out| imatrix.write(out))?;
            written.push(Written {
                kind: "imatrix",
                path,
                sha256,
            });
        }
        Ok(written)
    }
}

fn summary(samples: &Samples) -> String {
    format!(
        "{} tokens in {} sequences, sha256 {}",
        samples.tokens(),
        samples.sequences.len(),
        samples.digest()
    )
}

fn document(origin: &Origin, written: &[Written], experts: &[ExpertEntry]) -> Value {
    let files: Vec<_> = written
        .iter()
        .map(|file| json!({ "kind": file.kind, "path": file.path, "sha256": file.sha256 }))
        .collect();
    json!({
        "nemoconv": origin.nemoconv,
        "model_sha256": origin.model_sha256,
        "samples": {
            "sha256": origin.samples_sha256,
            "tokens": origin.tokens,
            "sequences": origin.sequences,
            "context": origin.context_tokens,
            "seed": origin.seed,
        },
        "files": files,
        "experts": experts,
    })
}

fn ledger(experts: &[ExpertEntry]) -> String {
    let header = [
        "block", "expert", "tokens", "share", "weight", "", "rounding",
    ];
    let rows = experts.iter().map(|entry| {
        let (mark, rounding) = match entry.moments {
            ExpertMoments::Own => ("", String::new()),
            ExpertMoments::Shrunk => (
                "*",
                format!(
                    "fewer tokens than its {} inputs: second moments shrunk, {:.0} % its own",
                    entry.inputs,
                    100.0 * entry.own_share
                ),
            ),
            ExpertMoments::AllTokens => ("*", "no token chose it: shown all tokens".to_owned()),
        };
        vec![
            entry.block.to_string(),
            entry.expert.to_string(),
            entry.tokens.to_string(),
            format!("{:.2} %", 100.0 * entry.share),
            format!("{:.2}", entry.weight),
            mark.to_owned(),
            rounding,
        ]
    });
    let header = header.map(String::from).to_vec();
    let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
    table(&rows, &[true, true, true, true, true, false, false])
}
