//! `--target-bpw` and `--target-size`: types by measured sensitivity, so that the artifact has the size asked for.

use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use nemoconv::artifact::StoredModel;
use nemoconv::backend::Machines;
use nemoconv::convert::calibrated::sensitivity::trial::{self, Trial, Types};
use nemoconv::convert::calibrated::sensitivity::{Group, Measurement, Sensitivity};
use nemoconv::error::{Error, Fault, Result};
use nemoconv::formats::GgmlType;
use nemoconv::formats::gguf::{DEFAULT_ALIGNMENT, Value as GgufValue};
use nemoconv::model::nemotron_h::Storage;
use nemoconv::plan::allocation::{self, Price};
use nemoconv::plan::file_type::FileType;
use nemoconv::plan::recipe::{Aim, Recipe};
use nemoconv::plan::types::{Scheme, TensorTypeRule};
use nemoconv::plan::{Plan, PlannedTensor};
use regex::Regex;
use serde_json::{Value, json};

use super::args::ToGguf;
use super::calibration_job::{Calibration, Source};
use super::gguf_job::{Prepared, prepare};
use super::output::{Talk, table};
use super::progress::Report;
use super::recipe_job::Chosen;
use super::workers::on_workers;

/// Measures every tensor and chooses types for the recipe's target: a recipe that names a type for each.
pub fn allocate(
    args: &ToGguf,
    machines: &Machines,
    recipe: Recipe,
    talk: &Talk,
    stop: &AtomicBool,
) -> Result<Chosen> {
    let Some(text) = &args.calibration.calibration else {
        let fault = Fault::new("a target needs a text to measure sensitivities on");
        return Err(Error::Plan(fault.hint(
            "give one with `--calibration FILE`, or name a type with `--outtype`",
        )));
    };
    let weights = Arc::new(match recipe.widen {
        true => StoredModel::open_widened(&args.model)?,
        false => StoredModel::open(&args.model)?,
    });
    // What cannot be is refused before the model reads anything.
    let allocator = Allocator::new(args, recipe.clone(), &weights, Vec::new())?;
    allocator.choose(&vec![None; allocator.groups.len()], allocator.budget())?;
    let source = Source {
        checkpoint: &allocator.base.checkpoint,
        plan: &allocator.base.plan,
        type_of: &|name| allocator.middle_type(name),
    };
    let calibration = Calibration::begin(
        args.calibration_flags(machines),
        text,
        &recipe,
        &source,
        talk,
        stop,
    )?;
    let mut recipe = recipe;
    if let Some(rewrite) = &mut recipe.rewrite {
        rewrite.rotation = calibration.rotation().into();
    }
    let allocator = Allocator::new(args, recipe, &weights, calibration.keys())?;
    let measurement = Measurement {
        machines,
        weights: calibration.weights(),
        samples: calibration.samples(),
        rounding: allocator.recipe.rounding,
        groups: &allocator.groups,
        progress: &Report::new(*talk),
        stop,
    };
    let prices = on_workers(args.threads, || measurement.run())?;
    let check = |allocation: Allocation| {
        on_workers(args.threads, || {
            allocation.checked(&allocator, &measurement)
        })
    };
    let mut allocation = check(allocator.fit(prices)?)?;
    if let Some(prices) = allocation.rescaled(&allocator) {
        talk.say(format_args!(
            "measured KL divergence {:.6} instead of {:.6}: prices follow what each block added",
            allocation.measured(),
            allocation.predicted()
        ));
        let again = check(allocator.fit(prices)?)?;
        if again.measured() < allocation.measured() {
            allocation = again;
        }
    }
    talk.say(allocation.table(&allocator));
    talk.say(allocation.summary(&allocator));
    Ok(Chosen {
        calibration: Some(calibration),
        ..allocation.chosen(&allocator)
    })
}

/// How far what is measured may be from what was predicted, as a share of it.
const TOLERANCE: f64 = 0.25;

/// What is allocated, and what it may take.
struct Allocator<'a> {
    args: &'a ToGguf,
    /// What the artifact says of its calibration: bytes that count.
    keys: Vec<(&'static str, GgufValue)>,
    /// With every tensor that is allocated at 8 bits.
    base: Prepared,
    recipe: Recipe,
    groups: Vec<Group>,
}

/// A budget in bytes and how tensors are counted against it.
#[derive(Clone, Copy)]
struct Budget {
    bytes: u64,
    /// What a tensor's bytes are rounded up to.
    alignment: u64,
    /// What everything that is not allocated takes.
    fixed: u64,
}

