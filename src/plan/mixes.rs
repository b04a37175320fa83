//! Which tensor type each tensor gets under a named file type, by llama.cpp's rules.
//!
//! Enters: tensor names and shapes in llama-quantize's order. Leaves: one type per tensor, before shapes
//! are checked against block sizes ([`super::types`]). Knows no weights.
//!
//! Source: llama.cpp b11434 `src/llama-quant.cpp` (`llama_tensor_get_type`), restated for the two
//! architectures written here. Names keep the meaning that users know from llama-quantize.

use nemoconv_formats::GgmlType;

use super::file_type::FileType;

/// What the rules need to know about the model.
#[derive(Debug, Clone, Copy)]
pub struct ModelTraits {
    /// Blocks in the file, a multi-token-prediction block included.
    pub block_count: usize,
    /// Routed experts, 0 in dense models.
    pub expert_count: usize,
    /// Query heads per key-value head **of block 0**; 0 when block 0 is not attention.
    pub gqa_of_block_0: usize,
    /// Whether the file has an `output.weight` of its own.
    pub has_output: bool,
    /// Whether an importance matrix steers the rounding.
    pub has_imatrix: bool,
}

/// Role of a tensor in the mix rules, found by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Category {
    Output,
    TokenEmbd,
    AttnV,
    AttnK,
    AttnOutput,
    FfnDown,
    Other,
}

impl Category {
    fn of(name: &str) -> Self {
        match name {
            "output.weight" => Self::Output,
            "token_embd.weight" => Self::TokenEmbd,
            _ if name.contains("attn_v.weight") => Self::AttnV,
            _ if name.contains("attn_k.weight") => Self::AttnK,
            _ if name.contains("attn_output.weight") => Self::AttnOutput,
            _ if name.contains("ffn_down") => Self::FfnDown,
            _ => Self::Other,
        }
    }
}

/// Walks the tensors in llama-quantize's order and hands out types.
#[derive(Debug)]
pub struct Mix {
    file_type: FileType,
    traits: ModelTraits,
    attn_v_count: usize,
    attn_v_seen: usize,
    ffn_down_seen: usize,
}

impl Mix {
    /// `attn_v_count`: how many `attn_v.weight` tensors the file has.
    pub fn new(file_type: FileType, traits: ModelTraits, attn_v_count: usize) -> Self {
        Self {
            file_type,
            traits,
            attn_v_count,
            attn_v_seen: 0,
            ffn_down_seen: 0,
        }
    }

    /// The type of the next tensor that may be quantized and has no override.
    ///
    /// Call it in llama-quantize's order (non-block tensors by name, then blocks numerically, names
    /// bytewise inside a block): some rules count the tensors seen so far.
    /// `columns`: row length; `is_stacked`: whether it holds the experts of a block.
    pub fn next(&mut self, name: &str, columns: usize, is_stacked: bool) -> GgmlType {
        let base = self.file_type.base();
        let category = Category::of(name);
        let is_output = category == Category::Output
            || (category == Category::TokenEmbd && !self.traits.has_output);
        if is_output {
            return self.output(columns);
        }
        if self.file_type == FileType::MXFP4_MOE {
            return if is_stacked {
                GgmlType::MXFP4
            } else {
                GgmlType::Q8_0
            };
        }
        match category {
            Category::TokenEmbd => self.token_embd(),
            Category::AttnV => self.attn_v(),
            Category::AttnK if self.traits.expert_count == 8 => GgmlType::Q8_0,
            Category::AttnOutput => self.attn_output(),
            Category::FfnDown => self.ffn_down(name),
            _ => base,
        }
    }

    fn output(&self, columns: usize) -> GgmlType {
        let fits = columns.is_multiple_of(self.file_type.base().block_elements());
        match self.file_type {
            FileType::MXFP4_MOE | FileType::Q8_0 => GgmlType::Q8_0,
            _ if !fits => GgmlType::Q8_0,
            _ => GgmlType::Q6_K,
        }
    }

    fn token_embd(&self) -> GgmlType {
        match self.file_type {
            FileType::TQ1_0 | FileType::TQ2_0 => GgmlType::Q4_K,
            _ => self.file_type.base(),
        }
    }

    fn attn_v(&mut self) -> GgmlType {
        use FileType as F;
        let index = self.attn_v_seen;
        self.attn_v_seen += 1;
        if self.traits.expert_count == 8 {
            return GgmlType::Q8_0;
        }
        let grouped = self.traits.gqa_of_block_0 >= 4;
        match self.file_type {
            F::Q2_K if grouped => GgmlType::Q4_K,
            F::Q2_K => GgmlType::Q3_K,
            F::Q2_K_S if grouped => GgmlType::Q4_K,
            F::Q3_K_M if index < 2 => GgmlType::Q5_K,
            F::Q3_K_M => GgmlType::Q4_K,
            F::Q3_K_L => GgmlType::Q5_K,
            F::IQ4_NL | F::IQ4_XS if grouped => GgmlType::Q5_K,
            F::Q4_K_M | F::Q5_K_M if more_bits(index, self.attn_v_count) => GgmlType::Q6_K,
            F::Q4_K_S if index < 4 => GgmlType::Q5_K,
            _ => self.file_type.base(),
        }
    }

