//! Every kernel through the real compiler, for every supported generation: it compiles, nothing spills, registers suffice.
//!
//! Needs NVRTC and no device. Without it the tests say so and pass; `NEMOCONV_REQUIRE_NVRTC=1` turns that into a failure.
#![cfg(feature = "cuda")]
#![allow(
    clippy::print_stdout,
    reason = "tests say why they are skipped, and print a table"
)]

use nemoconv_device::DeviceError;
use nemoconv_device::cuda::{architectures, compile, compile_to_ptx, version};
use nemoconv_device::kernels::{self, Kernel};

/// One of each generation since Ampere: A100, RTX 3090, RTX 4090, H100, B200, RTX 5090.
const ARCHITECTURES: [u32; 6] = [80, 86, 89, 90, 100, 120];

/// Kernels that hold tiles or states in registers.
const LARGE: [&str; 9] = [
    "matmul_tiled",
    "matmul_direct",
    "matmul_f64",
    "gram",
    "selective_scan",
    "attention",
    "feedback_factors",
    "feedback_sweep",
    "feedback_descent",
];

/// Kernels whose warps hold 64 x 32 sums.
const LARGEST: [&str; 3] = ["matmul_bf16", "matmul_f16", "matmul_q8_0"];

/// The same with operands in parts.
const IN_PARTS: [&str; 3] = ["matmul_split", "matmul_split_bf16", "gram_split"];

/// Registers of a thread: up to 255 let 256 threads of a multiprocessor run at once, 128 let 512, 64 let 1024.
fn budget(kernel: &str) -> u32 {
    match kernel {
        _ if IN_PARTS.contains(&kernel) => 240,
        _ if LARGEST.contains(&kernel) => 200,
        _ if LARGE.contains(&kernel) => 128,
        _ => 64,
    }
}

/// Those of the list that this NVRTC knows.
fn known_architectures() -> Option<Vec<u32>> {
    match architectures() {
        Ok(known) => Some(
            ARCHITECTURES
                .into_iter()
                .filter(|one| known.contains(one))
                .collect(),
        ),
        Err(DeviceError::NoCompiler)
            if std::env::var_os("NEMOCONV_REQUIRE_NVRTC").is_none_or(|value| value != "1") =>
        {
            println!("skipped: NVRTC was not found");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

/// Tries every kernel for every architecture.
fn for_each(check: impl Fn(&'static Kernel, u32)) {
    let Some(architectures) = known_architectures() else {
        return;
    };
    // 12.8 and later know all of them.
    if version().unwrap() >= (12, 8) {
        assert_eq!(architectures, ARCHITECTURES);
    }
    assert!(!architectures.is_empty());
    for kernel in kernels::all() {
        for architecture in &architectures {
            check(kernel, *architecture);
        }
    }
}

#[test]
fn every_kernel_compiles_to_machine_code_without_spills() {
    for_each(|kernel, architecture| {
        let place = format!("`{}` for sm_{architecture}", kernel.name);
        let compiled = compile(
            &kernel.cuda_text(),
            kernel.name,
            &format!("sm_{architecture}"),
        );
        let compiled = compiled.unwrap_or_else(|error| panic!("{place}: {error}"));
        assert!(compiled.cubin.starts_with(b"\x7fELF"), "{place}");
        assert_eq!(
            [compiled.spill_stores, compiled.spill_loads],
            [0, 0],
            "{place} spills"
        );
        assert!(
            (1..=budget(kernel.name)).contains(&compiled.registers),
            "{place}: {} registers",
            compiled.registers
        );
        assert!(
            !compiled.log.contains("warning"),
            "{place}: {}",
            compiled.log
        );
    });
}

#[test]
fn every_kernel_compiles_to_ptx() {
    for_each(|kernel, architecture| {
        let place = format!("`{}` for compute_{architecture}", kernel.name);
        let ptx = compile_to_ptx(
            &kernel.cuda_text(),
            kernel.name,
            &format!("compute_{architecture}"),
        );
        let ptx = ptx.unwrap_or_else(|error| panic!("{place}: {error}"));
        for line in [
            format!(".target sm_{architecture}"),
            format!(".visible .entry {}(", kernel.name),
        ] {
            assert!(ptx.contains(&line), "{place}: no `{line}` in {ptx}");
        }
    });
}

#[test]
fn a_kernel_with_an_error_gives_its_line() {
    if known_architectures().is_none() {
        return;
    }
    let error = compile(
        "extern \"C\" __global__ void wrong() {\n    missing();\n}\n",
        "wrong",
        "sm_80",
    )
    .unwrap_err();
    let DeviceError::Compile {
        kernel: "wrong",
        log,
    } = &error
    else {
        panic!("{error}");
    };
    assert!(log.contains("wrong.cu(2): error"), "{log}");
    assert!(log.contains("missing()"), "{log}");
}

#[test]
fn an_unknown_architecture_is_refused() {
    if known_architectures().is_none() {
        return;
    }
    let result = compile("", "empty", "sm_1");
    assert!(
        matches!(result, Err(DeviceError::Compile { .. })),
        "{result:?}"
    );
    let result = compile_to_ptx("", "empty", "compute_1");
    assert!(
        matches!(result, Err(DeviceError::Compile { .. })),
        "{result:?}"
    );
}

/// `cargo test -p nemoconv-device --test nvrtc -- --ignored --nocapture`: the table of the README.
#[test]
#[ignore = "prints a table"]
fn print_registers() {
    let Some(architectures) = known_architectures() else {
        return;
    };
    let names: Vec<String> = architectures
        .iter()
        .map(|one| format!("sm_{one}"))
        .collect();
    println!("| kernel | {} | shared bytes |", names.join(" | "));
    println!("| --- |{} --- |", " --- |".repeat(names.len()));
    for kernel in kernels::all() {
        let all = names
            .iter()
            .map(|name| compile(&kernel.cuda_text(), kernel.name, name).expect("kernels compile"));
        let all: Vec<_> = all.collect();
        let registers: Vec<String> = all.iter().map(|one| one.registers.to_string()).collect();
        let shared = all.iter().map(|one| one.shared_bytes).max().unwrap_or(0);
        println!("| {} | {} | {shared} |", kernel.name, registers.join(" | "));
    }
}
