//! One table of cases, every operation against plain loops in f64, on every device that is there: odd sizes, tails, no
//! rows, values that are no numbers.

mod columns;
mod doubles;
mod drivers;
mod feedback;
mod matmul;
mod minima;
mod mixers;
mod narrow;
mod oddities;
mod page;
pub mod reference;
mod rows;
mod softmax;
mod split;
mod stored;
mod values;

pub use reference::{TOLERANCE, check, numbers};
