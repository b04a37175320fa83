//! Weights on a device: they lie there while nothing else needs the memory, or are sent row by row, matrix by matrix when they
//! are multiplied.
//!
//! Enters: weights as the host reads them. Leaves: bytes on the device, of whole matrices or of the rows that are asked for.
//! Knows no products.

use std::ops::Range;
use std::sync::Arc;

use nemoconv_device::{Bytes, Spare};

use super::{OnDevice, SENT_BYTES, TILES, or_no_room, packed};
use crate::artifact::StoredTensor;
use crate::backend::cpu::CpuWeight;
use crate::error::Result;

/// The part of memory that weights leave to activations.
const RESERVE: u64 = 4;
/// Where matrices of a stack begin: multiples of this.
const MATRIX_ALIGNMENT: u64 = 256;

/// A weight for a device.
pub struct DeviceWeight {
    pub(super) host: CpuWeight,
    pub(super) resident: Resident,
}

/// What of a weight lies on the device.
pub(super) enum Resident {
    /// Nothing: rows, of a packed checkpoint a matrix, are sent when they are multiplied.
    No,
    /// All matrices in the stored type.
    Rows(Spare<Bytes>),
    /// As a packed checkpoint has it, by matrix.
    Packed(Spare<Vec<packed::Matrix>>),
}

/// Rows of a matrix as they are stored, on the device.
pub(super) struct StoredRows {
    pub(super) bytes: Arc<Bytes>,
    /// Where the first one begins.
    pub(super) first: u64,
}

impl DeviceWeight {
    pub(super) fn tensor(&self) -> &StoredTensor {
        self.host.tensor()
    }

    /// All rows, if they lie on the device; there they stay while this is held.
    pub(super) fn rows(&self) -> Option<Arc<Bytes>> {
        match &self.resident {
            Resident::Rows(rows) => rows.get(),
            _ => None,
        }
    }

    /// The same of packed matrices.
    pub(super) fn packed(&self) -> Option<Arc<Vec<packed::Matrix>>> {
        match &self.resident {
            Resident::Packed(matrices) => matrices.get(),
            _ => None,
        }
    }
}

/// Bytes from one matrix of a stack to the next.
fn matrix_stride(tensor: &StoredTensor) -> u64 {
    (tensor.row_bytes() as u64 * tensor.rows as u64).next_multiple_of(MATRIX_ALIGNMENT)
}

impl OnDevice {
    /// Whether so many more bytes leave enough to activations.
    pub(super) fn has_room(&self, bytes: u64) -> bool {
        let (free, total) = (self.device().free_bytes(), self.device().total_bytes());
        bytes + total / RESERVE <= free
    }

    /// Sends a weight, unless it would not fit.
    pub(super) fn make_resident(&self, weight: &CpuWeight) -> Result<Resident> {
        if weight.tensor().is_packed {
            let matrices = self.send_packed(weight);
            if let Some(matrices) = or_no_room(matrices)?.flatten() {
                return Ok(Resident::Packed(self.device().spare(matrices)));
            }
        }
        let tensor = weight.tensor();
        let bytes = matrix_stride(tensor) * tensor.matrices as u64;
        let limits = self.device().description().limits;
        if !self.has_room(bytes) || bytes > limits.allocation_bytes {
            return Ok(Resident::No);
        }
        let rows = or_no_room(self.send_rows(weight, bytes))?;
        let spare = |rows| Resident::Rows(self.device().spare(rows));
        Ok(rows.map_or(Resident::No, spare))
    }

    /// Sends a packed weight as its checkpoint has it; `None` where a matrix is something else, or there is no room.
    fn send_packed(&self, weight: &CpuWeight) -> Result<Option<Vec<packed::Matrix>>> {
        let matrices = 0..weight.tensor().matrices;
        let send = |matrix| self.send_matrix(weight, matrix, |bytes| self.has_room(bytes));
        matrices.map(send).collect()
    }

    /// A packed matrix for one product, where the whole weight has no place.
    pub(super) fn send_for_now(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
    ) -> Result<Option<packed::Matrix>> {
        if !weight.tensor().is_packed || weight.rows().is_some() {
            return Ok(None);
        }
        let fits = |bytes| bytes <= self.device().free_bytes() / TILES;
        Ok(or_no_room(self.send_matrix(&weight.host, matrix, fits))?.flatten())
    }

    fn send_matrix(
        &self,
        weight: &CpuWeight,
        matrix: usize,
        fits: impl Fn(u64) -> bool,
    ) -> Result<Option<packed::Matrix>> {
        let Some(stored) = weight.packed(matrix)? else {
            return Ok(None);
        };
        let limits = self.device().description().limits;
        if !fits(stored.linear.bytes() as u64)
            || packed::bytes_in_a_view(&stored.linear) > limits.view_bytes
        {
            return Ok(None);
        }
        let columns = weight.tensor().columns;
        packed::Matrix::send(self.device(), &stored, columns).map(Some)
    }

    fn send_rows(&self, weight: &CpuWeight, bytes: u64) -> Result<Bytes> {
        let tensor = weight.tensor();
        let mut resident = self.device().reserve_bytes(bytes)?;
        // Whole words: every fourth row ends with one.
        let tile = (SENT_BYTES / tensor.row_bytes()).next_multiple_of(4).max(4);
        let mut buffer = Vec::new();
        for matrix in 0..tensor.matrices {
            for first in (0..tensor.rows).step_by(tile) {
                let count = tile.min(tensor.rows - first);
                let rows = weight.rows(matrix, first, count, &mut buffer)?;
                let at =
                    matrix as u64 * matrix_stride(tensor) + (first * tensor.row_bytes()) as u64;
                self.device().write_bytes(&mut resident, at, rows)?;
            }
        }
        Ok(resident)
    }

    /// Rows of a matrix as they are stored: where they lie on the device, sent if they are not there.
    pub(super) fn stored(
        &self,
        weight: &DeviceWeight,
        matrix: usize,
        rows: Range<usize>,
    ) -> Result<StoredRows> {
        let tensor = weight.tensor();
        if let Some(bytes) = weight.rows() {
            let row = (rows.start * tensor.row_bytes()) as u64;
            let first = matrix as u64 * matrix_stride(tensor) + row;
            return Ok(StoredRows { bytes, first });
        }
        let mut buffer = Vec::new();
        let stored = weight
            .host
            .rows(matrix, rows.start, rows.len(), &mut buffer)?;
        let bytes = Arc::new(self.device().upload_bytes(stored)?);
        Ok(StoredRows { bytes, first: 0 })
    }
}
