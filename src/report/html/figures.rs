//! The plots of a validation report.
//!
//! Enters: the report's figures. Leaves: one `figure` element each, or nothing where nothing was measured.

use std::collections::BTreeMap;

use maud::{Markup, html};

use super::plot::{Frame, Shape, Ticks, legend, short};
use super::scale::Scale;
use crate::report::text::{figure as number, percent};
use crate::report::{
    BucketDrift, Estimate, LayerDrift, LogitsDrift, TensorError, ValidationReport,
};

const BOTH: Ticks = Ticks { x: true, y: true };
const ONLY_Y: Ticks = Ticks { x: false, y: true };
const ONLY_X: Ticks = Ticks { x: true, y: false };

/// All plots there is something to plot for.
pub(super) fn all(report: &ValidationReport) -> Vec<Markup> {
    let floor = report.noise_floor.as_ref();
    let floor_layers = floor.map_or(&[][..], |floor| &floor.layers);
    let floor_logits = floor.map(|floor| &floor.logits);
    let logits = report.logits.as_ref().filter(|logits| logits.positions > 0);
    let mut plots = vec![layer_errors(&report.layers, floor_layers)];
    plots.push(logits.and_then(|logits| kl_histogram(logits, floor_logits)));
    plots.push(tensor_errors(&report.tensors));
    plots.push(logits.and_then(|logits| kl_by_position(logits, floor_logits)));
    plots.push(logits.and_then(|logits| perplexity_by_position(&logits.buckets)));
    plots.push(state_drift(&report.layers));
    plots.push(expert_changes(&report.layers, floor_layers));
    plots.into_iter().flatten().collect()
}

fn figure(title: &str, caption: &str, plot: &Markup) -> Markup {
    html! {
        figure {
            h3 { (title) }
            figcaption { (caption) }
            (plot)
        }
    }
}

/// Kinds of block in the order of their marks; unknown ones look like the last.
const KINDS: [&str; 4] = ["mamba2", "attention", "mlp", "moe"];

fn kind_index(kind: &str) -> usize {
    let index = KINDS.iter().position(|known| *known == kind);
    index.unwrap_or(KINDS.len() - 1)
}

fn kind_legend(layers: &[LayerDrift], has_floor: bool) -> Markup {
    let present = |index: &usize| layers.iter().any(|layer| kind_index(&layer.kind) == *index);
    let entry = |index: usize| (Shape::ALL[index], format!("k{index}"), KINDS[index].into());
    let mut entries: Vec<_> = (0..KINDS.len()).filter(present).map(entry).collect();
    if has_floor {
        entries.push((Shape::Disc, "m-floor".into(), "noise floor".into()));
    }
    legend(&entries)
}

fn layer_scale(layers: &[LayerDrift]) -> Scale {
    let last = layers.iter().map(|layer| layer.layer).max().unwrap_or(0);
    Scale::between(-0.5, last as f64 + 0.5)
}

fn layer_errors(layers: &[LayerDrift], floor: &[LayerDrift]) -> Option<Markup> {
    if layers.is_empty() {
        return None;
    }
    let errors = layers.iter().chain(floor).map(|layer| layer.relative_error);
    let frame = Frame::new(layer_scale(layers), Scale::log(errors));
    let points = |layers: &[LayerDrift]| -> Vec<(f64, f64)> {
        let points = layers
            .iter()
            .map(|layer| (layer.layer as f64, layer.relative_error));
        points.collect()
    };
    let marks = html! {
        @if !floor.is_empty() { (frame.line("s-floor", points(floor))) }
        (frame.line("s-link", points(layers)))
        @for layer in layers {
            @let index = kind_index(&layer.kind);
            @let tooltip = format!("layer {} ({}): {}", layer.layer, layer.kind, number(layer.relative_error));
            (frame.mark(Shape::ALL[index], &format!("k{index}"), (layer.layer as f64, layer.relative_error), &tooltip))
        }
    };
    let title = "Drift per layer";
    let plot = html! {
        (kind_legend(layers, !floor.is_empty()))
        (frame.render(title, "layer", &BOTH, &marks))
    };
    Some(figure(
        title,
        "Relative error of each block's output, mean over tokens.",
        &plot,
    ))
}

