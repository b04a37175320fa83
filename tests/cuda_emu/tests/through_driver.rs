//! `nemoconv_device::cuda` on a `libcuda`, a `libnvrtc` and a `libcublas` that belong to the emulator: what is called in which
//! order, what is waited for, what is given back, which errors come of it.
//!
//! Libraries are found when a process starts: each test runs itself again as a child.
#![allow(clippy::print_stdout, reason = "tests say why they are skipped")]

mod overlap;

use std::path::{Path, PathBuf};
use std::process::Command;

use nemoconv_device::cuda::{list, open};
use nemoconv_device::{
    Device, DeviceError, Driver, Family, Handle, Launch, MatmulLayout, View, kernels,
};

const CHILD: &str = "NEMOCONV_EMU_CHILD";

/// Whether this process has the libraries.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// A folder with the libraries and an empty cache.
struct Libraries(PathBuf);

impl Libraries {
    fn new(name: &str) -> Option<Self> {
        let tests = std::env::current_exe().unwrap();
        let library = tests
            .ancestors()
            .nth(2)
            .unwrap()
            .join("examples")
            .join("libcuda.so");
        if !library.exists() {
            println!(
                "skipped: `cargo build -p nemoconv-cuda-emu --examples` makes {}",
                library.display()
            );
            return None;
        }
        // Lists of folders have colons.
        let name = name.replace("::", "-");
        let folder = std::env::temp_dir().join(format!("nemoconv-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        for name in ["libcuda.so", "libnvrtc.so"] {
            std::fs::copy(&library, folder.join(name)).unwrap();
        }
        // Not a copy: it queues on the streams of the one device.
        std::os::unix::fs::symlink(folder.join("libcuda.so"), folder.join("libcublas.so")).unwrap();
        Some(Self(folder))
    }

    fn run(&self, settings: &[(&str, u64)], arguments: &[&str]) {
        let mut child = Command::new(std::env::current_exe().unwrap());
        child
            .args(arguments)
            .env(CHILD, "1")
            .env("LD_LIBRARY_PATH", &self.0)
            .env("XDG_CACHE_HOME", &self.0);
        for (name, value) in settings {
            child.env(format!("NEMOCONV_LIBCUDA_{name}"), value.to_string());
        }
        let output = child.output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        assert!(output.status.success(), "{settings:?}: {text}");
        assert!(!text.contains(" 0 passed"), "{settings:?}: {text}");
    }
}

impl Drop for Libraries {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs `body` in a child.
fn with_libraries(test: &str, settings: &[(&str, u64)], body: impl Fn()) {
    if is_child() {
        return body();
    }
    if let Some(libraries) = Libraries::new(test) {
        libraries.run(
            settings,
            &["--exact", &format!("through_driver::{test}"), "--nocapture"],
        );
    }
}

/// The same, in a child for each of these settings.
fn with_each<'a>(test: &str, all: &[impl AsRef<[(&'a str, u64)]>], body: impl Fn()) {
    if is_child() {
        return body();
    }
    for settings in all {
        with_libraries(test, settings.as_ref(), &body);
    }
}

/// Which streams run as soon as they can, of kernels (1), uploads (2) and downloads (4), and which as late as events allow: each
/// two of them in all four ways.
const SCHEDULES: [[(&str, u64); 1]; 4] = [
    [("EAGER", 0)],
    [("EAGER", 3)],
    [("EAGER", 5)],
    [("EAGER", 6)],
];

#[test]
fn the_table_of_operations() {
    if is_child() {
        return;
    }
    let Some(libraries) = Libraries::new("table") else {
        return;
    };
    for schedule in SCHEDULES {
        libraries.run(&schedule, &["--skip", "through_driver"]);
    }
    libraries.run(&[("POOLS", 0)], &["--skip", "through_driver"]);
    libraries.run(&[("BLAS", 0)], &["matmul::products_of_every_layout"]);
    let cubins = cached(&libraries.0);
    assert!(cubins > 15, "{cubins} kernels were kept");
}

fn cached(folder: &Path) -> usize {
    let kernels = folder.join("nemoconv").join("kernels");
    let names = std::fs::read_dir(kernels)
        .unwrap()
        .map(|file| file.unwrap().file_name());
    names
        .filter(|name| name.to_string_lossy().ends_with(".cubin"))
        .count()
}

