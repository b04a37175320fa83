//! What waits for what, between kernels, uploads and downloads. Waits that are missing give wrong values. Waits for too much
//! meet a kernel that fails: where it was not run the results before it can still be read.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nemoconv_device::cuda::open;
use nemoconv_device::{Device, DeviceError, Driver, Handle, Launch, Result, View, kernels};

use super::{read, scale, with_each};

type Setting = (&'static str, u64);

/// As late as events allow, or as soon: kernels (1), uploads (2), downloads (4).
const ALL: [[Setting; 1]; 8] = [
    [("EAGER", 0)],
    [("EAGER", 1)],
    [("EAGER", 2)],
    [("EAGER", 3)],
    [("EAGER", 4)],
    [("EAGER", 5)],
    [("EAGER", 6)],
    [("EAGER", 7)],
];

/// Those in which kernels run no sooner than they must.
const LATE_KERNELS: [[Setting; 1]; 4] = [
    [("EAGER", 0)],
    [("EAGER", 2)],
    [("EAGER", 4)],
    [("EAGER", 6)],
];

/// In a child for each of these schedules, with pools and without, on a device that is set up so.
fn in_schedules(
    test: &str,
    schedules: &[[Setting; 1]],
    settings: &[Setting],
    body: impl Fn(Box<dyn Driver>),
) {
    let with_pools = |schedule: &[Setting; 1]| {
        [0, 1].map(|pools| [schedule, settings, &[("POOLS", pools)]].concat())
    };
    let all: Vec<_> = schedules.iter().flat_map(with_pools).collect();
    with_each(&format!("overlap::{test}"), &all, || {
        body(open(0).unwrap_or_else(|error| panic!("{error}")));
    });
}

/// Memory with these values.
fn uploaded(device: &dyn Driver, values: &[f32]) -> Handle {
    let memory = device.allocate(4 * values.len() as u64).unwrap();
    write(device, memory, values).unwrap();
    memory
}

fn write(device: &dyn Driver, memory: Handle, values: &[f32]) -> Result<()> {
    let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
    device.write(memory, 0, &bytes)
}

/// Doubles two values.
fn double(device: &dyn Driver, memory: Handle) -> Result<()> {
    scale(device, memory, 2, 2.0)
}

#[track_caller]
fn assert_lost<T: std::fmt::Debug>(result: Result<T>) {
    assert!(
        matches!(result, Err(DeviceError::Lost { .. })),
        "{result:?}"
    );
}

#[test]
fn memory_that_was_used_is_written_in_order() {
    let test = "memory_that_was_used_is_written_in_order";
    in_schedules(test, &ALL, &[], |device| {
        let device = &*device;
        let memory = uploaded(device, &[1.0, 2.0]);
        double(device, memory).unwrap();
        let copy = device.allocate(8).unwrap();
        device.copy(memory, 0, copy, 0, 8).unwrap();
        write(device, memory, &[5.0, 6.0]).unwrap();
        double(device, memory).unwrap();
        // What is fetched was computed, or was uploaded and not seen by a kernel.
        assert_eq!(read(device, copy, 2), [2.0, 4.0]);
        assert_eq!(read(device, memory, 2), [10.0, 12.0]);
        write(device, memory, &[7.0, 8.0]).unwrap();
        assert_eq!(read(device, memory, 2), [7.0, 8.0]);
    });
}

#[test]
fn memory_is_freed_in_order() {
    in_schedules("memory_is_freed_in_order", &ALL, &[], |device| {
        let device = &*device;
        let kept = uploaded(device, &[1.0, 2.0]);
        let [written, used] = [(); 2].map(|()| uploaded(device, &[3.0, 4.0]));
        device.free(written);
        double(device, used).unwrap();
        device.free(used);
        double(device, kept).unwrap();
        assert_eq!(read(device, kept, 2), [2.0, 4.0]);
    });
}

/// The launch names memory that is there before memory that is not.
#[test]
fn launches_that_are_refused_change_no_order() {
    let test = "launches_that_are_refused_change_no_order";
    in_schedules(test, &ALL, &[], |device| {
        let device = &*device;
        let [first, second] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, second).unwrap();
        // No upload has to wait for this kernel any more.
        assert_eq!(read(device, second, 2), [2.0, 4.0]);
        let views = [first, Handle(99)].map(|memory| View {
            memory,
            offset: 0,
            bytes: 8,
        });
        let refused = device.launch(&Launch {
            kernel: &kernels::ADD,
            groups: 1,
            views: &views,
            parameters: &[2],
        });
        assert!(matches!(refused, Err(DeviceError::Call { .. })));
        write(device, first, &[3.0, 4.0]).unwrap();
        double(device, second).unwrap();
        write(device, second, &[5.0, 6.0]).unwrap();
        assert_eq!(read(device, first, 2), [3.0, 4.0]);
        assert_eq!(read(device, second, 2), [5.0, 6.0]);
    });
}

