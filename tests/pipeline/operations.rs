//! One table of cases: every operation of a backend against plain loops in f64, on the processor, on every device that is
//! there and on the emulator of CUDA. Odd sizes, tails, no rows, values that are no numbers.

mod mixers;
mod products;
#[path = "../../shaders/tests/operations/reference.rs"]
mod reference;
mod rows;
mod sums;
mod values;

use std::path::Path;
use std::sync::Arc;

use nemoconv::artifact::{MemoryTensor, StoredModel};
use nemoconv::backend::cpu::Residence;
use nemoconv::backend::{Backend, Machine, MachineBuffer, Machines};

/// The processor, whatever devices there are, and the emulator.
fn machines() -> Vec<(String, Machines)> {
    let cpu = ("cpu".to_owned(), Machines::Cpu);
    #[cfg(feature = "device")]
    let devices = super::device::machines();
    #[cfg(not(feature = "device"))]
    let devices = Vec::new();
    std::iter::once(cpu).chain(devices).collect()
}

/// Tries something on every machine.
fn on_each(check: impl Fn(&str, &Machine)) {
    for (name, machines) in machines() {
        check(&name, &with_tensors(&machines, Vec::new()).1);
    }
}

/// A machine for the weights of a model of these tensors, and the model.
fn with_tensors(machines: &Machines, tensors: Vec<MemoryTensor>) -> (Arc<StoredModel>, Machine) {
    let nano = nemoconv_fixtures::nano();
    let nano = StoredModel::open(nano.to_str().unwrap()).unwrap();
    let model = StoredModel::in_memory(Path::new("table"), nano.config().clone(), tensors);
    let model = Arc::new(model.unwrap());
    let machine = machines.machine(Arc::clone(&model), Residence::Mapped);
    (model, machine)
}

fn upload(machine: &Machine, values: &[f32]) -> MachineBuffer {
    machine.upload(values.to_vec()).unwrap()
}

/// Numbers with something else in one place.
fn with(odd: f32, place: usize, count: usize, seed: u64) -> Vec<f32> {
    let mut values = reference::numbers(count, seed);
    values[place] = odd;
    values
}
