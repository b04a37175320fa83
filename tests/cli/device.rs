//! `--device` and `devices`: what is said where there is none, and what is computed where there is one.

use std::path::Path;
use std::process::{Command, Output};

use nemoconv_device::{DeviceName, Found, devices, open};
use nemoconv_fixtures::nano;
use serde_json::Value;

use super::emulated_cuda::EmulatedCuda;
use crate::support::{Place, stderr, to_gguf};

/// Runs the binary as if the loader of Vulkan knew no driver.
fn without_vulkan(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .args(args)
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .output()
        .expect("the binary starts")
}

fn run(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .args(args)
        .output()
        .expect("the binary starts")
}

/// Devices that can be opened, one per driver.
fn names() -> Vec<String> {
    let mut names = Vec::new();
    for Found { family, devices } in devices() {
        let name = DeviceName { family, index: 0 };
        match (devices, open(name)) {
            (Ok(found), Ok(_)) if !found.is_empty() => names.push(name.to_string()),
            (Err(error), _) | (_, Err(error)) => println!("skipped {name}: {error}"),
            _ => println!("skipped {name}: no device"),
        }
    }
    names
}

/// With a text that does not repeat itself.
pub fn place() -> Place {
    let prose = nemoconv_fixtures::data().join("calibration.txt");
    Place::new(std::fs::read(prose).expect("fixtures have a text"))
}

fn text(path: &Path) -> &str {
    path.to_str().expect("test paths are UTF-8")
}

#[test]
fn no_device_is_an_error_of_its_own() {
    let place = place();
    let model = nano();
    let check = |device: &str, code: i32, words: &[&str]| {
        let args = [
            "validate",
            text(&model),
            "--reference",
            text(&model),
            "--text",
            text(&place.text),
            "--device",
            device,
        ];
        let output = without_vulkan(&args);
        assert_eq!(output.status.code(), Some(code), "{}", stderr(&output));
        for word in words {
            assert!(stderr(&output).contains(word), "{}", stderr(&output));
        }
    };
    // Where there is no loader at all, its absence is what is wrong.
    if devices()
        .iter()
        .any(|found| found.family.name() == "wgpu" && found.devices.is_ok())
    {
        check("wgpu", 71, &["no usable device", "nemoconv devices"]);
    } else {
        check("wgpu", 70, &["libvulkan", "--device cpu"]);
    }
    if devices()
        .iter()
        .all(|found| found.family.name() != "cuda" || found.devices.is_err())
    {
        check("cuda:3", 70, &["no cuda driver", "libcuda", "NVIDIA"]);
    }
    check("gpu", 64, &["`gpu` is no device"]);
}

#[test]
fn auto_never_fails_for_want_of_a_device() {
    let place = place();
    let model = nano();
    let args = [
        "validate",
        text(&model),
        "--reference",
        text(&model),
        "--text",
        text(&place.text),
        "--context",
        "64",
        "--chunks",
        "1",
        "--device",
        "auto",
    ];
    let output = without_vulkan(&args);
    assert!(output.status.success(), "{}", stderr(&output));
}

#[test]
fn devices_are_listed() {
    let output = run(&["devices", "--json"]);
    let listed: Value = serde_json::from_str(&stdout(&output)).unwrap();
    let listed = listed["devices"].as_array().unwrap().clone();
    for name in names() {
        let device = listed
            .iter()
            .find(|device| device["device"] == name.as_str());
        let device = device.unwrap_or_else(|| panic!("{name} is not in {listed:?}"));
        assert!(device["binding_bytes"].as_u64().unwrap() >= 128 << 20);
        assert!(device["group_threads"].as_u64().unwrap() >= 256);
        assert!(stdout(&run(&["devices"])).contains(&name));
    }
    let output = without_vulkan(&["devices"]);
    assert!(output.status.success() && !stdout(&output).is_empty());
    // Drivers have nothing to say about a session that is not there.
    let output = Command::new(env!("CARGO_BIN_EXE_nemoconv"))
        .arg("devices")
        .env_remove("XDG_RUNTIME_DIR")
        .output()
        .unwrap();
    assert!(
        !stderr(&output).contains("XDG_RUNTIME_DIR"),
        "{}",
        stderr(&output)
    );
}

/// Mean KL divergence and top-1 agreement of a file, measured on the CPU.
fn drift(file: &Path, place: &Place, device: &str) -> (f64, String) {
    drift_within(file, place, device, &[])
}

fn drift_within(file: &Path, place: &Place, device: &str, more: &[&str]) -> (f64, String) {
    let model = nano();
    let args = [
        "validate",
        text(file),
        "--reference",
        text(&model),
        "--text",
        text(&place.text),
        "--context",
        "128",
        "--chunks",
        "2",
        "--json",
        "--device",
        device,
    ];
    let output = run(&[&args, more].concat());
    (mean_kl(&output), stderr(&output))
}

