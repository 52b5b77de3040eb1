//! The Kaplan-Meier figure: curves with 95 % bands, censor marks, medians, log-rank p and the numbers at risk.

use std::fmt::Write;

use super::{
    figure::{Anchor, Axis, Figure, SERIES, month_step, tick_label},
    p_text,
    plots::{cell, table},
};
use crate::{
    Result,
    survival::{KaplanMeier, Limits, kaplan_meier, number_at_risk},
};

/// One curve's cohort: months of follow-up, and whether the event was observed.
#[derive(Clone, Debug)]
pub struct Group {
    pub label: String,
    pub time: Vec<f64>,
    pub event: Vec<bool>,
}

/// Confidence level of the bands (log limits, as R's `survfit`).
const LEVEL: f64 = 0.95;
const WIDTH: f64 = 854.0;
const PLOT_HEIGHT: f64 = 340.0;
const ROW: f64 = 19.0;
const LEFT: f64 = 104.0;
const RIGHT: f64 = 20.0;

/// The figure of these groups in the order given; empty ones are left out. `p` is the log-rank test's, where it is defined.
pub fn figure(groups: &[Group], p: Option<f64>) -> Result<Figure> {
    let groups: Vec<(String, &Group)> = groups
        .iter()
        .enumerate()
        .filter(|(_, group)| !group.time.is_empty())
        .map(|(i, group)| (colour(i, groups.len()), group))
        .collect();
    let curves = groups
        .iter()
        .map(|(_, group)| kaplan_meier(&group.time, &group.event, Limits::Log, LEVEL))
        .collect::<Result<Vec<_>>>()?;
    let rows = groups.len() as f64;
    let top = 24.0 + ROW * rows;
    let bottom = top + PLOT_HEIGHT;
    let height = bottom + 78.0 + ROW * rows;
    let names: Vec<&str> = groups.iter().map(|(_, group)| group.label.as_str()).collect();
    let mut figure = Figure::new(WIDTH, height, format!("Kaplan-Meier curves: {}", names.join(", ")));

    let times = || groups.iter().flat_map(|(_, group)| &group.time).copied();
    let (first, last) = (times().fold(0.0, f64::min), times().fold(0.0, f64::max));
    let step = month_step(last - first);
    let x = Axis::new((first, last), (LEFT, WIDTH - RIGHT));
    let y = Axis::new((0.0, 1.0), (bottom, top));

    for value in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let class = if value == 0.5 { "guide" } else { "grid" };
        figure.line(class, (LEFT, y.at(value)), (WIDTH - RIGHT, y.at(value)));
        figure.text("muted", Anchor::End, (LEFT - 10.0, y.at(value) + 4.0), &format!("{value}"));
    }
    figure.vertical_text("muted", (LEFT - 52.0, (top + bottom) / 2.0), "Survival probability");
    figure.line("axis", (LEFT, bottom), (WIDTH - RIGHT, bottom));
    let ticks = x.ticks(step);
    for &tick in &ticks {
        figure.line("axis", (x.at(tick), bottom), (x.at(tick), bottom + 5.0));
        figure.text("muted", Anchor::Middle, (x.at(tick), bottom + 19.0), &tick_label(tick, step));
    }
    figure.text("muted", Anchor::Middle, ((LEFT + WIDTH - RIGHT) / 2.0, bottom + 38.0), "Months");
    figure.text("strong", Anchor::End, (LEFT - 24.0, bottom + 58.0), "At risk");

    // Bands first, so that no band lies over another group's curve.
    for ((colour, _), curve) in groups.iter().zip(&curves) {
        figure.group(colour, |figure| figure.path("band", &band_path(curve, x, y)));
    }
    for (i, ((colour, group), curve)) in groups.iter().zip(&curves).enumerate() {
        let legend = 14.0 + ROW * i as f64;
        let at_risk = bottom + 58.0 + ROW * (i + 1) as f64;
        figure.group(colour, |figure| {
            figure.path("curve", &curve_path(curve, x, y));
            figure.path("mark", &censor_path(curve, x, y));
            figure.line("curve", (LEFT, legend), (LEFT + 22.0, legend));
            figure.text("strong tint", Anchor::End, (LEFT - 24.0, at_risk), &group.label);
        });
        let pieces = [("strong", group.label.as_str()), ("muted", &describe(group, curve))];
        figure.texts(Anchor::Start, (LEFT + 31.0, legend + 4.0), &pieces);
        for (&tick, count) in ticks.iter().zip(number_at_risk(&group.time, &ticks)?) {
            figure.text("", Anchor::Middle, (x.at(tick), at_risk), &count.to_string());
        }
    }
    if groups.len() > 1 {
        let text = p.map_or("log-rank test undefined".to_string(), |p| format!("log-rank {}", p_text(p)));
        figure.text("strong", Anchor::End, (WIDTH - RIGHT, 18.0), &text);
    }
    Ok(figure)
}

