//! Scales and codes of packed blocks: what can be judged without a reference.
//!
//! Enters: rows as stored. Leaves: counts that add up in any order.

use half::f16;
use nemoconv_formats::GgmlType;
use nemoconv_formats::block::*;

/// Scales and codes of a tensor.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct BlockFacts {
    /// Blocks.
    pub blocks: u64,
    /// Scales that are NaN or infinite.
    pub nonfinite: u64,
    /// Index of the first block with such a scale.
    pub first_nonfinite: Option<u64>,
    /// Scales that are 0.
    pub zero: u64,
    /// Scales among the subnormal numbers of F16, which keep fewer digits.
    pub subnormal: u64,
    /// Largest |scale|.
    pub largest: f32,
    /// Codes.
    pub codes: u64,
    /// Codes at either end of their range.
    pub at_ends: u64,
}

impl BlockFacts {
    /// The facts of whole blocks; types without scales have none.
    pub fn of(ty: GgmlType, bytes: &[u8]) -> Self {
        let mut facts = Self::default();
        macro_rules! walk {
            ($block:ident, |$each:ident| $scales:expr, $codes:expr) => {
                for (index, $each) in bytemuck::cast_slice::<u8, $block>(bytes).iter().enumerate() {
                    facts.block(index as u64, &$scales, $codes)
                }
            };
        }
        let f16s = |scale: f16| [scale.to_f32()];
        match ty {
            GgmlType::Q4_0 => {
                walk!(BlockQ4_0, |b| f16s(b.parts().0), ends(&b.parts().1, 0, 15))
            }
            GgmlType::Q5_0 => {
                walk!(BlockQ5_0, |b| f16s(b.parts().0), ends(&b.parts().1, 0, 31))
            }
            GgmlType::Q8_0 => walk!(
                BlockQ8_0,
                |b| f16s(b.parts().0),
                ends(&b.parts().1, -127, 127)
            ),
            GgmlType::IQ4_NL => {
                walk!(BlockIQ4NL, |b| f16s(b.parts().0), ends(&b.parts().1, 0, 15))
            }
            GgmlType::Q4_1 => {
                walk!(
                    BlockQ4_1,
                    |b| two(b.parts().0, b.parts().1),
                    ends(&b.parts().2, 0, 15)
                )
            }
            GgmlType::Q5_1 => {
                walk!(
                    BlockQ5_1,
                    |b| two(b.parts().0, b.parts().1),
                    ends(&b.parts().2, 0, 31)
                )
            }
            GgmlType::Q2_K => {
                walk!(
                    BlockQ2K,
                    |b| two(b.parts().0, b.parts().1),
                    ends(&b.parts().4, 0, 3)
                )
            }
            GgmlType::Q4_K => {
                walk!(
                    BlockQ4K,
                    |b| two(b.parts().0, b.parts().1),
                    ends(&b.parts().4, 0, 15)
                )
            }
            GgmlType::Q5_K => {
                walk!(
                    BlockQ5K,
                    |b| two(b.parts().0, b.parts().1),
                    ends(&b.parts().4, 0, 31)
                )
            }
            GgmlType::Q3_K => walk!(BlockQ3K, |b| f16s(b.parts().0), ends(&b.parts().2, 0, 7)),
            GgmlType::Q6_K => walk!(BlockQ6K, |b| f16s(b.parts().0), ends(&b.parts().2, 0, 63)),
            GgmlType::IQ4_XS => {
                walk!(BlockIQ4XS, |b| f16s(b.parts().0), ends(&b.parts().2, 0, 15))
            }
            GgmlType::MXFP4 => {
                walk!(
                    BlockMXFP4,
                    |b| [mxfp4_scale(b.parts().0)],
                    fp4_ends(&b.parts().1)
                )
            }
            GgmlType::NVFP4 => {
                walk!(
                    BlockNVFP4,
                    |b| b.parts().0.map(nvfp4_scale),
                    fp4_ends(&b.parts().1)
                )
            }
            // One or two bits: every code is at an end.
            GgmlType::TQ1_0 => walk!(BlockTQ1_0, |b| f16s(b.parts().0), (0, 0)),
            GgmlType::TQ2_0 => walk!(BlockTQ2_0, |b| f16s(b.parts().0), (0, 0)),
            GgmlType::Q1_0 => walk!(BlockQ1_0, |b| f16s(b.parts().0), (0, 0)),
            GgmlType::Q2_0 => walk!(BlockQ2_0, |b| f16s(b.parts().0), (0, 0)),
            _ => {}
        }
        facts
    }

