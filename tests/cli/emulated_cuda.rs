//! `--device cuda` where the driver is the emulator's library: whole commands, and what is said of each thing that fails.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use nemoconv_fixtures::checkpoint::cases;
use nemoconv_fixtures::nano;
use serde_json::Value;
use tempfile::TempDir;

use super::device::{CALIBRATED, DIVERGENCE, mean_kl, place};
use crate::support::{Place, stderr, to_gguf};

/// A folder with a `libcuda` and a `libnvrtc` that are the emulator's.
pub struct EmulatedCuda(TempDir);

impl EmulatedCuda {
    /// Nothing where it was not built, or cannot be loaded.
    pub fn found() -> Option<Self> {
        let binary = Path::new(env!("CARGO_BIN_EXE_nemoconv"));
        let library = binary.parent()?.join("examples").join("libcuda.so");
        let is_required = std::env::var_os("NEMOCONV_REQUIRE_GPU").is_some();
        if !library.exists() {
            assert!(!is_required, "{} is not there", library.display());
            println!(
                "skipped: `cargo build -p nemoconv-cuda-emu --examples` makes {}",
                library.display()
            );
            return None;
        }
        let folder = tempfile::tempdir().expect("there is a temporary folder");
        for name in ["libcuda.so", "libnvrtc.so"] {
            std::fs::copy(&library, folder.path().join(name)).expect("the library can be copied");
        }
        let found = Self(folder);
        let listed = found.run(&[], &["devices"]);
        if !String::from_utf8_lossy(&listed.stdout).contains("cuda:0") {
            // One with sanitizers cannot be loaded by a program without them.
            println!("skipped: {} does not load", library.display());
            return None;
        }
        Some(found)
    }

    /// Makes a command find the emulator.
    pub fn lend(&self, command: &mut Command) {
        command.env("LD_LIBRARY_PATH", self.0.path());
        command.env("XDG_CACHE_HOME", self.0.path());
    }

    /// `settings`: as `NEMOCONV_LIBCUDA_NAME`.
    fn run(&self, settings: &[(&str, u64)], args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nemoconv"));
        command.args(args);
        self.lend(&mut command);
        for (name, value) in settings {
            command.env(format!("NEMOCONV_LIBCUDA_{name}"), value.to_string());
        }
        command.output().expect("the binary starts")
    }
}

/// A short validation of `file`.
fn validation<'a>(
    file: &'a Path,
    model: &'a Path,
    place: &'a Place,
    device: &'a str,
) -> Vec<&'a str> {
    let text = |path: &'a Path| path.to_str().expect("test paths are UTF-8");
    let mut args = vec!["validate", text(file), "--reference", text(model)];
    args.extend(["--text", text(&place.text), "--context", "64"]);
    args.extend(["--chunks", "1", "--json", "--device", device]);
    args
}

#[test]
fn files_are_validated_as_on_the_cpu() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let (place, model) = (place(), nano());
    let file = place.file("m.gguf");
    to_gguf(&model, &file, &["-t", "q4_k_m"]);
    let expected = mean_kl(&cuda.run(&[], &validation(&file, &model, &place, "cpu")));
    let output = cuda.run(&[], &validation(&file, &model, &place, "cuda"));
    let (found, said) = (mean_kl(&output), stderr(&output));
    println!("mean KL {found:e}, on the CPU {expected:e}");
    assert!((found - expected).abs() <= DIVERGENCE * expected, "{said}");
    let (there, here) = said.split_once("; on the CPU: ").expect("a tally is said");
    assert!(there.contains("matmul"), "{said}");
    assert!(there.contains("kl_divergence"), "{said}");
    assert!(!here.contains("matmul"), "{said}");
}