#[test]
fn uploads_wait_for_no_other_kernel() {
    let test = "uploads_wait_for_no_other_kernel";
    in_schedules(test, &LATE_KERNELS, &[("FAULT", 2)], |device| {
        let device = &*device;
        let [memory, other] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, memory).unwrap();
        double(device, other).unwrap();
        write(device, memory, &[3.0, 4.0]).unwrap();
        assert_eq!(read(device, memory, 2), [3.0, 4.0]);
        assert_lost(device.read(other, 0, &mut [0; 8]));
    });
}

/// Arrays that are dropped, and whose memory is used again.
#[test]
fn uploads_into_pooled_memory_wait_for_no_other_kernel() {
    let test = "uploads_into_pooled_memory_wait_for_no_other_kernel";
    let settings = [("FAULT", 2), ("MEMORY", 512)];
    in_schedules(test, &LATE_KERNELS, &settings, |driver| {
        let device = Device::new(driver, None);
        let [mut first, mut second] = [(); 2].map(|()| device.upload(&[1.0, 2.0]).unwrap());
        device.scale(&mut first, 2.0).unwrap();
        device.scale(&mut second, 2.0).unwrap();
        drop(first);
        drop(second);
        // There is no memory but theirs.
        let again = device.upload(&[3.0, 4.0]).unwrap();
        assert_eq!(device.download_all(&again).unwrap(), [3.0, 4.0]);
        let last = device.upload(&[5.0, 6.0]).unwrap();
        assert_lost(device.download_all(&last));
    });
}

/// So many operations that the one that an upload waits for cannot be told apart: of 1024 it waits for the first.
#[test]
fn uploads_long_after_a_kernel_wait_for_it() {
    let test = "uploads_long_after_a_kernel_wait_for_it";
    in_schedules(test, &LATE_KERNELS, &[("FAULT", 2)], |device| {
        let device = &*device;
        let [memory, other] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, memory).unwrap();
        for _ in 1..1024 {
            device.clear(other, 0, 8).unwrap();
        }
        double(device, other).unwrap();
        write(device, memory, &[3.0, 4.0]).unwrap();
        assert_eq!(read(device, memory, 2), [3.0, 4.0]);
        assert_lost(device.read(other, 0, &mut [0; 8]));
    });
}

#[test]
fn kernels_wait_for_no_other_upload() {
    let test = "kernels_wait_for_no_other_upload";
    in_schedules(test, &[[("EAGER", 1)]], &[("FAULT", 1)], |device| {
        let device = &*device;
        let other = uploaded(device, &[1.0, 2.0]);
        read(device, other, 2);
        uploaded(device, &[1.0, 2.0]);
        // It runs while it is launched, though the upload has yet to begin.
        assert_lost(double(device, other));
    });
}

#[test]
fn downloads_wait_for_no_later_kernel() {
    let test = "downloads_wait_for_no_later_kernel";
    in_schedules(test, &LATE_KERNELS, &[("FAULT", 2)], |device| {
        let device = &*device;
        let [memory, other] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, memory).unwrap();
        double(device, other).unwrap();
        assert_eq!(read(device, memory, 2), [2.0, 4.0]);
        assert_lost(device.read(other, 0, &mut [0; 8]));
    });
}

