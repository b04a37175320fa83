//! What is conspicuous in the figures of the logits level, whatever the gates.
//!
//! Enters: drift of predictions and blocks, and the noise floor. Leaves: findings.

use crate::report::text::figure;
use crate::report::{Finding, LayerDrift, LogitsDrift, NoiseFloor, Rule};

/// A block is an outlier if it adds this many times the median error (squared: errors of blocks add as squares).
const OUTLIER_FACTOR: f64 = 16.0;
/// And this many times the error that rounding alone gives there.
const NOISE_FACTOR: f64 = 4.0;
/// With fewer blocks there is no usual error.
const MIN_LAYERS: usize = 5;
/// Share of tokens with other experts that is worth a finding.
const CHANGED_ROUTING: f64 = 0.25;

/// Findings of the logits level. Gates are judged elsewhere.
pub fn findings(
    logits: Option<&LogitsDrift>,
    layers: &[LayerDrift],
    noise_floor: Option<&NoiseFloor>,
) -> Vec<Finding> {
    let floor = noise_floor.map_or(&[][..], |floor| &floor.layers);
    // From the first block that computes no number on, errors are those of few tokens or of none.
    let broken = layers.iter().position(|layer| layer.non_finite_tokens > 0);
    let sound = &layers[..broken.unwrap_or(layers.len())];
    let mut findings: Vec<_> = logits
        .and_then(|drift| not_finite(drift, layers))
        .into_iter()
        .collect();
    findings.extend(outliers(sound, floor));
    findings.extend(sound.iter().filter_map(growing_state));
    findings.extend(sound.iter().filter_map(|layer| routing(layer, floor)));
    findings
}

fn not_finite(logits: &LogitsDrift, layers: &[LayerDrift]) -> Option<Finding> {
    let count = logits.non_finite_positions;
    let of = count + logits.positions;
    let message = format!(
        "{count} of {of} positions have a logit that is not a number, or were run together with one that has"
    );
    let finding = (count > 0).then(|| Finding::new(Rule::NonFiniteLogits, message))?;
    match layers.iter().find(|layer| layer.non_finite_tokens > 0) {
        Some(layer) => Some(finding.in_layer(layer.layer)),
        None => Some(finding),
    }
}

fn outliers(layers: &[LayerDrift], floor: &[LayerDrift]) -> Vec<Finding> {
    let added: Vec<f64> = layers
        .windows(2)
        .map(|pair| added_square(&pair[0], &pair[1]))
        .collect();
    let mut sorted = added.clone();
    sorted.sort_unstable_by(f64::total_cmp);
    let median = sorted.get(sorted.len() / 2).copied().unwrap_or(0.0);
    let is_outlier = |layer: &LayerDrift, added: f64| {
        let noise = relative_error_of(floor, layer.layer) * NOISE_FACTOR;
        layers.len() >= MIN_LAYERS && added > OUTLIER_FACTOR * median && added > noise * noise
    };
    // The first block carries the error of the embedding and is nobody's neighbour.
    let candidates = layers.iter().skip(1).zip(added);
    candidates
        .filter(|(layer, added)| is_outlier(layer, *added))
        .map(|(layer, added)| {
            let message = format!(
                "this {} block adds a relative error of {}, the median block adds {}",
                layer.kind,
                figure(added.sqrt()),
                figure(median.sqrt())
            );
            Finding::new(Rule::LayerDriftOutlier, message).in_layer(layer.layer)
        })
        .collect()
}

fn added_square(before: &LayerDrift, after: &LayerDrift) -> f64 {
    (after.relative_error.powi(2) - before.relative_error.powi(2)).max(0.0)
}

fn relative_error_of(layers: &[LayerDrift], index: usize) -> f64 {
    let layer = layers.iter().find(|layer| layer.layer == index);
    layer.map_or(0.0, |layer| layer.relative_error)
}

