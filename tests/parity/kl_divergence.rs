//! llama.cpp's own `--kl-divergence` report and ours of the same two models, and base files both ways.
//!
//! The stored files always; a run of llama.cpp itself where `NEMOCONV_LLAMA_BIN` names the folder of its tools.

use std::path::{Path, PathBuf};
use std::process::Command;

use nemoconv::report::{Estimate, LogitsDrift};
use nemoconv::validate::logits::compact_reference::{CompactRow, Keep};
use nemoconv::validate::logits::drift::{DriftAccumulator, ScoredPosition};
use nemoconv::validate::logits::kl_divergence::compare_log_probs;
use nemoconv::validate::logits::kld_base::{KldBaseReader, KldBaseWriter};
use nemoconv::validate::logits::perplexity::{ChunkedText, scored_positions};
use nemoconv_fixtures::{nano, reference};
use serde_json::Value;
use tempfile::tempdir;

use super::llama_cpp::TYPES;
use crate::support::{nemoconv, stderr, to_gguf};

/// Both sides of our comparison have 16 bits, llama.cpp's artifact has 32.
const TOLERANCE: f64 = 0.02;
/// Of a perplexity beside llama-perplexity's.
const PERPLEXITY_TOLERANCE: f64 = 2e-3;
const CONTEXT: usize = 512;

fn llama_bin() -> Option<PathBuf> {
    let folder = std::env::var_os("NEMOCONV_LLAMA_BIN").map(PathBuf::from);
    if folder.is_none() {
        println!("skipped: NEMOCONV_LLAMA_BIN names no folder of llama.cpp tools");
    }
    folder
}

/// What the tool prints; it sometimes ends before its last lines are written.
fn llama_perplexity(bin: &Path, model: &Path, last_line: &str, args: &[&Path]) -> String {
    for _ in 0..6 {
        let output = Command::new(bin.join("llama-perplexity"))
            .args(["-c", "512", "-t", "1", "-m"])
            .arg(model)
            .args(args)
            .output()
            .expect("the tool starts");
        let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        if text.contains(last_line) {
            return text;
        }
    }
    panic!("llama-perplexity never printed `{last_line}`");
}

/// The numbers of the line that begins with `label`.
fn printed(report: &str, label: &str) -> Vec<f64> {
    let line = report.lines().find(|line| line.starts_with(label));
    let line = line.unwrap_or_else(|| panic!("no line `{label}` in {report}"));
    let (_, figures) = line.split_once(':').expect("a label ends with a colon");
    let words = figures.split(|c: char| c.is_whitespace() || c == '%');
    words.filter_map(|word| word.parse().ok()).collect()
}

/// Every row of a base file.
fn rows(path: &Path) -> (KldBaseReader, Vec<Vec<f32>>) {
    let mut reader = KldBaseReader::open(path).unwrap();
    let (mut rows, mut row) = (Vec::new(), Vec::new());
    while reader.read_row(&mut row).unwrap() {
        rows.push(row.clone());
    }
    (reader, rows)
}

/// Each scored position of all chunks and its target.
fn positions(base: &KldBaseReader) -> Vec<(usize, u32)> {
    let text = ChunkedText::new(base.tokens().to_vec(), base.context_tokens(), None, None).unwrap();
    text.chunks().flat_map(|chunk| chunk.scored()).collect()
}

fn drift(base: &Path, artifact: &Path) -> LogitsDrift {
    let ((base, reference), (_, artifact)) = (rows(base), rows(artifact));
    let mut drift = DriftAccumulator::new(base.context_tokens(), base.vocab_size());
    for ((position, target), (reference, artifact)) in positions(&base)
        .into_iter()
        .zip(reference.iter().zip(&artifact))
    {
        let compared = compare_log_probs(reference, artifact, target);
        drift.push(ScoredPosition::new(position, compared));
    }
    drift.finish()
}

fn near(label: &str, found: f64, expected: f64, tolerance: f64) {
    assert!(
        (found - expected).abs() <= tolerance * expected.abs() + 1e-6,
        "{label}: {found}, llama.cpp has {expected}"
    );
}