/// A calibrated conversion of nano: the file, and what was said.
fn calibrated(cuda: &EmulatedCuda, place: &Place, flags: &[&str]) -> (PathBuf, String) {
    let file = place.file(&format!("{}.gguf", flags.join("")));
    let model = nano();
    let mut args = vec!["to-gguf", model.to_str().unwrap(), "-o"];
    args.extend([file.to_str().unwrap(), "-t", "q4_k_m", "--calibration"]);
    args.extend([place.text.to_str().unwrap(), "--calibration-context", "64"]);
    args.extend(["--calibration-sequences", "2", "--passes", "1"]);
    args.extend(["--rotate", "none", "--device"]);
    args.extend(flags);
    let output = cuda.run(&[], &args);
    assert!(output.status.success(), "{}", stderr(&output));
    (file, stderr(&output))
}

#[test]
fn calibrated_files_are_as_good_as_those_of_the_cpu() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let (place, model) = (place(), nano());
    let convert = |flags: &[&str]| calibrated(&cuda, &place, flags);
    let ((expected, _), (found, said)) = (convert(&["cpu"]), convert(&["cuda"]));
    let (there, here) = said.split_once("; on the CPU: ").expect("a tally is said");
    for operation in [
        "gram",
        "cross_gram",
        "column_sums",
        "magnitudes",
        "feedback_sweep",
        "feedback_descent",
    ] {
        assert!(there.contains(operation), "{operation}: {said}");
        assert!(!here.contains(operation), "{operation}: {said}");
    }
    let (within, said) = convert(&["cuda", "--device-mem", "5M"]);
    assert!(!said.contains("going on on the CPU"), "{said}");
    let files = [&expected, &found, &within];
    let bytes = files.map(|file| std::fs::read(file).unwrap().len());
    assert_eq!(bytes, [bytes[0]; 3]);
    let [expected, found, within] =
        files.map(|file| mean_kl(&cuda.run(&[], &validation(file, &model, &place, "cpu"))));
    println!("mean KL {found:e}, within 5 MB {within:e}, of the CPU's file {expected:e}");
    for found in [found, within] {
        assert!((found - expected).abs() <= CALIBRATED * expected);
    }
}

#[test]
fn other_commands_calibrate_on_devices_too() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let (place, model) = (place(), nano());
    for (command, read, out, flags) in [
        ("calibrate", "--text", "statistics.safetensors", &[][..]),
        (
            "to-safetensors",
            "--calibration",
            "packed",
            &["-s", "w8a16", "--rotate", "none", "--passes", "0"],
        ),
    ] {
        let out = place.file(out);
        let mut args = vec![
            command,
            model.to_str().unwrap(),
            "-o",
            out.to_str().unwrap(),
        ];
        args.extend([read, place.text.to_str().unwrap()]);
        args.extend([
            "--calibration-context",
            "32",
            "--calibration-sequences",
            "1",
        ]);
        args.extend(["--device", "cuda"]);
        args.extend(flags);
        let output = cuda.run(&[], &args);
        let said = stderr(&output);
        assert!(output.status.success(), "{command}: {said}");
        let (there, _) = said.split_once("; on the CPU: ").expect("a tally is said");
        for operation in ["matmul", "gram", "column_sums"] {
            assert!(there.contains(operation), "{command}, {operation}: {said}");
        }
        assert!(out.exists(), "{command}");
    }
}

