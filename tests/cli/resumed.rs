//! Runs that are killed: the next one goes on where they were and ends with the same bytes.

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use nemoconv_fixtures::nano;

use super::safetensors::{Place, calibrated, files, names, text};
use crate::support::{nemoconv, stderr};

/// Runs the command until `done` is there, and kills it three times on the way, each time two tensors further on in the
/// journal of `work`.
#[track_caller]
fn run_and_kill(args: &[&str], work: &Path, done: &Path) {
    let lines = || {
        let journal = fs::read_to_string(work.join("journal.jsonl"));
        journal.unwrap_or_default().lines().count()
    };
    let mut kills = 0;
    while !done.exists() {
        let mut child = Command::new(env!("CARGO_BIN_EXE_nemoconv"))
            .args(args)
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let begun = lines();
        // After two more tensors, or when it is done.
        while child.try_wait().unwrap().is_none() && (kills >= 3 || lines() < begun.max(1) + 2) {
            std::thread::sleep(Duration::from_millis(2));
        }
        if child.try_wait().unwrap().is_none() {
            child.kill().unwrap();
            kills += 1;
        }
        child.wait().unwrap();
    }
    assert!(kills > 0, "the run was never killed");
}

#[test]
fn a_folder_is_the_same_after_kills() {
    let place = Place::new();
    let text = text();
    let flags = calibrated(&text, &["--scheme", "w4a16"]);
    let expected = files(&place.pack("straight", &flags));
    let (out, work) = (place.path("killed"), place.path("killed.work"));
    let (model, folder) = (nano(), out.to_str().unwrap());
    let fixed = [
        "to-safetensors",
        model.to_str().unwrap(),
        "-q",
        "-o",
        folder,
    ];
    run_and_kill(&[&fixed[..], &flags].concat(), &work, &out);
    let found = files(&out);
    assert!(found.keys().eq(expected.keys()));
    for (name, bytes) in &found {
        assert!(*bytes == expected[name], "{name}");
    }
    assert!(!work.exists());
}

/// A GGUF file and a folder from one walk: two journals, of which either may be a tensor ahead.
#[test]
fn both_artifacts_are_the_same_after_kills() {
    let place = Place::new();
    let (text, model) = (text(), nano());
    let args = |gguf: &str, folder: &str| {
        let fixed = [
            "to-gguf",
            model.to_str().unwrap(),
            "-q",
            "-t",
            "q4_0",
            "--pure",
        ];
        let also = ["--also-safetensors", folder, "--also-scheme", "w4a16"];
        let flags = calibrated(&text, &["--no-rewrites", "--passes", "0", "-o", gguf]);
        let all = [&fixed[..], &also, &flags].concat();
        all.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let path = |name: &str| place.path(name).to_str().unwrap().to_owned();
    let straight = nemoconv(args(&path("straight.gguf"), &path("straight")));
    assert!(straight.status.success(), "{}", stderr(&straight));
    let killed = args(&path("killed.gguf"), &path("killed"));
    let killed: Vec<&str> = killed.iter().map(String::as_str).collect();
    let (gguf, work) = (place.path("killed.gguf"), place.path("killed.work"));
    run_and_kill(&killed, &work, &gguf);
    assert!(fs::read(gguf).unwrap() == fs::read(place.path("straight.gguf")).unwrap());
    let (found, expected) = (files(&place.path("killed")), files(&place.path("straight")));
    assert!(found == expected);
    let left = names(place.0.path());
    assert!(!left.iter().any(|name| name.contains("work")), "{left:?}");
}

/// `SIGTERM` while tensors are rounded: what is finished is kept, and that is said.
#[test]
fn an_interrupted_run_says_how_it_goes_on() {
    let place = Place::new();
    let (text, model, out) = (text(), nano(), place.path("m.gguf"));
    let fixed = ["to-gguf", model.to_str().unwrap(), "-t", "q4_0", "-o"];
    let flags = calibrated(&text, &["--no-rewrites"]);
    let child = Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .args([&fixed[..], &[out.to_str().unwrap()], &flags].concat())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let journal = place.path("m.work").join("journal.jsonl");
    let has_begun = || fs::read_to_string(&journal).is_ok_and(|text| text.lines().count() > 2);
    while !has_begun() && !out.exists() {
        std::thread::sleep(Duration::from_millis(2));
    }
    let id = child.id().to_string();
    let killed = Command::new("kill").arg(id).status().unwrap().success();
    let output = child.wait_with_output().unwrap();
    let said = stderr(&output);
    match output.status.code() {
        Some(130) => assert!(said.contains("m.work: the same command goes on"), "{said}"),
        // It was faster than the signal.
        code => assert_eq!(code, Some(0), "killed: {killed}, {said}"),
    }
}