impl<'a> Allocator<'a> {
    fn new(
        args: &'a ToGguf,
        recipe: Recipe,
        weights: &StoredModel,
        keys: Vec<(&'static str, GgufValue)>,
    ) -> Result<Self> {
        let eight_bits = Scheme::Mix(FileType::Q8_0);
        let chosen = Chosen::of_scheme(recipe.clone(), eight_bits);
        let base = prepare(args, &chosen, &keys)?;
        let types = recipe.settings(eight_bits, true).types;
        let mut groups: Vec<Group> = Vec::new();
        for tensor in &base.plan.tensors {
            let is_run = weights.tensor(&tensor.name).is_some();
            let candidates: Vec<_> = allocation::candidates(tensor.dims[0]).collect();
            let is_open = tensor.rule.storage == Storage::OutType
                && types.override_of(&tensor.name).is_none();
            if !is_open || !is_run || candidates.is_empty() {
                continue;
            }
            let name = allocation::group_of(&tensor.name);
            match groups.iter_mut().find(|group| group.name == name) {
                Some(group) => group.tensors.push(tensor.name.clone()),
                None => groups.push(Group {
                    name,
                    tensors: vec![tensor.name.clone()],
                    types: candidates,
                }),
            }
        }
        Ok(Self {
            args,
            keys,
            base,
            recipe,
            groups,
        })
    }

    fn tensor(&self, name: &str) -> &PlannedTensor {
        let tensors = &self.base.plan.tensors;
        tensors
            .iter()
            .find(|tensor| tensor.name == name)
            .expect("groups are made of planned tensors")
    }

    /// What stands for the type of a tensor before it is chosen: the smallest of about four bits that a group may have.
    fn middle_type(&self, name: &str) -> GgmlType {
        let group = self
            .groups
            .iter()
            .find(|group| group.tensors.iter().any(|tensor| tensor == name));
        let middle = group.and_then(|group| {
            let types = group.types.iter();
            types.copied().find(|ty| ty.bits_per_weight() >= 4.5)
        });
        middle.unwrap_or_else(|| self.base.plan.type_of(name))
    }

    fn budget(&self) -> Budget {
        let plan = &self.base.plan;
        let (bytes, alignment, all) = match self.recipe.aim {
            Aim::FileBytes(bytes) => (
                bytes,
                u64::from(DEFAULT_ALIGNMENT),
                self.base.parts.file_bytes(),
            ),
            Aim::BitsPerWeight(bits) => (
                (bits * plan.weights() as f64 / 8.0) as u64,
                1,
                plan.tensor_bytes(),
            ),
            Aim::OwnType | Aim::Scheme(_) => unreachable!("only a target is allocated"),
        };
        let allocated = self
            .groups
            .iter()
            .map(|group| self.bytes_of(group, |tensor| tensor.ty, alignment));
        Budget {
            bytes,
            alignment,
            fixed: all - allocated.sum::<u64>(),
        }
    }

    fn bytes_of(
        &self,
        group: &Group,
        ty: impl Fn(&PlannedTensor) -> GgmlType,
        alignment: u64,
    ) -> u64 {
        let tensors = group.tensors.iter().map(|name| self.tensor(name));
        let bytes = tensors.map(|tensor| bytes_in(tensor, ty(tensor)).next_multiple_of(alignment));
        bytes.sum()
    }

    /// Whether all tensors of a group may take a type.
    fn is_allowed(group: &Group, ty: GgmlType) -> bool {
        group
            .tensors
            .iter()
            .all(|name| allocation::is_allowed(name, ty))
    }

    /// One type per group, within the budget.
    fn choose(&self, measured: &[Option<Sensitivity>], budget: Budget) -> Result<Vec<GgmlType>> {
        let groups = self.groups.iter().zip(measured);
        let priced = groups.map(|(group, measured)| {
            let allowed = group
                .types
                .iter()
                .filter(|ty| Self::is_allowed(group, **ty));
            let price = |ty: &GgmlType| {
                let bytes = self.bytes_of(group, |_| *ty, budget.alignment);
                (
                    *ty,
                    Price {
                        bytes,
                        loss: measured
                            .as_ref()
                            .map_or(0.0, |measured| divergence(measured, *ty)),
                    },
                )
            };
            allowed.map(price).unzip()
        });
        let (types, prices): (Vec<Vec<GgmlType>>, Vec<Vec<Price>>) = priced.unzip();
        let chosen = allocation::allocate(&prices, budget.bytes.saturating_sub(budget.fixed));
        match chosen {
            Ok(chosen) => Ok(types
                .iter()
                .zip(chosen)
                .map(|(types, index)| types[index])
                .collect()),
            Err(smallest) => Err(self.too_small(smallest + budget.fixed)),
        }
    }

    fn too_small(&self, smallest: u64) -> Error {
        let weights = self.base.plan.weights() as f64;
        let (what, hint) = match self.recipe.aim {
            Aim::BitsPerWeight(bits) => {
                // Rounded up, so that what is suggested is possible.
                let smallest = (smallest as f64 * 8000.0 / weights).ceil() / 1000.0;
                let what = format!(
                    "{bits} bits per weight are not possible: the smallest are {smallest:.3}"
                );
                (
                    what,
                    format!("ask for `--target-bpw {smallest:.3}` or more"),
                )
            }
            _ => {
                let wanted = self.budget().bytes;
                let what = format!("{wanted} bytes are not possible: the smallest are {smallest}");
                (what, format!("ask for `--target-size {smallest}` or more"))
            }
        };
        Error::Plan(Fault::new(what).hint(format!(
            "{hint}; attention keeps 4 bits unless `--tensor-type` says less"
        )))
    }

    /// Chooses types until the artifact, laid out, is within the target: a split set has headers that depend on them.
    fn fit(&self, measured: Vec<Sensitivity>) -> Result<Allocation> {
        let measured: Vec<_> = measured.into_iter().map(Some).collect();
        let mut budget = self.budget();
        loop {
            let types = self.choose(&measured, budget)?;
            let (recipe, scheme) = self.recipe_of(&types)?;
            let prepared = prepare(
                self.args,
                &Chosen::of_scheme(recipe.clone(), scheme),
                &self.keys,
            )?;
            let file_bytes = prepared.parts.file_bytes();
            let excess = match self.recipe.aim {
                Aim::FileBytes(bytes) => file_bytes.saturating_sub(bytes),
                _ => 0,
            };
            if excess == 0 {
                let prices: Vec<_> = measured.into_iter().flatten().collect();
                return Ok(Allocation {
                    mix: self.named_mix(file_bytes, &prices),
                    recipe,
                    scheme,
                    types,
                    prices,
                    file_bytes,
                    plan: prepared.plan,
                    trial: None,
                });
            }
            budget.bytes = budget.bytes.saturating_sub(excess);
        }
    }

    /// The recipe that names every type.
    fn recipe_of(&self, types: &[GgmlType]) -> Result<(Recipe, Scheme)> {
        let mut recipe = self.recipe.clone();
        let settings = recipe.settings(Scheme::Mix(FileType::Q8_0), true).types;
        let allocated = |tensor: &PlannedTensor| {
            let group = self
                .groups
                .iter()
                .position(|group| group.tensors.contains(&tensor.name));
            group.map_or(tensor.ty, |group| types[group])
        };
        for tensor in &self.base.plan.tensors {
            if tensor.rule.storage == Storage::F32 || settings.override_of(&tensor.name).is_some() {
                continue;
            }
            let ty = allocated(tensor).into();
            match tensor.name.as_str() {
                "output.weight" => recipe.output = Some(ty),
                "token_embd.weight" => recipe.token_embedding = Some(ty),
                name => {
                    let pattern = Regex::new(&format!("^{}$", regex::escape(name)));
                    let pattern =
                        pattern.map_err(|error| Error::Plan(Fault::new(error.to_string())))?;
                    recipe.rules.push(TensorTypeRule { pattern, ty });
                }
            }
        }
        let weights = self
            .base
            .plan
            .tensors
            .iter()
            .map(|tensor| (allocated(tensor), tensor.weights()));
        let scheme = Scheme::Mix(FileType::of_most(weights));
        recipe.aim = Aim::Scheme(scheme);
        Ok((recipe, scheme))
    }

    /// The largest named mix that is no larger than the allocation.
    fn named_mix(&self, file_bytes: u64, prices: &[Sensitivity]) -> Option<NamedMix> {
        let header = self.base.parts.file_bytes() - aligned_bytes(&self.base.plan);
        let mixes = FileType::all()
            .filter(|file_type| !file_type.is_float() && self.has_use_of(*file_type))
            .filter_map(|file_type| {
                let mut recipe = self.recipe.clone();
                recipe.allow_fallback = true;
                let settings = recipe.settings(Scheme::Mix(file_type), true);
                let plan = Plan::new(
                    &self.base.checkpoint,
                    self.base.plan.config.clone(),
                    &settings,
                    None,
                )
                .ok()?;
                let groups = self.groups.iter().zip(prices);
                let divergences = groups.map(|(group, prices)| of_plan(&plan, group, prices));
                Some(NamedMix {
                    file_type,
                    file_bytes: header + aligned_bytes(&plan),
                    predicted: divergences.sum::<Option<f64>>()?,
                    types: self.types_of(&plan),
                    measured: None,
                })
            });
        // The header of a mix may be some bytes longer.
        mixes
            .filter(|mix| mix.file_bytes <= file_bytes + file_bytes / 100)
            .max_by_key(|mix| mix.file_bytes)
    }

    /// Whether a mix is made for models of this kind.
    fn has_use_of(&self, file_type: FileType) -> bool {
        file_type != FileType::MXFP4_MOE || self.base.plan.config.moe.is_some()
    }

    /// What a plan gives the tensors that are allocated.
    fn types_of(&self, plan: &Plan) -> Types {
        let names = self.groups.iter().flat_map(|group| &group.tensors);
        names
            .map(|name| (name.clone(), plan.type_of(name)))
            .collect()
    }

    /// The step of the network's trial at which a group comes.
    fn step_of(&self, group: &Group) -> usize {
        let blocks = self.base.plan.config.pattern.kinds().len();
        trial::step_of(&group.tensors[0], blocks)
    }
}

/// A uniform choice to compare with.
struct NamedMix {
    file_type: FileType,
    file_bytes: u64,
    predicted: f64,
    types: Types,
    measured: Option<f64>,
}

impl NamedMix {
    fn measured(&self) -> f64 {
        self.measured.unwrap_or(self.predicted)
    }
}

/// Types and what they were chosen from.
struct Allocation {
    recipe: Recipe,
    scheme: Scheme,
    /// One per group.
    types: Vec<GgmlType>,
    /// One per group.
    prices: Vec<Sensitivity>,
    file_bytes: u64,
    plan: Plan,
    mix: Option<NamedMix>,
    /// What the types do together.
    trial: Option<Trial>,
}

impl Allocation {
    fn predicted(&self) -> f64 {
        let prices = self.prices.iter().zip(&self.types);
        prices.map(|(prices, ty)| divergence(prices, *ty)).sum()
    }

