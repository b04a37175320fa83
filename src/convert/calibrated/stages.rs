//! In which order the matrices of a block are rounded: those that read the same input together, writers after readers.

use crate::model::config::NemotronHConfig;
use crate::model::hybrid_pattern::BlockKind;
use crate::model::nemotron_h::stream_readers;

/// Names by stage; every name that is in `present`.
pub fn of<'a>(kind: BlockKind, prefix: &str, present: &[&'a str]) -> Vec<Vec<&'a str>> {
    let is_latent = present
        .iter()
        .any(|name| name.ends_with("ffn_latent_down.weight"));
    let stages: &[&[&str]] = match kind {
        BlockKind::Mamba => &[&["ssm_in"], &["ssm_out"]],
        BlockKind::Attention => &[&["attn_q", "attn_k", "attn_v"], &["attn_output"]],
        BlockKind::Mlp => &[&["ffn_up"], &["ffn_down"]],
        BlockKind::Moe if is_latent => &[
            &["ffn_up_shexp", "ffn_latent_down"],
            &["ffn_down_shexp", "ffn_up_exps"],
            &["ffn_down_exps"],
            &["ffn_latent_up"],
        ],
        BlockKind::Moe => &[
            &["ffn_up_shexp", "ffn_up_exps"],
            &["ffn_down_shexp", "ffn_down_exps"],
        ],
    };
    let find = |stem: &&str| {
        present
            .iter()
            .copied()
            .find(|name| *name == format!("{prefix}{stem}.weight"))
    };
    stages
        .iter()
        .map(|stage| stage.iter().filter_map(find).collect())
        .collect()
}

/// The tensor whose captured input is also that of `name`.
pub fn input_of(name: &str) -> String {
    for (reader, first) in [
        ("attn_k.", "attn_q."),
        ("attn_v.", "attn_q."),
        ("ffn_latent_down.", "ffn_up_shexp."),
    ] {
        if name.contains(reader) {
            return name.replace(reader, first);
        }
    }
    name.to_string()
}

/// Whether all tensors of a stage read the normed stream itself.
pub fn reads_stream(kind: BlockKind, config: &NemotronHConfig, stage: &[&str]) -> bool {
    let readers = stream_readers(kind, config);
    stage.iter().all(|name| {
        let stem = name.rsplit('.').nth(1).unwrap_or_default();
        readers.contains(&stem)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_of_a_stage_share_inputs() {
        let check = |name: &str, input: &str| assert_eq!(input_of(name), input);
        check("blk.3.attn_v.weight", "blk.3.attn_q.weight");
        check("blk.3.ffn_latent_down.weight", "blk.3.ffn_up_shexp.weight");
        check("blk.3.ffn_down.weight", "blk.3.ffn_down.weight");
    }
}
