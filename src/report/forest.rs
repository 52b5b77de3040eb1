//! A forest plot: a row a statistic, its estimate as a point on its interval, with the numbers
//! beside it.

use super::{
    accuracy::Estimate,
    figure::{Anchor, Axis, Figure, Screen, nice_step, tick_label},
};

/// One row: a label, and an estimate for each series.
#[derive(Clone, Debug)]
pub struct Row {
    /// Stands to the left of the axis.
    pub label: String,
    /// In the order of [`Forest::series`].
    pub estimates: Vec<Estimate>,
    /// A row that sums others up; a rule sets it apart from what stands above.
    pub total: bool,
}

/// What the rows have in common.
#[derive(Clone, Debug)]
pub struct Forest<'a> {
    /// What a screen reader says.
    pub label: &'a str,
    /// Under the axis.
    pub axis: &'a str,
    /// Names of the series; a single one is not named.
    pub series: &'a [&'a str],
    /// Where chance, or no difference, lies.
    pub reference: f64,
    /// The axis ends here at the latest, and longer intervals in an arrow.
    pub bounds: (f64, f64),
    /// Written before numbers above zero.
    pub signed: bool,
}

/// Not the orange of high risk.
const COLOURS: [&str; 2] = ["c0", "c2"];
const LINE: f64 = 19.0;
const GAP: f64 = 11.0;
/// The axis shows at least this much, also where all estimates are one.
const LEAST_SPAN: f64 = 0.02;

/// Draws the rows one below the other, over an axis that spans them within the bounds.
pub fn figure(forest: &Forest, rows: &[Row], screen: Screen) -> Figure {
    let (width, left, right) = (screen.width(), screen.pick(176.0, 116.0), screen.pick(216.0, 168.0));
    let named = forest.series.len() > 1;
    let top = if named { 34.0 } else { 12.0 };
    let height_of = |row: &Row| LINE * row.estimates.len() as f64 + GAP;
    let bottom = top + rows.iter().map(height_of).sum::<f64>();
    let mut figure = Figure::new(width, bottom + 46.0, forest.label);

    let ends =
        rows.iter().flat_map(|row| &row.estimates).flat_map(|e| e.interval.into_iter().flatten().chain(e.estimate));
    let (low, high) = ends.fold((forest.reference, forest.reference), |(a, b), x| (a.min(x), b.max(x)));
    let (low, high) =
        if high - low < LEAST_SPAN { (low - LEAST_SPAN / 2.0, high + LEAST_SPAN / 2.0) } else { (low, high) };
    let step = nice_step((high - low).min(forest.bounds.1 - forest.bounds.0), screen.pick(6, 3));
    let from = ((low / step + 1e-9).floor() * step).max(forest.bounds.0);
    let to = ((high / step - 1e-9).ceil() * step).min(forest.bounds.1);
    let x = Axis::new((from, to), (left, width - right));
    for tick in x.ticks(step) {
        figure.line("grid", (x.at(tick), top), (x.at(tick), bottom));
        figure.text("muted", Anchor::Middle, (x.at(tick), bottom + 18.0), &tick_label(tick, step));
    }
    figure.line("guide", (x.at(forest.reference), top), (x.at(forest.reference), bottom));
    figure.text("muted", Anchor::Middle, ((left + width - right) / 2.0, bottom + 38.0), forest.axis);
    if named {
        let mut at = left;
        for (i, name) in forest.series.iter().enumerate() {
            figure.group(COLOURS[i % 2], |figure| {
                figure.line("curve", (at, 12.0), (at + 22.0, 12.0));
                figure.circle("solid", (at + 11.0, 12.0), 4.0);
            });
            figure.text("", Anchor::Start, (at + 31.0, 16.0), name);
            at += 60.0 + 7.0 * name.len() as f64;
        }
    }

    let mut y = top;
    let mut totals = false;
    for row in rows {
        if row.total && !totals && y > top {
            figure.line("axis", (0.0, y), (width, y));
            totals = true;
        }
        let height = height_of(row);
        let class = if row.total { "strong" } else { "" };
        figure.text(class, Anchor::End, (left - screen.pick(16.0, 10.0), y + height / 2.0 + 4.0), &row.label);
        for (i, estimate) in row.estimates.iter().enumerate() {
            let centre = y + GAP / 2.0 + LINE * (i as f64 + 0.5);
            figure.group(COLOURS[i % 2], |figure| mark(figure, estimate, x, (from, to), centre));
            let text = number_text(estimate, forest.signed);
            let class = if estimate.estimate.is_none() { "muted small" } else { class };
            figure.text(class, Anchor::Start, (width - right + screen.pick(18.0, 8.0), centre + 4.0), &text);
        }
        y += height;
    }
    figure
}

fn mark(figure: &mut Figure, estimate: &Estimate, x: Axis, (from, to): (f64, f64), y: f64) {
    if let Some([lower, upper]) = estimate.interval {
        let (left, right) = (x.at(lower.clamp(from, to)), x.at(upper.clamp(from, to)));
        figure.line("curve", (left, y), (right, y));
        if lower < from {
            figure.path("curve", &format!("M{:.1} {:.1}l-6 5l6 5", left + 6.0, y - 5.0));
        }
        if upper > to {
            figure.path("curve", &format!("M{:.1} {:.1}l6 5l-6 5", right - 6.0, y - 5.0));
        }
    }
    if let Some(estimate) = estimate.estimate {
        figure.circle("solid", (x.at(estimate.clamp(from, to)), y), 4.5);
    }
}

fn number_text(estimate: &Estimate, signed: bool) -> String {
    let number = |value: f64| {
        let text = if signed { format!("{value:+.3}") } else { format!("{value:.3}") };
        text.replace('-', "\u{2212}")
    };
    match (estimate.estimate, estimate.interval) {
        (Some(estimate), Some([lower, upper])) => {
            format!("{} ({} to {})", number(estimate), number(lower), number(upper))
        }
        (Some(estimate), None) => number(estimate),
        _ => "\u{2013}".into(),
    }
}
