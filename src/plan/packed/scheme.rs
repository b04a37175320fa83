//! Named schemes of packed folders, and what each makes of a linear.
//!
//! Enters: a name, the row lengths of matrices that must be alike. Leaves: tensors to write ([`Scheme`]) and the grid of
//! their codes ([`IntegerGrid`]).

use std::fmt;
use std::str::FromStr;

use nemoconv_formats::packed::{GptqZeros, Group, Inputs, Layout, Scheme, Width};

use crate::quantize::integer::{IntegerGrid, ScaleFloat};

/// Group sizes that every reader has kernels for, the best first.
pub const GROUP_SIZES: [usize; 3] = [128, 64, 32];

/// A scheme by the name that users give it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum NamedScheme {
    /// 4-bit weights in groups.
    W4A16,
    /// 4-bit weights in groups with zero points.
    W4A16Asym,
    /// 8-bit weights, a scale per row.
    W8A16,
    /// 8-bit weights, a scale per row; 8-bit inputs, a scale per token.
    W8A8,
    /// 8-bit weights, a scale per row; 8-bit inputs with a fixed scale.
    W8A8Static,
    /// 4-bit weights in groups; 8-bit inputs, a scale per token.
    W4A8,
    /// GPTQ's layout, 4 bits.
    Gptq4,
    /// GPTQ's layout, 8 bits.
    Gptq8,
}

impl NamedScheme {
    /// All of them.
    pub const ALL: [Self; 8] = [
        Self::W4A16,
        Self::W4A16Asym,
        Self::W8A16,
        Self::W8A8,
        Self::W8A8Static,
        Self::W4A8,
        Self::Gptq4,
        Self::Gptq8,
    ];

    /// As it is written in flags, recipes and file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::W4A16 => "w4a16",
            Self::W4A16Asym => "w4a16-asym",
            Self::W8A16 => "w8a16",
            Self::W8A8 => "w8a8",
            Self::W8A8Static => "w8a8-static",
            Self::W4A8 => "w4a8",
            Self::Gptq4 => "gptq-4",
            Self::Gptq8 => "gptq-8",
        }
    }

    /// Whether scales are per group of columns rather than per row.
    pub fn has_groups(self) -> bool {
        !matches!(self, Self::W8A16 | Self::W8A8 | Self::W8A8Static)
    }

    /// Whether it is GPTQ's layout, which a folder has throughout or not at all.
    pub fn is_gptq(self) -> bool {
        matches!(self, Self::Gptq4 | Self::Gptq8)
    }

    /// The scheme with groups of `group_size`, which schemes with a scale per row ignore.
    pub fn with_groups(self, group_size: usize) -> LinearScheme {
        let width = match self {
            Self::W4A16 | Self::W4A16Asym | Self::W4A8 | Self::Gptq4 => Width::Four,
            Self::W8A16 | Self::W8A8 | Self::W8A8Static | Self::Gptq8 => Width::Eight,
        };
        let group = match self.has_groups() {
            true => Group::Columns(group_size),
            false => Group::Row,
        };
        let symmetric = self != Self::W4A16Asym;
        let layout = match self {
            Self::W4A16 | Self::W4A16Asym | Self::W8A16 => Layout::PackQuantized {
                width,
                group,
                symmetric,
            },
            Self::W8A8 | Self::W8A8Static | Self::W4A8 => Layout::IntQuantized {
                bits: width.bits(),
                group,
                symmetric,
            },
            Self::Gptq4 | Self::Gptq8 => Layout::Gptq {
                width,
                group,
                symmetric,
                zeros: GptqZeros::MinusOne,
            },
        };
        let inputs = match self {
            Self::W8A8 | Self::W4A8 => Inputs::Int8PerToken,
            Self::W8A8Static => Inputs::Int8PerTensor,
            _ => Inputs::AsTheyAre,
        };
        LinearScheme {
            named: self,
            scheme: Scheme { layout, inputs },
            grid: IntegerGrid {
                width,
                group_size: self.has_groups().then_some(group_size),
                has_zero_point: !symmetric,
                scale: match self.is_gptq() {
                    true => ScaleFloat::F16,
                    false => ScaleFloat::Bf16,
                },
            },
        }
    }
}

impl fmt::Display for NamedScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for NamedScheme {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|scheme| scheme.name() == text);
        found.ok_or_else(|| {
            let known = Self::ALL.map(Self::name).join(", ");
            format!("scheme must be one of {known}; found `{text}`")
        })
    }
}

/// What becomes of one linear.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinearScheme {
    /// By name.
    pub named: NamedScheme,
    /// Its tensors, and what becomes of its inputs.
    pub scheme: Scheme,
    /// Its codes.
    pub grid: IntegerGrid,
}

/// The largest known group size that divides all of these row lengths.
pub fn largest_group(columns: impl Iterator<Item = usize> + Clone) -> Option<usize> {
    let divides = |size: &usize| columns.clone().all(|columns| columns.is_multiple_of(*size));
    GROUP_SIZES.into_iter().find(divides)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for scheme in NamedScheme::ALL {
            assert_eq!(scheme.name().parse(), Ok(scheme));
        }
        assert!(
            "w3a16"
                .parse::<NamedScheme>()
                .unwrap_err()
                .contains("w4a16-asym")
        );
    }

    #[test]
    fn groups_are_the_largest_that_divide() {
        let check = |columns: &[usize], expected| {
            assert_eq!(
                largest_group(columns.iter().copied()),
                expected,
                "{columns:?}"
            );
        };
        check(&[2688], Some(128));
        check(&[3136], Some(64));
        check(&[15680], Some(64));
        check(&[2688, 1856], Some(64));
        check(&[32 * 7], Some(32));
        check(&[100], None);
    }
}
