//! Compiles every kernel as C++, together with the emulator, and lists their entry points.
//!
//! `NEMOCONV_EMU_SANITIZE=1` adds the address and undefined-behaviour sanitizers.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};

use nemoconv_device::kernels;

fn main() {
    let out = PathBuf::from(env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let mut sources = kernel_texts();
    sources.extend(planted_texts());
    let mut build = compiler();
    for (name, text) in &sources {
        build.file(write_unit(&out, name, text));
    }
    build.file("src/emulator.cpp").compile("kernels");
    write_entries(&out, &sources);
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=src/emulator.h");
    println!("cargo:rerun-if-changed=src/emulator.cpp");
    println!("cargo:rerun-if-changed=planted");
}

fn kernel_texts() -> Vec<(String, String)> {
    kernels::all()
        .map(|kernel| (kernel.name.to_owned(), kernel.cuda_text()))
        .collect()
}

/// Kernels with defects, which the tests of the emulator must find.
fn planted_texts() -> Vec<(String, String)> {
    let files = fs::read_dir("planted").expect("the folder `planted` is part of this package");
    let mut paths: Vec<PathBuf> = files
        .map(|file| file.expect("a readable folder").path())
        .collect();
    paths.sort();
    let text = |path: &Path| fs::read_to_string(path).expect("a readable file");
    let name = |path: &Path| {
        path.file_stem()
            .expect("a file name")
            .to_string_lossy()
            .into_owned()
    };
    paths.iter().map(|path| (name(path), text(path))).collect()
}

fn compiler() -> cc::Build {
    let mut build = cc::Build::new();
    build
        .cpp(true)
        .std("c++17")
        .include("src")
        .opt_level(2)
        // As `--fmad=false` of NVRTC: fused only where the kernel says `fmaf`.
        .flag("-ffp-contract=off")
        .flag("-pthread")
        .flag("-Wno-unknown-pragmas")
        .extra_warnings(false)
        .flag("-Wno-unused-function");
    println!("cargo:rerun-if-env-changed=NEMOCONV_EMU_SANITIZE");
    println!("cargo:rustc-check-cfg=cfg(sanitized)");
    if env::var_os("NEMOCONV_EMU_SANITIZE").is_some_and(|value| value == "1") {
        build
            .debug(true)
            .flag("-fsanitize=address,undefined")
            .flag("-fno-sanitize-recover=all")
            .flag("-fno-omit-frame-pointer");
        println!("cargo:rustc-link-lib=dylib=asan");
        println!("cargo:rustc-link-lib=dylib=ubsan");
        println!("cargo:rustc-cfg=sanitized");
    }
    build
}

/// A kernel in a namespace of its own, under a name that meets no other symbol of the program.
fn write_unit(out: &Path, name: &str, text: &str) -> PathBuf {
    let kernel = out.join(format!("{name}.cu"));
    let unit = out.join(format!("{name}.cpp"));
    fs::write(&kernel, text).expect("OUT_DIR can be written");
    let wrapped = format!(
        "#include \"emulator.h\"\n\
         #define {name} kernel_{name}\n\
         namespace unit_{name} {{\n\
         #include \"{kernel}\"\n\
         }}\n\
         #undef {name}\n\
         EMULATOR_EXPORT(emulated_{name}, unit_{name}::kernel_{name})\n",
        kernel = kernel.display()
    );
    fs::write(&unit, wrapped).expect("OUT_DIR can be written");
    unit
}

fn write_entries(out: &Path, sources: &[(String, String)]) {
    let mut text = String::from("unsafe extern \"C\" {\n");
    for (name, _) in sources {
        text += &format!("    fn emulated_{name}(request: *const Request) -> bool;\n");
        text += &format!("    fn emulated_{name}_shape() -> Shape;\n");
    }
    text += "}\n\n/// All kernels.\nstatic ENTRY_POINTS: &[EntryPoint] = &[\n";
    for (name, _) in sources {
        text += &format!(
            "    EntryPoint {{ name: \"{name}\", run: emulated_{name}, shape: emulated_{name}_shape }},\n"
        );
    }
    text += "];\n";
    fs::write(out.join("entries.rs"), text).expect("OUT_DIR can be written");
}
