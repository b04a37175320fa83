//! `validate` from the outside: levels, gates, reports, references, memory, exit codes.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use nemoconv_fixtures::checkpoint::{RandomCheckpoint, cases};
use nemoconv_fixtures::{models, nano};
use serde_json::Value;
use tempfile::tempdir;

use crate::support::{Place, mean_kl, nemoconv, report, stderr, to_gguf, validate};

/// Text whose every chunk is scored.
const TEXT: &str =
    "The old harbour lay quiet under the morning fog, and the boats came in one after another. ";

fn place() -> Place {
    Place::new(TEXT.repeat(40))
}

impl Place {
    fn artifact(&self, file_type: &str) -> PathBuf {
        let path = self.file(&format!("{file_type}.gguf"));
        to_gguf(&nano(), &path, &["-t", file_type]);
        path
    }

    fn validate(&self, artifact: &Path, reference: &Path, flags: &[&str]) -> Output {
        validate(artifact, reference, &self.text, flags)
    }
}

#[test]
fn a_gate_decides_the_exit_code_and_every_report_is_written() {
    let place = place();
    let artifact = place.artifact("q4_0");
    let files = ["r.xml", "r.sarif", "r.html"].map(|name| place.file(name));
    let [junit, sarif, html] = files.each_ref().map(|path| path.to_str().unwrap());
    let flags = ["--json", "--junit", junit, "--sarif", sarif, "--html", html];
    let passed = place.validate(
        &artifact,
        &nano(),
        &[&flags[..], &["--max-kld", "0.5"]].concat(),
    );
    assert_eq!(passed.status.code(), Some(0), "{}", stderr(&passed));
    let found = report(&passed);
    assert_eq!(found["verdict"], "passed");
    assert!(mean_kl(&found) > 1e-3, "Q4_0 is not the reference");
    assert!(found["layers"].as_array().unwrap().len() == 5 && !found["noise_floor"].is_null());
    for file in &files {
        assert!(
            std::fs::metadata(file).unwrap().len() > 500,
            "{}",
            file.display()
        );
    }
    let failed = place.validate(&artifact, &nano(), &["--max-kld", "1e-6"]);
    assert_eq!(failed.status.code(), Some(2), "{}", stderr(&failed));
    let shown = String::from_utf8(failed.stdout).unwrap();
    assert!(
        shown.contains("max-kld") && shown.contains("verdict: failed"),
        "{shown}"
    );
}

#[test]
fn an_artifact_that_computes_no_numbers_has_a_report() {
    let place = place();
    let artifact = place.artifact("bf16");
    let saved = ["reference.nref", "base.kld"].map(|name| place.file(name));
    for path in &saved {
        let flags = ["--save-reference", path.to_str().unwrap()];
        let made = place.validate(&nano(), &nano(), &flags);
        assert!(made.status.success(), "{}", stderr(&made));
    }
    spoil(&artifact);
    let html = place.file("r.html");
    let flags = ["--json", "--max-kld", "1", "--html", html.to_str().unwrap()];
    for reference in [nano()].iter().chain(&saved) {
        let output = place.validate(&artifact, reference, &flags);
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        let found = report(&output);
        let findings = found["findings"].as_array().unwrap();
        let ids: Vec<_> = findings.iter().map(|f| f["id"].as_str().unwrap()).collect();
        assert!(ids.contains(&"weights/not-finite"), "{ids:?}");
        assert!(ids.contains(&"logits/not-finite"), "{ids:?}");
        assert_eq!(found["logits"]["positions"], 0);
        assert!(found["logits"]["non_finite_positions"].as_u64() > Some(60));
        assert_eq!(found["gates"][0]["outcome"], "not-measured");
        assert!(
            std::fs::read_to_string(&html)
                .unwrap()
                .contains("logits/not-finite")
        );
    }
    // Nothing can be compared with a reference like that.
    let output = place.validate(&nano(), &artifact, &[]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("the reference computes no numbers"),
        "{}",
        stderr(&output)
    );
}

/// Fixed scales are measured on the artifact itself where it was rewritten, else on the reference.
#[test]
fn fixed_scales_of_a_network_without_numbers_change_no_verdict() {
    let place = place();
    let act = ["--act", "static-int8", "--json"];
    let calibration = ["--calibration", place.text.to_str().unwrap()];
    let few = ["--calibration-context", "128", "--passes", "0"];
    let artifact = place.file("rewritten.gguf");
    let flags = [&["-t", "q8_0"], &calibration[..], &few].concat();
    to_gguf(&nano(), &artifact, &flags);
    let output = place.validate(&artifact, &nano(), &act);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    spoil(&artifact);
    let output = place.validate(&artifact, &nano(), &act);
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    let found = report(&output);
    let findings = found["findings"].as_array().unwrap();
    let not_finite = findings.iter().find(|f| f["id"] == "weights/not-finite");
    assert_eq!(not_finite.unwrap()["place"]["tensor"], "output.weight");
    assert_eq!(found["logits"]["positions"], 0);
    let output = place.validate(&place.artifact("q8_0"), &artifact, &act);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("the reference computes no numbers"),
        "{}",
        stderr(&output)
    );
}