/// `percent`: llama.cpp prints these as percentages.
fn near_estimate(report: &str, label: &str, found: Estimate, percent: bool) {
    let expected = printed(report, label);
    let scale = if percent { 100.0 } else { 1.0 };
    near(label, found.value * scale, expected[0], TOLERANCE);
    near(label, found.error * scale, expected[1], 2.0 * TOLERANCE);
}

#[test]
fn a_stored_report_of_llama_cpp_is_ours() {
    let folder = reference().join("llama-kl-divergence");
    let (base, artifact) = (folder.join("f32.kld"), folder.join("q4_0.kld"));
    let report = std::fs::read_to_string(folder.join("report.txt")).unwrap();
    let found = drift(&base, &artifact);
    assert_eq!((found.positions, found.chunks), (124, 4));
    check_report(&report, &found);
    near_estimate(
        &report,
        "Mean PPL(Q)/PPL(base)",
        found.perplexity_ratio,
        false,
    );
    check_compact(&base, &artifact);
}

#[test]
fn a_run_of_llama_cpp_is_ours() {
    let Some(bin) = llama_bin() else { return };
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = [
        include_str!("../../LICENSE"),
        include_str!("../../README.md"),
    ]
    .concat();
    std::fs::write(at("text.txt"), &text).unwrap();
    let [f32_kld, q4_kld] = ["f32", "q4_0"].map(|ty| {
        let (model, kld) = (at(&format!("{ty}.gguf")), at(&format!("{ty}.kld")));
        to_gguf(&nano(), &model, &["--outtype", ty]);
        let args = [
            "-f".as_ref(),
            at("text.txt").as_path(),
            "--save-all-logits".as_ref(),
            &kld,
        ]
        .map(Path::to_path_buf);
        let args: Vec<&Path> = args.iter().map(PathBuf::as_path).collect();
        let log = llama_perplexity(&bin, &model, "Final estimate", &args);
        let words: Vec<&str> = log
            .split("PPL = ")
            .nth(1)
            .unwrap()
            .split_whitespace()
            .collect();
        println!("{ty}: perplexity {} +/- {}", words[0], words[2]);
        kld
    });
    let compare = |base: &Path| {
        let args = [
            "--kl-divergence".as_ref(),
            "--kl-divergence-base".as_ref(),
            base,
        ];
        llama_perplexity(&bin, &at("q4_0.gguf"), "Same top p:", &args)
    };
    let report = compare(&f32_kld);
    let found = drift(&f32_kld, &q4_kld);
    check_report(&report, &found);
    // Our network instead of llama.cpp's, on the same file.
    let ours = validated(&at("q4_0.gguf"), &f32_kld);
    let mean = ours["logits"]["kl_divergence"]["mean"]["value"].as_f64();
    near(
        "our network, mean KLD",
        mean.unwrap(),
        printed(&report, "Mean    KLD")[0],
        TOLERANCE,
    );

    // llama.cpp reads what we write.
    let (base, rows) = rows(&f32_kld);
    let vocab = base.vocab_size();
    let mut writer = KldBaseWriter::create(&at("ours.kld"), CONTEXT, vocab, base.tokens()).unwrap();
    for row in &rows {
        writer.write_row(row).unwrap();
    }
    writer.finish().unwrap();
    let again = compare(&at("ours.kld"));
    let mean = "Mean    KLD";
    near(
        "ours, mean KLD",
        printed(&again, mean)[0],
        printed(&report, mean)[0],
        1e-3,
    );
    check_compact(&f32_kld, &q4_kld);
}

/// What `validate` reports of a file beside a base file.
fn validated(artifact: &Path, base: &Path) -> Value {
    let (artifact, base) = (artifact.to_str().unwrap(), base.to_str().unwrap());
    let output = nemoconv(["-q", "validate", artifact, "--reference", base, "--json"]);
    serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", stderr(&output)))
}