/// Low risk is blue and high risk orange, whatever lies between.
fn colour(group: usize, groups: usize) -> String {
    let series = if groups == 3 { [0, 3, 1][group] } else { group % SERIES };
    format!("c{series}")
}

/// A row a group and distinct time: at risk, events, censored, survival and its limits, blank where they are undefined.
pub fn csv(groups: &[Group]) -> Result<Vec<u8>> {
    let mut rows = Vec::new();
    for group in groups.iter().filter(|group| !group.time.is_empty()) {
        for step in kaplan_meier(&group.time, &group.event, Limits::Log, LEVEL)?.steps {
            let (lower, upper) = step.limits.unzip();
            let counts = [step.at_risk, step.events, step.censored].map(|n| n.to_string());
            let numbers = [Some(step.survival), lower, upper].map(cell);
            rows.push([vec![group.label.clone(), step.time.to_string()], counts.to_vec(), numbers.to_vec()].concat());
        }
    }
    table(&["group", "time", "at_risk", "events", "censored", "survival", "lower", "upper"], rows)
}

fn describe(group: &Group, curve: &KaplanMeier) -> String {
    let events = group.event.iter().filter(|&&event| event).count();
    let median = curve.median();
    let mut text = format!("n = {}, {events} {}", group.time.len(), if events == 1 { "event" } else { "events" });
    match median.estimate {
        None => text.push_str(", median not reached"),
        Some(estimate) => {
            let limit = |limit: Option<f64>| limit.map_or("not reached".to_string(), |limit| format!("{limit:.1}"));
            let (lower, upper) = (limit(median.lower), limit(median.upper));
            let _ = write!(text, ", median {estimate:.1} months (95% CI {lower} to {upper})");
        }
    }
    text
}

fn curve_path(curve: &KaplanMeier, x: Axis, y: Axis) -> String {
    let mut d = format!("M{:.1} {:.1}", x.at(0.0), y.at(1.0));
    for step in curve.steps.iter().filter(|step| step.events > 0) {
        let _ = write!(d, "H{:.1}V{:.1}", x.at(step.time), y.at(step.survival));
    }
    if let Some(last) = curve.steps.last() {
        let _ = write!(d, "H{:.1}", x.at(last.time));
    }
    d
}

/// Up to where the variance is known: a curve that falls to zero has no limits from there.
fn band_path(curve: &KaplanMeier, x: Axis, y: Axis) -> String {
    let Some(last) = curve.steps.iter().find(|step| step.limits.is_none()).or(curve.steps.last()) else {
        return String::new();
    };
    let known = curve.steps.iter().filter(|step| step.events > 0);
    let known: Vec<_> = known.map_while(|step| step.limits.map(|limits| (step.time, limits))).collect();
    let mut d = format!("M{:.1} {:.1}", x.at(0.0), y.at(1.0));
    for &(time, (_, upper)) in &known {
        let _ = write!(d, "H{:.1}V{:.1}", x.at(time), y.at(upper));
    }
    let _ = write!(d, "H{:.1}", x.at(last.time));
    for &(time, (lower, _)) in known.iter().rev() {
        let _ = write!(d, "V{:.1}H{:.1}", y.at(lower), x.at(time));
    }
    d + "Z"
}

fn censor_path(curve: &KaplanMeier, x: Axis, y: Axis) -> String {
    let marks = curve.steps.iter().filter(|step| step.censored > 0);
    marks.map(|step| format!("M{:.1} {:.1}v8", x.at(step.time), y.at(step.survival) - 4.0)).collect()
}