fn kl_histogram(logits: &LogitsDrift, floor: Option<&LogitsDrift>) -> Option<Markup> {
    let shares = |drift: &LogitsDrift| -> Vec<f64> {
        let of = drift.positions.max(1) as f64;
        drift
            .kl_histogram
            .counts
            .iter()
            .map(|&count| count as f64 / of)
            .collect()
    };
    let (bars, floor_bars) = (shares(logits), floor.map(shares).unwrap_or_default());
    let used = |bin: &usize| bars[*bin] > 0.0 || floor_bars.get(*bin).is_some_and(|bar| *bar > 0.0);
    let first = (0..bars.len()).find(used)?;
    let last = (0..bars.len()).rfind(used)?;
    let edges = &logits.kl_histogram.edges;
    if edges.len() != bars.len() + 1 {
        return None;
    }
    let x = Scale::log([edges[first] * 1.001, edges[last + 1] * 0.999]);
    let y = Scale::linear(bars.iter().chain(&floor_bars).map(|share| 100.0 * share));
    let frame = Frame::new(x, y);
    let bar = |bin: usize, share: f64, class: &str| {
        bar(&frame, class, (edges[bin], edges[bin + 1]), share)
    };
    let distribution = &logits.kl_divergence;
    let marks = html! {
        @for bin in first..=last {
            @if let Some(share) = floor_bars.get(bin) { (bar(bin, *share, "m-floor soft")) }
            (bar(bin, bars[bin], "m-artifact"))
        }
        (upright(&frame, distribution.mean.value, "mean", 4.0))
        (upright(&frame, distribution.p99, "99 %", 18.0))
    };
    let title = "KL divergence per position";
    let entries = [
        (Shape::Square, "m-artifact".into(), "artifact".into()),
        (Shape::Square, "m-floor".into(), "noise floor".into()),
    ];
    let entries = &entries[..if floor.is_some() { 2 } else { 1 }];
    let plot = html! {
        (legend(entries))
        (frame.render(title, "KL divergence in nats", &BOTH, &marks))
    };
    let (mean, p99) = (number(distribution.mean.value), number(distribution.p99));
    let caption = format!("Share of scored positions in %. Mean {mean}, 99 % {p99}.");
    Some(figure(title, &caption, &plot))
}

fn bar(frame: &Frame, class: &str, (from, to): (f64, f64), share: f64) -> Markup {
    let (left, right) = (frame.at_x(from), frame.at_x(to));
    let top = frame.at_y(100.0 * share);
    html! {
        @if share > 0.0 {
            rect class=(class) x=(short(left + 0.5)) width=(short((right - left - 1.0).max(0.5)))
                y=(short(top)) height=(short(frame.bottom() - top)) {
                title { (percent(share)) " from " (number(from)) " to " (number(to)) }
            }
        }
    }
}

/// A vertical line with its name, `down` from the top.
fn upright(frame: &Frame, value: f64, name: &str, down: f64) -> Markup {
    let x = frame.at_x(value);
    let is_right = x > frame.right() - 60.0;
    let (anchor, dx) = if is_right {
        ("end", -5.0)
    } else {
        ("start", 5.0)
    };
    html! {
        line class="s-mark" x1=(short(x)) x2=(short(x)) y1=(frame.top) y2=(frame.bottom()) {}
        text class="strong" x=(short(x + dx)) y=(frame.top + down + 6.0) text-anchor=(anchor) {
            (name)
        }
    }
}

fn tensor_errors(tensors: &[TensorError]) -> Option<Markup> {
    let mut by_type: BTreeMap<&str, Vec<&TensorError>> = BTreeMap::new();
    for tensor in tensors {
        by_type.entry(&tensor.ty).or_default().push(tensor);
    }
    if by_type.is_empty() {
        return None;
    }
    let errors = tensors
        .iter()
        .flat_map(|tensor| [Some(tensor.relative_error), tensor.expected]);
    let x = Scale::log(errors.flatten());
    let mut frame = Frame::new(x, Scale::between(0.0, by_type.len() as f64));
    frame.left = 92.0;
    frame.height = 60.0 + 26.0 * by_type.len() as f64;
    let rows = by_type.iter().rev().enumerate();
    let marks = html! {
        @for (row, (ty, tensors)) in rows { (type_row(&frame, row as f64 + 0.5, ty, tensors)) }
    };
    let title = "Error per tensor type";
    let entries = [
        (Shape::Disc, "m-artifact".into(), "one tensor".into()),
        (Shape::Disc, "m-fail".into(), "above expectation".into()),
    ];
    let plot = html! {
        (legend(&entries))
        (frame.render(title, "relative error", &ONLY_X, &marks))
    };
    let caption = "Upright marks: what rounding normal weights to the type gives. Number of tensors after the type.";
    Some(figure(title, caption, &plot))
}

