//! A run: prepare every task, ask the model what is not answered yet, keep a journal.
//!
//! Enters: data, an encoder, a [`Scorer`]. Leaves: [`TaskSamples`]. Knows no result file and no container.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use super::document::DataSet;
use super::journal::Journal;
use super::requests::{Answer, Prompting, Tokenized};
use super::samples::Sample;
use super::shard::Shard;
use super::tasks::{Item, Task};
use crate::error::{Error, Fault, Result};
use crate::forward::scoring::Scorer;
use crate::model::tokenizer::TextEncoder;

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
        let mut documents = Vec::new();
        let limit = settings.limit.unwrap_or(usize::MAX);
        for (doc_id, document) in data.documents.iter().enumerate() {
            let fault = |what: String| data.fault(document, &what);
            let item = task.item(document).map_err(fault)?;
            if doc_id >= limit || !settings.shard.has(doc_id) {
                continue;
            }
            let tokenized =
                Tokenized::of(&item.question, encoder, settings.prompting).map_err(fault)?;
            if tokenized.largest_id() as usize >= vocab_size {
                return Err(vocabulary_mismatch(tokenized.largest_id(), vocab_size));
            }
            documents.push(PreparedDocument {
                doc_id,
                digest: tokenized.digest(),
                item,
                tokenized,
            });
        }
        Ok(Self {
            task,
            original: data.documents.len(),
            files: data.files.clone(),
            documents,
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
