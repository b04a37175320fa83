//! Result files on disk: their names, writing them whole, reading them back.
//!
//! Enters: results and samples, or a path. Leaves: files, or a [`StoredRun`]. Computes no figure.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::python_text;
use super::run::TaskSamples;
use super::samples::Sample;
use super::tasks::Task;
use crate::error::{Error, Fault, Result};
use crate::write::gguf::artifact::create_sibling;

/// A result file with its samples.
#[derive(Debug, Clone)]
pub struct StoredRun {
    /// The result file.
    pub path: PathBuf,
    /// Its content.
    pub results: Value,
    /// In the order of the result file.
    pub tasks: Vec<TaskSamples>,
}

/// How deep parts may lie below a folder that is named.
const MAX_DEPTH: usize = 4;

/// Writes `results_DATE.json` and a samples file per task into `folder`, the result file last.
///
/// # Errors
/// The folder cannot be made or written to.
pub fn write(folder: &Path, results: &Value, tasks: &[TaskSamples]) -> Result<PathBuf> {
    let date = file_date(results["date"].as_f64().unwrap_or(0.0));
    for samples in tasks {
        let lines: String = samples
            .samples
            .iter()
            .flat_map(|sample| [sample.line.as_str(), "\n"])
            .collect();
        let name = format!("samples_{}_{date}.jsonl", samples.task.name());
        write_whole(&folder.join(name), &lines)?;
    }
    let path = folder.join(format!("results_{date}.json"));
    write_whole(&path, &python_text::json_indented(results))?;
    Ok(path)
}

/// Writes a JSON file beside a result file: `KIND_DATE.json`.
///
/// # Errors
/// The folder cannot be written to.
pub fn write_beside(results: &Path, kind: &str, content: &Value) -> Result<PathBuf> {
    let name = results.file_name().unwrap_or_default().to_string_lossy();
    let date = name.strip_prefix("results_").unwrap_or(&name);
    let path = results.with_file_name(format!("{kind}_{date}"));
    write_whole(&path, &python_text::json_indented(content))?;
    Ok(path)
}

/// Makes a folder and those above it.
///
/// # Errors
/// The system refuses.
pub fn make_folder(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder).map_err(|source| Error::Write {
        fault: Fault::new("cannot make the output folder").in_file(folder),
        source,
    })
}

fn write_whole(path: &Path, content: &str) -> Result<()> {
    let mut file = create_sibling(path)?;
    let failed = |source| Error::Write {
        fault: Fault::new("cannot write").in_file(path),
        source,
    };
    file.write_all(content.as_bytes()).map_err(failed)?;
    file.as_file().sync_all().map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}

/// ISO 8601 in UTC with `-` for `:`, with microseconds where there are any: what Python's `isoformat` makes of it.
fn file_date(seconds: f64) -> String {
    let micros = (seconds * 1e6).round() as i64;
    let (days, in_day) = (
        micros.div_euclid(86_400_000_000),
        micros.rem_euclid(86_400_000_000),
    );
    let (year, month, day) = civil_date(days);
    let (second, micros) = (in_day / 1_000_000, in_day % 1_000_000);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let fraction = if micros == 0 {
        String::new()
    } else {
        format!(".{micros:06}")
    };
    format!("{year:04}-{month:02}-{day:02}T{hour:02}-{minute:02}-{second:02}{fraction}")
}

/// Year, month and day of a day counted from 1970-01-01.
///
/// Source: Howard Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
fn civil_date(days: i64) -> (i64, i64, i64) {
    let days = days + 719_468;
    let (era, day_of_era) = (days.div_euclid(146_097), days.rem_euclid(146_097));
    let year_of_era =
        (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = (shifted_month + 2) % 12 + 1;
    let year = year_of_era + era * 400 + i64::from(month <= 2);
    (year, month, day)
}

impl StoredRun {
    /// Reads a result file and the samples files beside it.
    ///
    /// # Errors
    /// A file that is missing, or not as this program or lm-eval writes it.
    pub fn read(path: &Path) -> Result<Self> {
        let fault = |what: &str| Error::Data(Fault::new(what).in_file(path));
        let text = read_text(path)?;
        let results: Value = serde_json::from_str(&text)
            .map_err(|error| fault(&format!("not a result file: {error}")))?;
        let figures = results["results"].as_object();
        let figures = figures.ok_or_else(|| fault("not a result file: it has no `results`"))?;
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let date = name
            .strip_prefix("results_")
            .and_then(|name| name.strip_suffix(".json"))
            .ok_or_else(|| fault("expected a file name like results_DATE.json"))?;
        let known = figures.keys().filter_map(|name| name.parse::<Task>().ok());
        let tasks = known.map(|task| {
            let samples = path.with_file_name(format!("samples_{}_{date}.jsonl", task.name()));
            let original = results["n-samples"][task.name()]["original"].as_u64();
            Ok(TaskSamples {
                task,
                original: original.unwrap_or(0) as usize,
                files: Vec::new(),
                samples: read_samples(task, &samples)?,
            })
        });
        let tasks = tasks.collect::<Result<_>>()?;
        Ok(Self {
            path: path.to_owned(),
            results,
            tasks,
        })
    }

    /// The result files at or below `path`, sorted.
    pub fn find(path: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        if path.is_file() {
            found.push(path.to_owned());
        } else {
            find_below(path, MAX_DEPTH, &mut found);
        }
        found.sort();
        found
    }
}

fn find_below(folder: &Path, depth: usize, found: &mut Vec<PathBuf>) {
    let entries = folder.read_dir().into_iter().flatten().flatten();
    for path in entries.map(|entry| entry.path()) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && depth > 0 {
            find_below(&path, depth - 1, found);
        } else if name.starts_with("results_") && name.ends_with(".json") {
            found.push(path);
        }
    }
}

fn read_text(path: &Path) -> Result<String> {
    fs::read_to_string(path)
        .map_err(|error| nemoconv_formats::Error::from(error).in_file(path).into())
}

fn read_samples(task: Task, path: &Path) -> Result<Vec<Sample>> {
    if !path.is_file() {
        let fault = Fault::new("the result file has no samples beside it")
            .in_file(path)
            .hint("run lm-eval with `--log_samples`, or nemoconv with `--output`");
        return Err(Error::Data(fault));
    }
    let text = read_text(path)?;
    let sample = |(index, line): (usize, &str)| {
        Sample::parse(task, line).map_err(|what| {
            let what = format!("line {}: {what}", index + 1);
            Error::Data(Fault::new(what).in_file(path))
        })
    };
    // Not `lines()`: a line may hold other line ends.
    let lines = text.split_terminator('\n');
    lines.enumerate().map(sample).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        let check = |seconds, expected| assert_eq!(file_date(seconds), expected);
        check(0.0, "1970-01-01T00-00-00");
        check(1_709_210_096.0, "2024-02-29T12-34-56");
        check(1_795_411_767.454_421, "2026-11-23T05-29-27.454421");
        check(951_868_799.5, "2000-02-29T23-59-59.500000");
    }
}
