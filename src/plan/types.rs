//! The type of every tensor: the scheme, the user's overrides, and whether the row fits.
//!
//! Enters: names and stored shapes, [`TypeSettings`]. Leaves: one type per tensor; a type that cannot hold
//! its row is an error unless llama.cpp's substitution is allowed. Reads no weights.

use std::fmt;
use std::str::FromStr;

use nemoconv_formats::{Dtype, GgmlType};
use regex::Regex;

use super::file_type::FileType;
use super::mixes::{Mix, ModelTraits, is_quantizable, quantizer_order};
use super::phase::Phase;
use crate::error::{Error, Fault, Result};
use crate::model::nemotron_h::Storage;

/// What the user wants a tensor stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WantedType {
    /// The float type that holds the checkpoint's without loss.
    Keep,
    /// This type.
    As(GgmlType),
}

impl WantedType {
    fn of(self, source: Dtype) -> GgmlType {
        match self {
            Self::Keep => float_of(source),
            Self::As(ty) => ty,
        }
    }
}

impl From<GgmlType> for WantedType {
    fn from(ty: GgmlType) -> Self {
        Self::As(ty)
    }
}

impl fmt::Display for WantedType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Keep => f.pad("keep"),
            Self::As(ty) => f.pad(ty.name()),
        }
    }
}

impl FromStr for WantedType {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        if text.eq_ignore_ascii_case("keep") {
            return Ok(Self::Keep);
        }
        let ty = text.parse()?;
        // NVFP4 is not rounded to, but taken over from sources that have it.
        match crate::quantize::can_quantize(ty) || ty == GgmlType::NVFP4 {
            true => Ok(Self::As(ty)),
            false => Err(format!("{ty} cannot be written")),
        }
    }
}

/// `--tensor-type REGEX=TYPE`: the first rule whose pattern is found in the name wins.
#[derive(Debug, Clone)]
pub struct TensorTypeRule {
    /// Searched for anywhere in the GGUF name.
    pub pattern: Regex,
    /// What matching tensors become.
    pub ty: WantedType,
}

/// The types of tensors that no override names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scheme {
    /// llama.cpp's named mix.
    Mix(FileType),
    /// A phase.
    Phase(Phase),
}

impl Scheme {
    /// As it stands in file names.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mix(file_type) => file_type.name(),
            Self::Phase(phase) => phase.name(),
        }
    }

    /// The file type that the tensors make, each with its type and weights: the mix, or that of most weights.
    pub fn file_type(self, tensors: impl Iterator<Item = (GgmlType, u64)>) -> FileType {
        match self {
            Self::Mix(file_type) => file_type,
            Self::Phase(_) => FileType::of_most(tensors),
        }
    }
}

/// What the user decided about types.
#[derive(Debug, Clone)]
pub struct TypeSettings {
    /// Types of the tensors that nothing below names.
    pub scheme: Scheme,
    /// Every quantizable tensor takes the base type of the mix.
    pub pure: bool,
    /// Type of `output.weight`.
    pub output: Option<WantedType>,
    /// Type of `token_embd.weight`.
    pub token_embedding: Option<WantedType>,
    /// Overrides by name.
    pub rules: Vec<TensorTypeRule>,
    /// Whether llama.cpp's substitute may stand in for a type that does not fit.
    pub allow_fallback: bool,
}

impl TypeSettings {
    /// Every tensor in the float type that holds it exactly: its own, F32 for what is packed.
    pub fn own() -> Self {
        let everything = TensorTypeRule {
            pattern: Regex::new("").expect("an empty pattern is one"),
            ty: WantedType::Keep,
        };
        Self {
            rules: vec![everything],
            ..Self::of(FileType::F32)
        }
    }

    /// The named mix and no wish beyond it.
    pub fn of(file_type: FileType) -> Self {
        Self {
            scheme: Scheme::Mix(file_type),
            pure: false,
            output: None,
            token_embedding: None,
            rules: Vec::new(),
            allow_fallback: false,
        }
    }

    /// What the user wants of the tensor of this name, if anything.
    pub fn override_of(&self, name: &str) -> Option<WantedType> {
        let explicit = match name {
            "output.weight" => self.output,
            "token_embd.weight" => self.token_embedding,
            _ => None,
        };
        let by_rule = || self.rules.iter().find(|rule| rule.pattern.is_match(name));
        explicit.or_else(|| by_rule().map(|rule| rule.ty))
    }
}

/// A tensor as far as its type depends on it.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// GGUF name.
    pub name: &'a str,
    /// Stored dimensions, fastest first.
    pub dims: &'a [u64],
    /// Whether it takes the type asked for.
    pub storage: Storage,
    /// Type in the checkpoint.
    pub source: Dtype,
}

/// The decision for one tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Choice {
    /// The type it is stored as.
    pub ty: GgmlType,
    /// The type it should have had, if that did not fit.
    pub instead_of: Option<GgmlType>,
}