    fn attn_output(&self) -> GgmlType {
        use FileType as F;
        if self.traits.expert_count == 8 {
            return match self.file_type {
                F::Q2_K | F::Q3_K_S | F::Q3_K_M | F::IQ4_NL | F::Q4_K_S | F::Q4_K_M | F::IQ4_XS => {
                    GgmlType::Q5_K
                }
                _ => self.file_type.base(),
            };
        }
        match self.file_type {
            F::Q2_K => GgmlType::Q3_K,
            F::Q3_K_M => GgmlType::Q4_K,
            F::Q3_K_L => GgmlType::Q5_K,
            _ => self.file_type.base(),
        }
    }

    fn ffn_down(&mut self, name: &str) -> GgmlType {
        use FileType as F;
        let counted = self.ffn_down_seen;
        self.ffn_down_seen += 1;
        let index = if self.traits.expert_count > 1 {
            block_number(name)
        } else {
            counted
        };
        let n = self.traits.block_count;
        let imatrix = self.traits.has_imatrix;
        match self.file_type {
            F::Q2_K => GgmlType::Q3_K,
            F::Q2_K_S if index < n / 8 => GgmlType::Q4_K,
            F::Q3_K_M if index < n / 16 => GgmlType::Q5_K,
            F::Q3_K_M => GgmlType::Q4_K,
            F::Q3_K_L => GgmlType::Q5_K,
            F::Q4_K_M | F::Q5_K_M if more_bits(index, n) => GgmlType::Q6_K,
            F::IQ4_NL | F::IQ4_XS if index < n / 8 && !imatrix => GgmlType::Q5_K,
            F::Q4_K_S if index < n / 8 => GgmlType::Q5_K,
            F::Q4_0 if index < n / 8 && imatrix => GgmlType::Q4_1,
            F::Q5_0 if index < n / 8 && imatrix => GgmlType::Q5_1,
            _ => self.file_type.base(),
        }
    }
}

/// The first and last eighth, and every third in between.
fn more_bits(index: usize, count: usize) -> bool {
    index < count / 8 || index >= 7 * count / 8 || (index - count / 8) % 3 == 2
}

/// N of `blk.N.`; names are made by the architecture table, so it is always there.
fn block_number(name: &str) -> usize {
    let number = name
        .strip_prefix("blk.")
        .and_then(|rest| rest.split('.').next());
    number.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Whether llama-quantize would touch this tensor at all: matrices named `*weight`, except norms,
/// routers and convolutions.
pub fn is_quantizable(name: &str, dims: &[u64]) -> bool {
    let matrix = dims
        .iter()
        .rposition(|&dim| dim != 1)
        .is_some_and(|last| last >= 1);
    matrix
        && name.ends_with("weight")
        && !["_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d"]
            .iter()
            .any(|part| name.contains(part))
}

/// Sort key of llama-quantize's file order: non-block tensors by name, then blocks numerically, names
/// bytewise inside a block.
pub fn quantizer_order(name: &str) -> (bool, usize, &str) {
    (name.starts_with("blk."), block_number(name), name)
}

#[cfg(test)]
mod tests {
    use super::*;

    const DENSE: ModelTraits = ModelTraits {
        block_count: 32,
        expert_count: 0,
        gqa_of_block_0: 0,
        has_output: true,
        has_imatrix: false,
    };

    #[test]
    fn dense_models_count_mlps_against_all_blocks() {
        let mut mix = Mix::new(FileType::Q4_K_M, DENSE, 2);
        let blocks: Vec<_> = (0..16).map(|i| 2 * i + 1).collect();
        let high: Vec<_> = blocks
            .into_iter()
            .filter(|b| mix.next(&format!("blk.{b}.ffn_down.weight"), 256, false) == GgmlType::Q6_K)
            .collect();
        assert_eq!(high, [1, 3, 5, 7, 13, 19, 25, 31]);
    }

    #[test]
    fn tied_embeddings_follow_the_output() {
        let mut mix = Mix::new(
            FileType::Q4_K_M,
            ModelTraits {
                has_output: false,
                ..DENSE
            },
            0,
        );
        assert_eq!(mix.next("token_embd.weight", 256, false), GgmlType::Q6_K);
    }

    #[test]
    fn only_expert_stacks_become_mxfp4() {
        let mut mix = Mix::new(FileType::MXFP4_MOE, DENSE, 0);
        assert_eq!(
            mix.next("blk.1.ffn_up_exps.weight", 256, true),
            GgmlType::MXFP4
        );
        assert_eq!(
            mix.next("blk.1.ffn_up_shexp.weight", 256, false),
            GgmlType::Q8_0
        );
    }

    #[test]
    fn norms_routers_and_convolutions_stay() {
        assert!(is_quantizable("blk.0.ssm_in.weight", &[256, 512]));
        assert!(!is_quantizable("blk.0.ssm_norm.weight", &[256, 2]));
        assert!(!is_quantizable("blk.0.ssm_conv1d.weight", &[4, 768]));
        assert!(!is_quantizable("blk.0.ffn_gate_inp.weight", &[256, 16]));
        assert!(!is_quantizable("blk.0.ssm_a", &[1, 8]));
        assert!(!is_quantizable("output_norm.weight", &[256]));
    }
}