/// Two devices round experts side by side; what comes of it is kept in order.
#[test]
fn experts_are_rounded_on_two_devices_as_on_one() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let place = place();
    let case = cases()
        .into_iter()
        .find(|case| case.name == "sharded-experts");
    let case = case.expect("there are random experts");
    let folder = tempfile::tempdir().unwrap();
    let model = case.checkpoint.write_as(folder.path(), case.name).unwrap();
    let convert = |device: &str| {
        let file = place.file("experts.gguf");
        let mut args = vec!["to-gguf", model.to_str().unwrap(), "-o"];
        args.extend([file.to_str().unwrap(), "-t", "q4_0", "--allow-fallback"]);
        args.push("--calibration");
        args.extend([place.text.to_str().unwrap(), "--calibration-context", "32"]);
        args.extend(["--calibration-sequences", "2", "--passes", "1"]);
        args.extend(["--rotate", "none", "--device", device]);
        let output = cuda.run(&[("DEVICES", 2)], &args);
        assert!(output.status.success(), "{}", stderr(&output));
        let bytes = std::fs::read(&file).expect("the file was written");
        std::fs::remove_file(&file).expect("the file can be removed");
        (bytes, stderr(&output))
    };
    let ((one, _), (two, said)) = (convert("cuda:0"), convert("cuda:0,cuda:1"));
    assert!(one == two, "{said}");
    let sweeping = said.lines().filter(|line| line.contains("feedback_sweep"));
    assert_eq!(sweeping.count(), 2, "{said}");
}

#[test]
fn benchmarks_have_the_scores_of_the_cpu() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let folder = tempfile::tempdir().unwrap();
    super::eval::write_data(folder.path());
    let model = nano();
    let results = |device: &str| -> (Value, String) {
        let mut args = vec!["eval", model.to_str().unwrap(), "--data"];
        args.extend([folder.path().to_str().unwrap(), "--tasks", "piqa", "--json"]);
        args.extend(["--device", device]);
        let output = cuda.run(&[("DEVICES", 2)], &args);
        assert!(output.status.success(), "{}", stderr(&output));
        let document: Value = serde_json::from_slice(&output.stdout).unwrap();
        (document["results"]["results"].clone(), stderr(&output))
    };
    let (expected, _) = results("cpu");
    assert!(expected.is_object(), "{expected}");
    assert_eq!(results("cuda").0, expected);
    // Each device has half of the blocks.
    let (found, said) = results("cuda:0,cuda:1");
    assert_eq!(found, expected);
    for device in ["device 0: ", "device 1: "] {
        let mut tallies = said.lines().filter(|line| line.contains(device));
        let tally = tallies.next().unwrap_or_else(|| panic!("{said}"));
        assert!(tally.contains("matmul"), "{tally}");
    }
}

#[test]
fn what_fails_is_told_apart() {
    let Some(cuda) = EmulatedCuda::found() else {
        return;
    };
    let (place, model) = (place(), nano());
    let check = |settings: &[(&str, u64)], device: &str, code: i32, words: &[&str]| {
        let output = cuda.run(settings, &validation(&model, &model, &place, device));
        let said = stderr(&output);
        assert_eq!(output.status.code(), Some(code), "{settings:?}: {said}");
        for word in words {
            assert!(said.contains(word), "{settings:?}: {word}: {said}");
        }
        assert!(!said.contains("panicked"), "{settings:?}: {said}");
    };
    check(&[("DEVICES", 0)], "cuda", 71, &["no usable device"]);
    check(&[], "cuda:1", 71, &["no usable device"]);
    check(
        &[("CAPABILITY", 75)],
        "cuda",
        73,
        &["sm_75", "not supported"],
    );
    check(&[("BROKEN", 1)], "cuda", 75, &["the device was lost"]);
    // Of a device that nobody asked for, whatever fails: the CPU does it.
    let went_on = ["going on on the CPU"];
    check(&[("BROKEN", 1)], "auto", 0, &went_on);
    check(&[("CAPABILITY", 75)], "auto", 0, &["running on the CPU"]);
    // Not even a tile fits.
    check(&[("MEMORY", 1 << 14)], "cuda", 0, &went_on);
    std::fs::remove_file(cuda.0.path().join("libnvrtc.so")).unwrap();
    if Path::new("/usr/local/cuda").exists() {
        println!("skipped: there is a compiler in /usr/local/cuda");
    } else {
        std::fs::remove_dir_all(cuda.0.path().join("nemoconv")).ok();
        check(&[], "cuda", 72, &["NVRTC"]);
    }
}
