//! How many parameters a model has, and the label that says so.

/// Parameters by kind. Experts are counted once per tensor stack, not once per expert.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ParameterCounts {
    /// All elements of all tensors.
    pub total: u64,
    /// Elements outside expert stacks.
    pub shared: u64,
    /// Elements of one expert, summed over all stacks.
    pub expert: u64,
    /// Experts per stack, on average and rounded down; 0 without experts.
    pub expert_count: u64,
}

impl ParameterCounts {
    /// Counts `tensors`: GGUF name and dimensions, fastest first (experts are the third).
    ///
    /// Source: llama.cpp `gguf-py/gguf/gguf_writer.py` (`get_total_parameter_count`): a stack is a
    /// name containing `_exps.` with at least three dimensions.
    pub fn of<'a>(tensors: impl IntoIterator<Item = (&'a str, &'a [u64])>) -> Self {
        let mut counts = Self::default();
        let (mut stacks, mut experts) = (0_u64, 0_u64);
        for (name, dims) in tensors {
            let size = dims
                .iter()
                .fold(1_u64, |size, dim| size.saturating_mul(*dim));
            counts.total = counts.total.saturating_add(size);
            match dims.get(2) {
                Some(&count) if name.contains("_exps.") && count > 0 => {
                    counts.expert = counts.expert.saturating_add(size / count);
                    experts = experts.saturating_add(count);
                    stacks += 1;
                }
                _ => counts.shared = counts.shared.saturating_add(size),
            }
        }
        counts.expert_count = experts.checked_div(stacks).unwrap_or(0);
        counts
    }

    /// `8.1B`, or `128x2.4B` with experts: then the size is that of the shared part and one expert.
    ///
    /// Source: llama.cpp `gguf-py/gguf/utility.py` (`size_label`).
    pub fn size_label(&self) -> String {
        if self.expert_count > 0 {
            let one = rounded(self.shared.saturating_add(self.expert));
            return format!("{}x{one}", self.expert_count);
        }
        rounded(self.total)
    }
}

/// At least two digits, counting those before the point.
fn rounded(count: u64) -> String {
    let count = count as f64;
    let (scaled, unit) = match count {
        c if c > 1e12 => (c * 1e-12, 'T'),
        c if c > 1e9 => (c * 1e-9, 'B'),
        c if c > 1e6 => (c * 1e-6, 'M'),
        c => (c * 1e-3, 'K'),
    };
    let whole = scaled.round_ties_even();
    let digits = if whole == 0.0 {
        0
    } else {
        format!("{whole:.0}").len()
    };
    format!("{scaled:.*}{unit}", 2_usize.saturating_sub(digits))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_have_two_digits() {
        for (total, expected) in [
            (0, "0.00K"),
            (499, "0.50K"),
            (2_178_624, "2.2M"),
            (9_499_999, "9.5M"),
            (9_999_999, "10M"),
            (1_000_000_000, "1000M"),
            (8_100_000_000, "8.1B"),
            (31_577_940_288, "32B"),
            (1_500_000_000_000, "1.5T"),
        ] {
            let counts = ParameterCounts {
                total,
                ..ParameterCounts::default()
            };
            assert_eq!(counts.size_label(), expected, "{total}");
        }
    }

    #[test]
    fn experts_count_once_per_stack() {
        let tensors: [(&str, &[u64]); 4] = [
            ("token_embd.weight", &[8, 100]),
            ("blk.1.ffn_up_exps.weight", &[8, 4, 16]),
            ("blk.1.ffn_down_exps.weight", &[4, 8, 16]),
            ("blk.1.ffn_up_shexp.weight", &[8, 4]),
        ];
        let expected = ParameterCounts {
            total: 1856,
            shared: 832,
            expert: 64,
            expert_count: 16,
        };
        let counts = ParameterCounts::of(tensors);
        assert_eq!(counts, expected);
        assert_eq!(counts.size_label(), "16x0.9K");
    }
}
