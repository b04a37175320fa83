//! `validate`: four levels, gates, and the report in every form that was asked for.

use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use nemoconv::artifact::{Container, StoredModel, locate};
use nemoconv::backend::cpu::Residence;
use nemoconv::backend::{Machine, Machines};
use nemoconv::error::{Error, Fault, Result};
use nemoconv::forward::network::Network;
use nemoconv::forward::numerics::{ActivationScheme, Numerics};
use nemoconv::model::tokenizer::TextEncoder;
use nemoconv::report::{Gates, KlBounds, Level, LevelReport, NoiseFloor, ValidationReport};
use nemoconv::report::{html, json, junit, sarif, text};
use nemoconv::rewrite::Rewrites;
use nemoconv::validate::logits::compact_file::ReferenceHeader;
use nemoconv::validate::logits::compact_reference::Keep;
use nemoconv::validate::logits::perplexity::ChunkedText;
use nemoconv::validate::reference_file::{ReferenceFile, write_compact, write_kld_base};
use nemoconv::validate::side_by_side::{side_by_side, static_scales};
use nemoconv::validate::{Recorded, logits, recorded, static_levels};
use nemoconv::write::gguf::artifact::create_sibling;

use super::args::{Act, Validate};
use super::eval_model::open_encoder;
use super::exit;
use super::inputs;
use super::output::{Talk, print_stdout};
use super::outputs;

/// Chunks on which the noise floor is measured.
const FLOOR_CHUNKS: usize = 4;
/// Chunks from which static activation scales are taken.
const CALIBRATION_CHUNKS: usize = 4;
/// What a run needs beside weights: activations of a batch, logits, buffers, the program.
const BASE_MEMORY_BYTES: u64 = 256 << 20;

/// Validates, writes the reports and gives the exit code.
pub fn validate(
    args: &Validate,
    machines: &Machines,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<u8> {
    args.gates().check().map_err(Error::Usage)?;
    args.require_inputs()?;
    // Before the long run: gates that cannot be read.
    let gates = match &args.gates {
        Some(path) => args.gates().or(Gates::open(path)?),
        None => args.gates(),
    };
    args.spare_inputs()?;
    args.try_outputs()?;
    let job = Job {
        args,
        machines,
        talk,
        stop,
    };
    if let Some(path) = &args.save_reference {
        job.save_reference(path)?;
        return Ok(exit::DONE);
    }
    let reference = job.reference()?;
    let mixer = machines.mixer();
    let mut report = static_levels::inspect(&args.artifact, reference.model(), mixer.as_deref())?;
    job.logits(&mut report, reference)?;
    report.judge(&gates);
    job.write(&report)?;
    Ok(report.exit_code())
}

impl Validate {
    fn require_inputs(&self) -> Result<()> {
        inputs::require(&[
            ("--text", self.text.as_deref()),
            ("--gates", self.gates.as_deref()),
            ("--tokenizer", self.tokenizer.as_deref()),
        ])
    }

    fn try_outputs(&self) -> Result<()> {
        let files = [
            ("--junit", &self.junit),
            ("--sarif", &self.sarif),
            ("--html", &self.html),
            ("--save-reference", &self.save_reference),
        ];
        let mut files = files.into_iter();
        files.try_for_each(|(flag, path)| outputs::try_file(flag, path.as_deref()))
    }

    fn spare_inputs(&self) -> Result<()> {
        let read = [
            Some(Path::new(&self.artifact)),
            self.reference.as_deref().map(Path::new),
            self.text.as_deref(),
            self.gates.as_deref(),
        ];
        let written = [&self.junit, &self.sarif, &self.html, &self.save_reference];
        inputs::spare(&read, &written.map(Option::as_deref))
    }
}

struct Job<'a> {
    args: &'a Validate,
    machines: &'a Machines,
    talk: &'a Talk,
    stop: &'a AtomicBool,
}

/// What the artifact is compared with.
enum Reference<'a> {
    None,
    Model(&'a str),
    File(ReferenceFile),
}

impl Reference<'_> {
    fn model(&self) -> Option<&str> {
        match self {
            Self::Model(model) => Some(model),
            _ => None,
        }
    }
}

