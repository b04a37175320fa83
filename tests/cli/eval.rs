//! `eval` from the outside: files, resuming, comparing, exit codes.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::{Value, json};

use crate::support::{nemoconv, stderr};

/// Rows that every task accepts.
pub(super) fn write_data(folder: &Path) {
    let write = |task: &str, rows: Vec<Value>| {
        let lines: String = rows.iter().map(|row| format!("{row}\n")).collect();
        std::fs::write(folder.join(format!("{task}.jsonl")), lines).unwrap();
    };
    let piqa = |i: usize| json!({"goal": format!("goal {i}"), "sol1": "walk there", "sol2": "stay here", "label": i % 2});
    write("piqa", (0..9).map(piqa).collect());
    let arc = |i: usize| {
        let choices = json!({"text": ["a dog", "a tree", "the sun"], "label": ["1", "2", "3"]});
        json!({"question": format!("what is {i}?"), "choices": choices, "answerKey": "2"})
    };
    write("arc_easy", (0..7).map(arc).collect());
    write(
        "wikitext",
        vec![json!({"page": " = A = \n some words , and more ."})],
    );
}

pub(super) fn eval(model: &Path, data: &Path, flags: &[&str]) -> Output {
    let (model, data) = (model.to_str().unwrap(), data.to_str().unwrap());
    nemoconv([&["-q", "eval", model, "--data", data], flags].concat())
}

/// The only file of a folder (or below) whose name begins so.
fn file(folder: &Path, prefix: &str) -> PathBuf {
    let found: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| {
            path.file_name()
                .unwrap()
                .to_string_lossy()
                .starts_with(prefix)
        })
        .collect();
    assert_eq!(found.len(), 1, "{prefix}: {found:?}");
    found[0].clone()
}

#[test]
fn a_run_writes_results_and_leaves_no_journal() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let out = folder.path().join("out");
    let flags = [
        "--tasks",
        "piqa,wikitext,arc_easy",
        "--limit",
        "5",
        "--output",
    ];
    let output = eval(
        &nemoconv_fixtures::nano(),
        folder.path(),
        &[&flags[..], &[out.to_str().unwrap()]].concat(),
    );
    assert!(output.status.success(), "{}", stderr(&output));
    let table = String::from_utf8_lossy(&output.stdout);
    assert!(
        table.contains("word_perplexity") && table.contains("decode tokens/s"),
        "{table}"
    );
    let written = out.join("nemotron-h-nano");
    let results: Value =
        serde_json::from_slice(&std::fs::read(file(&written, "results_")).unwrap()).unwrap();
    assert_eq!(results["results"]["piqa"]["sample_len"], 5);
    assert_eq!(
        results["n-samples"]["piqa"],
        json!({"original": 9, "effective": 5})
    );
    assert_eq!(
        results["results"]["wikitext"]["word_perplexity_stderr,none"],
        "N/A"
    );
    assert_eq!(results["tokenizer_bos_token"], json!(["<s>", "1"]));
    file(&written, "performance_");
    assert!(!written.join("journal.jsonl").exists());
    let samples = std::fs::read_to_string(file(&written, "samples_piqa_")).unwrap();
    assert_eq!(samples.lines().count(), 5);
}

#[test]
fn a_model_equals_itself() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let out = folder.path().join("out");
    let nano = nemoconv_fixtures::nano();
    let flags = ["--tasks", "piqa,wikitext", "--json"];
    let baseline = [&flags[..], &["--output", out.to_str().unwrap()]].concat();
    assert!(eval(&nano, folder.path(), &baseline).status.success());
    for baseline in [out.join("nemotron-h-nano"), nano.clone()] {
        let flags = [&flags[..], &["--baseline", baseline.to_str().unwrap()]].concat();
        let output = eval(&nano, folder.path(), &flags);
        assert!(output.status.success(), "{}", stderr(&output));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        let task = &document["comparison"]["tasks"][0];
        assert_eq!(
            (&task["task"], &task["documents"]),
            (&json!("piqa"), &json!(9))
        );
        assert_eq!(task["changed_predictions"], 0);
        assert_eq!(task["mean_abs_log_likelihood_change_per_token"], 0.0);
        let acc = &task["metrics"][0];
        assert_eq!((&acc["flips"], &acc["mcnemar_p"]), (&json!(0), &json!(1.0)));
        assert_eq!(
            document["performance"].as_array().unwrap().len(),
            1 + usize::from(baseline == nano)
        );
    }
    // Another question under the same number.
    std::fs::write(
        folder.path().join("piqa.jsonl"),
        json!({"goal": "new", "sol1": "a", "sol2": "b", "label": 0}).to_string(),
    )
    .unwrap();
    let baseline = out.join("nemotron-h-nano");
    let flags = ["--tasks", "piqa", "--baseline", baseline.to_str().unwrap()];
    let output = eval(&nano, folder.path(), &flags);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("document 0 of piqa is another one"),
        "{}",
        stderr(&output)
    );
}

