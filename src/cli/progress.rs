//! A bar with rate and remaining time on a terminal, plain lines elsewhere.

use std::io::IsTerminal;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};
use nemoconv::convert::Progress;

use super::output::{Talk, human_bytes};

/// How often a plain line is written at most.
const LINE_EVERY: Duration = Duration::from_secs(10);

/// Progress on stderr.
pub struct Report {
    talk: Talk,
    bar: Option<ProgressBar>,
    stage: Mutex<Stage>,
}

struct Stage {
    name: String,
    total: u64,
    done: u64,
    begun: Instant,
    said: Instant,
}

impl Report {
    pub fn new(talk: Talk) -> Self {
        let bar = (!talk.quiet && std::io::stderr().is_terminal()).then(ProgressBar::hidden);
        let now = Instant::now();
        let stage = Stage {
            name: String::new(),
            total: 0,
            done: 0,
            begun: now,
            said: now,
        };
        Self {
            talk,
            bar,
            stage: Mutex::new(stage),
        }
    }

    fn stage(&self) -> std::sync::MutexGuard<'_, Stage> {
        self.stage
            .lock()
            .expect("no thread panics while it reports")
    }
}

impl Progress for Report {
    fn begin(&self, name: &str, total_bytes: u64) {
        let now = Instant::now();
        *self.stage() = Stage {
            name: name.into(),
            total: total_bytes,
            done: 0,
            begun: now,
            said: now,
        };
        if let Some(bar) = &self.bar {
            let template = "{msg:<9} [{bar:30}] {decimal_bytes}/{decimal_total_bytes}  {decimal_bytes_per_sec}  {eta} left";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            bar.reset();
            bar.set_style(style.progress_chars("=> "));
            bar.set_length(total_bytes);
            bar.set_message(name.to_string());
            bar.set_draw_target(indicatif::ProgressDrawTarget::stderr());
        }
    }

    fn advance(&self, bytes: u64) {
        if let Some(bar) = &self.bar {
            bar.inc(bytes);
            return;
        }
        let mut stage = self.stage();
        stage.done += bytes;
        if stage.said.elapsed() >= LINE_EVERY && stage.done < stage.total {
            stage.said = Instant::now();
            let rate = stage.done as f64 / stage.begun.elapsed().as_secs_f64();
            let left = (stage.total - stage.done) as f64 / rate;
            self.talk.say(format_args!(
                "{}: {} of {}, {}/s, {left:.0} s left",
                stage.name,
                human_bytes(stage.done),
                human_bytes(stage.total),
                human_bytes(rate as u64),
            ));
        }
    }

    fn end(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
        let stage = self.stage();
        let seconds = stage.begun.elapsed().as_secs_f64();
        self.talk.say(format_args!(
            "{}: {} in {seconds:.1} s",
            stage.name,
            human_bytes(stage.total)
        ));
    }
}