fn growing_state(layer: &LayerDrift) -> Option<Finding> {
    let state = layer.state.as_ref()?;
    let worst = state.growing.first()?;
    let message = format!(
        "{} of {} heads grow; head {} reaches {} with slope {:.2}",
        state.growing.len(),
        state.heads,
        worst.head,
        figure(worst.relative_error.last().copied().unwrap_or(0.0)),
        worst.growth
    );
    Some(Finding::new(Rule::StateDriftGrows, message).in_layer(layer.layer))
}

fn routing(layer: &LayerDrift, floor: &[LayerDrift]) -> Option<Finding> {
    let changed = layer.experts.as_ref()?.changed_tokens;
    let same = floor.iter().find(|known| known.layer == layer.layer);
    let noise = same.and_then(|known| Some(known.experts.as_ref()?.changed_tokens));
    if changed <= CHANGED_ROUTING || changed <= NOISE_FACTOR * noise.unwrap_or(0.0) {
        return None;
    }
    let message = format!(
        "{:.1} % of the tokens are routed to other experts",
        100.0 * changed
    );
    Some(Finding::new(Rule::ExpertRoutingChanges, message).in_layer(layer.layer))
}

#[cfg(test)]
mod tests {
    use super::super::drift::{DriftAccumulator, ScoredPosition};
    use super::super::layers::LayerAccumulator;
    use super::*;
    use crate::report::ExpertDrift;

    fn layers(errors: &[f64]) -> Vec<LayerDrift> {
        let mut layers = LayerAccumulator::new(vec!["mlp"; errors.len()], 512).finish();
        for (layer, error) in layers.iter_mut().zip(errors) {
            layer.relative_error = *error;
        }
        layers
    }

    fn found(layers: &[LayerDrift]) -> Vec<(Rule, Option<usize>)> {
        let findings = findings(None, layers, None);
        findings
            .into_iter()
            .map(|f| (f.rule, f.place.layer))
            .collect()
    }

    #[test]
    fn a_block_that_adds_too_much_is_named() {
        let steady = [0.05, 0.051, 0.052, 0.053, 0.054, 0.055];
        assert_eq!(found(&layers(&steady)), []);
        let broken = [0.05, 0.051, 0.052, 0.2, 0.201, 0.202];
        assert_eq!(
            found(&layers(&broken)),
            [(Rule::LayerDriftOutlier, Some(3))]
        );
        assert_eq!(found(&layers(&broken[..4])), []);
    }

    #[test]
    fn routing_that_changes_is_named_unless_rounding_does_it_too() {
        let routed = |changed_tokens| {
            let mut layers = layers(&[0.0]);
            layers[0].experts = Some(ExpertDrift {
                tokens: 100,
                changed_tokens,
                changed_experts: 0.1,
            });
            layers
        };
        assert_eq!(found(&routed(0.3)), [(Rule::ExpertRoutingChanges, Some(0))]);
        assert_eq!(found(&routed(0.2)), []);
        let floor = NoiseFloor {
            what: String::new(),
            logits: DriftAccumulator::new(512, 8).finish(),
            layers: routed(0.1),
        };
        assert_eq!(findings(None, &routed(0.3), Some(&floor)), []);
    }

    #[test]
    fn logits_that_are_not_numbers_name_the_first_block() {
        let mut drift = DriftAccumulator::new(512, 8);
        drift.push(ScoredPosition::new(256, None));
        let mut layers = layers(&[0.1, 0.1]);
        layers[1].non_finite_tokens = 3;
        let found = findings(Some(&drift.finish()), &layers, None);
        assert_eq!(found[0].rule, Rule::NonFiniteLogits);
        assert_eq!(found[0].place.layer, Some(1));
        assert!(found[0].message.starts_with("1 of 1 positions"));
        // What its followers say is of few tokens or of none.
        let mut broken = self::layers(&[0.05, 0.051, 0.052, 0.053, 0.054, 0.055, 0.0, 2.0]);
        broken[6].non_finite_tokens = 3;
        assert_eq!(self::found(&broken), []);
    }
}
