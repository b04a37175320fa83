//! In which order the matrices of a block are rounded: those that read the same input together, writers after readers.

use crate::model::hybrid_pattern::BlockKind;

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

/// Whether a tensor's input is the normed stream itself.
pub fn reads_stream(name: &str, is_latent: bool) -> bool {
    let readers = ["ssm_in.", "attn_q.", "ffn_up.", "ffn_up_shexp."];
    readers.iter().any(|reader| name.contains(reader))
        || name.contains("ffn_up_exps.") && !is_latent
}
