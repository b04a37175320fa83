//! Our importance matrix beside llama-imatrix's of the same model and text, and what llama-quantize makes of both.
//!
//! Needs the folder of llama.cpp's tools in `NEMOCONV_LLAMA_BIN` and texts in `NEMOCONV_SHARED`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use nemoconv::formats::gguf::{Gguf, Metadata};
use nemoconv_fixtures::models;
use tempfile::tempdir;

use crate::support::{nemoconv, stderr, to_gguf};

/// Largest difference of a sum, by the larger of the sum itself and a hundredth of its matrix's mean: the other side
/// sums in f32 and computes the network in f32 too, in another order.
const TOLERANCE: f64 = 1e-3;
/// Where router scores are nearly equal a token may go to another expert, and with it all it adds to a channel: largest
/// share of a stack's tokens, and of the sum over all its experts and channels.
const ROUTED_TOLERANCE: f64 = 5e-3;
/// Largest share of bytes that may differ between two quantized files: of two scales that are nearly as good another may
/// win, and with it all codes of a block. Most often so where scales are hostile.
const BYTES_TOLERANCE: f64 = 2e-2;
/// Some dozens of chunks.
const TEXT_CHARACTERS: usize = 60_000;

struct Peer {
    bin: PathBuf,
    text: String,
}

impl Peer {
    fn find() -> Option<Self> {
        let bin = std::env::var_os("NEMOCONV_LLAMA_BIN").map(PathBuf::from);
        let shared = std::env::var_os("NEMOCONV_SHARED").map(PathBuf::from);
        let (Some(bin), Some(shared)) = (bin, shared) else {
            println!("skipped: NEMOCONV_LLAMA_BIN and NEMOCONV_SHARED name no folders");
            return None;
        };
        let text = std::fs::read_to_string(shared.join("text/calib.txt")).ok()?;
        Some(Self {
            bin,
            text: text.chars().take(TEXT_CHARACTERS).collect(),
        })
    }

    fn run(&self, tool: &str, args: &[&str]) {
        let output = Command::new(self.bin.join(tool)).args(args).output();
        let output = output.expect("the tool starts");
        assert!(
            output.status.success(),
            "{tool} {args:?}: {}",
            stderr(&output)
        );
    }
}

/// Dimensions and values of every tensor but those that runtimes do not read.
type Sums = BTreeMap<String, (Vec<u64>, Vec<f32>)>;

fn sums(path: &Path) -> (Metadata, Sums) {
    let file = Gguf::open(path).unwrap();
    let header = file.header();
    let is_read = |name: &str| name.ends_with(".in_sum2") || name.ends_with(".counts");
    let tensors = header.tensors.iter().filter(|tensor| is_read(&tensor.name));
    let values = tensors.map(|tensor| {
        let (words, _) = file.tensor_bytes(tensor).as_chunks::<4>();
        let values = words.iter().map(|word| f32::from_le_bytes(*word)).collect();
        (tensor.name.clone(), (tensor.dims.clone(), values))
    });
    (header.metadata.clone(), values.collect())
}

/// Sums of one expert, or of a whole matrix, in units of the tolerance.
fn worst_of(ours: &[f32], theirs: &[f32]) -> f64 {
    let mean = theirs.iter().map(|x| f64::from(*x)).sum::<f64>() / theirs.len() as f64;
    let pairs = ours.iter().zip(theirs);
    pairs
        .map(|(a, b)| {
            (f64::from(*a) - f64::from(*b)).abs() / f64::from(*b).max(mean / 100.0).max(1e-12)
        })
        .fold(0.0, f64::max)
}

/// The largest difference of sums of stacks whose matrices saw equally many tokens.
fn compare(ours: &Sums, theirs: &Sums) -> f64 {
    let names = |sums: &Sums| sums.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(ours), names(theirs));
    let mut worst = 0.0_f64;
    for (name, (dims, found)) in ours {
        let (expected_dims, expected) = &theirs[name];
        assert_eq!(dims, expected_dims, "{name}");
        let Some(weight) = name.strip_suffix(".in_sum2") else {
            let all: f32 = expected.iter().sum();
            let moved: f32 = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).sum();
            assert!(
                f64::from(moved / all) <= ROUTED_TOLERANCE,
                "{name}: {moved} of {all}"
            );
            continue;
        };
        let counts = |sums: &Sums| sums[&format!("{weight}.counts")].1.clone();
        if counts(ours) != counts(theirs) {
            let total = |sums: &[f32]| sums.iter().map(|x| f64::from(*x)).sum::<f64>();
            let moved = (total(found) / total(expected) - 1.0).abs();
            assert!(moved <= ROUTED_TOLERANCE, "{name}: {moved} of the whole");
            continue;
        }
        let columns = dims[0] as usize;
        for (found, expected) in found.chunks(columns).zip(expected.chunks(columns)) {
            worst = worst.max(worst_of(found, expected));
        }
    }
    worst
}

fn differing_share(a: &Path, b: &Path) -> f64 {
    let (a, b) = (Gguf::open(a).unwrap(), Gguf::open(b).unwrap());
    let (mut differing, mut all) = (0, 0);
    for (one, other) in a.header().tensors.iter().zip(&b.header().tensors) {
        assert_eq!((&one.name, one.ty), (&other.name, other.ty));
        let (x, y) = (a.tensor_bytes(one), b.tensor_bytes(other));
        differing += x.iter().zip(y).filter(|(x, y)| x != y).count();
        all += x.len();
    }
    differing as f64 / all as f64
}

#[test]
fn sums_are_llama_imatrixs_and_llama_quantize_takes_them() {
    let Some(peer) = Peer::find() else { return };
    for model in models() {
        let folder = tempdir().unwrap();
        let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
        let (text, f32_file) = (path("text.txt"), path("f32.gguf"));
        std::fs::write(&text, &peer.text).unwrap();
        to_gguf(&model, Path::new(&f32_file), &["-t", "f32"]);
        let (ours, theirs) = (path("ours.gguf"), path("theirs.gguf"));
        let common = ["-m", &f32_file, "-f", &text, "-c", "512", "-t", "1"];
        peer.run(
            "llama-imatrix",
            &[&common[..], &["--no-ppl", "-o", &theirs]].concat(),
        );
        let model = model.to_str().unwrap();
        let output = nemoconv(["calibrate", model, "--text", &text, "--imatrix", &ours]);
        assert!(output.status.success(), "{}", stderr(&output));
        let (our_keys, our_sums) = sums(Path::new(&ours));
        let (their_keys, their_sums) = sums(Path::new(&theirs));
        for (key, value) in our_keys.iter() {
            assert_eq!(their_keys.get(key), Some(value), "{key}");
        }
        let worst = compare(&our_sums, &their_sums);
        println!("{model}: sums differ by {worst:.2e} at most");
        assert!(worst <= TOLERANCE, "{model}: {worst:e}");
        for ty in ["Q4_K_M", "IQ4_NL"] {
            let (a, b) = (path("a.gguf"), path("b.gguf"));
            peer.run("llama-quantize", &["--imatrix", &ours, &f32_file, &a, ty]);
            peer.run("llama-quantize", &["--imatrix", &theirs, &f32_file, &b, ty]);
            let share = differing_share(Path::new(&a), Path::new(&b));
            println!("{model}: {ty}: {share:.2e} of the bytes differ");
            assert!(share <= BYTES_TOLERANCE, "{model} {ty}: {share:e}");
        }
    }
}