/// Of a validation that printed JSON.
pub fn mean_kl(output: &Output) -> f64 {
    // 2: a file of few samples may have findings.
    let code = output.status.code();
    assert!(matches!(code, Some(0 | 2)), "{}", stderr(output));
    let report: Value = serde_json::from_str(&stdout(output)).unwrap();
    let kl = report["logits"]["kl_divergence"]["mean"]["value"].as_f64();
    kl.unwrap_or_else(|| panic!("{report:#}"))
}

/// How far the mean KL divergence of a calibrated file may be from that of the CPU's, as a share of it: second moments of few
/// tokens that differ in last bits choose other scales and codes, no worse ones.
pub const CALIBRATED: f64 = 0.2;

#[test]
fn calibrated_files_of_devices_are_as_good_as_those_of_the_cpu() {
    let place = place();
    let convert = |device: &str| {
        let file = place.file(&format!("{}.gguf", device.replace(':', "-")));
        let flags = [
            "-t",
            "q4_k_m",
            "--calibration",
            text(&place.text),
            "--calibration-context",
            "64",
            "--calibration-sequences",
            "6",
            "--passes",
            "1",
            "--device",
            device,
        ];
        to_gguf(&nano(), &file, &flags);
        file
    };
    let expected = convert("cpu");
    let (cpu, _) = drift(&expected, &place, "cpu");
    for name in names() {
        let file = convert(&name);
        let [ours, theirs] = [&file, &expected].map(|file| std::fs::read(file).unwrap());
        assert_eq!(ours.len(), theirs.len());
        let differing = ours.iter().zip(&theirs).filter(|(a, b)| a != b).count();
        println!("{name}: {differing} of {} bytes differ", ours.len());
        let (kl, said) = drift(&file, &place, &name);
        println!("{name}: mean KL {kl:.2e}, of the CPU's file {cpu:.2e}");
        assert!((kl - cpu).abs() < CALIBRATED * cpu, "{name}: {kl}, {cpu}");
        assert!(
            said.contains("on the device: ") && said.contains("matmul"),
            "{said}"
        );
    }
}

/// A rotated file that is rounded to the nearest: no sum of a network decides a byte of it.
fn rotated(place: &Place, device: &str, cuda: Option<&EmulatedCuda>) -> (Vec<u8>, String) {
    let file = place.file("rotated.gguf");
    let mut command = Command::new(env!("CARGO_BIN_EXE_nemoconv"));
    command.arg("to-gguf").arg(nano()).arg("-o").arg(&file);
    command.arg("--calibration").arg(&place.text);
    command.args([
        "--calibration-context",
        "64",
        "--calibration-sequences",
        "2",
    ]);
    command.args(["-t", "q8_0", "--method", "rtn", "--rotate", "hadamard"]);
    command.args(["--no-smoothing", "--device", device]);
    if let Some(cuda) = cuda {
        cuda.lend(&mut command);
    }
    let output = command.output().expect("the binary starts");
    assert!(output.status.success(), "{}", stderr(&output));
    let bytes = std::fs::read(&file).expect("the file was written");
    std::fs::remove_file(&file).expect("the file can be removed");
    (bytes, stderr(&output))
}

#[test]
fn rotated_files_of_devices_are_those_of_the_cpu() {
    let place = place();
    let (expected, _) = rotated(&place, "cpu", None);
    for name in names() {
        let (found, said) = rotated(&place, &name, None);
        assert!(found == expected, "{name}");
        let (on_device, on_cpu) = said.rsplit_once("on the CPU: ").expect("a tally is said");
        let taken = if name.starts_with("cuda") {
            on_device
        } else {
            on_cpu
        };
        assert!(taken.contains("mix "), "{name}: {said}");
    }
    if let Some(cuda) = EmulatedCuda::found() {
        let (found, said) = rotated(&place, "cuda", Some(&cuda));
        assert!(found == expected, "the emulator");
        let (on_device, on_cpu) = said.rsplit_once("on the CPU: ").expect("a tally is said");
        assert!(
            on_device.contains("mix ") && !on_cpu.contains("mix "),
            "{said}"
        );
    }
}

/// Largest difference of a mean KL divergence from the CPU's, as a share of it: inputs rounded to 8 bits fall on other sides of
/// ties.
pub const DIVERGENCE: f64 = 1e-2;