impl Job<'_> {
    fn reference(&self) -> Result<Reference<'_>> {
        let Some(reference) = self.args.reference.as_deref() else {
            return Ok(Reference::None);
        };
        inputs::require(&[("--reference", Some(&locate(reference)?))])?;
        Ok(match ReferenceFile::open(Path::new(reference))? {
            Some(file) => Reference::File(file),
            None => Reference::Model(reference),
        })
    }

    fn logits(&self, report: &mut ValidationReport, reference: Reference) -> Result<()> {
        let skip = |report: &mut ValidationReport, why: &str| {
            report.levels.push(LevelReport::skipped(Level::Logits, why));
        };
        let text = match (&reference, &self.args.text) {
            (Reference::None, _) => {
                skip(report, "no reference: name one with --reference");
                return Ok(());
            }
            (Reference::Model(_), None) => {
                skip(report, "no text: name one with --text");
                return Ok(());
            }
            (_, path) => path.as_deref(),
        };
        // Findings of the earlier levels say why an artifact cannot be run.
        let Ok(stored) = StoredModel::open(&self.args.artifact) else {
            skip(report, "the artifact cannot be opened");
            return Ok(());
        };
        let stored = Arc::new(stored);
        match reference {
            Reference::Model(model) => {
                let text = text.unwrap_or(Path::new(""));
                self.against_model(report, &stored, model, text)
            }
            Reference::File(file) => self.against_file(report, &stored, file),
            Reference::None => Ok(()),
        }
    }

    fn against_model(
        &self,
        report: &mut ValidationReport,
        stored: &Arc<StoredModel>,
        reference: &str,
        text: &Path,
    ) -> Result<()> {
        let theirs = Arc::new(StoredModel::open(reference)?);
        // A reference that has its own tokenizer files decides: a wrong tokenizer in the artifact is a finding elsewhere.
        let tokens_of = match theirs.container() {
            Container::Checkpoint => &theirs,
            Container::Gguf | Container::Memory => stored,
        };
        let text = self.chunked(tokens_of, text)?;
        let residence = self.residence(&[stored, &theirs])?;
        let exact = open(self.machines, &theirs, residence, &Numerics::EXACT)?;
        let recorded = recorded(stored);
        // Inputs of a rewritten network have other sizes: then its own, with its weights, are measured.
        let own = match recorded {
            Recorded::None => None,
            _ => Some(open(self.machines, stored, residence, &Numerics::EXACT)?),
        };
        let numerics = self.numerics(stored, Some((own.as_ref().unwrap_or(&exact), &text)))?;
        let artifact = open(self.machines, stored, residence, &numerics)?;
        let is_comparable = !matches!(recorded, Recorded::Unknown(_));
        let rewrites = match recorded {
            Recorded::Rewrites(rewrites) => *rewrites,
            Recorded::None | Recorded::Unknown(_) => Rewrites::none(),
        };
        let watch = self.watch("logits");
        let measured = side_by_side(&exact, &artifact, &rewrites, &text, &watch)?;
        let floor = Numerics {
            activations: ActivationScheme::Bf16,
            ..Numerics::EXACT
        };
        let rounded = open(self.machines, &theirs, residence, &floor)?;
        let few = first_chunks(&text, FLOOR_CHUNKS)?;
        let (none, watch) = (Rewrites::none(), self.watch("noise floor"));
        let noise = side_by_side(&exact, &rounded, &none, &few, &watch)?;
        report.noise_floor = Some(NoiseFloor {
            what: "activations of the reference rounded to BF16".into(),
            logits: noise.logits,
            layers: noise.layers,
        });
        // Hidden values under rewrites that are not known cannot be told from wrong ones.
        report.layers = if is_comparable {
            measured.layers
        } else {
            Vec::new()
        };
        report.logits = Some(measured.logits);
        self.conclude(report, &text, &numerics);
        Ok(())
    }

    fn against_file(
        &self,
        report: &mut ValidationReport,
        stored: &Arc<StoredModel>,
        file: ReferenceFile,
    ) -> Result<()> {
        // The file has the tokens; a tokenizer only says which of them begins a chunk, and whether it gives the same.
        let tokenizer = self.args.tokenizer.as_deref();
        let encoder = open_encoder(stored, tokenizer, stored.config().vocab_size);
        let bos = encoder
            .as_ref()
            .ok()
            .and_then(TextEncoder::bos)
            .map(|bos| bos.id);
        if let Some(path) = &self.args.text {
            let tokens = encoder?.encode(&read_text(path)?, None)?;
            report.findings.extend(file.check_tokens(&tokens));
        }
        let chunks = self.args.chunks.map(|chunks| chunks as usize);
        let text = file.text(bos, chunks)?;
        let numerics = self.numerics(stored, None)?;
        let artifact = open(self.machines, stored, self.residence(&[stored])?, &numerics)?;
        let logits = file.measure(&artifact, &text, &self.watch("logits"))?;
        if let Some(KlBounds { lower, upper, .. }) = logits.kl_bounds {
            self.talk.say(format_args!(
                "the mean KL divergence is between {lower:.6} and {upper:.6}"
            ));
        }
        report.logits = Some(logits);
        self.conclude(report, &text, &numerics);
        Ok(())
    }

    /// The level's entry and its findings.
    fn conclude(&self, report: &mut ValidationReport, text: &ChunkedText, numerics: &Numerics) {
        let mut level = LevelReport::ran(Level::Logits);
        level.scope = vec![
            ("chunks".into(), text.chunks().len().to_string()),
            ("context".into(), text.context_tokens().to_string()),
            ("activations".into(), name_of(&numerics.activations).into()),
        ];
        report.levels.push(level);
        let found = logits::findings(
            report.logits.as_ref(),
            &report.layers,
            report.noise_floor.as_ref(),
        );
        report.findings.extend(found);
    }

    /// Writes what CI needs instead of the model: compact, or llama.cpp's format under a name that ends in `.kld`.
    fn save_reference(&self, path: &Path) -> Result<()> {
        let text = self.args.text.as_deref().ok_or_else(|| {
            Error::Usage(
                Fault::new("`--save-reference` needs a text").hint("name one with `--text FILE`"),
            )
        })?;
        let stored = Arc::new(StoredModel::open(&self.args.artifact)?);
        let text = self.chunked(&stored, text)?;
        let network = open(
            self.machines,
            &stored,
            self.residence(&[&stored])?,
            &Numerics::EXACT,
        )?;
        let vocab_size = stored.config().vocab_size;
        let watch = self.watch("reference");
        if path.extension().is_some_and(|extension| extension == "kld") {
            write_kld_base(path, &network, &text, &watch)?;
        } else {
            let header = ReferenceHeader {
                model: static_levels::subject(&stored, &self.args.artifact)
                    .name
                    .unwrap_or_else(|| self.args.artifact.clone()),
                file_type: stored
                    .tensors()
                    .iter()
                    .map(|t| t.ty.name())
                    .next()
                    .unwrap_or("")
                    .into(),
                vocab_size,
                context_tokens: text.context_tokens(),
                bos: text.bos(),
                written_by: concat!("nemoconv ", env!("CARGO_PKG_VERSION")).into(),
            };
            let keep = Keep {
                tail_mass: self.args.tail_mass,
                top_k: self.args.top_k.map(|k| k as usize),
            };
            let bound = write_compact(path, &header, keep, (&network, &text), &watch)?;
            self.talk.say(format_args!(
                "mean tail mass {:.2e}: the KL divergence is known to about that",
                bound.mean_tail_mass
            ));
        }
        print_stdout(path.display());
        Ok(())
    }

    fn chunked(&self, model: &StoredModel, path: &Path) -> Result<ChunkedText> {
        let text = read_text(path)?;
        let tokenizer = self.args.tokenizer.as_deref();
        let encoder = open_encoder(model, tokenizer, model.config().vocab_size)?;
        let tokens = encoder.encode(&text, None)?;
        let bos = encoder.bos().map(|bos| bos.id);
        let bos = bos.filter(|bos| tokens.first() == Some(bos));
        let chunks = self.args.chunks.map(|chunks| chunks as usize);
        let context = self.args.context as usize;
        ChunkedText::new(tokens, context, bos, chunks).map_err(|error| match error {
            Error::Plan(fault) => Error::Plan(fault.in_file(path)),
            other => other,
        })
    }

    fn numerics(
        &self,
        stored: &StoredModel,
        calibration: Option<(&Network<Machine>, &ChunkedText)>,
    ) -> Result<Numerics> {
        let target = Numerics::of_target(stored);
        if self.args.act == Act::Target
            && let Some(inputs) = stored.inputs_not_followed()
        {
            self.talk.say(format_args!(
                "the artifact declares {inputs}, which are not followed: they are taken as f32"
            ));
        }
        let activations = match self.args.act {
            Act::Target => target.activations.clone(),
            Act::None => ActivationScheme::None,
            Act::Q8_0 => ActivationScheme::Q8_0,
            Act::Q8K => ActivationScheme::Q8K,
            Act::TokenInt8 => ActivationScheme::TokenInt8,
            Act::StaticInt8 => {
                let Some((network, text)) = calibration else {
                    let fault = Fault::new("`--act static-int8` needs a reference model");
                    return Err(Error::Usage(
                        fault.hint("its scales are measured on the reference"),
                    ));
                };
                ActivationScheme::StaticInt8(static_scales(network, text, CALIBRATION_CHUNKS)?)
            }
        };
        Ok(Numerics {
            activations,
            time_step: self.args.time_step,
            ..target
        })
    }

    /// Mapped where all weights fit `--max-ram` beside the rest, else streamed.
    fn residence(&self, models: &[&Arc<StoredModel>]) -> Result<Residence> {
        let Some(limit) = self.args.max_ram else {
            return Ok(Residence::Mapped);
        };
        if limit < BASE_MEMORY_BYTES {
            let what =
                format!("--max-ram {limit} is less than the {BASE_MEMORY_BYTES} bytes a run needs");
            return Err(Error::Usage(Fault::new(what)));
        }
        let weights: u64 = models.iter().map(|model| model.decoded_bytes()).sum();
        Ok(match weights.saturating_add(BASE_MEMORY_BYTES) <= limit {
            true => Residence::Mapped,
            false => Residence::Streamed,
        })
    }

    fn watch(&self, stage: &'static str) -> impl Fn(usize, usize) -> Result<()> {
        move |done, total| {
            if self.stop.load(Ordering::Relaxed) {
                return Err(Error::Interrupted);
            }
            match done {
                0 => self.talk.say(format_args!("{stage}: begun")),
                _ => self
                    .talk
                    .say(format_args!("{stage}: {done} of {total} chunks done")),
            }
            Ok(())
        }
    }

    /// The report on stdout, and every file that was asked for.
    fn write(&self, report: &ValidationReport) -> Result<()> {
        let files = [
            (
                &self.args.junit,
                junit::render as fn(&ValidationReport) -> String,
            ),
            (&self.args.sarif, sarif::render),
            (&self.args.html, html::render),
        ];
        for (path, render) in files {
            if let Some(path) = path {
                write_whole(path, &render(report))?;
            }
        }
        if self.args.json {
            print_stdout(json::render(report));
        } else {
            print_stdout(text::render(report).trim_end());
        }
        Ok(())
    }
}