/// The other upload has to wait for a kernel.
#[test]
fn downloads_wait_for_no_other_upload() {
    let test = "downloads_wait_for_no_other_upload";
    in_schedules(test, &LATE_KERNELS, &[("FAULT", 1)], |device| {
        let device = &*device;
        let [memory, other] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, other).unwrap();
        write(device, other, &[3.0, 4.0]).unwrap();
        assert_eq!(read(device, memory, 2), [1.0, 2.0]);
        assert_lost(device.read(other, 0, &mut [0; 8]));
    });
}

/// Parts of pinned memory are used again while others are on their way.
#[test]
fn long_downloads_come_in_parts() {
    let test = "long_downloads_come_in_parts";
    in_schedules(test, &LATE_KERNELS, &[], |device| {
        let device = &*device;
        let count = (76 << 20) / 4;
        let values: Vec<f32> = (0..count).map(|i| i as f32).collect();
        let memory = uploaded(device, &values);
        assert!(read(device, memory, count) == values);
        let mut middle = vec![0; 44 << 20];
        device.read(memory, 16 << 20, &mut middle).unwrap();
        assert_eq!(middle[..4], values[4 << 20].to_le_bytes());
        assert_eq!(
            middle[(44 << 20) - 4..],
            values[(15 << 20) - 1].to_le_bytes()
        );
    });
}

/// The first download ends only after something else was launched.
#[test]
fn others_launch_while_a_download_is_waited_for() {
    let test = "others_launch_while_a_download_is_waited_for";
    in_schedules(test, &[[("EAGER", 0)]], &[("BUSY", 1)], |device| {
        let device = &*device;
        let [memory, other] = [(); 2].map(|()| uploaded(device, &[1.0, 2.0]));
        double(device, memory).unwrap();
        let is_there = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !is_there.load(Ordering::Relaxed) {
                    scale(device, other, 2, 1.0).unwrap();
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
            let mut bytes = [0; 8];
            let result = device.read(memory, 0, &mut bytes);
            is_there.store(true, Ordering::Relaxed);
            result.unwrap();
            assert_eq!(bytes[4..], 4.0f32.to_le_bytes());
        });
        assert_eq!(read(device, other, 2), [1.0, 2.0]);
    });
}

#[test]
fn a_kernel_that_fails_is_what_calls_after_it_say() {
    let test = "a_kernel_that_fails_is_what_calls_after_it_say";
    in_schedules(test, &LATE_KERNELS, &[("FAULT", 1)], |device| {
        let device = &*device;
        let memory = uploaded(device, &[1.0, 2.0]);
        double(device, memory).unwrap();
        assert_lost(device.read(memory, 0, &mut [0; 8]));
        assert_lost(device.read(memory, 0, &mut [0; 8]));
        assert_lost(write(device, memory, &[1.0, 2.0]));
        assert_lost(double(device, memory));
        assert_lost(device.allocate(8));
    });
}

/// None, enough for uploads, and not quite enough for downloads too.
#[test]
fn host_memory_that_cannot_be_pinned() {
    let all = [0, 32 << 20, 63 << 20].map(|bytes| [("PINNED", bytes)]);
    with_each("overlap::host_memory_that_cannot_be_pinned", &all, || {
        let has_none = std::env::var("NEMOCONV_LIBCUDA_PINNED").unwrap() == "0";
        let device = open(0).ok().unwrap();
        let memory = device.allocate(8).unwrap();
        device.clear(memory, 0, 8).unwrap();
        let written = write(&*device, memory, &[1.0, 2.0]);
        assert_eq!(written.is_err(), has_none);
        let error = device.read(memory, 0, &mut [0; 8]).unwrap_err();
        for error in written.err().into_iter().chain([error]) {
            assert!(
                error.to_string().starts_with("cuMemHostAlloc failed"),
                "{error}"
            );
        }
        // The device is as it was, and gives back what there is.
        double(&*device, memory).unwrap();
        device.free(memory);
    });
}