#[test]
fn parts_are_merged() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let nano = nemoconv_fixtures::nano();
    let run = |to: &str, shard: &[&str]| {
        let to = folder.path().join(to);
        let flags = ["--tasks", "piqa,arc_easy", "--output", to.to_str().unwrap()];
        let output = eval(&nano, folder.path(), &[&flags[..], shard].concat());
        assert!(output.status.success(), "{}", stderr(&output));
        to.join("nemotron-h-nano")
    };
    let whole = run("whole", &[]);
    run("parts", &["--shard", "1/2"]);
    run("parts", &["--shard", "2/2"]);
    let (parts, to) = (folder.path().join("parts"), folder.path().join("merged"));
    let merge = [
        "eval",
        "merge",
        parts.to_str().unwrap(),
        "--output",
        to.to_str().unwrap(),
    ];
    let output = nemoconv(merge);
    assert!(output.status.success(), "{}", stderr(&output));
    let merged = to.join("nemotron-h-nano");
    for prefix in ["samples_piqa_", "samples_arc_easy_"] {
        let read = |folder: &Path| std::fs::read(file(folder, prefix)).unwrap();
        assert_eq!(read(&merged), read(&whole));
    }
    let read = |folder: &Path| -> Value {
        let bytes = std::fs::read(file(folder, "results_")).unwrap();
        let mut results: Value = serde_json::from_slice(&bytes).unwrap();
        results["date"] = Value::Null;
        results
    };
    assert_eq!(read(&merged), read(&whole));
}

#[test]
fn faults_are_explained_and_have_their_exit_codes() {
    let folder = tempfile::tempdir().unwrap();
    write_data(folder.path());
    let nano = nemoconv_fixtures::nano();
    let check = |flags: &[&str], code: i32, expected: &str| {
        let output = eval(&nano, folder.path(), flags);
        assert_eq!(
            output.status.code(),
            Some(code),
            "{flags:?}: {}",
            stderr(&output)
        );
        assert!(stderr(&output).contains(expected), "{}", stderr(&output));
    };
    check(&["--tasks", "mmlu"], 64, "known are arc_easy");
    check(&["--tasks", "piqa", "--shard", "1/2"], 64, "--output");
    check(
        &["--tasks", "piqa", "--output", "x", "--shard", "0/2"],
        64,
        "counted from 1",
    );
    check(&["--tasks", "piqa", "--limit", "0"], 64, "0 is not in 1..");
    check(
        &["--tasks", "hellaswag"],
        1,
        "there is no data of `hellaswag`",
    );
    check(
        &["--tasks", "piqa", "--max-length", "1"],
        1,
        "more than the longest input of 1",
    );
    check(
        &["--tasks", "piqa", "--baseline", "none.json"],
        1,
        "none.json",
    );
    let write = |line: &str| std::fs::write(folder.path().join("piqa.jsonl"), line).unwrap();
    let good = json!({"goal": "g", "sol1": "a", "sol2": "b", "label": 0});
    write(&format!("{good}\n{good}\n{{\"goal\": 1}}\n"));
    check(
        &["--tasks", "piqa", "--limit", "1"],
        1,
        "line 3: expected `goal` to be a string, found a number",
    );
    write(&format!("{good}\n\nnot json\n"));
    check(&["--tasks", "piqa"], 1, "line 3: not JSON");
    write(&format!(
        "{}\n",
        json!({"goal": "g", "sol1": "a", "sol2": "", "label": 0})
    ));
    check(&["--tasks", "piqa"], 1, "line 1: choice 2 is empty");
    write("");
    check(&["--tasks", "piqa"], 1, "the file has no rows");
    std::fs::write(folder.path().join("wikitext.jsonl"), "{\"page\": \"\"}\n").unwrap();
    check(&["--tasks", "wikitext"], 1, "line 1: the text is empty");
    let output = nemoconv([
        "eval",
        "merge",
        folder.path().to_str().unwrap(),
        "--output",
        "x",
    ]);
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
}