    fn measured(&self) -> f64 {
        let trial = self.trial.as_ref();
        trial.map_or_else(|| self.predicted(), Trial::kl_divergence)
    }

    /// With the network rounded to these types, and to those of the mix beside it.
    fn checked(mut self, allocator: &Allocator, measurement: &Measurement) -> Result<Self> {
        let mix = self.mix.iter().map(|mix| mix.types.clone());
        let own = std::iter::once(allocator.types_of(&self.plan));
        let wanted: Vec<Types> = own.chain(mix).collect();
        let mut trials = measurement.try_types(&wanted)?.into_iter();
        self.trial = trials.next();
        if let Some(mix) = &mut self.mix {
            mix.measured = trials.next().map(|trial| trial.kl_divergence());
        }
        Ok(self)
    }

    /// Prices that follow what each block added, where what was measured is far from what was predicted.
    fn rescaled(&self, allocator: &Allocator) -> Option<Vec<Sensitivity>> {
        let trial = self.trial.as_ref()?;
        let off = (self.measured() - self.predicted()).abs();
        if off <= TOLERANCE * self.predicted() {
            return None;
        }
        let mut predicted = vec![0.0; trial.steps.len()];
        let groups = allocator.groups.iter().zip(&self.prices).zip(&self.types);
        for ((group, prices), ty) in groups {
            predicted[allocator.step_of(group)] += divergence(prices, *ty);
        }
        let factors = trial.rescale(&predicted);
        let scaled = allocator.groups.iter().zip(&self.prices);
        Some(
            scaled
                .map(|(group, prices)| prices.scaled(factors[allocator.step_of(group)]))
                .collect(),
        )
    }

