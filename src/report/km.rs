//! The Kaplan-Meier figure: curves with 95 % bands, censor marks, medians, log-rank p and the
//! numbers at risk.

use std::fmt::Write;

use super::{
    figure::{Anchor, Axis, Figure, SERIES, Screen, month_step, tick_label},
    groups::HazardRatioResult,
    p_text,
    plots::{cell, table},
};
use crate::{
    Result,
    survival::{KaplanMeier, Limits, kaplan_meier, number_at_risk, short},
};

/// One curve's cohort: months of follow-up, and whether the event was observed.
#[derive(Clone, Debug)]
pub struct Group {
    /// Names the curve: "High risk".
    pub label: String,
    /// Months of follow-up, a patient each.
    pub time: Vec<f64>,
    /// Whether the event was observed, a patient each.
    pub event: Vec<bool>,
}

/// What is tested of the groups.
#[derive(Clone, Debug, Default)]
pub struct Tests {
    /// Of the log-rank test, where it is defined.
    pub p: Option<f64>,
    /// From one group to the next, where the figure shall say it.
    pub hazard_ratio: Option<HazardRatioResult>,
}

/// Confidence level of the bands (log limits, as R's `survfit`).
const LEVEL: f64 = 0.95;
/// The time axis ends where fewer patients are left, and a group's curve is pale from where it has
/// fewer: what is drawn of a handful looks like a finding. Groups of fewer than twice as many are
/// drawn whole.
pub const LEAST_AT_RISK: usize = 10;
const ROW: f64 = 19.0;
const RIGHT: f64 = 20.0;

/// The figure of these groups in the order given; empty ones are left out.
pub fn figure(groups: &[Group], tests: &Tests, screen: Screen) -> Result<Figure> {
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
    let (width, left) = (screen.width(), screen.pick(104.0, 100.0));
    let legend_left = screen.pick(left, 8.0);
    let phone = screen == Screen::Phone;
    let rows = groups.len() as f64;
    let mut results = Vec::new();
    if groups.len() > 1 {
        results.push(("strong", format!("log-rank {}", tests.p.map_or("\u{2013}".into(), p_text))));
        if let Some(ratio) = &tests.hazard_ratio {
            let text = ratio.text();
            let step = if groups.len() > 2 && !text.ends_with('-') { " a group" } else { "" };
            results.push(("strong", text.replace(" -", " \u{2013}") + step));
            if ratio.reversed {
                results.push(("strong tint", "Reversed: the high-risk group lives longer".to_string()));
            }
        }
    }
    // The results stand below the legend, in one line; on a phone, where the legend takes two lines
    // a group, in several.
    let legend_lines = screen.pick(rows, 2.0 * rows);
    let result_lines = if phone { results.len() } else { results.len().min(1) };
    let top = 24.0 + ROW * (legend_lines + result_lines as f64);
    let bottom = screen.pick(24.0 + ROW * rows + 340.0, top + 260.0);
    let height = bottom + 78.0 + ROW * rows;
    let names: Vec<&str> = groups.iter().map(|(_, group)| group.label.as_str()).collect();
    let mut figure = Figure::new(width, height, format!("Kaplan-Meier curves: {}", names.join(", ")));

    let times: Vec<f64> = groups.iter().flat_map(|(_, group)| &group.time).copied().collect();
    let (first, last) = (times.iter().copied().fold(0.0, f64::min), last_time(&times));
    let step = month_step(last - first);
    let x = Axis::new((first, last), (left, width - RIGHT));
    let y = Axis::new((0.0, 1.0), (bottom, top));

    for value in [0.0, 0.25, 0.5, 0.75, 1.0] {
        let class = if value == 0.5 { "guide" } else { "grid" };
        figure.line(class, (left, y.at(value)), (width - RIGHT, y.at(value)));
        figure.text("muted", Anchor::End, (left - 10.0, y.at(value) + 4.0), &format!("{value}"));
    }
    figure.vertical_text("muted", (left - 52.0, (top + bottom) / 2.0), "Survival probability");
    figure.line("axis", (left, bottom), (width - RIGHT, bottom));
    let ticks = x.ticks(step);
    for &tick in &ticks {
        figure.line("axis", (x.at(tick), bottom), (x.at(tick), bottom + 5.0));
        figure.text("muted", Anchor::Middle, (x.at(tick), bottom + 19.0), &tick_label(tick, step));
    }
    figure.text("muted", Anchor::Middle, ((left + width - RIGHT) / 2.0, bottom + 38.0), "Months");
    let label_end = left - screen.pick(24.0, 18.0);
    figure.text("strong", Anchor::End, (label_end, bottom + 58.0), "At risk");

    // Bands first, so that no band lies over another group's curve.
    for ((colour, _), curve) in groups.iter().zip(&curves) {
        figure.group(colour, |figure| figure.path("band", &band_path(curve, last, x, y)));
    }
    for (i, ((colour, group), curve)) in groups.iter().zip(&curves).enumerate() {
        let legend = 14.0 + ROW * i as f64 * screen.pick(1.0, 2.0);
        let at_risk = bottom + 58.0 + ROW * (i + 1) as f64;
        let pale = last_time(&group.time).min(last);
        figure.group(colour, |figure| {
            figure.path("curve", &curve_path(curve, (0.0, pale), x, y));
            if curve.steps.last().is_some_and(|step| step.time > pale) && last > pale {
                figure.path("curve pale", &curve_path(curve, (pale, last), x, y));
            }
            figure.path("mark", &censor_path(curve, last, x, y));
            figure.line("curve", (legend_left, legend), (legend_left + 22.0, legend));
            figure.text("strong tint", Anchor::End, (label_end, at_risk), &group.label);
        });
        let (counts, median) = describe(group, curve);
        let label = ("strong", group.label.as_str());
        if phone {
            figure.texts(Anchor::Start, (legend_left + 31.0, legend + 4.0), &[label, ("muted", &counts)]);
            figure.text("muted", Anchor::Start, (legend_left + 31.0, legend + ROW + 2.0), &median);
        } else {
            let text = format!("{counts}, {median}");
            figure.texts(Anchor::Start, (legend_left + 31.0, legend + 4.0), &[label, ("muted", &text)]);
        }
        for (&tick, count) in ticks.iter().zip(number_at_risk(&group.time, &ticks)?) {
            figure.text("", Anchor::Middle, (x.at(tick), at_risk), &count.to_string());
        }
    }
    let results: Vec<(&str, &str)> = results.iter().map(|(class, text)| (*class, text.as_str())).collect();
    for (i, line) in results.chunks(screen.pick(results.len().max(1), 1)).enumerate() {
        let at = (legend_left + 31.0, 18.0 + ROW * (legend_lines + i as f64));
        figure.group("c1", |figure| figure.texts(Anchor::Start, at, line));
    }
    Ok(figure)
}