    fn block(&mut self, index: u64, scales: &[f32], (at_ends, codes): (u64, u64)) {
        self.blocks += 1;
        self.codes += codes;
        self.at_ends += at_ends;
        for scale in scales {
            if !scale.is_finite() {
                self.nonfinite += 1;
                self.first_nonfinite.get_or_insert(index);
                continue;
            }
            self.zero += u64::from(*scale == 0.0);
            let normal = f16::MIN_POSITIVE.to_f32();
            self.subnormal += u64::from(*scale != 0.0 && scale.abs() < normal);
            self.largest = self.largest.max(scale.abs());
        }
    }

    /// Adds those of later blocks, of which `before` lie between the two beginnings.
    pub fn merge(&mut self, other: &Self, before: u64) {
        self.blocks += other.blocks;
        self.nonfinite += other.nonfinite;
        let first = other.first_nonfinite.map(|index| index + before);
        self.first_nonfinite = self.first_nonfinite.or(first);
        self.zero += other.zero;
        self.subnormal += other.subnormal;
        self.largest = self.largest.max(other.largest);
        self.codes += other.codes;
        self.at_ends += other.at_ends;
    }
}

fn two(d: f16, m: f16) -> [f32; 2] {
    [d.to_f32(), m.to_f32()]
}

/// How many codes are at either end or beyond, and how many there are. Runs of one code are no information: zeros.
fn ends<C: Copy + PartialOrd, const N: usize>(codes: &[C; N], low: C, high: C) -> (u64, u64) {
    count_ends(codes, |code| code <= low || code >= high)
}

/// The same for four-bit floats, whose sign is the upper bit: 6 and -6.
fn fp4_ends<const N: usize>(codes: &[u8; N]) -> (u64, u64) {
    count_ends(codes, |code| code & 7 == 7)
}

fn count_ends<C: Copy + PartialEq>(codes: &[C], at_end: impl Fn(C) -> bool) -> (u64, u64) {
    const RUN: usize = 16;
    let runs = codes.chunks(RUN);
    let telling = runs.filter(|run| run.iter().any(|code| *code != run[0]));
    telling.fold((0, 0), |(at_ends, all), run| {
        let more = run.iter().filter(|code| at_end(**code)).count();
        (at_ends + more as u64, all + run.len() as u64)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scales_and_codes_are_counted() {
        let block = |d: f32, code: i8| {
            let mut codes = [code; 32];
            codes[0] = 1;
            BlockQ8_0::pack(f16::from_f32(d), &codes)
        };
        let blocks = [
            block(0.5, 3),
            block(0.0, 127),
            block(f32::NAN, -128),
            block(1e-6, 0),
        ];
        let facts = BlockFacts::of(GgmlType::Q8_0, bytemuck::cast_slice(&blocks));
        let expected = BlockFacts {
            blocks: 4,
            nonfinite: 1,
            first_nonfinite: Some(2),
            zero: 1,
            subnormal: 1,
            largest: 0.5,
            // Half a block of one code tells nothing.
            codes: 64,
            at_ends: 30,
        };
        assert_eq!(facts, expected);
        let mut twice = facts;
        twice.merge(&facts, 4);
        assert_eq!((twice.nonfinite, twice.first_nonfinite), (2, Some(2)));
    }
}
