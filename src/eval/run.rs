//! A run: prepare every task, ask the model what is not answered yet, keep a journal.
//!
//! Enters: data, an encoder, a [`Scorer`]. Leaves: [`TaskSamples`]. Knows no result file and no container.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::document::{DataSet, Document};
use super::journal::Journal;
use super::requests::{Answer, Prompting, Tokenized};
use super::samples::Sample;
use super::shard::Shard;
use super::tasks::{Item, Task};
use crate::error::{Error, Fault, Result};
use crate::forward::scoring::Scorer;
use crate::model::tokenizer::TextEncoder;
use crate::parallel;

/// Which documents are asked, and how.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Settings {
    /// Only so many documents of a task, from the first.
    pub limit: Option<usize>,
    /// Which of them.
    pub shard: Shard,
    /// How strings become inputs.
    pub prompting: Prompting,
}

/// A task whose data is read, checked and encoded.
#[derive(Debug)]
pub struct PreparedTask {
    task: Task,
    original: usize,
    files: Vec<PathBuf>,
    documents: Vec<PreparedDocument>,
}

#[derive(Debug)]
struct PreparedDocument {
    doc_id: usize,
    item: Item,
    tokenized: Tokenized,
    digest: String,
}

/// The samples of a task.
#[derive(Debug, Clone, PartialEq)]
pub struct TaskSamples {
    /// Which task.
    pub task: Task,
    /// Documents in the data.
    pub original: usize,
    /// Where the data came from.
    pub files: Vec<PathBuf>,
    /// By document.
    pub samples: Vec<Sample>,
}

/// What was run and how long it took; answers from the journal count for nothing.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Effort {
    /// Input tokens, shared prefixes counted once.
    pub tokens: usize,
    /// In the model.
    pub time: Duration,
}

/// Hears how far a run is.
pub trait Progress {
    /// A task begins; `answered` of its documents were found in the journal.
    fn begin(&self, task: Task, documents: usize, answered: usize);
    /// So many documents more.
    fn advance(&self, documents: usize);
    /// The task is done.
    fn end(&self);
}

/// Input tokens that are asked between two entries of the journal.
const BATCH_TOKENS: usize = 2048;

impl PreparedTask {
    /// Reads every row, and encodes those that are asked.
    ///
    /// # Errors
    /// A row that is no item of the task or cannot be encoded, with its line; a token id that the model lacks.
    pub fn new(
        task: Task,
        data: &DataSet,
        encoder: &TextEncoder,
        vocab_size: usize,
        settings: Settings,
    ) -> Result<Self> {
        let limit = settings.limit.unwrap_or(usize::MAX);
        let prepare = |(doc_id, document): (usize, &Document)| {
            let fault = |what: String| data.fault(document, &what);
            let item = task.item(document).map_err(fault)?;
            if doc_id >= limit || !settings.shard.has(doc_id) {
                return Ok(None);
            }
            let tokenized =
                Tokenized::of(&item.question, encoder, settings.prompting).map_err(fault)?;
            if tokenized.largest_id() as usize >= vocab_size {
                return Err(vocabulary_mismatch(tokenized.largest_id(), vocab_size));
            }
            Ok(Some(PreparedDocument {
                doc_id,
                digest: tokenized.digest(),
                item,
                tokenized,
            }))
        };
        // The first fault in the order of the data, not the first that a thread found.
        let prepared = parallel::try_map(data.documents.iter().enumerate(), prepare)?;
        Ok(Self {
            task,
            original: data.documents.len(),
            files: data.files.clone(),
            documents: prepared.into_iter().flatten().collect(),
        })
    }

    /// Documents that are asked.
    pub fn document_count(&self) -> usize {
        self.documents.len()
    }