    fn table(&self, allocator: &Allocator) -> String {
        let header = [
            "tensor",
            "type",
            "bits",
            "sensitivity",
            "loss",
            "predicted KL",
        ]
        .map(String::from)
        .to_vec();
        let groups = allocator.groups.iter().zip(&self.prices).zip(&self.types);
        let rows = groups.map(|((group, measured), ty)| {
            let found = measured.types.iter().find(|found| found.ty == *ty);
            vec![
                group.name.clone(),
                ty.to_string(),
                format!("{:.2}", ty.bits_per_weight()),
                format!("{:.3e}", measured.gain),
                found.map_or(String::new(), |found| format!("{:.3e}", found.loss)),
                found.map_or(String::new(), |found| {
                    format!("{:.3e}", found.kl_divergence)
                }),
            ]
        });
        let rows: Vec<_> = std::iter::once(header).chain(rows).collect();
        table(&rows, &[false, false, true, true, true, true])
    }

    fn summary(&self, allocator: &Allocator) -> String {
        let target = match allocator.recipe.aim {
            Aim::FileBytes(bytes) => format!("{} of {bytes} bytes", self.file_bytes),
            _ => format!("{} bytes", self.file_bytes),
        };
        let bits = self.plan.bits_per_weight();
        let beside = match &self.mix {
            Some(mix) => format!(
                "; {} of {} bytes: predicted {:.6}, measured {:.6}",
                mix.file_type,
                mix.file_bytes,
                mix.predicted,
                mix.measured()
            ),
            None => String::new(),
        };
        format!(
            "allocated {bits:.3} bits per weight, {target}, KL divergence predicted {:.6}, measured {:.6}{beside} (measured in a trial without target correction)",
            self.predicted(),
            self.measured()
        )
    }

