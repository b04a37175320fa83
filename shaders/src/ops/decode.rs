//! Stored weights as values.

use nemoconv_formats::GgmlType;

use super::{groups_of, word};
use crate::array::{Array, Bytes, Device};
use crate::error::Result;
use crate::kernels;

/// Whether a type can be decoded on a device.
pub fn can_dequantize(ty: GgmlType) -> bool {
    kernels::dequantize(ty).is_some()
}

impl Device {
    /// Decodes `count` values, whole blocks of type `ty`, that begin at `first_byte`, to the first values of `out`.
    ///
    /// # Errors
    /// Device lost; the bytes are more than a view may span.
    ///
    /// # Panics
    /// The type cannot be decoded (see [`can_dequantize`]), or the blocks are not all there.
    pub fn dequantize(
        &self,
        ty: GgmlType,
        bytes: &Bytes,
        first_byte: u64,
        count: usize,
        out: &mut Array,
    ) -> Result<()> {
        let kernel = kernels::dequantize(ty).unwrap_or_else(|| panic!("{ty} cannot be decoded"));
        let stored = (count / ty.block_elements() * ty.block_bytes()) as u64;
        assert!(count.is_multiple_of(ty.block_elements()) && count <= out.len());
        assert!(
            first_byte + stored <= bytes.len(),
            "blocks end beyond their bytes"
        );
        if count == 0 {
            return Ok(());
        }
        let (view, first) = bytes.part(first_byte..first_byte + stored);
        let views = [view, out.part(0..count).0];
        let groups = groups_of(count, kernel.threads);
        self.launch(kernel, groups, &views, &[word(count), word(first as usize)])
    }
}
