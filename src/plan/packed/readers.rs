//! What the programs that load packed folders insist on.
//!
//! Enters: linears with their schemes, the readers that must load the folder. Leaves: an error that says which of them would
//! break, or remarks that the user should know. Versions: vLLM 0.33, its CPU build 0.32, transformers 5.23, SGLang 0.5.23,
//! GPTQModel 7.7.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;

use nemoconv_formats::Dtype;

use super::linears::{Kind, Linear};
use super::scheme::{LinearScheme, NamedScheme};
use super::{Content, PackedTensor};
use crate::error::{Error, Fault, Result};

/// A program that loads packed folders.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Reader {
    /// vLLM, and SGLang, which fuses and matches as it does.
    Vllm,
    /// transformers with compressed-tensors.
    Transformers,
}

impl Reader {
    /// All of them.
    pub const ALL: [Self; 2] = [Self::Vllm, Self::Transformers];

    /// As it is written in flags and recipes.
    pub fn name(self) -> &'static str {
        match self {
            Self::Vllm => "vllm",
            Self::Transformers => "transformers",
        }
    }
}

impl fmt::Display for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Reader {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let found = Self::ALL.into_iter().find(|reader| reader.name() == text);
        found.ok_or_else(|| format!("reader must be vllm or transformers, found `{text}`"))
    }
}

/// What experts take instead of a scheme that transformers cannot load for them: it decodes symmetric packed codes alone,
/// stops at zero points, and leaves experts in I8 at random values.
pub fn for_experts(scheme: NamedScheme, readers: &[Reader]) -> NamedScheme {
    if !readers.contains(&Reader::Transformers) {
        return scheme;
    }
    match scheme {
        NamedScheme::W8A8 | NamedScheme::W8A8Static => NamedScheme::W8A16,
        NamedScheme::W4A8 | NamedScheme::W4A16Asym => NamedScheme::W4A16,
        other => other,
    }
}

/// A linear and its scheme, if it is quantized.
type Choice<'a> = (&'a Linear, Option<&'a LinearScheme>);

/// Checks what the readers insist on; gives remarks.
///
/// # Errors
/// One of `readers` would refuse the folder or misread it.
pub fn check(choices: &[Choice], readers: &[Reader]) -> Result<Vec<String>> {
    one_layout(choices)?;
    alike(
        choices,
        Kind::QueryKeyValue,
        "vLLM fuses q, k and v into one matrix with one scheme",
    )?;
    alike(
        choices,
        Kind::Expert,
        "vLLM looks up the scheme of a layer's experts by expert 0 alone",
    )?;
    if readers.contains(&Reader::Transformers) {
        transformers(choices)?;
    }
    words(choices)?;
    Ok(remarks(choices))
}

fn refused(linear: &Linear, what: impl Into<String>, hint: &str) -> Error {
    let fault = Fault::new(what).in_tensor(format!("{}.weight", linear.module));
    Error::Plan(fault.hint(hint))
}

/// GPTQ's layout has no place for others beside it.
fn one_layout(choices: &[Choice]) -> Result<()> {
    let quantized = || {
        choices
            .iter()
            .filter_map(|(linear, scheme)| Some((linear, (*scheme)?)))
    };
    let has = |gptq: bool| quantized().find(|(_, scheme)| scheme.named.is_gptq() == gptq);
    match (has(true), has(false)) {
        (Some((linear, scheme)), Some((_, other))) => Err(refused(
            linear,
            format!(
                "{} and {} cannot be in one folder: no reader takes two layouts",
                scheme.named, other.named
            ),
            "choose schemes of one layout",
        )),
        _ => Ok(()),
    }
}

fn alike(choices: &[Choice], kind: Kind, why: &str) -> Result<()> {
    let mut first: BTreeMap<Option<usize>, Choice> = BTreeMap::new();
    for (linear, scheme) in choices.iter().filter(|(linear, _)| linear.kind == kind) {
        let (other, expected) = first.entry(linear.layer).or_insert((linear, *scheme));
        if *expected != *scheme {
            let what = format!(
                "{} here, {} in `{}`: {why}",
                described(*scheme),
                described(*expected),
                other.module
            );
            return Err(refused(linear, what, "give all of them the same scheme"));
        }
    }
    Ok(())
}

fn described(scheme: Option<&LinearScheme>) -> String {
    scheme.map_or("not quantized".to_string(), |scheme| {
        scheme.scheme.to_string()
    })
}