fn open(
    machines: &Machines,
    model: &Arc<StoredModel>,
    residence: Residence,
    numerics: &Numerics,
) -> Result<Network<Machine>> {
    Network::open_on(model, machines.all(model, residence), numerics)
}

fn first_chunks(text: &ChunkedText, chunks: usize) -> Result<ChunkedText> {
    ChunkedText::new(
        text.tokens().to_vec(),
        text.context_tokens(),
        text.bos(),
        Some(chunks),
    )
}

fn read_text(path: &Path) -> Result<String> {
    let failed = |error| nemoconv::formats::Error::from(error).in_file(path);
    Ok(std::fs::read_to_string(path).map_err(failed)?)
}

fn name_of(scheme: &ActivationScheme) -> &'static str {
    match scheme {
        ActivationScheme::None => "f32",
        ActivationScheme::Runtime => "as llama.cpp takes them",
        ActivationScheme::Bf16 => "BF16",
        ActivationScheme::Q8_0 => "Q8_0",
        ActivationScheme::Q8K => "Q8_K",
        ActivationScheme::TokenInt8 => "int8 per token",
        ActivationScheme::StaticInt8(_) => "int8 static",
        ActivationScheme::Declared(_) => "as the artifact declares them",
    }
}

/// Under a temporary name first, so that a file is whole or not there.
fn write_whole(path: &Path, content: &str) -> Result<()> {
    let failed = |source| Error::Write {
        fault: Fault::new("cannot write the report").in_file(path),
        source,
    };
    let mut file = create_sibling(path)?;
    file.write_all(content.as_bytes()).map_err(failed)?;
    file.persist(path).map_err(|error| failed(error.error))?;
    Ok(())
}