#[test]
fn devices_are_described() {
    with_libraries(
        "devices_are_described",
        &[("DEVICES", 2), ("CAPABILITY", 89)],
        || {
            let all = list().unwrap();
            assert_eq!(all.len(), 2);
            assert_eq!(all[1].family, Family::Cuda);
            assert_eq!(all[1].name, "Emulated device");
            assert_eq!(all[1].detail, "sm_89, driver for CUDA 12.8, NVRTC 12.8");
            assert_eq!(all[1].limits.memory_bytes, Some(1 << 32));
            // Machine code of sm_80 runs on it.
            assert_eq!(open(1).ok().unwrap().description(), &all[1]);
            let error = open(2).err().unwrap();
            assert_eq!(
                error,
                DeviceError::NoDevice {
                    family: "cuda",
                    index: 2
                }
            );
        },
    );
}

#[test]
fn no_device() {
    with_libraries("no_device", &[("DEVICES", 0)], || {
        let expected = DeviceError::NoDevice {
            family: "cuda",
            index: 0,
        };
        assert_eq!(list().unwrap_err(), expected);
        assert_eq!(open(0).err().unwrap(), expected);
    });
}

#[test]
fn a_device_that_is_too_old() {
    with_libraries("a_device_that_is_too_old", &[("CAPABILITY", 75)], || {
        let error = open(0).err().unwrap();
        let text = "Emulated device has architecture sm_75, which is not supported";
        assert_eq!(error.to_string(), text);
    });
}

#[test]
fn memory_that_runs_out() {
    let all = [0, 1].map(|pools| [("MEMORY", 1 << 20), ("POOLS", pools)]);
    with_each("memory_that_runs_out", &all, || {
        let device = open(0).ok().unwrap();
        let half = device.allocate(1 << 19).unwrap();
        device.allocate(1 << 19).unwrap();
        let error = DeviceError::OutOfMemory { bytes: 256 };
        assert_eq!(device.allocate(256).unwrap_err(), error);
        // What was freed is given back to the device when it is needed.
        device.free(half);
        device.allocate(1 << 18).unwrap();
    });
}

#[test]
fn a_device_that_fails() {
    with_libraries("a_device_that_fails", &[("BROKEN", 1)], || {
        let device = open(0).ok().unwrap();
        let memory = device.allocate(256).unwrap();
        let error = scale(&*device, memory, 64, 2.0).unwrap_err();
        assert!(matches!(error, DeviceError::Lost { .. }), "{error}");
    });
}

fn scale(
    device: &dyn Driver,
    memory: Handle,
    count: u32,
    factor: f32,
) -> nemoconv_device::Result<()> {
    device.launch(&Launch {
        kernel: &kernels::SCALE,
        groups: count.div_ceil(256),
        views: &[View {
            memory,
            offset: 0,
            bytes: u64::from(count) * 4,
        }],
        parameters: &[count, factor.to_bits()],
    })
}

/// Uploads of several parts, before, between and after kernels that use the same memory.
#[test]
fn uploads_and_kernels_keep_their_order() {
    with_each("uploads_and_kernels_keep_their_order", &SCHEDULES, || {
        let count = (40 << 20) / 4;
        let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let device = open(0).ok().unwrap();
        let memory = device.allocate(bytes.len() as u64).unwrap();
        device.write(memory, 0, &bytes).unwrap();
        scale(&*device, memory, 3, 10.0).unwrap();
        // A kernel has seen it: its tail is overwritten in order.
        device.write(memory, 4, &bytes[8..12]).unwrap();
        scale(&*device, memory, 3, 10.0).unwrap();
        let copy = device.allocate(16).unwrap();
        device.clear(copy, 0, 16).unwrap();
        device.copy(memory, 0, copy, 4, 12).unwrap();
        device.free(memory);
        let other = device.allocate(bytes.len() as u64).unwrap();
        device.write(other, 0, &bytes).unwrap();
        assert_eq!(read(&*device, copy, 4), [0.0, 0.0, 20.0, 200.0]);
        assert_eq!(read(&*device, other, count), values);
        assert!(device.write(other, bytes.len() as u64, &[0; 4]).is_err());
        assert!(device.read(memory, 0, &mut [0; 4]).is_err());
        // What is left belongs to the device, which gives everything back.
        drop(device);
    });
}

