//! The phases: type schemes by purpose rather than by llama.cpp's names.
//!
//! Enters: a tensor's name and row length. Leaves: its type. A GGUF file fixes weights only; the 8-bit activations are the
//! runtime's doing, per 32 values beside Q8_0 and IQ4_NL, per 256 beside Q4_K.

use std::fmt;

use nemoconv_formats::GgmlType;

/// Which matrices get 8 and which 4 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Phase {
    /// Phase 1: 8 bits everywhere.
    W8A8,
    /// Phase 2: 4 bits everywhere; head and embedding 6 to 8.
    W4A8,
    /// Phase 3: 4 bits in Mamba-2 mixers, 8 everywhere else.
    Mixed,
}

impl Phase {
    /// All of them, in order.
    pub const ALL: [Self; 3] = [Self::W8A8, Self::W4A8, Self::Mixed];

    /// The phase of a number, counted from 1.
    pub fn of_number(number: u64) -> Option<Self> {
        let index = usize::try_from(number).ok()?.checked_sub(1)?;
        Self::ALL.get(index).copied()
    }

    /// Counted from 1.
    pub fn number(self) -> u8 {
        self as u8 + 1
    }

    /// As it stands in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::W8A8 => "w8a8",
            Self::W4A8 => "w4a8",
            Self::Mixed => "w4a8-mixed",
        }
    }

    /// The type of a matrix. Whether Q8_0 and IQ4_NL fit its rows is not asked.
    pub fn type_of(self, name: &str, columns: usize) -> GgmlType {
        let fits_super_blocks = columns.is_multiple_of(GgmlType::Q4_K.block_elements());
        let four_bits = match fits_super_blocks {
            true => GgmlType::Q4_K,
            false => GgmlType::IQ4_NL,
        };
        match (self, name) {
            (Self::W8A8, _) | (_, "token_embd.weight") => GgmlType::Q8_0,
            (Self::W4A8, "output.weight") if fits_super_blocks => GgmlType::Q6_K,
            (_, "output.weight") => GgmlType::Q8_0,
            (Self::W4A8, _) => four_bits,
            (Self::Mixed, name) if name.contains(".ssm_") => four_bits,
            (Self::Mixed, _) => GgmlType::Q8_0,
        }
    }
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_are_counted_from_one() {
        assert_eq!(Phase::of_number(3), Some(Phase::Mixed));
        assert_eq!((Phase::of_number(0), Phase::of_number(4)), (None, None));
        assert!(
            Phase::ALL
                .iter()
                .all(|phase| Phase::of_number(phase.number().into()) == Some(*phase))
        );
    }

    #[test]
    fn four_bits_go_where_the_phase_says_and_rows_decide_which() {
        use GgmlType::{IQ4_NL, Q4_K, Q6_K, Q8_0};
        let check = |name, columns, expected: [GgmlType; 3]| {
            assert_eq!(
                Phase::ALL.map(|phase| phase.type_of(name, columns)),
                expected,
                "{name}"
            );
        };
        check("blk.0.ssm_in.weight", 4096, [Q8_0, Q4_K, Q4_K]);
        check("blk.0.ssm_in.weight", 2688, [Q8_0, IQ4_NL, IQ4_NL]);
        check("blk.1.ffn_up_exps.weight", 2688, [Q8_0, IQ4_NL, Q8_0]);
        check("blk.3.attn_q.weight", 4096, [Q8_0, Q4_K, Q8_0]);
        check("token_embd.weight", 4096, [Q8_0, Q8_0, Q8_0]);
        check("output.weight", 4096, [Q8_0, Q6_K, Q8_0]);
        check("output.weight", 2688, [Q8_0, Q8_0, Q8_0]);
    }
}