#[test]
fn drift_on_devices_is_that_of_the_cpu() {
    let place = place();
    let file = place.file("m.gguf");
    to_gguf(&nano(), &file, &["-t", "q4_k_m"]);
    let (expected, _) = drift(&file, &place, "cpu");
    for name in names() {
        let (kl, said) = drift(&file, &place, &name);
        println!("{name}: mean KL {kl:.6e}, on the CPU {expected:.6e}");
        assert!((kl - expected).abs() <= DIVERGENCE * expected, "{name}");
        let (there, here) = said.split_once("; on the CPU: ").unwrap();
        assert!(there.contains("kl_divergence"), "{said}");
        assert!(!here.contains("kl_divergence"), "{said}");
    }
}

#[test]
fn drift_within_little_memory_is_the_same() {
    let place = place();
    let file = place.file("m.gguf");
    to_gguf(&nano(), &file, &["-t", "q4_k_m"]);
    for name in names() {
        let (expected, _) = drift(&file, &place, &name);
        let (kl, said) = drift_within(&file, &place, &name, &["--device-mem", "3M"]);
        println!("{name}: mean KL {kl:.6e}, with all memory {expected:.6e}");
        assert!((kl - expected).abs() <= DIVERGENCE * expected, "{name}");
        assert!(!said.contains("going on on the CPU"), "{said}");
        assert!(said.contains("; weights that gave way"), "{said}");
    }
}

/// Largest difference of a divergence that is foreseen, as a share of it: the same codes, read by networks that differ in last
/// bits.
const PRICE: f64 = 2e-3;

/// Without rewrites, whose principal axes are anyone's where few tokens tell them apart: other axes are other weights.
#[test]
fn sensitivities_of_devices_are_those_of_the_cpu() {
    let (place, model) = (place(), nano());
    let measured = |device: &str| -> (Value, String) {
        let file = place.file(&format!("{}.gguf", device.replace(':', "-")));
        let args = [
            "to-gguf",
            text(&model),
            "-o",
            text(&file),
            "--calibration",
            text(&place.text),
            "--calibration-context",
            "64",
            "--calibration-sequences",
            "4",
            "--method",
            "rtn",
            "--no-rewrites",
            "--target-bpw",
            "6",
            "--device",
            device,
        ];
        let output = run(&args);
        assert!(output.status.success(), "{}", stderr(&output));
        let receipt = std::fs::read(file.with_extension("receipt.json")).unwrap();
        let receipt: Value = serde_json::from_slice(&receipt).unwrap();
        (receipt["allocation"]["groups"].clone(), stderr(&output))
    };
    let (expected, _) = measured("cpu");
    let expected = expected.as_array().expect("groups were allocated");
    for name in names() {
        let (found, said) = measured(&name);
        let found = found.as_array().expect("groups were allocated");
        assert_eq!(found.len(), expected.len(), "{name}");
        let worst = found.iter().zip(expected).map(|(found, expected)| {
            assert_eq!(found["tensors"], expected["tensors"], "{name}");
            assert_eq!(found["type"], expected["type"], "{name}");
            largest_difference(&found["types"], &expected["types"])
        });
        let worst = worst.fold(0.0, f64::max);
        println!("{name}: divergences foreseen differ by {worst:.1e} of themselves at most");
        assert!(worst <= PRICE, "{name}: {worst:e}");
        assert!(said.contains("kl_divergence"), "{said}");
    }
}

/// Of the divergences of a group's types, as a share of them.
fn largest_difference(found: &Value, expected: &Value) -> f64 {
    let types = [found, expected].map(|types| types.as_array().expect("types were looked at"));
    assert!(types[0].len() == types[1].len() && !types[0].is_empty());
    let difference = |(found, expected): (&Value, &Value)| {
        assert_eq!(found["type"], expected["type"]);
        let [found, expected] =
            [found, expected].map(|ty| ty["kl_divergence"].as_f64().expect("it is a number"));
        assert!(expected > 0.0);
        (found - expected).abs() / expected
    };
    types[0]
        .iter()
        .zip(types[1])
        .map(difference)
        .fold(0.0, f64::max)
}

fn stdout(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
fn benchmarks_on_devices_give_the_scores_of_the_cpu() {
    let folder = tempfile::tempdir().unwrap();
    super::eval::write_data(folder.path());
    let results = |device: &str| -> Value {
        let flags = ["--tasks", "piqa,arc_easy", "--json", "--device", device];
        let output = super::eval::eval(&nano(), folder.path(), &flags);
        assert!(output.status.success(), "{}", stderr(&output));
        let document: Value = serde_json::from_str(&stdout(&output)).unwrap();
        document["results"]["results"].clone()
    };
    let expected = results("cpu");
    assert!(expected.is_object(), "{expected}");
    for name in names() {
        assert_eq!(results(&name), expected, "{name}");
    }
}