fn read(device: &dyn Driver, memory: Handle, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; 4 * count];
    device.read(memory, 0, &mut bytes).unwrap();
    let words = bytes.as_chunks::<4>().0;
    words.iter().map(|word| f32::from_le_bytes(*word)).collect()
}

/// Both operands as they are and transposed, beside kernels before and after.
#[test]
fn products_of_the_library() {
    with_each("products_of_the_library", &SCHEDULES, || {
        let device = open(0).ok().unwrap();
        for (a, b) in [
            ([3, 1], [1, 3]),
            ([3, 1], [4, 1]),
            ([1, 2], [1, 3]),
            ([1, 2], [4, 1]),
        ] {
            check_product(&*device, a, b);
        }
        let layout = MatmulLayout {
            a: [0, 6, 2],
            ..MatmulLayout::linear(2, 3, 4, 0, 4)
        };
        let memory = device.allocate(256).unwrap();
        let view = View {
            memory,
            offset: 0,
            bytes: 256,
        };
        assert!(device.gemm(&layout, &[view; 3]).is_none());
    });
}

/// 2 x 3 times 3 x 4, after 1 value of each operand, with these steps.
fn check_product(device: &dyn Driver, a: [usize; 2], b: [usize; 2]) {
    let layout = MatmulLayout {
        a: [1, a[0], a[1]],
        b: [1, b[0], b[1]],
        out: [1, 5],
        alpha: 0.5,
        beta: 2.0,
        ..MatmulLayout::linear(2, 3, 4, 0, 5)
    };
    let values: Vec<f32> = (0..64).map(|i| (i * 7 % 13) as f32).collect();
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    let views = [(); 3].map(|()| {
        let memory = device.allocate(256).unwrap();
        device.write(memory, 0, &bytes).unwrap();
        View {
            memory,
            offset: 0,
            bytes: 256,
        }
    });
    scale(device, views[0].memory, 64, 2.0).unwrap();
    device.gemm(&layout, &views).unwrap().unwrap();
    scale(device, views[2].memory, 64, 3.0).unwrap();
    let mut expected: Vec<f32> = values.iter().map(|x| 3.0 * x).collect();
    for i in 0..2 {
        for j in 0..4 {
            let product =
                |k: usize| 2.0 * values[1 + i * a[0] + k * a[1]] * values[1 + k * b[0] + j * b[1]];
            let sum: f32 = (0..3).map(product).sum();
            let at = 1 + i * 5 + j;
            expected[at] = 3.0 * (0.5 * sum + 2.0 * values[at]);
        }
    }
    assert_eq!(read(device, views[2].memory, 64), expected, "{layout:?}");
    views.iter().for_each(|view| device.free(view.memory));
}

/// Products from some size on, and none where the library does not work.
#[test]
fn small_products_are_the_kernels() {
    let all = [0, 1].map(|blas| [("BLAS", blas)]);
    with_each("small_products_are_the_kernels", &all, || {
        let has_blas = std::env::var("NEMOCONV_LIBCUDA_BLAS").unwrap() == "1";
        let layout = MatmulLayout::linear(2, 3, 4, 0, 4);
        let driver = open(0).ok().unwrap();
        let view = View {
            memory: driver.allocate(256).unwrap(),
            offset: 0,
            bytes: 256,
        };
        driver.clear(view.memory, 0, 256).unwrap();
        assert_eq!(driver.gemm(&layout, &[view; 3]).is_some(), has_blas);
        // In sums of many values both differ in their last bits: the library of the emulator sums in f64.
        let large = MatmulLayout::linear(1, 4096, 1, 0, 1);
        let values: Vec<f32> = (0..4096).map(|i| 0.1 + (i % 7) as f32).collect();
        let product = |from: u64| {
            let device = Device::new(open(0).ok().unwrap(), None).with_library_from(from);
            let x = device.upload(&values).unwrap();
            let mut out = device.zeros(1).unwrap();
            device.matmul(&large, &x, &x, &mut out).unwrap();
            device.download_all(&out).unwrap()[0]
        };
        assert_eq!(product(4096) != product(4097), has_blas);
    });
}
