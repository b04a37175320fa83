//! Linears in the words of compressed-tensors: class name, or regular expressions over module names.
//!
//! Enters: the linears of a group and all of them. Leaves: targets that match those of the group in transformers and vLLM,
//! and no others. Expressions begin with `.*`, for the readers' prefixes differ, and end with `$`.

use std::collections::{BTreeMap, BTreeSet};

use super::linears::{Kind, Linear};

/// The class that means every linear that is not ignored.
pub const EVERY_LINEAR: &str = "Linear";

/// Targets of the linears that `is_member` picks.
pub fn targets(all: &[Linear], is_member: impl Fn(usize) -> bool) -> Vec<String> {
    let mut layers_of_stem: BTreeMap<String, BTreeSet<usize>> = BTreeMap::new();
    let mut members: Vec<(String, BTreeSet<usize>)> = Vec::new();
    let mut targets = Vec::new();
    for (index, linear) in all.iter().enumerate() {
        let Some(layer) = linear.layer else {
            if is_member(index) {
                targets.push(linear.module.clone());
            }
            continue;
        };
        let stem = stem_expression(linear);
        layers_of_stem
            .entry(stem.clone())
            .or_default()
            .insert(layer);
        if !is_member(index) {
            continue;
        }
        match members.iter_mut().find(|(known, _)| *known == stem) {
            Some((_, layers)) => drop(layers.insert(layer)),
            None => members.push((stem, BTreeSet::from([layer]))),
        }
    }
    let mut expressions = Vec::new();
    while let Some((stem, layers)) = members.first().cloned() {
        let everywhere = layers_of_stem[&stem] == layers;
        let (prefix, _) = stem.rsplit_once('.').unwrap_or(("", &stem));
        // Those of the same place and the same layers share an expression.
        let shares = |(other, their_layers): &(String, BTreeSet<usize>)| {
            let same_place = other.rsplit_once('.').map(|(prefix, _)| prefix) == Some(prefix);
            same_place
                && (layers_of_stem[other] == *their_layers) == everywhere
                && (everywhere || *their_layers == layers)
        };
        let (together, rest): (Vec<_>, Vec<_>) = members.into_iter().partition(shares);
        members = rest;
        let leaves: Vec<&str> = together
            .iter()
            .map(|(stem, _)| {
                stem.rsplit_once('.')
                    .map_or(stem.as_str(), |(_, leaf)| leaf)
            })
            .collect();
        let place = prefix.trim_end_matches('\\');
        let scope = match everywhere {
            true => String::new(),
            false => format!("layers\\.{}\\.", alternatives(layers.iter())),
        };
        expressions.push(format!(
            "re:.*{scope}{place}\\.{}$",
            alternatives(leaves.iter())
        ));
    }
    expressions.extend(targets);
    expressions
}

/// One of these.
fn alternatives(choices: impl ExactSizeIterator<Item = impl ToString>) -> String {
    let single = choices.len() == 1;
    let joined = choices
        .map(|choice| choice.to_string())
        .collect::<Vec<_>>()
        .join("|");
    match single {
        true => joined,
        false => format!("({joined})"),
    }
}

/// The stem as an expression: `mixer\.experts\.\d+\.up_proj`.
fn stem_expression(linear: &Linear) -> String {
    let escaped = linear.stem().replace('.', "\\.");
    match linear.kind {
        Kind::Expert => escaped.replace("experts\\.", "experts\\.\\d+\\."),
        _ => escaped,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn linear(module: &str, kind: Kind, layer: Option<usize>, piece: usize) -> Linear {
        Linear {
            module: module.to_string(),
            kind,
            layer,
            tensor: 0,
            piece,
            rows: 1,
            columns: 1,
        }
    }

    fn network() -> Vec<Linear> {
        let of = |layer: usize, name: &str, kind| {
            linear(
                &format!("backbone.layers.{layer}.mixer.{name}"),
                kind,
                Some(layer),
                0,
            )
        };
        let mut all = vec![
            of(0, "in_proj", Kind::Mamba),
            of(0, "out_proj", Kind::Mamba),
            of(1, "up_proj", Kind::Mlp),
            of(1, "down_proj", Kind::Mlp),
            of(2, "in_proj", Kind::Mamba),
            of(2, "out_proj", Kind::Mamba),
        ];
        for expert in 0..2 {
            let module = format!("backbone.layers.3.mixer.experts.{expert}.up_proj");
            all.push(linear(&module, Kind::Expert, Some(3), expert));
        }
        all.push(of(3, "shared_experts.up_proj", Kind::Mlp));
        all.push(linear("lm_head", Kind::Head, None, 0));
        all
    }

    /// Each linear is matched exactly where it is a member, as Python's `re.match` would.
    fn check(is_member: impl Fn(&Linear) -> bool, expected: &[&str]) {
        let all = network();
        let targets = targets(&all, |index| is_member(&all[index]));
        assert_eq!(targets, expected);
        for linear in &all {
            let matches = |target: &String| match target.strip_prefix("re:") {
                Some(regex) => regex::Regex::new(&format!("^(?:{regex})"))
                    .unwrap()
                    .is_match(&linear.module),
                None => *target == linear.module,
            };
            assert_eq!(
                targets.iter().any(matches),
                is_member(linear),
                "{}",
                linear.module
            );
        }
    }

    #[test]
    fn what_is_alike_everywhere_needs_no_layers() {
        check(
            |linear| linear.kind == Kind::Mamba,
            &["re:.*mixer\\.(in_proj|out_proj)$"],
        );
        check(
            |linear| linear.kind == Kind::Expert,
            &["re:.*mixer\\.experts\\.\\d+\\.up_proj$"],
        );
        check(|linear| linear.kind == Kind::Head, &["lm_head"]);
    }

    #[test]
    fn parts_are_named_by_layer() {
        check(
            |linear| linear.layer == Some(2),
            &["re:.*layers\\.2\\.mixer\\.(in_proj|out_proj)$"],
        );
        check(
            |linear| linear.module.ends_with("out_proj") || linear.kind == Kind::Mlp,
            &[
                "re:.*mixer\\.(out_proj|up_proj|down_proj)$",
                "re:.*mixer\\.shared_experts\\.up_proj$",
            ],
        );
    }
}