    fn json(&self, allocator: &Allocator) -> Value {
        let groups = allocator.groups.iter().zip(&self.prices).zip(&self.types);
        let groups: Vec<_> = groups
            .map(|((group, measured), ty)| {
                let types = measured.types.iter().map(|found| {
                    json!({
                        "type": found.ty.name(),
                        "bytes": allocator.bytes_of(group, |_| found.ty, 1),
                        "loss": found.loss,
                        "kl_divergence": found.kl_divergence,
                    })
                });
                json!({
                    "tensors": group.tensors,
                    "type": ty.name(),
                    "sensitivity": measured.gain,
                    "predicted_kl": divergence(measured, *ty),
                    "types": types.collect::<Vec<_>>(),
                })
            })
            .collect();
        let target = match allocator.recipe.aim {
            Aim::FileBytes(bytes) => json!({ "file_bytes": bytes }),
            Aim::BitsPerWeight(bits) => json!({ "bits_per_weight": bits }),
            Aim::OwnType | Aim::Scheme(_) => Value::Null,
        };
        let mix = self.mix.as_ref().map(|mix| {
            json!({
                "file_type": mix.file_type.name(),
                "file_bytes": mix.file_bytes,
                "predicted_kl": mix.predicted,
                "measured_kl": mix.measured,
            })
        });
        json!({
            "target": target,
            "file_bytes": self.file_bytes,
            "bits_per_weight": self.plan.bits_per_weight(),
            "predicted_kl": self.predicted(),
            "measured_kl": self.trial.as_ref().map(Trial::kl_divergence),
            "named_mix": mix,
            "groups": groups,
        })
    }

    fn chosen(self, allocator: &Allocator) -> Chosen {
        Chosen {
            allocation: Some(self.json(allocator)),
            name: format!("{:.2}bpw", self.plan.bits_per_weight()),
            recipe: self.recipe,
            scheme: self.scheme,
            calibration: None,
        }
    }
}

/// What a type adds to the divergence; a type that was not looked at is a float, or nothing reads the tensor.
fn divergence(measured: &Sensitivity, ty: GgmlType) -> f64 {
    measured
        .types
        .iter()
        .find(|found| found.ty == ty)
        .map_or(0.0, |found| found.kl_divergence)
}

/// What a group adds with the types of a plan, its tensors by their weights; `None` where one was not looked at.
fn of_plan(plan: &Plan, group: &Group, measured: &Sensitivity) -> Option<f64> {
    let tensors = plan
        .tensors
        .iter()
        .filter(|tensor| group.tensors.contains(&tensor.name));
    let (mut sum, mut weights) = (0.0, 0.0);
    for tensor in tensors {
        let is_float = matches!(tensor.ty, GgmlType::F32 | GgmlType::F16 | GgmlType::BF16);
        if !is_float && !group.types.contains(&tensor.ty) {
            return None;
        }
        sum += divergence(measured, tensor.ty) * tensor.weights() as f64;
        weights += tensor.weights() as f64;
    }
    Some(sum / f64::max(weights, 1.0))
}

fn bytes_in(tensor: &PlannedTensor, ty: GgmlType) -> u64 {
    ty.bytes_for(tensor.weights())
        .expect("candidates fit the rows")
}

fn aligned_bytes(plan: &Plan) -> u64 {
    plan.tensors
        .iter()
        .map(|tensor| {
            tensor
                .bytes()
                .next_multiple_of(u64::from(DEFAULT_ALIGNMENT))
        })
        .sum()
}