    /// Asks the model.
    ///
    /// # Errors
    /// What the scorer refuses, a score that is not a number, a journal that cannot be written, a signal.
    pub fn answer(
        self,
        scorer: &dyn Scorer,
        mut journal: Option<&mut Journal>,
        progress: &dyn Progress,
        stop: &AtomicBool,
    ) -> Result<(TaskSamples, Effort)> {
        let known = |document: &PreparedDocument| {
            let journal = journal.as_deref()?;
            journal.find(&document.digest).map(<[Answer]>::to_vec)
        };
        let mut answers: Vec<Option<Vec<Answer>>> = self.documents.iter().map(known).collect();
        let open: Vec<usize> = (0..answers.len())
            .filter(|index| answers[*index].is_none())
            .collect();
        progress.begin(self.task, answers.len(), answers.len() - open.len());
        let mut effort = Effort::default();
        for batch in self.batches(&open) {
            if stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            let begun = Instant::now();
            for (index, answer) in batch.iter().zip(self.ask(scorer, batch)?) {
                answers[*index] = Some(answer);
            }
            effort.time += begun.elapsed();
            let documents = batch.iter().map(|index| &self.documents[*index]);
            effort.tokens += documents
                .map(|document| document.tokenized.run_tokens())
                .sum::<usize>();
            if let Some(journal) = &mut journal {
                journal.append(batch.iter().filter_map(|index| {
                    let digest = self.documents[*index].digest.as_str();
                    Some((digest, answers[*index].as_deref()?))
                }))?;
            }
            progress.advance(batch.len());
        }
        progress.end();
        let answered = self.documents.into_iter().zip(answers);
        let samples = answered
            .map(|(document, answers)| document.sample(self.task, &answers.unwrap_or_default()));
        let samples = TaskSamples {
            task: self.task,
            original: self.original,
            files: self.files,
            samples: samples.collect(),
        };
        Ok((samples, effort))
    }

    /// Runs of open documents with about [`BATCH_TOKENS`] tokens.
    fn batches<'a>(&self, open: &'a [usize]) -> Vec<&'a [usize]> {
        let mut batches = Vec::new();
        let mut rest = open;
        while !rest.is_empty() {
            let mut tokens = 0;
            let fitting = rest.iter().take_while(|index| {
                let before = tokens;
                tokens += self.documents[**index].tokenized.run_tokens();
                before == 0 || tokens <= BATCH_TOKENS
            });
            let (batch, after) = rest.split_at(fitting.count());
            batches.push(batch);
            rest = after;
        }
        batches
    }

    fn ask(&self, scorer: &dyn Scorer, batch: &[usize]) -> Result<Vec<Vec<Answer>>> {
        let groups: Vec<_> = batch
            .iter()
            .map(|index| self.documents[*index].tokenized.prefix_groups())
            .collect();
        let counts: Vec<_> = groups.iter().map(Vec::len).collect();
        let scores = scorer.score(&groups.concat())?;
        let mut rest = scores.as_slice();
        let answers = batch.iter().zip(counts).map(|(index, count)| {
            let (own, after) = rest.split_at(count.min(rest.len()));
            rest = after;
            let document = &self.documents[*index];
            let answers = document.tokenized.answers(own);
            let finite = answers
                .iter()
                .all(|answer| answer.log_likelihood.is_finite());
            if finite {
                Ok(answers)
            } else {
                let (task, doc_id) = (self.task.name(), document.doc_id);
                Err(Error::Run(Fault::new(format!(
                    "the score of document {doc_id} of {task} is not a finite number"
                ))))
            }
        });
        answers.collect()
    }
}

impl PreparedDocument {
    fn sample(self, task: Task, answers: &[Answer]) -> Sample {
        let target_tokens = self.tokenized.target_tokens();
        Sample::new(task, self.doc_id, &self.item, answers, target_tokens)
    }
}

