//! Arrangements within memory: the same bytes however little there is.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nemoconv_fixtures::checkpoint::{RandomCheckpoint, cases};
use nemoconv_formats::checkpoint::Checkpoint;

use super::*;
use crate::artifact::StoredModel;
use crate::model::config::NemotronHConfig;
use crate::plan::Settings;
use crate::plan::file_type::FileType;
use crate::plan::types::TypeSettings;

struct Silent;

static GO: AtomicBool = AtomicBool::new(false);
static NO_INTEGERS: BTreeMap<String, IntegerGrid> = BTreeMap::new();

impl Progress for Silent {
    fn begin(&self, _: &str, _: u64) {}
    fn advance(&self, _: u64) {}
    fn end(&self) {}
}

/// A checkpoint with its plan and some samples.
pub struct Scene {
    _folder: tempfile::TempDir,
    pub weights: RewrittenModel,
    plan: Plan,
    samples: Samples,
}

impl Scene {
    pub fn new(checkpoint: &RandomCheckpoint) -> Self {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write(folder.path()).unwrap();
        let model = StoredModel::open(folder.path().to_str().unwrap()).unwrap();
        let checkpoint = Checkpoint::open(folder.path()).unwrap();
        let (_, config) = NemotronHConfig::open(&checkpoint).unwrap();
        let vocabulary = config.vocab_size as u32;
        let settings = Settings {
            types: TypeSettings::of(FileType::Q8_0),
            widen: false,
            calibrated: true,
            with_mtp: false,
        };
        let sequence = |n: u32| (0..24).map(|i| (i * 7919 + n * 31) % vocabulary).collect();
        Self {
            plan: Plan::new(&checkpoint, config, &settings, None).unwrap(),
            weights: RewrittenModel::new(Arc::new(model), Arc::default()),
            samples: Samples {
                sequences: (0..5).map(sequence).collect(),
            },
            _folder: folder,
        }
    }

    fn rounded(&self, folder: &Path, arrange: impl Fn(&mut Arrangement)) -> Vec<Vec<u8>> {
        let job = self.job(Rounding::default());
        let mut arrangement = self.needs().arrange(u64::MAX).unwrap();
        arrange(&mut arrangement);
        let mut workspace = Workspace::open(folder, "key").unwrap();
        job.run_arranged(&arrangement, &mut workspace).unwrap();
        let names: Vec<&str> = job.tensors().map(|tensor| tensor.name.as_str()).collect();
        let bytes = names.iter().map(|name| workspace.read(name).unwrap());
        bytes.collect()
    }

    pub fn job(&self, rounding: Rounding) -> Calibrated<'_> {
        Calibrated {
            machines: &Machines::Cpu,
            weights: &self.weights,
            plan: &self.plan,
            integers: &NO_INTEGERS,
            samples: &self.samples,
            outputs: None,
            rounding,
            memory_bytes: u64::MAX,
            progress: &Silent,
            stop: &GO,
            twin: None,
        }
    }

    fn needs(&self) -> Needs<'_> {
        Needs::of_samples(&self.plan, Rounding::default(), &self.samples)
    }
}

fn with_experts() -> impl Iterator<Item = RandomCheckpoint> {
    let all = cases().into_iter().map(|case| case.checkpoint);
    all.filter(|checkpoint| checkpoint.pattern.contains('E'))
}

#[test]
fn several_passes_and_streams_in_a_file_give_the_same_bytes() {
    let mut latent = 0;
    for checkpoint in with_experts() {
        latent += usize::from(checkpoint.experts.moe_latent_size.is_some());
        let scene = Scene::new(&checkpoint);
        let folder = tempfile::tempdir().unwrap();
        let in_one = scene.rounded(&folder.path().join("one"), |_| {});
        let in_many = scene.rounded(&folder.path().join("many"), |arrangement| {
            arrangement.streams_in_file = true;
            arrangement.look_at_most(3);
        });
        assert!(in_one == in_many);
    }
    assert!(latent > 0);
}

#[test]
fn less_memory_means_files_then_passes_then_an_error() {
    let scene = Scene::new(&with_experts().next().unwrap());
    let needs = scene.needs();
    let roomy = needs.arrange(u64::MAX).unwrap();
    assert!(!roomy.streams_in_file && roomy.most_passes == 1);
    assert_eq!(needs.arrange(roomy.peak_bytes).unwrap(), roomy);
    let tight = needs.arrange(roomy.peak_bytes - 1).unwrap();
    assert!(tight.streams_in_file && tight.peak_bytes < roomy.peak_bytes);
    // The least there can be, by halving.
    let (mut too_few, mut enough) = (0, roomy.peak_bytes);
    while too_few + 1 < enough {
        let middle = too_few.midpoint(enough);
        match needs.arrange(middle) {
            Ok(arrangement) => {
                assert!(arrangement.peak_bytes <= middle);
                enough = middle;
            }
            Err(_) => too_few = middle,
        }
    }
    let error = needs.arrange(too_few).unwrap_err();
    assert!(error.to_string().contains(&format!("{enough}")), "{error}");
    assert!(error.hint().unwrap().contains("--max-ram"), "{error}");
}

#[test]
fn a_folder_with_other_files_is_no_workspace() {
    let folder = tempfile::tempdir().unwrap();
    let note = folder.path().join("mine.txt");
    std::fs::write(&note, "mine").unwrap();
    let error = Workspace::open(folder.path(), "key")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("holds files that no conversion left there"),
        "{error}"
    );
    assert!(note.exists());
    std::fs::remove_file(note).unwrap();
    let workspace = Workspace::open(folder.path(), "key").unwrap();
    workspace.remove().unwrap();
    assert!(!folder.path().exists());
}
