//! Scales of FP8 weights: which scale belongs to which element.

/// How a scale tensor covers a weight `[out_features, in_features]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Grid {
    /// Scales per row of the scale tensor.
    columns: usize,
    /// Weight rows that share a scale.
    block_rows: usize,
    /// Weight columns that share a scale.
    block_columns: usize,
}

/// Block edge of block-scaled checkpoints (`weight_block_size` is 128 x 128 in the field).
const BLOCK: usize = 128;

impl Grid {
    /// One scale (`[]`, `[1]`, `[1, 1]`), one per row (`[rows]`, `[rows, 1]`), or one per 128 x 128 block.
    pub fn new(weight: &[usize], scale: &[usize]) -> Option<Self> {
        let &[rows, columns] = weight else {
            return None;
        };
        let blocks = [rows.div_ceil(BLOCK), columns.div_ceil(BLOCK)];
        match *scale {
            [] | [1] | [1, 1] => Some(Self {
                columns: 1,
                block_rows: rows.max(1),
                block_columns: columns,
            }),
            [n] | [n, 1] if n == rows => Some(Self {
                columns: 1,
                block_rows: 1,
                block_columns: columns,
            }),
            [r, c] if [r, c] == blocks => Some(Self {
                columns: c,
                block_rows: BLOCK,
                block_columns: BLOCK,
            }),
            _ => None,
        }
    }

    /// Multiplies `values`, the weight's row number `row`, by its scales.
    pub fn apply(&self, row: usize, scales: &[f32], values: &mut [f32]) {
        let first = row / self.block_rows * self.columns;
        for (index, block) in values.chunks_mut(self.block_columns.max(1)).enumerate() {
            let scale = scales[first + index];
            block.iter_mut().for_each(|value| *value *= scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(weight: [usize; 2], scale: &[usize], row: usize, expected: &[f32]) {
        let count = scale.iter().product();
        let scales: Vec<f32> = (1..=count).map(|i| i as f32).collect();
        let mut values = vec![1.0; weight[1]];
        Grid::new(&weight, scale)
            .unwrap()
            .apply(row, &scales, &mut values);
        let edges = [values[0], values[weight[1] - 1]];
        assert_eq!(edges, expected);
    }

    #[test]
    fn every_layout_finds_its_scale() {
        check([3, 4], &[], 2, &[1.0, 1.0]);
        check([3, 4], &[3, 1], 2, &[3.0, 3.0]);
        check([3, 4], &[3], 1, &[2.0, 2.0]);
        check([256, 300], &[2, 3], 130, &[4.0, 6.0]);
        assert_eq!(Grid::new(&[3, 4], &[2, 2]), None);
    }
}