/// How far above its expectation an error may lie before it is coloured.
const EXPECTATION_MARGIN: f64 = 1.5;

fn type_row(frame: &Frame, row: f64, ty: &str, tensors: &[&TensorError]) -> Markup {
    let y = short(frame.at_y(row));
    let exact = tensors.iter().all(|tensor| tensor.relative_error == 0.0);
    let expected = tensors
        .iter()
        .filter_map(|tensor| tensor.expected)
        .fold(0.0, f64::max);
    html! {
        line class="grid" x1=(frame.left) x2=(frame.right()) y1=(y) y2=(y) {}
        text class="strong" x=(frame.left - 8.0) y=(y) dy="4" text-anchor="end" { (ty) " (" (tensors.len()) ")" }
        @if exact {
            text x=(frame.left + 6.0) y=(y) dy="-3" { "exact" }
        }
        @if expected > 0.0 {
            @let x = short(frame.at_x(expected));
            line class="s-mark" x1=(x) x2=(x) y1=(y - 9.0) y2=(y + 9.0) {}
        }
        @for tensor in tensors.iter().filter(|tensor| tensor.relative_error > 0.0) {
            @let is_high = tensor.expected.is_some_and(|e| tensor.relative_error > EXPECTATION_MARGIN * e);
            @let class = if is_high { "m-fail" } else { "m-artifact soft" };
            @let tooltip = format!("{}: {}", tensor.name, number(tensor.relative_error));
            (frame.mark(Shape::Disc, class, (tensor.relative_error, row), &tooltip))
        }
    }
}

fn span(bucket: &BucketDrift) -> String {
    format!("{} to {}", bucket.from, bucket.to.saturating_sub(1))
}

/// Two series of estimates over the buckets: class, name, estimates.
type Series<'a> = (&'a str, &'a str, Vec<Estimate>);

fn by_position(
    title: &str,
    caption: &str,
    buckets: &[BucketDrift],
    series: &[Series],
) -> Option<Markup> {
    if buckets.is_empty() {
        return None;
    }
    let tops = series.iter().flat_map(|(_, _, estimates)| estimates);
    let y = Scale::linear(tops.map(|estimate| estimate.value + estimate.error));
    let frame = Frame::new(Scale::between(0.0, buckets.len() as f64), y);
    let shapes = [Shape::Disc, Shape::Square];
    let marks = html! {
        @for (index, bucket) in buckets.iter().enumerate() {
            text x=(short(frame.at_x(index as f64 + 0.5))) y=(frame.bottom() + 16.0) text-anchor="middle" {
                (span(bucket))
            }
        }
        @for ((offset, shape), (class, name, estimates)) in [0.42, 0.58].iter().zip(shapes).zip(series) {
            @for (index, estimate) in estimates.iter().enumerate() {
                @let tooltip = format!("{name}: {} ± {}", number(estimate.value), number(estimate.error));
                @let y = (estimate.value, estimate.error);
                (frame.whisker(shape, class, index as f64 + offset, y, &tooltip))
            }
        }
    };
    let entries = shapes.iter().zip(series);
    let entries: Vec<_> = entries
        .map(|(shape, (class, name, _))| (*shape, format!("m-{class}"), name.to_string()))
        .collect();
    let plot = html! {
        (legend(&entries))
        (frame.render(title, "position in the chunk", &ONLY_Y, &marks))
    };
    Some(figure(title, caption, &plot))
}