/// Chooses a type for each candidate.
///
/// # Errors
/// An override that matches nothing; rows that do not fill blocks (one error for all of them).
pub fn choose(
    candidates: &[Candidate],
    settings: &TypeSettings,
    traits: ModelTraits,
) -> Result<Vec<Choice>> {
    check_rules(candidates, settings)?;
    let wanted = wanted_types(candidates, settings, traits);
    let misfits: Vec<_> = candidates
        .iter()
        .zip(&wanted)
        .filter(|(candidate, ty)| !fits(**ty, candidate.dims[0]))
        .map(|(candidate, ty)| (*candidate, *ty))
        .collect();
    if !misfits.is_empty() && !settings.allow_fallback {
        return Err(misfit_error(&misfits, candidates));
    }
    let choice = |(candidate, ty): (&Candidate, GgmlType)| match fits(ty, candidate.dims[0]) {
        true => Choice {
            ty,
            instead_of: None,
        },
        false => Choice {
            ty: substitute(ty, candidate.dims[0]),
            instead_of: Some(ty),
        },
    };
    Ok(candidates.iter().zip(wanted).map(choice).collect())
}

/// Types before shapes are looked at, parallel to `candidates`.
fn wanted_types(
    candidates: &[Candidate],
    settings: &TypeSettings,
    traits: ModelTraits,
) -> Vec<GgmlType> {
    let attn_v = candidates
        .iter()
        .filter(|c| c.name.contains("attn_v.weight"))
        .count();
    let mut mix = match settings.scheme {
        Scheme::Mix(file_type) => Some(Mix::new(file_type, traits, attn_v)),
        Scheme::Phase(_) => None,
    };
    let mut order: Vec<_> = (0..candidates.len()).collect();
    order.sort_by_key(|&index| quantizer_order(candidates[index].name));
    let mut types = vec![GgmlType::F32; candidates.len()];
    for index in order {
        types[index] = wanted_type(&candidates[index], settings, mix.as_mut());
    }
    types
}

fn wanted_type(candidate: &Candidate, settings: &TypeSettings, mix: Option<&mut Mix>) -> GgmlType {
    if candidate.storage == Storage::F32 {
        return GgmlType::F32;
    }
    if let Some(wanted) = settings.override_of(candidate.name) {
        return wanted.of(candidate.source);
    }
    let columns = usize::try_from(candidate.dims[0]).unwrap_or(usize::MAX);
    let file_type = match settings.scheme {
        Scheme::Phase(phase) => return phase.type_of(candidate.name, columns),
        Scheme::Mix(file_type) => file_type,
    };
    match mix {
        Some(mix)
            if !settings.pure
                && !file_type.is_float()
                && is_quantizable(candidate.name, candidate.dims) =>
        {
            mix.next(candidate.name, columns, candidate.dims.len() > 2)
        }
        _ => file_type.base(),
    }
}

/// The float type that holds a checkpoint type without loss.
fn float_of(dtype: Dtype) -> GgmlType {
    match dtype {
        Dtype::Bf16 => GgmlType::BF16,
        Dtype::F16 => GgmlType::F16,
        _ => GgmlType::F32,
    }
}

fn check_rules(candidates: &[Candidate], settings: &TypeSettings) -> Result<()> {
    for rule in &settings.rules {
        let matches =
            |c: &Candidate| c.storage == Storage::OutType && rule.pattern.is_match(c.name);
        if !candidates.iter().any(matches) {
            let example = candidates
                .iter()
                .find(|c| c.storage == Storage::OutType)
                .map_or("", |c| c.name);
            let fault = Fault::new(format!(
                "`--tensor-type {}={}` matches no tensor that can be quantized",
                rule.pattern, rule.ty
            ));
            return Err(Error::Plan(fault.hint(format!(
                "patterns are searched for in GGUF names such as `{example}`; `nemoconv plan` lists them"
            ))));
        }
    }
    Ok(())
}

/// Whether rows of this length are whole blocks of the type.
pub fn fits(ty: GgmlType, columns: u64) -> bool {
    columns.is_multiple_of(ty.block_elements() as u64)
}

/// What llama-quantize silently stores instead.
pub fn substitute(ty: GgmlType, columns: u64) -> GgmlType {
    use GgmlType as T;
    let smaller = match ty {
        T::IQ4_XS => T::IQ4_NL,
        T::Q2_K | T::Q3_K | T::TQ1_0 | T::TQ2_0 => T::Q4_0,
        T::Q4_K => T::Q5_0,
        T::Q5_K => T::Q5_1,
        T::Q6_K => T::Q8_0,
        other => other,
    };
    if fits(smaller, columns) {
        smaller
    } else {
        T::F16
    }
}

/// The two types that fit the row and come closest: first the nearest in size, then the next larger.
fn alternatives(ty: GgmlType, columns: u64) -> [GgmlType; 2] {
    use GgmlType as T;
    if !columns.is_multiple_of(32) {
        return [T::F16, T::BF16];
    }
    match ty {
        T::Q5_K => [T::Q5_0, T::Q5_1],
        T::Q6_K => [T::Q5_1, T::Q8_0],
        _ => [T::IQ4_NL, T::Q5_0],
    }
}

