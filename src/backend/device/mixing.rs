//! Matrices that are mixed on a device, part by part, beside the rotations that mix them.
//!
//! Enters: f32 values and f64 matrices. Leaves: f64 values, those of the CPU to the bit. Knows no weights.

use std::borrow::Cow;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nemoconv_device::{Device, Doubles};

use super::{OpenDevice, TILES, or_no_room};
use crate::error::Result;
use crate::rewrite::{MixedPart, Mixer, Mixing, SquareMatrix};

/// Values that are mixed at a time, where runs are not longer.
const MIXED_VALUES: usize = 1 << 24;
/// Bytes of a value on its way: in f32, and in f64 before, between and after both mixes.
const MIXED_BYTES: u64 = 4 + 3 * 8;

/// Square matrices that lie on the device while somebody has them.
#[derive(Default)]
pub struct HeldMatrices(Mutex<Vec<Held>>);

struct Held {
    matrix: Weak<Vec<f64>>,
    values: Arc<Doubles>,
}

impl HeldMatrices {
    /// The matrix on the device, sent once.
    fn of(&self, device: &Device, matrix: &SquareMatrix) -> Result<Arc<Doubles>> {
        // Whatever another thread did, what is listed was sent.
        let mut held = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        held.retain(|held| held.matrix.strong_count() > 0);
        let wanted = Arc::downgrade(matrix.shared());
        if let Some(found) = held.iter().find(|held| held.matrix.ptr_eq(&wanted)) {
            return Ok(Arc::clone(&found.values));
        }
        let values = Arc::new(device.upload_doubles(matrix.values())?);
        held.push(Held {
            matrix: wanted,
            values: Arc::clone(&values),
        });
        Ok(values)
    }
}

impl OpenDevice {
    /// Whether the device can take such a matrix: it has f64, and the matrix fits a view.
    fn takes(&self, matrix: Option<&SquareMatrix>) -> bool {
        let bytes = matrix.map_or(0, |matrix| 8 * matrix.values().len() as u64);
        self.device.has_f64() && bytes <= self.device.description().limits.view_bytes
    }

    /// Values of a part that has room.
    fn most_values(&self) -> usize {
        let room = self.device.free_bytes() / TILES / MIXED_BYTES;
        room.min(self.device.description().limits.view_bytes / 8) as usize
    }

    /// Rows and columns of a part; nothing where not even one run of each has room.
    fn part_shape(&self, mixing: &Mixing) -> Option<[usize; 2]> {
        let ([_, columns], [row_run, column_run]) = (mixing.shape(), mixing.runs());
        let values = self
            .most_values()
            .min(MIXED_VALUES.max(row_run * column_run));
        let rows = values / columns.max(1) / row_run * row_run;
        if rows > 0 {
            return Some([rows, columns]);
        }
        let columns = values / row_run / column_run * column_run;
        (columns > 0).then_some([row_run, columns])
    }

    /// `a [_, size]` times `b`, as many rows at a time as a part has.
    fn product_parts(&self, a: &[f64], b: &SquareMatrix) -> Result<Vec<f64>> {
        let device = &self.device;
        let q = self.matrices.of(device, b)?;
        let ones = device.upload_doubles(&vec![1.0; b.size()])?;
        let rows = (self.most_values().min(MIXED_VALUES) / b.size().max(1)).max(1);
        let mut out = Vec::with_capacity(a.len());
        for part in a.chunks((rows * b.size()).max(1)) {
            let part = device.upload_doubles(part)?;
            let made = device.mix_columns(&part, &q, &ones, &ones)?;
            out.extend(device.download_doubles(&made)?);
        }
        Ok(out)
    }

    /// Mixes all parts; `false` where they have no room.
    fn mix_parts(&self, mixing: &Mixing, take: &mut dyn FnMut(MixedPart)) -> Result<bool> {
        let Some([part_rows, part_columns]) = self.part_shape(mixing) else {
            return Ok(false);
        };
        let [rows, columns] = mixing.shape();
        for row in (0..rows).step_by(part_rows) {
            for column in (0..columns).step_by(part_columns) {
                let mut part = MixedPart {
                    rows: row..rows.min(row + part_rows),
                    columns: column..columns.min(column + part_columns),
                    values: Vec::new(),
                };
                part.values = self.mix_part(mixing, &part)?;
                take(part);
            }
        }
        Ok(true)
    }

    fn mix_part(&self, mixing: &Mixing, part: &MixedPart) -> Result<Vec<f64>> {
        let device = &self.device;
        let [before, after] = [&mixing.columns_before, &mixing.columns_after]
            .map(|factors| device.upload_doubles(&factors[part.columns.clone()]));
        let (before, after) = (before?, after?);
        let x = device.upload(&values_of(mixing, part))?;
        let mut made = match mixing.columns {
            None => device.widen(&x, &before, &after)?,
            Some(matrix) => {
                let ones = device.upload_doubles(&vec![1.0; part.columns.len()])?;
                let x = device.widen(&x, &ones, &ones)?;
                let q = self.matrices.of(device, matrix)?;
                device.mix_columns(&x, &q, &before, &after)?
            }
        };
        if let Some((matrix, before)) = &mixing.rows {
            let q = self.matrices.of(device, matrix)?;
            let before = device.upload_doubles(&before[part.rows.clone()])?;
            made = device.mix_rows(&made, &q, &before)?;
        }
        Ok(device.download_doubles(&made)?)
    }

    /// Counts what the device took, or the CPU in its place.
    fn tallied<T>(
        &self,
        operation: &'static str,
        made: Result<T>,
        is_made: fn(&T) -> bool,
    ) -> Result<T> {
        let made = made?;
        match is_made(&made) {
            true => self.tally.device(operation),
            false => self.tally.host(operation),
        }
        Ok(made)
    }
}

/// The part as it is stored.
fn values_of<'a>(mixing: &Mixing<'a>, part: &MixedPart) -> Cow<'a, [f32]> {
    let [_, width] = mixing.shape();
    let rows = &mixing.values[part.rows.start * width..part.rows.end * width];
    if part.columns.len() == width {
        return rows.into();
    }
    let rows = rows.chunks_exact(width);
    let columns = rows.flat_map(|row| &row[part.columns.clone()]);
    columns.copied().collect()
}

impl Mixer for OpenDevice {
    fn mix(&self, mixing: &Mixing, take: &mut dyn FnMut(MixedPart)) -> Result<bool> {
        let rows = mixing.rows.as_ref().map(|(matrix, _)| *matrix);
        let made = match self.takes(mixing.columns) && self.takes(rows) {
            true => or_no_room(self.mix_parts(mixing, take)).map(|made| made == Some(true)),
            false => Ok(false),
        };
        self.tallied("mix", made, |made| *made)
    }

    fn product(&self, a: &[f64], b: &SquareMatrix) -> Result<Option<Vec<f64>>> {
        let made = match self.takes(Some(b)) {
            true => or_no_room(self.product_parts(a, b)),
            false => Ok(None),
        };
        self.tallied("exact_product", made, Option::is_some)
    }
}