/// Makes the last weights NaN.
fn spoil(artifact: &Path) {
    let mut bytes = std::fs::read(artifact).unwrap();
    let last = bytes.len() - 1000;
    bytes[last..].fill(0xff);
    std::fs::write(artifact, bytes).unwrap();
}

#[test]
fn the_same_function_has_no_drift() {
    let place = place();
    let found = report(&place.validate(
        &place.artifact("f32"),
        &nano(),
        &["--act", "none", "--json"],
    ));
    assert!(mean_kl(&found).abs() < 1e-6, "{}", mean_kl(&found));
    assert_eq!(found["logits"]["top1_agreement"]["value"], 1.0);
    // A widened stream is compared with the stream it was.
    let narrow = place.file("q8_0.gguf");
    to_gguf(&nano(), &narrow, &["-t", "f32", "--widen"]);
    assert_eq!(
        report(&place.validate(&narrow, &nano(), &["--json"]))["verdict"],
        "passed"
    );
}

#[test]
fn gates_come_from_a_file_and_flags_win() {
    let place = place();
    let artifact = place.artifact("q8_0");
    let gates = place.file("gates.yaml");
    std::fs::write(&gates, "max-kld: 1e-9\n").unwrap();
    let gates = gates.to_str().unwrap();
    let by_file = place.validate(&artifact, &nano(), &["--gates", gates]);
    assert_eq!(by_file.status.code(), Some(2), "{}", stderr(&by_file));
    let by_flag = place.validate(&artifact, &nano(), &["--gates", gates, "--max-kld", "1"]);
    assert_eq!(by_flag.status.code(), Some(0), "{}", stderr(&by_flag));
    let wrong = place.validate(&artifact, &nano(), &["--min-top1", "7"]);
    assert_eq!(wrong.status.code(), Some(64), "{}", stderr(&wrong));
}

#[test]
fn saved_references_stand_in_for_the_model() {
    let place = place();
    let artifact = place.artifact("q4_0");
    let exact = mean_kl(&report(&place.validate(&artifact, &nano(), &["--json"])));
    for (name, tolerance) in [("reference.nref", 0.02), ("base.kld", 0.02)] {
        let saved = place.file(name);
        let made = place.validate(
            &nano(),
            &nano(),
            &["--save-reference", saved.to_str().unwrap()],
        );
        assert_eq!(made.status.code(), Some(0), "{}", stderr(&made));
        let found = report(&place.validate(&artifact, &saved, &["--json"]));
        let share = mean_kl(&found) / exact;
        assert!((share - 1.0).abs() < tolerance, "{name}: {share}");
        // Another text is not the one that the file was made of.
        let other = place.file("other.txt");
        std::fs::write(&other, "Another text altogether.").unwrap();
        let output = nemoconv([
            "validate",
            artifact.to_str().unwrap(),
            "--reference",
            saved.to_str().unwrap(),
            "--text",
            other.to_str().unwrap(),
        ]);
        let shown = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(2), "{shown}");
        assert!(shown.contains("tokenizer/token-ids-differ"), "{shown}");
        assert!(shown.contains("not that of the reference file"), "{shown}");
        let first = place.validate(&artifact, &saved, &["--json", "--chunks", "1"]);
        assert_eq!(report(&first)["logits"]["chunks"], 1);
        // A file that was cut is refused by name.
        let bytes = std::fs::read(&saved).unwrap();
        std::fs::write(&saved, &bytes[..bytes.len() - 7]).unwrap();
        let cut = place.validate(&artifact, &saved, &["--json"]);
        assert_eq!(cut.status.code(), Some(1), "{}", stderr(&cut));
        assert!(stderr(&cut).contains(name), "{}", stderr(&cut));
    }
}

#[test]
fn every_activation_scheme_runs_and_none_drifts_least() {
    let place = place();
    let artifact = place.artifact("q8_0");
    let kl = |act: &str| {
        mean_kl(&report(&place.validate(
            &artifact,
            &nano(),
            &["--act", act, "--json"],
        )))
    };
    let none = kl("none");
    for act in ["target", "q8_0", "q8_k", "token-int8", "static-int8"] {
        assert!(kl(act) > none, "{act}");
    }
}

