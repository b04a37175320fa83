//! The fixed cut of the samples, and the fixed tree in which its parts are combined.

use std::ops::Range;

/// Parts that samples are cut into.
pub const CELLS: usize = 64;

/// Which sequences each cell holds: consecutive, as even as possible; empty cells where there are fewer sequences.
pub fn cells(sequences: usize) -> impl Iterator<Item = Range<usize>> {
    (0..CELLS).map(move |cell| cell * sequences / CELLS..(cell + 1) * sequences / CELLS)
}

/// Numbers of cells of which so many go side by side, in order.
pub fn side_by_side(cells: usize, abreast: usize) -> impl Iterator<Item = Range<usize>> {
    let firsts = (0..cells).step_by(abreast);
    firsts.map(move |first| first..(first + abreast).min(cells))
}

/// Something that is summed over cells.
pub trait Merge {
    /// Adds what later cells found.
    fn merge(&mut self, later: Self);
}

/// Combines cells, given in order, as leaves of a balanced binary tree; holds one sum per level.
#[derive(Debug)]
pub struct Tree<T> {
    /// Sums with their numbers of leaves, a power of two each, the larger first.
    pending: Vec<(usize, T)>,
}

impl<T> Default for Tree<T> {
    fn default() -> Self {
        Self {
            pending: Vec::new(),
        }
    }
}

impl<T: Merge> Tree<T> {
    /// Adds the next leaf.
    pub fn push(&mut self, leaf: T) {
        let mut grown = (1, leaf);
        while let Some((leaves, mut earlier)) =
            self.pending.pop_if(|(leaves, _)| *leaves == grown.0)
        {
            earlier.merge(grown.1);
            grown = (leaves * 2, earlier);
        }
        self.pending.push(grown);
    }

    /// The sum of all leaves; `None` without any.
    pub fn finish(mut self) -> Option<T> {
        let (_, mut sum) = self.pending.pop()?;
        while let Some((_, mut earlier)) = self.pending.pop() {
            earlier.merge(sum);
            sum = earlier;
        }
        Some(sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug)]
    struct Shape(String);

    impl Merge for Shape {
        fn merge(&mut self, later: Self) {
            self.0 = format!("({}{})", self.0, later.0);
        }
    }

    #[test]
    fn the_tree_is_balanced_and_in_order() {
        let shape = |leaves: &str| {
            let mut tree = Tree::default();
            leaves
                .chars()
                .for_each(|leaf| tree.push(Shape(leaf.to_string())));
            tree.finish().map(|shape| shape.0)
        };
        assert_eq!(shape("abcdefgh").unwrap(), "(((ab)(cd))((ef)(gh)))");
        assert_eq!(shape("abc").unwrap(), "((ab)c)");
        assert!(shape("").is_none());
    }

    #[test]
    fn every_sequence_is_in_one_cell() {
        for sequences in [0, 1, 63, 64, 130] {
            let cells: Vec<_> = cells(sequences).collect();
            assert_eq!(cells.len(), CELLS);
            assert!(cells.windows(2).all(|pair| pair[0].end == pair[1].start));
            assert_eq!((cells[0].start, cells[CELLS - 1].end), (0, sequences));
        }
    }
}