fn vocabulary_mismatch(id: u32, vocab_size: usize) -> Error {
    let fault = Fault::new(format!(
        "the tokenizer gives token id {id}, but the model has {vocab_size} tokens"
    ));
    Error::Data(fault.hint("check that the tokenizer files belong to the model"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::eval::files::{self, StoredRun};
    use crate::eval::merge::merge;
    use crate::eval::results::{Description, results};
    use crate::forward::scoring::{ContinuationScore, PrefixGroup};
    use crate::model::tokenizer::TokenizerFiles;
    use sha2::{Digest, Sha256};
    use std::path::Path;
    use std::sync::atomic::AtomicUsize;

    /// Scores that depend on every token and on nothing else; stops the run after so many calls.
    #[derive(Default)]
    struct HashScorer {
        asked: AtomicUsize,
        stop: AtomicBool,
        stop_after_calls: usize,
        calls: AtomicUsize,
    }

    impl Scorer for HashScorer {
        fn vocab_size(&self) -> usize {
            1024
        }

        fn score(&self, groups: &[PrefixGroup]) -> Result<Vec<Vec<ContinuationScore>>> {
            if self.calls.fetch_add(1, Ordering::Relaxed) + 1 == self.stop_after_calls {
                self.stop.store(true, Ordering::Relaxed);
            }
            let score = |group: &PrefixGroup| {
                let continuations = group.continuations.iter();
                continuations
                    .map(|continuation| {
                        self.asked.fetch_add(1, Ordering::Relaxed);
                        let mut hasher = Sha256::new();
                        let input = group.prefix.iter().chain(&continuation.tokens);
                        for token in input.chain(&continuation.targets) {
                            hasher.update(token.to_le_bytes());
                        }
                        let digest = hasher.finalize();
                        ContinuationScore {
                            log_likelihood: -f64::from(digest[0]) - f64::from(digest[1]) / 3.0,
                            is_greedy: digest[2] < 9,
                        }
                    })
                    .collect()
            };
            Ok(groups.iter().map(score).collect())
        }
    }

    struct Silent;

    impl Progress for Silent {
        fn begin(&self, _: Task, _: usize, _: usize) {}
        fn advance(&self, _: usize) {}
        fn end(&self) {}
    }

    fn encoder() -> TextEncoder {
        let files = TokenizerFiles::read(&nemoconv_fixtures::nano()).unwrap();
        TextEncoder::of_files(&files, 1024).unwrap()
    }

    /// 120 questions with texts long enough for several batches, and 7 pages.
    fn write_data(folder: &Path) {
        let question = |index: usize| {
            let goal = format!("reach place number {index} {}", "by this road ".repeat(9));
            serde_json::json!({"goal": goal, "sol1": format!("walk {index}"), "sol2": "run", "label": index % 2})
                .to_string()
        };
        let page =
            |index: usize| serde_json::json!({"page": format!(" = {index} = a page")}).to_string();
        let lines = |lines: Vec<String>| lines.join("\n") + "\n";
        std::fs::write(
            folder.join("piqa.jsonl"),
            lines((0..120).map(question).collect()),
        )
        .unwrap();
        std::fs::write(
            folder.join("wikitext.jsonl"),
            lines((0..7).map(page).collect()),
        )
        .unwrap();
    }

    fn settings(shard: &str) -> Settings {
        Settings {
            limit: Some(100),
            shard: shard.parse().unwrap(),
            prompting: Prompting {
                add_bos: None,
                max_length: 512,
            },
        }
    }

    fn answer_all(
        data: &Path,
        settings: Settings,
        scorer: &HashScorer,
        mut journal: Option<&mut Journal>,
    ) -> Result<Vec<TaskSamples>> {
        let tasks = [Task::Wikitext, Task::Piqa].into_iter();
        tasks
            .map(|task| {
                let data = DataSet::read(data, task)?;
                let prepared = PreparedTask::new(task, &data, &encoder(), 1024, settings)?;
                let journal = journal.as_deref_mut();
                let (samples, _) = prepared.answer(scorer, journal, &Silent, &scorer.stop)?;
                Ok(samples)
            })
            .collect()
    }

    fn write_run(folder: &Path, settings: Settings, date: f64, tasks: &[TaskSamples]) -> PathBuf {
        let description = Description {
            model_name: "org/model".into(),
            parameters: 1,
            dtype: "F32".into(),
            identity: "x".into(),
            revision: None,
            max_length: settings.prompting.max_length,
            add_bos: settings.prompting.add_bos,
            limit: settings.limit,
            shard: settings.shard,
            date,
        };
        files::make_folder(folder).unwrap();
        files::write(folder, &results(&description, &encoder(), tasks), tasks).unwrap()
    }

    /// Every file of a folder by name.
    fn content(folder: &Path) -> Vec<(String, Vec<u8>)> {
        let entries = std::fs::read_dir(folder).unwrap().flatten();
        let mut files: Vec<_> = entries
            .map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                (name, std::fs::read(entry.path()).unwrap())
            })
            .collect();
        files.sort();
        files
    }

    #[test]
    fn merged_parts_are_the_whole_byte_for_byte() {
        let folder = tempfile::tempdir().unwrap();
        write_data(folder.path());
        let scorer = HashScorer::default();
        let run = |shard: &str, to: &str| {
            let tasks = answer_all(folder.path(), settings(shard), &scorer, None).unwrap();
            write_run(&folder.path().join(to), settings(shard), 1e9, &tasks)
        };
        run("1/1", "whole");
        let parts = ["3/3", "1/3", "2/3"].map(|shard| run(shard, &shard.replace('/', "of")));
        let read = |parts: &[PathBuf]| -> Vec<_> {
            parts
                .iter()
                .map(|part| StoredRun::read(part).unwrap())
                .collect()
        };
        let (results, tasks) = merge(read(&parts)).unwrap();
        let merged = folder.path().join("merged");
        files::make_folder(&merged).unwrap();
        files::write(&merged, &results, &tasks).unwrap();
        let whole = content(&folder.path().join("whole"));
        assert_eq!(whole.len(), 3);
        assert_eq!(content(&merged), whole);

        let check = |parts: &[PathBuf], expected: &str| {
            let error = merge(read(parts)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        };
        check(&parts[..2], "missing: part 2/3");
        check(
            &[&parts[..], &parts[..1]].concat(),
            "part 3/3 is given twice",
        );
        check(
            &[run("1/2", "other"), parts[2].clone()],
            "of different runs",
        );
        check(&[run("1/1", "whole")], "not a part of a sharded run");
        let mut changed = read(&parts);
        changed[1].results["config"]["limit"] = 9.into();
        let error = merge(changed).unwrap_err().to_string();
        assert!(error.contains("`config` differs"), "{error}");
    }

    #[test]
    fn a_stopped_run_goes_on_where_it_was() {
        let folder = tempfile::tempdir().unwrap();
        write_data(folder.path());
        let whole =
            answer_all(folder.path(), settings("1/1"), &HashScorer::default(), None).unwrap();
        let path = folder.path().join("journal");
        let stopping = HashScorer {
            stop_after_calls: 3,
            ..HashScorer::default()
        };
        let mut journal = Journal::open(&path, "k").unwrap();
        let stopped = answer_all(
            folder.path(),
            settings("1/1"),
            &stopping,
            Some(&mut journal),
        );
        assert!(matches!(stopped, Err(Error::Interrupted)));
        drop(journal);
        let asked = stopping.asked.load(Ordering::Relaxed);
        assert!(
            (8..200).contains(&asked),
            "{asked} requests before the stop"
        );

        let scorer = HashScorer::default();
        let mut journal = Journal::open(&path, "k").unwrap();
        let resumed =
            answer_all(folder.path(), settings("1/1"), &scorer, Some(&mut journal)).unwrap();
        assert_eq!(resumed, whole);
        assert_eq!(scorer.asked.load(Ordering::Relaxed) + asked, 207);
    }

    #[test]
    fn tokens_that_the_model_lacks_are_refused_before_it_is_asked() {
        let folder = tempfile::tempdir().unwrap();
        write_data(folder.path());
        let data = DataSet::read(folder.path(), Task::Piqa).unwrap();
        let error =
            PreparedTask::new(Task::Piqa, &data, &encoder(), 300, settings("1/1")).unwrap_err();
        assert!(
            error.to_string().contains("but the model has 300 tokens"),
            "{error}"
        );
        assert!(error.hint().is_some());
    }
}
