//! How far an evaluation is: a bar on a terminal, a line now and then elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use nemoconv::eval::run::Progress;
use nemoconv::eval::tasks::Task;

use super::output::Talk;

/// How often a plain line is written at most.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress on stderr.
pub struct EvalProgress {
    talk: Talk,
    bar: Option<ProgressBar>,
    task: Mutex<TaskProgress>,
}

struct TaskProgress {
    name: &'static str,
    total: usize,
    /// Found in the journal.
    answered: usize,
    done: usize,
    begun: Instant,
    said: Instant,
}

impl EvalProgress {
    pub fn new(talk: Talk) -> Self {
        let bar = (!talk.quiet && std::io::stderr().is_terminal()).then(ProgressBar::hidden);
        let now = Instant::now();
        Self {
            talk,
            bar,
            task: Mutex::new(TaskProgress {
                name: "",
                total: 0,
                answered: 0,
                done: 0,
                begun: now,
                said: now,
            }),
        }
    }

    fn task(&self) -> std::sync::MutexGuard<'_, TaskProgress> {
        self.task.lock().expect("no thread panics while it reports")
    }
}

impl Progress for EvalProgress {
    fn begin(&self, task: Task, documents: usize, answered: usize) {
        let now = Instant::now();
        *self.task() = TaskProgress {
            name: task.name(),
            total: documents,
            answered,
            done: answered,
            begun: now,
            said: now,
        };
        if answered > 0 {
            self.talk.say(format_args!(
                "{}: {answered} of {documents} documents were answered before",
                task.name()
            ));
        }
        if let Some(bar) = &self.bar {
            let style =
                ProgressStyle::with_template("{msg:<13} [{bar:30}] {pos}/{len}  {eta} left")
                    .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.reset();
            bar.set_style(style.progress_chars("=> "));
            bar.set_length(documents as u64);
            bar.set_position(answered as u64);
            bar.set_message(task.name());
            bar.set_draw_target(ProgressDrawTarget::stderr());
        }
    }

    fn advance(&self, documents: usize) {
        let mut task = self.task();
        task.done += documents;
        if let Some(bar) = &self.bar {
            bar.inc(documents as u64);
        } else if task.said.elapsed() >= LINE_EVERY && task.done < task.total {
            task.said = Instant::now();
            let rate = (task.done - task.answered) as f64 / task.begun.elapsed().as_secs_f64();
            let left = (task.total - task.done) as f64 / rate;
            self.talk.say(format_args!(
                "{}: {} of {} documents, {left:.0} s left",
                task.name, task.done, task.total
            ));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let task = self.task();
        self.talk.say(format_args!(
            "{}: {} documents in {:.1} s",
            task.name,
            task.total,
            task.begun.elapsed().as_secs_f64()
        ));
    }
}
