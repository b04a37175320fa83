//! The scheme of every linear: rules, then the aim, then what the readers can load.
//!
//! Enters: linears, settings. Leaves: schemes with their group sizes, remarks.

use std::collections::BTreeMap;

use super::linears::{Kind, Linear};
use super::readers::for_experts;
use super::scheme::{GROUP_SIZES, LinearScheme, NamedScheme, largest_group};
use super::{PackedAim, PackedSettings, fault};
use crate::error::{Error, Result};
use crate::plan::phase::Phase;

/// Parallel to `linears`.
pub fn schemes(
    linears: &[Linear],
    settings: &PackedSettings,
) -> Result<(Vec<Option<LinearScheme>>, Vec<String>)> {
    if let Some(size) = settings
        .group_size
        .filter(|size| !GROUP_SIZES.contains(size))
    {
        let what = format!("group size must be 128, 64 or 32 (vLLM's kernels), found {size}");
        return Err(Error::Plan(crate::error::Fault::new(what)));
    }
    let unused = settings.rules.iter().find(|rule| {
        !linears
            .iter()
            .any(|linear| rule.pattern.is_match(&linear.module))
    });
    if let Some(rule) = unused {
        let what = format!("`{}` matches no linear of this model", rule.pattern);
        return Err(Error::Plan(crate::error::Fault::new(what)));
    }
    let mut remarks = Vec::new();
    let named: Vec<Option<NamedScheme>> = linears
        .iter()
        .map(|linear| named(linear, settings, &mut remarks))
        .collect();
    if named.iter().all(Option::is_none) {
        let fault = crate::error::Fault::new("no linear is left to quantize");
        return Err(Error::Plan(
            fault.hint("keep fewer of them with `--linear`"),
        ));
    }
    let sizes = group_sizes(linears, &named, settings.group_size)?;
    let chosen = named.into_iter().zip(sizes);
    let schemes = chosen
        .map(|(named, size)| Some(named?.with_groups(size)))
        .collect();
    Ok((schemes, remarks))
}

fn named(
    linear: &Linear,
    settings: &PackedSettings,
    remarks: &mut Vec<String>,
) -> Option<NamedScheme> {
    if linear.kind == Kind::Router {
        return None;
    }
    let rule = settings
        .rules
        .iter()
        .find(|rule| rule.pattern.is_match(&linear.module));
    if let Some(rule) = rule {
        return rule.scheme;
    }
    let wanted = match (settings.aim, linear.kind) {
        // As NVIDIA leaves them.
        (_, Kind::Head | Kind::Latent | Kind::Router) => return None,
        (PackedAim::Scheme(scheme), _) => scheme,
        (PackedAim::Phase(Phase::W8A8), _) => NamedScheme::W8A8,
        (PackedAim::Phase(Phase::W4A8), _) | (PackedAim::Phase(Phase::Mixed), Kind::Mamba) => {
            NamedScheme::W4A8
        }
        (PackedAim::Phase(Phase::Mixed), _) => NamedScheme::W8A8,
    };
    if linear.kind != Kind::Expert {
        return Some(wanted);
    }
    let taken = for_experts(wanted, &settings.readers);
    if taken != wanted && remarks.is_empty() {
        remarks.push(format!(
            "experts take {taken} instead of {wanted}: transformers decodes experts of symmetric packed codes alone (`--readers vllm` writes {wanted})"
        ));
    }
    Some(taken)
}

/// Group sizes, equal where matrices must be alike.
fn group_sizes(
    linears: &[Linear],
    named: &[Option<NamedScheme>],
    wanted: Option<usize>,
) -> Result<Vec<usize>> {
    let unit = |index: usize, linear: &Linear| match linear.kind {
        Kind::QueryKeyValue | Kind::Expert => (linear.layer, linear.kind, None),
        kind => (linear.layer, kind, Some(index)),
    };
    let mut columns: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (index, linear) in linears.iter().enumerate() {
        columns
            .entry(unit(index, linear))
            .or_default()
            .push(linear.columns);
    }
    let sized = linears.iter().zip(named).enumerate().map(|(index, (linear, named))| {
        if !named.is_some_and(NamedScheme::has_groups) {
            return Ok(GROUP_SIZES[0]);
        }
        let together = columns[&unit(index, linear)].iter().copied();
        let hint = "keep it with `--linear REGEX=keep`, or give it a scheme with a scale per row, such as w8a16";
        match wanted {
            Some(size) if !linear.columns.is_multiple_of(size) => {
                let what = format!("groups of {size} do not divide rows of {}", linear.columns);
                Err(Error::Plan(fault(linear, what).hint("leave `--group-size` out: each matrix then takes the largest that fits")))
            }
            Some(size) => Ok(size),
            None => largest_group(together).ok_or_else(|| {
                let what = format!("no group size of 128, 64 or 32 divides rows of {}", linear.columns);
                Error::Plan(fault(linear, what).hint(hint))
            }),
        }
    });
    sized.collect()
}