#[test]
fn what_cannot_be_compared_is_an_error_that_says_why() {
    let place = place();
    let artifact = place.artifact("q8_0");
    let check = |output: Output, expected: &str| {
        assert_eq!(
            output.status.code(),
            Some(1),
            "{expected}: {}",
            stderr(&output)
        );
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    };
    // Another model is a finding; what has other blocks cannot be run beside it.
    let folder = tempdir().unwrap();
    for case in cases() {
        let other = case.checkpoint.write_as(folder.path(), case.name).unwrap();
        let output = place.validate(&artifact, &other, &[]);
        let (shown, said) = (String::from_utf8_lossy(&output.stdout), stderr(&output));
        let is_finding = output.status.code() == Some(2) && shown.contains("error weights/");
        let is_error = output.status.code() == Some(1) && said.contains("different models");
        assert!(is_finding || is_error, "{}: {said} {shown}", case.name);
    }
    std::fs::write(&place.text, "too short").unwrap();
    check(
        place.validate(&artifact, &nano(), &[]),
        "one chunk needs 128",
    );
    std::fs::write(&place.text, "").unwrap();
    check(place.validate(&artifact, &nano(), &[]), "text.txt");
    check(
        place.validate(&artifact, Path::new("/nowhere"), &[]),
        "/nowhere",
    );
}

/// The largest resident size of a process while it lives, kB, as the kernel counts it.
fn peak_kilobytes(mut command: Command) -> (u64, Option<i32>) {
    let mut child = command
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let status = format!("/proc/{}/status", child.id());
    let mut peak = 0;
    loop {
        if let Ok(text) = std::fs::read_to_string(&status) {
            let line = text.lines().find_map(|line| line.strip_prefix("VmHWM:"));
            let found = line.and_then(|line| line.split_whitespace().next()?.parse().ok());
            peak = peak.max(found.unwrap_or(0));
        }
        if let Some(status) = child.try_wait().unwrap() {
            return (peak, status.code());
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[cfg(target_os = "linux")]
#[test]
fn a_model_larger_than_max_ram_is_scored_under_it() {
    let place = place();
    let checkpoint = RandomCheckpoint {
        pattern: "M-*M-".into(),
        hidden_size: 1024,
        intermediate_size: 16384,
        vocab_size: 4096,
        ..RandomCheckpoint::of_1b()
    };
    let model = checkpoint.write_as(place.folder.path(), "large").unwrap();
    let artifact = place.file("large.gguf");
    to_gguf(&model, &artifact, &["-t", "f32"]);
    let bytes = std::fs::metadata(&artifact).unwrap().len();
    let limit = 300_000_000;
    assert!(bytes > limit, "{bytes}");
    let run = |flags: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nemoconv"));
        command.args(["validate".as_ref(), artifact.as_os_str()]);
        command.args(["--reference".as_ref(), model.as_os_str()]);
        command.args(["--text".as_ref(), place.text.as_os_str()]);
        command
            .args(["--context", "64", "--chunks", "2"])
            .args(flags);
        peak_kilobytes(command)
    };
    let (peak, code) = run(&["--max-ram", "300M"]);
    println!("peak {peak} kB for a file of {bytes} bytes");
    assert_eq!(code, Some(0));
    assert!(peak * 1024 < limit, "{peak} kB");
    let (unlimited, _) = run(&[]);
    assert!(
        unlimited * 1024 > limit,
        "without a limit the file is resident: {unlimited} kB"
    );
}

/// Perplexity is llama.cpp's: the figures that came with the models.
#[test]
fn perplexity_is_the_published_one() {
    let Some(shared) = std::env::var_os("NEMOCONV_SHARED") else {
        println!("skipped: NEMOCONV_SHARED is not set");
        return;
    };
    let text = Path::new(&shared).join("text/eval.txt");
    for model in models()
        .into_iter()
        .filter(|model| model.join("reference").is_dir())
    {
        let json = std::fs::read(model.join("reference/reference.json")).unwrap();
        let json: Value = serde_json::from_slice(&json).unwrap();
        let values = &json["perplexity"]["values"]["eval.txt"];
        let expected = values["second_half_of_windows"].as_f64().unwrap();
        let model = model.to_str().unwrap();
        let text = text.to_str().unwrap();
        let output = nemoconv([
            "-q",
            "validate",
            model,
            "--reference",
            model,
            "--text",
            text,
            "--chunks",
            "16",
            "--json",
        ]);
        let found = report(&output)["logits"]["perplexity"]["value"]
            .as_f64()
            .unwrap();
        println!("{model}: {found:.4}, published {expected}");
        assert!(
            (found / expected - 1.0).abs() < 1e-4,
            "{model}: {found} {expected}"
        );
    }
}
