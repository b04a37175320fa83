//! Kernels with defects: each must be found.

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::kernels::{self, Kernel};
use nemoconv_device::{DeviceError, Driver, Launch, View};

use crate::{run, run_ordered};

const fn planted(name: &'static str) -> Kernel {
    Kernel {
        name,
        threads: 64,
        views: 1,
        wgsl: &[],
        cuda: &[],
    }
}

static MISSING_BARRIER: Kernel = planted("missing_barrier");
static DIVERGENT_BARRIER: Kernel = planted("divergent_barrier");
static SHORT_BUFFER: Kernel = planted("short_buffer");

#[test]
fn a_missing_barrier_shows_in_the_order_of_threads() {
    let results = Order::ALL
        .map(|order| run_ordered(order, &MISSING_BARRIER, 2, &[vec![0; 128]], &[64]).unwrap());
    assert_ne!(results[0], results[1]);
}

#[test]
fn a_divergent_barrier_is_an_error_with_counts() {
    let result = run_ordered(
        Order::Ascending,
        &DIVERGENT_BARRIER,
        1,
        &[vec![0; 64]],
        &[32],
    );
    let Err(DeviceError::Call { reason, .. }) = result else {
        panic!("{result:?}");
    };
    assert!(reason.contains("32 of 64 threads wait"), "{reason}");
    assert!(reason.contains("32 have returned"), "{reason}");
}

#[test]
fn without_their_defects_they_run() {
    let whole = run(&DIVERGENT_BARRIER, 1, &[vec![0; 64]], &[64]);
    assert_eq!(whole[0], vec![1.0f32.to_bits(); 64]);
    run(&SHORT_BUFFER, 1, &[vec![0; 12]], &[11]);
}

/// The sanitizer ends the process: a child has the defect.
#[test]
fn a_short_buffer_is_found_by_the_sanitizer() {
    let name = "planted::a_short_buffer_is_found_by_the_sanitizer";
    expect_report(name, "heap-buffer-overflow", || {
        run(&SHORT_BUFFER, 1, &[vec![0; 12]], &[12]);
    });
}

/// The allocation goes on where the view ends.
#[test]
fn a_short_view_is_found_by_the_sanitizer() {
    let name = "planted::a_short_view_is_found_by_the_sanitizer";
    expect_report(name, "use-after-poison", || {
        let emulator = Emulator::new(Order::Ascending);
        let memory = emulator.allocate(256).unwrap();
        let views = [View {
            memory,
            offset: 0,
            bytes: 44,
        }];
        let launch = Launch {
            kernel: &SHORT_BUFFER,
            groups: 1,
            views: &views,
            parameters: &[11],
        };
        emulator.launch(&launch).unwrap();
    });
}

fn expect_report(test: &str, what: &str, defect: impl Fn()) {
    const CHILD: &str = "NEMOCONV_EMU_DEFECT";
    if !nemoconv_cuda_emu::IS_SANITIZED {
        return;
    }
    if std::env::var_os(CHILD).is_some() {
        return defect();
    }
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let report = String::from_utf8_lossy(&child.stderr);
    assert!(!child.status.success());
    assert!(report.contains(what), "{report}");
    assert!(report.contains("short_buffer.cu:"), "{report}");
}

#[test]
fn launches_that_do_not_fit_the_kernel_are_refused() {
    let emulator = Emulator::new(Order::Ascending);
    let memory = emulator.allocate(256).unwrap();
    let view = View {
        memory,
        offset: 0,
        bytes: 256,
    };
    let refused = |views: &[View], parameters: &[u32]| {
        let launch = Launch {
            kernel: &kernels::SCALE,
            groups: 1,
            views,
            parameters,
        };
        let error = emulator.launch(&launch).unwrap_err();
        assert!(matches!(error, DeviceError::Call { .. }), "{error}");
    };
    refused(&[view], &[64]);
    refused(&[view, view], &[64, 0]);
    refused(
        &[View {
            offset: 4,
            bytes: 4,
            ..view
        }],
        &[1, 0],
    );
    refused(&[View { bytes: 260, ..view }], &[1, 0]);
    emulator.free(memory);
    refused(&[view], &[64, 0]);
}

#[test]
fn copies_stay_within_their_memory() {
    let emulator = Emulator::new(Order::Ascending);
    let from = emulator.allocate(8).unwrap();
    let to = emulator.allocate(12).unwrap();
    emulator.write(from, 0, &[1, 2, 3, 4, 5, 6, 7, 8]).unwrap();
    emulator.clear(to, 0, 12).unwrap();
    emulator.copy(from, 4, to, 8, 4).unwrap();
    let mut read = [1; 12];
    emulator.read(to, 0, &mut read).unwrap();
    assert_eq!(read, [0, 0, 0, 0, 0, 0, 0, 0, 5, 6, 7, 8]);
    assert!(emulator.write(from, 4, &[0; 8]).is_err());
    assert!(emulator.copy(from, 0, from, 4, 4).is_err());
    assert!(emulator.allocate(0).is_err());
}