fn kl_by_position(logits: &LogitsDrift, floor: Option<&LogitsDrift>) -> Option<Markup> {
    let estimates = |drift: &LogitsDrift| {
        drift
            .buckets
            .iter()
            .map(|bucket| bucket.kl_divergence)
            .collect()
    };
    let mut series: Vec<Series> = vec![("artifact", "artifact", estimates(logits))];
    if let Some(floor) = floor {
        series.push(("floor", "noise floor", estimates(floor)));
    }
    let caption =
        "Mean and standard error, in nats. Rising with the position: errors pile up over time.";
    by_position(
        "KL divergence by position",
        caption,
        &logits.buckets,
        &series,
    )
}

fn perplexity_by_position(buckets: &[BucketDrift]) -> Option<Markup> {
    let series = [
        (
            "artifact",
            "artifact",
            buckets.iter().map(|bucket| bucket.perplexity).collect(),
        ),
        (
            "floor",
            "reference",
            buckets
                .iter()
                .map(|bucket| bucket.perplexity_reference)
                .collect(),
        ),
    ];
    let caption =
        "Mean and standard error. The errors are mostly those of the text, common to both.";
    by_position("Perplexity by position", caption, buckets, &series)
}

fn state_drift(layers: &[LayerDrift]) -> Option<Markup> {
    let states: Vec<_> = layers
        .iter()
        .filter_map(|layer| Some((layer.layer, layer.state.as_ref()?)))
        .collect();
    let times = states.iter().flat_map(|(_, state)| &state.times);
    let last = times.max().copied()?;
    let heads = states
        .iter()
        .flat_map(|(_, state)| &state.growing)
        .map(|head| &head.relative_error);
    let errors = states
        .iter()
        .map(|(_, state)| &state.relative_error)
        .chain(heads)
        .flatten();
    let frame = Frame::new(
        Scale::between(0.0, last as f64),
        Scale::linear(errors.copied()),
    );
    let points = |times: &[u64], errors: &[f64]| -> Vec<(f64, f64)> {
        times
            .iter()
            .map(|&time| time as f64)
            .zip(errors.iter().copied())
            .collect()
    };
    let marks = html! {
        @for (layer, state) in &states {
            g {
                title { "layer " (layer) ", mean of " (state.heads) " heads" }
                (frame.line("s-artifact soft", points(&state.times, &state.relative_error)))
            }
            @for head in &state.growing {
                g {
                    title { "layer " (layer) ", head " (head.head) ", slope " (number(head.growth)) }
                    (frame.line("s-fail", points(&state.times, &head.relative_error)))
                }
            }
        }
    };
    let title = "SSM state drift over time";
    let entries = [
        (Shape::Disc, "m-artifact".into(), "a layer".into()),
        (Shape::Disc, "m-fail".into(), "a head that grows".into()),
    ];
    let plot = html! {
        (legend(&entries))
        (frame.render(title, "tokens", &BOTH, &marks))
    };
    Some(figure(
        title,
        "Relative error of the states, mean over heads and chunks.",
        &plot,
    ))
}

fn expert_changes(layers: &[LayerDrift], floor: &[LayerDrift]) -> Option<Markup> {
    let points = |layers: &[LayerDrift]| -> Vec<(f64, f64)> {
        let point = |layer: &LayerDrift| {
            Some((
                layer.layer as f64,
                100.0 * layer.experts.as_ref()?.changed_tokens,
            ))
        };
        layers.iter().filter_map(point).collect()
    };
    let (changed, floor) = (points(layers), points(floor));
    if changed.is_empty() {
        return None;
    }
    let shares = changed.iter().chain(&floor).map(|point| point.1);
    let frame = Frame::new(layer_scale(layers), Scale::linear(shares));
    let marks = html! {
        @for (class, shape, points) in [("m-floor", Shape::Square, &floor), ("m-artifact", Shape::Disc, &changed)] {
            @for point in points {
                @let tooltip = format!("layer {}: {} %", point.0, number(point.1));
                (frame.mark(shape, class, *point, &tooltip))
            }
        }
    };
    let title = "Expert sets that change";
    let entries = [
        (Shape::Disc, "m-artifact".into(), "artifact".into()),
        (Shape::Square, "m-floor".into(), "noise floor".into()),
    ];
    let entries = &entries[..if floor.is_empty() { 1 } else { 2 }];
    let plot = html! {
        (legend(entries))
        (frame.render(title, "layer", &BOTH, &marks))
    };
    Some(figure(
        title,
        "Share of tokens routed to other experts, in %.",
        &plot,
    ))
}
