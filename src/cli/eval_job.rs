//! `eval` and `eval merge`: from flags to scores, result files and tables.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::time::{SystemTime, UNIX_EPOCH};

use nemoconv::artifact::{StoredModel, locate};
use nemoconv::backend::Machines;
use nemoconv::error::{Error, Fault, Result};
use nemoconv::eval::comparison::Comparison;
use nemoconv::eval::document::DataSet;
use nemoconv::eval::files::{self, StoredRun};
use nemoconv::eval::journal::Journal;
use nemoconv::eval::merge::merge;
use nemoconv::eval::requests::Prompting;
use nemoconv::eval::results::{Description, results, sanitize};
use nemoconv::eval::run::{Effort, PreparedTask, Settings, TaskSamples};
use nemoconv::eval::samples::sha256;
use nemoconv::eval::shard::Shard;
use nemoconv::eval::tasks::Task;
use nemoconv::forward::scoring::Scorer;
use serde_json::{Value, json};

use super::args::{Eval, EvalCommand, EvalMerge, EvalRun};
use super::eval_model::{
    OpenModel, Performance, open_scorer, peak_memory_bytes, reset_peak_memory,
};
use super::eval_progress::EvalProgress;
use super::eval_report::{accuracy_table, compare, comparison_json, model_name, performance_table};
use super::inputs;
use super::output::{Talk, print_stdout};

/// What came of one model.
struct Evaluated {
    name: String,
    results: Value,
    tasks: Vec<TaskSamples>,
    /// Of a model that was asked now.
    performance: Option<Performance>,
    /// The result file, if one was written.
    file: Option<PathBuf>,
}

/// Scores a model, or merges parts.
pub fn eval(args: &Eval, machines: &Machines, talk: &Talk, stop: &AtomicBool) -> Result<()> {
    match &args.command {
        Some(EvalCommand::Merge(args)) => merge_parts(args),
        None => run(&args.run, machines, talk, stop),
    }
}

fn run(args: &EvalRun, machines: &Machines, talk: &Talk, stop: &AtomicBool) -> Result<()> {
    let artifact = args.artifact.as_deref().unwrap_or_default();
    // Before the long run: a baseline of results that cannot be read.
    let stored = args.baseline.as_deref().and_then(stored_baseline);
    let stored = stored.map(|path| read_baseline(&path)).transpose()?;
    if let (Some(baseline), None) = (args.baseline.as_deref(), &stored) {
        open_baseline(baseline)?;
    }
    inputs::require(&[
        ("--data", args.data.as_deref()),
        ("--tokenizer", args.tokenizer.as_deref()),
    ])?;
    let job = Job {
        args,
        machines,
        data: read_data(args)?,
        date: date()?,
        talk,
        stop,
    };
    let model = job.evaluate(artifact, None)?;
    let baseline = match (&args.baseline, stored) {
        (_, Some(stored)) => Some(Evaluated {
            name: model_name(&stored),
            results: stored.results,
            tasks: stored.tasks,
            performance: None,
            file: Some(stored.path),
        }),
        (Some(artifact), None) => Some(job.evaluate(artifact, Some(&model.name))?),
        (None, None) => None,
    };
    report(&model, baseline.as_ref(), args.json)
}

fn merge_parts(args: &EvalMerge) -> Result<()> {
    let files = args.parts.iter().map(|path| results_at("eval merge", path));
    let files = files.collect::<Result<Vec<_>>>()?.concat();
    let parts: Vec<_> = files
        .iter()
        .map(|path| StoredRun::read(path))
        .collect::<Result<_>>()?;
    let baseline = args.baseline.as_deref().map(read_baseline).transpose()?;
    let (results, tasks) = merge(parts)?;
    let name = results["model_name"]
        .as_str()
        .unwrap_or_default()
        .to_string();
    let folder = args.output.join(sanitize(&name));
    files::make_folder(&folder)?;
    let file = files::write(&folder, &results, &tasks)?;
    let merged = Evaluated {
        name,
        results,
        tasks,
        performance: None,
        file: Some(file),
    };
    let baseline = baseline.map(|stored| Evaluated {
        name: model_name(&stored),
        results: stored.results,
        tasks: stored.tasks,
        performance: None,
        file: Some(stored.path),
    });
    report(&merged, baseline.as_ref(), args.json)
}

