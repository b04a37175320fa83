//! Every CUDA kernel against plain loops in f64, and defects that the emulator must find.

mod numerics;
mod planted;
mod reference;
mod softmax;
mod split;

use nemoconv_cuda_emu::{Emulator, Order};
use nemoconv_device::kernels::Kernel;
use nemoconv_device::{Driver, Launch, Result, View};

/// What a kernel leaves in its views, in one order of threads.
fn run_ordered(
    order: Order,
    kernel: &'static Kernel,
    groups: u32,
    views: &[Vec<u32>],
    parameters: &[u32],
) -> Result<Vec<Vec<u32>>> {
    let emulator = Emulator::new(order);
    let mut bound = Vec::new();
    for words in views {
        let bytes = words.len() as u64 * 4;
        let memory = emulator.allocate(bytes)?;
        emulator.write(memory, 0, &to_bytes(words))?;
        bound.push(View {
            memory,
            offset: 0,
            bytes,
        });
    }
    emulator.launch(&Launch {
        kernel,
        groups,
        views: &bound,
        parameters,
    })?;
    let mut results = Vec::new();
    for view in bound {
        let mut bytes = vec![0; view.bytes as usize];
        emulator.read(view.memory, 0, &mut bytes)?;
        emulator.free(view.memory);
        results.push(to_words(&bytes));
    }
    Ok(results)
}

/// The same, which must not depend on the order.
fn run(
    kernel: &'static Kernel,
    groups: u32,
    views: &[Vec<u32>],
    parameters: &[u32],
) -> Vec<Vec<u32>> {
    assert_eq!(kernel.views, views.len(), "{}", kernel.name);
    let [first, others @ ..] = Order::ALL.map(|order| {
        run_ordered(order, kernel, groups, views, parameters)
            .unwrap_or_else(|error| panic!("{error}"))
    });
    for other in others {
        assert!(
            first == other,
            "`{}` depends on the order of threads",
            kernel.name
        );
    }
    first
}

fn to_bytes(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn to_words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<4>().0;
    words.iter().map(|word| u32::from_le_bytes(*word)).collect()
}