fn transformers(choices: &[Choice]) -> Result<()> {
    let only_vllm = "`--readers vllm` writes it for vLLM alone";
    let experts = || {
        choices
            .iter()
            .filter(|(linear, _)| linear.kind == Kind::Expert)
    };
    let mut all = choices.iter().filter_map(|(_, scheme)| *scheme);
    let is_compressed_tensors = all.any(|scheme| !scheme.named.is_gptq());
    let kept = experts().find(|(_, scheme)| scheme.is_none());
    if let Some((linear, _)) = kept.filter(|_| is_compressed_tensors) {
        let what = "not quantized: beside packed linears transformers looks for packed experts alone, and leaves others \
                    at random values";
        return Err(refused(linear, what, only_vllm));
    }
    let mut quantized = experts().filter_map(|(linear, scheme)| Some((linear, (*scheme)?)));
    let Some((first, scheme)) = quantized.next() else {
        return Ok(());
    };
    if for_experts(scheme.named, &[Reader::Transformers]) != scheme.named {
        let what = match scheme.named {
            NamedScheme::W4A16Asym => "transformers decodes no zero points of experts",
            _ => "transformers leaves experts in I8 at random values without a word",
        };
        let what = format!("{}: {what}", scheme.named);
        return Err(refused(first, what, only_vllm));
    }
    match quantized.find(|(_, other)| *other != scheme) {
        Some((linear, other)) => {
            let what = format!(
                "{} here, {} in `{}`: transformers takes one scheme for all experts of the model",
                other.scheme, scheme.scheme, first.module
            );
            Err(refused(linear, what, only_vllm))
        }
        None => Ok(()),
    }
}

/// GPTQ's kernels want whole words and tiles.
fn words(choices: &[Choice]) -> Result<()> {
    const TILE: usize = 32;
    for (linear, scheme) in choices {
        let Some(scheme) = scheme.filter(|scheme| scheme.named.is_gptq()) else {
            continue;
        };
        if !linear.rows.is_multiple_of(TILE) {
            let what = format!(
                "{} needs out_features in multiples of {TILE} (GPTQModel's kernels), found {}",
                scheme.named, linear.rows
            );
            return Err(refused(
                linear,
                what,
                "keep it with `--linear REGEX=keep`, or choose `--scheme w4a16`",
            ));
        }
    }
    Ok(())
}

/// Kept matrices of another float than the config's: they are written as they are, but every reader makes the config's
/// type of what it loads (vLLM copies into parameters of that type, transformers converts).
pub fn casts(linears: &[Linear], tensors: &[PackedTensor], own: Option<Dtype>) -> Option<String> {
    let own = own?;
    let kept: HashMap<&str, Dtype> = tensors
        .iter()
        // Codes of 8 bits have the name of the matrix.
        .filter(|tensor| !matches!(tensor.content, Content::Packed { .. }))
        .filter_map(|tensor| Some((tensor.name.strip_suffix(".weight")?, tensor.dtype)))
        .collect();
    let others: Vec<(&Linear, Dtype)> = linears
        .iter()
        .filter(|linear| linear.kind != Kind::Router)
        .filter_map(|linear| Some((linear, *kept.get(linear.module.as_str())?)))
        .filter(|(_, dtype)| *dtype != own)
        .collect();
    let (first, dtype) = others.first()?;
    Some(format!(
        "{} kept matrices, such as `{}` in {dtype}, are not of the config's type, which readers make of them: {own}",
        others.len(),
        first.module
    ))
}

fn remarks(choices: &[Choice]) -> Vec<String> {
    let has = |wanted: &dyn Fn(&Linear, &LinearScheme) -> bool| {
        let mut all = choices
            .iter()
            .filter_map(|(linear, scheme)| Some((linear, (*scheme)?)));
        all.any(|(linear, scheme)| wanted(linear, scheme))
    };
    let mut remarks = Vec::new();
    let mut remark = |is_so: bool, text: &str| {
        if is_so {
            remarks.push(text.to_string());
        }
    };
    remark(
        has(&|_, scheme| scheme.named == NamedScheme::W4A8),
        "w4a8 runs in vLLM's CPU build and is simulated by transformers; vLLM on CUDA and SGLang have no kernel for it",
    );
    remark(
        has(&|_, scheme| scheme.named == NamedScheme::W8A16),
        "w8a16 is not read by vLLM's CPU build, which knows 4-bit packed weights only",
    );
    remark(
        has(&|_, scheme| scheme.named == NamedScheme::Gptq8),
        "gptq-8 is not read by vLLM's CPU build",
    );
    remark(
        has(&|_, scheme| scheme.named.is_gptq()) && has(&|linear, _| linear.kind == Kind::Expert),
        "GPTQ's own tools know no MoE of this architecture; vLLM on CUDA reads it",
    );
    let mut gptq: Vec<_> = choices
        .iter()
        .filter_map(|(_, scheme)| scheme.filter(|scheme| scheme.named.is_gptq()))
        .map(|scheme| scheme.grid)
        .collect();
    gptq.sort();
    gptq.dedup();
    remark(
        gptq.len() > 1,
        "several GPTQ settings in one folder need `dynamic`, which transformers ignores",
    );
    remarks.extend(uneven(choices));
    remarks
}

/// What vLLM's CPU kernel does not take.
fn uneven(choices: &[Choice]) -> Option<String> {
    let is_uneven = |(linear, scheme): &&Choice| {
        let has_groups =
            |scheme: &LinearScheme| scheme.named.has_groups() && !scheme.named.is_gptq();
        scheme.is_some_and(has_groups) && !linear.rows.is_multiple_of(32)
    };
    let (first, _) = choices.iter().find(is_uneven)?;
    let count = choices.iter().filter(is_uneven).count();
    Some(format!(
        "vLLM's CPU kernel needs out_features in multiples of 32, which {count} of these matrices have not, such as `{}` with {}",
        first.module, first.rows
    ))
}