/// The result files at or below a path that was named.
fn results_at(named_by: &str, path: &Path) -> Result<Vec<PathBuf>> {
    inputs::require(&[(named_by, Some(path))])?;
    let found = StoredRun::find(path);
    if found.is_empty() {
        let fault = Fault::new("the folder holds no results_*.json").in_file(path);
        let hint = "name what `nemoconv eval --output DIR` wrote: DIR, or its result files";
        return Err(Error::Data(fault.hint(hint)));
    }
    Ok(found)
}

/// Everything that both models of a run share.
struct Job<'a> {
    args: &'a EvalRun,
    machines: &'a Machines,
    data: Vec<(Task, DataSet)>,
    date: f64,
    talk: &'a Talk,
    stop: &'a AtomicBool,
}

impl Job<'_> {
    /// Asks one model all tasks; `other_name` is a name it must not be confused with.
    fn evaluate(&self, artifact: &str, other_name: Option<&str>) -> Result<Evaluated> {
        reset_peak_memory();
        let model = open_scorer(
            self.machines,
            artifact,
            self.args.tokenizer.as_deref(),
            self.args.time_step,
        )?;
        let name = match other_name {
            Some(other) if other == model.name => format!("{}-baseline", model.name),
            _ => model.name.clone(),
        };
        let settings = self.settings(&model);
        let prepared: Vec<_> = self
            .data
            .iter()
            .map(|(task, data)| {
                let vocab_size = model.scorer.vocab_size();
                PreparedTask::new(*task, data, &model.encoder, vocab_size, settings)
            })
            .collect::<Result<_>>()?;
        let description = self.description(&model, &name, settings);
        let folder = self.folder(&name, settings.shard)?;
        let mut journal = folder
            .as_deref()
            .map(|folder| Journal::open(&folder.join("journal.jsonl"), &key(&description)))
            .transpose()?;
        let progress = EvalProgress::new(*self.talk);
        let mut tasks = Vec::new();
        let mut effort = Effort::default();
        for task in prepared {
            let (samples, spent) =
                task.answer(&model.scorer, journal.as_mut(), &progress, self.stop)?;
            tasks.push(samples);
            effort.tokens += spent.tokens;
            effort.time += spent.time;
        }
        let peak_memory_bytes = peak_memory_bytes();
        let performance = performance(&model, &name, effort, peak_memory_bytes)?;
        let results = results(&description, &model.encoder, &tasks);
        let file = folder
            .map(|folder| {
                let file = files::write(&folder, &results, &tasks)?;
                files::write_beside(&file, "performance", &performance.json())?;
                Ok::<_, Error>(file)
            })
            .transpose()?;
        if let Some(journal) = journal {
            journal.remove();
        }
        Ok(Evaluated {
            name,
            results,
            tasks,
            performance: Some(performance),
            file,
        })
    }

    fn settings(&self, model: &OpenModel) -> Settings {
        Settings {
            limit: self.args.limit.map(|limit| limit as usize),
            shard: self.args.shard.unwrap_or(Shard::WHOLE),
            prompting: Prompting {
                add_bos: self.args.add_bos,
                max_length: self
                    .args
                    .max_length
                    .map_or(model.max_length, |length| length as usize),
            },
        }
    }

    fn description(&self, model: &OpenModel, name: &str, settings: Settings) -> Description {
        Description {
            model_name: name.to_string(),
            parameters: model.parameters(),
            dtype: model.dtype(),
            identity: model.identity.clone(),
            revision: model.revision(),
            max_length: settings.prompting.max_length,
            add_bos: settings.prompting.add_bos,
            limit: settings.limit,
            shard: settings.shard,
            date: self.date,
        }
    }

    /// The folder of a model's results, made if it is not there.
    fn folder(&self, name: &str, shard: Shard) -> Result<Option<PathBuf>> {
        let Some(output) = &self.args.output else {
            return Ok(None);
        };
        let mut folder = output.join(sanitize(name));
        if shard != Shard::WHOLE {
            folder.push(format!("shard_{}", shard.to_string().replace('/', "_of_")));
        }
        files::make_folder(&folder)?;
        Ok(Some(folder))
    }
}

