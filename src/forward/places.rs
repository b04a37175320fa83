//! Which machine runs which block: one all of them, or several some each, one after the other.

use crate::backend::Backend;
use crate::error::Result;

/// Machines, and the block that each begins with.
pub struct Places<B> {
    machines: Vec<B>,
    /// By block.
    of_block: Vec<usize>,
}

impl<B: Backend> Places<B> {
    /// Spreads consecutive blocks of so many bytes each, as evenly as they go.
    ///
    /// # Panics
    /// There is no machine.
    pub fn spread(machines: Vec<B>, block_bytes: &[u64]) -> Self {
        assert!(!machines.is_empty(), "a network runs somewhere");
        let total = block_bytes.iter().sum::<u64>().max(1);
        let mut before = 0;
        let place = |bytes: &u64| {
            // By its middle, so that no machine gets a block that hardly touches its share.
            let twice_middle = 2 * u128::from(before) + u128::from(*bytes);
            before += bytes;
            let place = twice_middle * machines.len() as u128 / (2 * u128::from(total));
            (place as usize).min(machines.len() - 1)
        };
        let of_block = block_bytes.iter().map(place).collect();
        Self { machines, of_block }
    }

    /// The machine of a block; behind the last block, that of the final norm and the head.
    pub fn of(&self, block: usize) -> &B {
        match self.of_block.get(block) {
            Some(place) => &self.machines[*place],
            None => self.last(),
        }
    }

    /// The machine of the embedding.
    pub fn first(&self) -> &B {
        self.of(0)
    }

    /// The machine of the final norm and of the head.
    pub fn last(&self) -> &B {
        &self.machines[self.of_block.last().copied().unwrap_or(0)]
    }

    /// Whether the embedding and the head are on different machines.
    pub fn is_spread(&self) -> bool {
        self.of_block.first() != self.of_block.last()
    }

    /// A stream that was before block `from`, where block `to` is run.
    ///
    /// # Errors
    /// A machine fails.
    pub fn carry(&self, stream: B::Buffer, from: usize, to: usize) -> Result<B::Buffer> {
        let place = |block: usize| self.of_block.get(block).or(self.of_block.last());
        if place(from) == place(to) {
            return Ok(stream);
        }
        self.of(to).upload(self.of(from).download_all(stream)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::StoredModel;
    use crate::backend::{Machine, Machines};

    #[test]
    fn machines_get_consecutive_blocks_of_about_as_many_bytes() {
        let nano = nemoconv_fixtures::nano();
        let model = StoredModel::open(nano.to_str().unwrap()).unwrap();
        let check = |machines: usize, bytes: &[u64], expected: &[usize]| {
            let machine = |_| Machines::Cpu.without_weights(0, model.config());
            let machines: Vec<Machine> = (0..machines).map(machine).collect();
            assert_eq!(Places::spread(machines, bytes).of_block, expected);
        };
        check(1, &[5, 1, 9], &[0, 0, 0]);
        check(2, &[4, 4, 4, 4], &[0, 0, 1, 1]);
        check(2, &[1, 1, 1, 9], &[0, 0, 0, 1]);
        check(3, &[1, 1], &[0, 2]);
        check(2, &[0, 0], &[0, 0]);
    }
}
