//! The frame of a plot and the marks in it, as SVG that follows the page's colours.
//!
//! Enters: scales, points. Leaves: markup. Knows not what is plotted.

use maud::{Markup, html};

use super::scale::Scale;

/// Drawn at this width, so that text has its size on a phone.
const WIDTH: f64 = 380.0;
const RIGHT: f64 = 10.0;
const BOTTOM: f64 = 38.0;

/// A plot with two axes.
#[derive(Debug, Clone)]
pub(super) struct Frame {
    pub x: Scale,
    pub y: Scale,
    pub left: f64,
    pub top: f64,
    pub height: f64,
}

impl Frame {
    /// A frame with room for tick labels.
    pub fn new(x: Scale, y: Scale) -> Self {
        Self {
            x,
            y,
            left: 46.0,
            top: 12.0,
            height: 250.0,
        }
    }

    pub fn bottom(&self) -> f64 {
        self.height - BOTTOM
    }

    pub fn right(&self) -> f64 {
        WIDTH - RIGHT
    }

    pub fn at_x(&self, value: f64) -> f64 {
        self.left + self.x.place(value) * (self.right() - self.left)
    }

    pub fn at_y(&self, value: f64) -> f64 {
        self.bottom() - self.y.place(value) * (self.bottom() - self.top)
    }

    /// The whole plot: `title` is read out, `x_label` stands below the axis.
    pub fn render(&self, title: &str, x_label: &str, ticks: &Ticks, marks: &Markup) -> Markup {
        html! {
            svg viewBox=(format!("0 0 {WIDTH} {}", self.height)) role="img" aria-label=(title) {
                @if ticks.y { (self.y_axis()) }
                @if ticks.x { (self.x_axis()) }
                line class="axis" x1=(self.left) x2=(self.right()) y1=(self.bottom()) y2=(self.bottom()) {}
                text x=(middle(self.left, self.right())) y=(self.height - 4.0) text-anchor="middle" { (x_label) }
                (marks)
            }
        }
    }

    fn y_axis(&self) -> Markup {
        html! {
            @for (value, label) in self.y.ticks() {
                @let y = short(self.at_y(value));
                line class="grid" x1=(self.left) x2=(self.right()) y1=(y) y2=(y) {}
                text x=(self.left - 6.0) y=(y) dy="4" text-anchor="end" { (label) }
            }
        }
    }

    fn x_axis(&self) -> Markup {
        html! {
            @for (value, label) in self.x.ticks() {
                @let x = short(self.at_x(value));
                line class="grid" x1=(x) x2=(x) y1=(self.top) y2=(self.bottom()) {}
                text x=(x) y=(self.bottom() + 16.0) text-anchor="middle" { (label) }
            }
        }
    }

    /// A line through points.
    pub fn line(&self, class: &str, points: impl IntoIterator<Item = (f64, f64)>) -> Markup {
        let places = points
            .into_iter()
            .map(|(x, y)| format!("{},{}", short(self.at_x(x)), short(self.at_y(y))));
        let places: Vec<_> = places.collect();
        html! { polyline class=(class) points=(places.join(" ")) {} }
    }

    /// A mark at a point with its tooltip.
    pub fn mark(&self, shape: Shape, class: &str, (x, y): (f64, f64), tooltip: &str) -> Markup {
        html! {
            path class=(class) d=(shape.path(self.at_x(x), self.at_y(y))) { title { (tooltip) } }
        }
    }

    /// A value with its standard error.
    pub fn whisker(
        &self,
        shape: Shape,
        class: &str,
        x: f64,
        y: (f64, f64),
        tooltip: &str,
    ) -> Markup {
        let (value, error) = y;
        let at = short(self.at_x(x));
        html! {
            line class=(format!("s-{class}")) x1=(at) x2=(at)
                y1=(short(self.at_y(value - error))) y2=(short(self.at_y(value + error))) {}
            (self.mark(shape, &format!("m-{class}"), (x, value), tooltip))
        }
    }
}

/// Which axes have ticks of their own.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ticks {
    pub x: bool,
    pub y: bool,
}

/// The shape of a mark, so that kinds differ without colours.
#[derive(Debug, Clone, Copy)]
pub(super) enum Shape {
    Disc,
    Square,
    Diamond,
    Triangle,
}

impl Shape {
    pub const ALL: [Self; 4] = [Self::Disc, Self::Diamond, Self::Square, Self::Triangle];

    pub fn path(self, x: f64, y: f64) -> String {
        let (x, y) = (short(x), short(y));
        match self {
            Self::Disc => format!("M{x} {y}m-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0"),
            Self::Square => format!("M{x} {y}m-3.5 -3.5h7v7h-7z"),
            Self::Diamond => format!("M{x} {y}m0 -5l5 5l-5 5l-5 -5z"),
            Self::Triangle => format!("M{x} {y}m0 -5l5 9h-10z"),
        }
    }
}

/// Marks and what they stand for, above the plot.
pub(super) fn legend(entries: &[(Shape, String, String)]) -> Markup {
    html! {
        ul.legend {
            @for (shape, class, label) in entries {
                li {
                    svg viewBox="0 0 12 12" aria-hidden="true" { path class=(class) d=(shape.path(6.0, 6.0)) {} }
                    (label)
                }
            }
        }
    }
}

fn middle(a: f64, b: f64) -> f64 {
    (a + b) / 2.0
}

/// One decimal is enough for a screen.
pub(super) fn short(value: f64) -> f64 {
    (value * 10.0).round() / 10.0
}