fn misfit_error(misfits: &[(Candidate, GgmlType)], all: &[Candidate]) -> Error {
    let (first, ty) = misfits[0];
    let weights = |dims: &[u64]| dims.iter().product::<u64>() as f64;
    let total: f64 = all.iter().map(|c| weights(c.dims)).sum();
    let affected: f64 = misfits.iter().map(|(c, _)| weights(c.dims)).sum();
    let mut lengths: Vec<u64> = misfits.iter().map(|(c, _)| c.dims[0]).collect();
    lengths.sort_unstable();
    lengths.dedup();
    let lengths: Vec<_> = lengths.iter().map(u64::to_string).collect();
    let what = format!(
        "cannot be stored as {ty}: row length must be a multiple of {}, found {}; so it is for {} of {} \
         tensors, {:.1} % of the weights (row lengths {})",
        ty.block_elements(),
        first.dims[0],
        misfits.len(),
        all.len(),
        100.0 * affected / total,
        lengths.join(", "),
    );
    let [near, larger] = alternatives(ty, first.dims[0]);
    let escaped = regex::escape(first.name);
    let hint = format!(
        "the best types that fit are {near} ({:.2} bits per weight) and {larger} ({:.2}): \
         `--tensor-type '{escaped}={near}'`; `--widen` makes {ty} fit exactly where the width can grow; \
         `--allow-fallback` stores {} instead, as llama-quantize does",
        near.bits_per_weight(),
        larger.bits_per_weight(),
        substitute(ty, first.dims[0]),
    );
    Error::Plan(Fault::new(what).in_tensor(first.name).hint(hint))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRAITS: ModelTraits = ModelTraits {
        block_count: 4,
        expert_count: 0,
        gqa_of_block_0: 0,
        has_output: true,
        has_imatrix: false,
    };

    fn weight<'a>(name: &'a str, dims: &'a [u64]) -> Candidate<'a> {
        Candidate {
            name,
            dims,
            storage: Storage::OutType,
            source: Dtype::Bf16,
        }
    }

    fn rule(pattern: &str, ty: GgmlType) -> TensorTypeRule {
        TensorTypeRule {
            pattern: Regex::new(pattern).unwrap(),
            ty: ty.into(),
        }
    }

    #[test]
    fn a_row_that_does_not_fit_is_an_error_with_a_way_out() {
        let tensors = [weight("blk.0.ssm_in.weight", &[2688, 64])];
        let error = choose(&tensors, &TypeSettings::of(FileType::Q4_K_M), TRAITS).unwrap_err();
        assert!(error.to_string().contains("found 2688"), "{error}");
        let hint = error.hint().unwrap();
        assert!(
            hint.contains("IQ4_NL") && hint.contains("Q5_0") && hint.contains("--widen"),
            "{hint}"
        );
    }

    #[test]
    fn fallback_is_llama_quantizes() {
        let check = |ty, columns, expected| assert_eq!(substitute(ty, columns), expected);
        check(GgmlType::Q4_K, 2688, GgmlType::Q5_0);
        check(GgmlType::Q6_K, 2688, GgmlType::Q8_0);
        check(GgmlType::IQ4_XS, 2688, GgmlType::IQ4_NL);
        check(GgmlType::TQ1_0, 2688, GgmlType::Q4_0);
        check(GgmlType::Q4_K, 100, GgmlType::F16);
        check(GgmlType::Q8_0, 100, GgmlType::F16);
        let tensors = [weight("blk.0.ssm_in.weight", &[2688, 64])];
        let allowed = TypeSettings {
            allow_fallback: true,
            ..TypeSettings::of(FileType::Q4_K_M)
        };
        let choices = choose(&tensors, &allowed, TRAITS).unwrap();
        assert_eq!(
            choices,
            [Choice {
                ty: GgmlType::Q5_0,
                instead_of: Some(GgmlType::Q4_K)
            }]
        );
    }

    #[test]
    fn the_first_matching_rule_wins_and_an_idle_one_is_an_error() {
        let tensors = [weight("blk.0.ssm_in.weight", &[256, 64])];
        let rules = vec![rule("ssm_in", GgmlType::Q6_K), rule("blk", GgmlType::Q8_0)];
        let chosen = choose(
            &tensors,
            &TypeSettings {
                rules,
                ..TypeSettings::of(FileType::Q4_K_M)
            },
            TRAITS,
        );
        assert_eq!(chosen.unwrap()[0].ty, GgmlType::Q6_K);
        let rules = vec![rule("attn_q", GgmlType::Q6_K)];
        let error = choose(
            &tensors,
            &TypeSettings {
                rules,
                ..TypeSettings::of(FileType::Q4_K_M)
            },
            TRAITS,
        );
        assert!(error.unwrap_err().to_string().contains("matches no tensor"));
    }
}