/// What answers depend on beside the tokens that are asked.
fn key(description: &Description) -> String {
    let version = env!("CARGO_PKG_VERSION");
    sha256(&format!("{version} {}", description.identity))
}

fn performance(
    model: &OpenModel,
    name: &str,
    effort: Effort,
    peak_memory_bytes: Option<u64>,
) -> Result<Performance> {
    let (prefill, decode) = model.speed()?;
    Ok(Performance {
        model: name.to_string(),
        file_bytes: model.file_bytes,
        weight_bytes: model.stored.weight_bytes(),
        peak_memory_bytes,
        prefill_tokens_per_second: prefill,
        decode_tokens_per_second: decode,
        evaluation_tokens: effort.tokens,
        evaluation_seconds: effort.time.as_secs_f64(),
    })
}

fn read_data(args: &EvalRun) -> Result<Vec<(Task, DataSet)>> {
    let folder = args.data.as_deref().unwrap_or(Path::new("."));
    let mut tasks: Vec<Task> = Vec::new();
    for task in &args.tasks {
        if !tasks.contains(task) {
            tasks.push(*task);
        }
    }
    DataSet::read_all(folder, tasks)
}

/// Seconds since 1970: SOURCE_DATE_EPOCH, else now.
fn date() -> Result<f64> {
    if let Ok(text) = std::env::var("SOURCE_DATE_EPOCH") {
        let seconds: Option<u32> = text.trim().parse().ok();
        return seconds.map(f64::from).ok_or_else(|| {
            Error::Data(Fault::new(format!(
                "SOURCE_DATE_EPOCH must be seconds since 1970, found {text:?}"
            )))
        });
    }
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    Ok(now.map_or(0.0, |now| now.as_micros() as f64 / 1e6))
}

/// Whether a baseline is results and not a model: a JSON file, or a folder that holds results and no model.
fn stored_baseline(baseline: &str) -> Option<PathBuf> {
    let path = Path::new(baseline);
    let is_json = path
        .extension()
        .is_some_and(|extension| extension == "json");
    let is_model = path.join("config.json").is_file();
    let holds_results = || path.is_dir() && !is_model && !StoredRun::find(path).is_empty();
    (is_json || holds_results()).then(|| path.to_owned())
}

/// A baseline that is a model, or neither that nor results.
fn open_baseline(baseline: &str) -> Result<()> {
    let path = locate(baseline)?;
    inputs::require(&[("--baseline", Some(&path))])?;
    StoredModel::open(baseline).map(drop)
}

fn read_baseline(path: &Path) -> Result<StoredRun> {
    let found = results_at("--baseline", path)?;
    if let [first, .., last] = found.as_slice() {
        let fault = Fault::new(format!(
            "there are several results, from {} to {}",
            first.display(),
            last.display()
        ));
        return Err(Error::Data(
            fault.in_file(path).hint("name one results_*.json"),
        ));
    }
    StoredRun::read(&found[0])
}

fn report(model: &Evaluated, baseline: Option<&Evaluated>, as_json: bool) -> Result<()> {
    let changes: Vec<Comparison> = match baseline {
        Some(baseline) => compare(&model.tasks, &baseline.tasks)?,
        None => Vec::new(),
    };
    let comparison = baseline.map(|baseline| comparison_json(&baseline.name, &changes));
    if let (Some(file), Some(comparison)) = (&model.file, &comparison) {
        files::write_beside(file, "comparison", comparison)?;
    }
    let measured: Vec<&Performance> = [Some(model), baseline]
        .into_iter()
        .flatten()
        .filter_map(|evaluated| evaluated.performance.as_ref())
        .collect();
    if as_json {
        let performance: Vec<_> = measured.iter().map(|measured| measured.json()).collect();
        let document = json!({
            "results": model.results,
            "baseline_results": baseline.map(|baseline| &baseline.results),
            "comparison": comparison,
            "performance": performance,
            "file": model.file,
        });
        print_stdout(format_args!("{document:#}"));
        return Ok(());
    }
    print_stdout(accuracy_table(&model.results, &model.tasks, &changes));
    if !measured.is_empty() {
        print_stdout(format_args!("\n{}", performance_table(&measured)));
    }
    if let Some(file) = &model.file {
        print_stdout(format_args!("\n{}", file.display()));
    }
    Ok(())
}