/// The last time at which enough patients are at risk; of few patients, the last of all.
pub fn last_time(time: &[f64]) -> f64 {
    let mut sorted = time.to_vec();
    sorted.sort_unstable_by(|a, b| b.total_cmp(a));
    let place = if time.len() < 2 * LEAST_AT_RISK { 0 } else { LEAST_AT_RISK - 1 };
    sorted.get(place).map_or(0.0, |&time| time.max(0.0))
}

/// Low risk is blue and high risk orange, whatever lies between.
fn colour(group: usize, groups: usize) -> String {
    let series = if groups == 3 { [0, 3, 1][group] } else { group % SERIES };
    format!("c{series}")
}

/// A row a group and distinct time: at risk, events, censored, survival and its limits, blank where
/// they are undefined.
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

/// How many, and the median.
fn describe(group: &Group, curve: &KaplanMeier) -> (String, String) {
    let events = group.event.iter().filter(|&&event| event).count();
    let counts = format!("n = {}, {events} {}", group.time.len(), if events == 1 { "event" } else { "events" });
    let median = curve.median();
    let Some(estimate) = median.estimate else { return (counts, "median not reached".into()) };
    let months = |time: f64| if time < 1e6 { format!("{time:.1}") } else { short(time) };
    let limit = |limit: Option<f64>| limit.map_or("not reached".to_string(), months);
    let (lower, upper) = (limit(median.lower), limit(median.upper));
    (counts, format!("median {} months (95% CI {lower} to {upper})", months(estimate)))
}

/// The curve between two times.
fn curve_path(curve: &KaplanMeier, (from, to): (f64, f64), x: Axis, y: Axis) -> String {
    let before = curve.steps.iter().rfind(|step| step.time <= from && from > 0.0);
    let mut d = format!("M{:.1} {:.1}", x.at(from), y.at(before.map_or(1.0, |step| step.survival)));
    for step in
        curve.steps.iter().filter(|step| step.events > 0 && (step.time > from || from == 0.0) && step.time <= to)
    {
        let _ = write!(d, "H{:.1}V{:.1}", x.at(step.time), y.at(step.survival));
    }
    if let Some(last) = curve.steps.last() {
        let _ = write!(d, "H{:.1}", x.at(last.time.min(to)));
    }
    d
}

/// From the first event, before which both limits are 1, up to where the variance is known: a curve
/// that falls to zero has no limits from there.
fn band_path(curve: &KaplanMeier, to: f64, x: Axis, y: Axis) -> String {
    let Some(end) = curve.steps.iter().find(|step| step.limits.is_none()).or(curve.steps.last()) else {
        return String::new();
    };
    let known = curve.steps.iter().filter(|step| step.events > 0 && step.time < to);
    let known: Vec<_> = known.map_while(|step| step.limits.map(|limits| (step.time, limits))).collect();
    let mut d = String::new();
    for &(time, (_, upper)) in &known {
        let start = if d.is_empty() { format!("M{:.1} {:.1}", x.at(time), y.at(upper)) } else { String::new() };
        let _ = write!(d, "{start}H{:.1}V{:.1}", x.at(time), y.at(upper));
    }
    if d.is_empty() {
        return d;
    }
    let _ = write!(d, "H{:.1}", x.at(end.time.min(to)));
    for &(time, (lower, _)) in known.iter().rev() {
        let _ = write!(d, "V{:.1}H{:.1}", y.at(lower), x.at(time));
    }
    d + "Z"
}

fn censor_path(curve: &KaplanMeier, to: f64, x: Axis, y: Axis) -> String {
    let marks = curve.steps.iter().filter(|step| step.censored > 0 && step.time <= to);
    marks.map(|step| format!("M{:.1} {:.1}v8", x.at(step.time), y.at(step.survival) - 4.0)).collect()
}