#[test]
fn perplexities_are_llama_perplexitys_on_every_type() {
    let Some(bin) = llama_bin() else { return };
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let text = include_str!("../../LICENSE").to_owned() + include_str!("../../README.md");
    std::fs::write(at("text.txt"), &text).unwrap();
    let (text, base) = (at("text.txt"), at("base.kld"));
    for file_type in TYPES {
        let model = at(&format!("{file_type}.gguf"));
        to_gguf(&nano(), &model, &["--outtype", file_type]);
        let flags: [&Path; 4] = ["-f".as_ref(), &text, "--save-all-logits".as_ref(), &base];
        let log = llama_perplexity(&bin, &model, "Final estimate", &flags);
        let theirs = log
            .split("PPL = ")
            .nth(1)
            .and_then(|rest| rest.split_whitespace().next());
        let theirs: f64 = theirs.unwrap().parse().unwrap();
        let report = validated(&model, &base);
        let found = report["logits"]["perplexity"]["value"].as_f64().unwrap();
        println!(
            "{file_type}: {found:.4}, llama-perplexity {theirs}, {:+.4} %",
            100.0 * (found / theirs - 1.0)
        );
        assert!(
            (found / theirs - 1.0).abs() < PERPLEXITY_TOLERANCE,
            "{file_type}: {found} {theirs}"
        );
    }
}

fn check_report(report: &str, found: &LogitsDrift) {
    let kl = found.kl_divergence;
    println!(
        "mean KLD {} +/- {}, llama.cpp {:?}",
        kl.mean.value,
        kl.mean.error,
        printed(report, "Mean    KLD")
    );
    near_estimate(report, "Mean    KLD", kl.mean, false);
    near_estimate(report, "Mean PPL(base)", found.perplexity_reference, false);
    // Not the ratio: base files clip log-probabilities, and llama.cpp's artifact has no base file.
    near_estimate(report, "RMS Δp", found.delta_p_rms, true);
    near_estimate(report, "Same top p", found.top1_agreement, true);
    let percentiles = [
        ("Maximum KLD", kl.max),
        ("99.9%   KLD", kl.p99_9),
        ("99.0%   KLD", kl.p99),
        ("95.0%   KLD", kl.p95),
        ("90.0%   KLD", kl.p90),
        ("Median  KLD", kl.median),
        ("10.0%   KLD", kl.p10),
        (" 1.0%   KLD", kl.p1),
    ];
    for (label, found) in percentiles {
        near(label, found, printed(report, label)[0], TOLERANCE);
    }
    let correlation = printed(report, "Cor(ln(PPL(Q)), ln(PPL(base)))")[0];
    near(
        "correlation",
        100.0 * found.correlation.unwrap(),
        correlation,
        TOLERANCE,
    );
}

/// On real predictions: the interval holds, and what it costs.
fn check_compact(base: &Path, artifact: &Path) {
    let ((base, reference), (_, artifact)) = (rows(base), rows(artifact));
    let positions = positions(&base);
    let scored = scored_positions(base.context_tokens()).len();
    assert_eq!(reference.len() % scored, 0);
    for tail_mass in [1e-1, 1e-2, 1e-3, 1e-4] {
        let (mut exact, mut lumped, mut lower, mut upper, mut kept) = (0.0, 0.0, 0.0, 0.0, 0);
        for ((_, target), (reference, artifact)) in
            positions.iter().zip(reference.iter().zip(&artifact))
        {
            let keep = Keep {
                tail_mass,
                top_k: None,
            };
            let row = CompactRow::new(reference, *target, keep).unwrap();
            let (drift, interval) = row.compare(artifact, *target).unwrap();
            exact +=
                nemoconv::validate::logits::kl_divergence::compare(reference, artifact, *target)
                    .unwrap()
                    .kl_divergence;
            lumped += drift.kl_divergence;
            lower += interval.lower;
            upper += interval.upper;
            kept += row.kept();
        }
        let [exact, lumped, lower, upper, kept] =
            [exact, lumped, lower, upper, kept as f64].map(|sum| sum / positions.len() as f64);
        println!(
            "tail {tail_mass}: kept {kept:.0}, {lower:.6} <= {exact:.6} <= {upper:.6}, lumped {lumped:.6}"
        );
        assert!(lower <= exact && exact <= upper);
    }
}
