//! Calibration: the survival that a model predicts against the survival that was observed, by group
//! of predicted survival.

use serde::Serialize;

use super::{
    FoldFacts, SlideResult,
    accuracy::{edge_times, quantile, survival_at},
    figure::{Anchor, Axis, Figure, Screen, nice_step, tick_label},
};
use crate::survival::{Limits, kaplan_meier};

/// Patients of like predicted survival at one time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationPoint {
    /// Months.
    pub time: f64,
    /// From the lowest predicted survival up.
    pub group: usize,
    /// Members of the group.
    pub patients: usize,
    /// Those of them that had an event up to `time`.
    pub events: usize,
    /// Mean predicted survival at `time`.
    pub predicted: f64,
    /// Kaplan-Meier's survival at `time`; None where the group was not followed so long.
    pub observed: Option<f64>,
    /// Of `observed`, 95 %.
    pub interval: Option<[f64; 2]>,
}

/// Fewest patients of a group.
const LEAST: usize = 10;
const MOST_GROUPS: usize = 4;
const MOST_TIMES: usize = 3;

/// Up to three of the times at which bins meet, and up to four groups a time, of equal size; or why
/// there are none.
pub fn calibration(rows: &[SlideResult], folds: &[FoldFacts]) -> Result<Vec<CalibrationPoint>, String> {
    let groups = (rows.len() / LEAST).min(MOST_GROUPS);
    if groups < 2 {
        return Err(format!("two groups need {} patients, and there are {}", 2 * LEAST, rows.len()));
    }
    let last = rows.iter().map(|row| row.time).fold(f64::NEG_INFINITY, f64::max);
    let edges: Vec<f64> = edge_times(folds)?.into_iter().filter(|&edge| edge < last).collect();
    if edges.is_empty() {
        return Err("no two time bins meet within the follow-up".into());
    }
    let mut points = Vec::new();
    for time in spread(&edges, MOST_TIMES) {
        let predicted = survival_at(rows, folds, &[time])?;
        let cuts: Vec<f64> = (1..groups).map(|g| quantile(&predicted, g as f64 / groups as f64)).collect();
        for group in 0..groups {
            let of = |s: f64| cuts.iter().filter(|&&cut| s >= cut).count() == group;
            let members: Vec<usize> = (0..rows.len()).filter(|&row| of(predicted[row])).collect();
            if members.is_empty() {
                continue; // ties of predicted survival
            }
            let times: Vec<f64> = members.iter().map(|&row| rows[row].time).collect();
            let events: Vec<bool> = members.iter().map(|&row| rows[row].event).collect();
            let curve = kaplan_meier(&times, &events, Limits::Log, 0.95).map_err(|e| e.to_string())?;
            let observed = curve.survival_at(time);
            points.push(CalibrationPoint {
                time,
                group,
                patients: members.len(),
                events: events.iter().zip(&times).filter(|(event, t)| **event && **t <= time).count(),
                predicted: members.iter().map(|&row| predicted[row]).sum::<f64>() / members.len() as f64,
                observed,
                interval: curve.limits_at(time).map(|(lower, upper)| [lower, upper]),
            });
        }
    }
    Ok(points)
}

/// At most `most` of the values, evenly spread, the last included.
fn spread(values: &[f64], most: usize) -> Vec<f64> {
    let n = values.len();
    let taken = most.min(n);
    (1..=taken).map(|i| values[(i * n).div_ceil(taken) - 1]).collect()
}

const PANEL: f64 = 208.0;
const LEFT: f64 = 58.0;
const SPACE: f64 = 72.0;
const TOP: f64 = 30.0;
/// A panel shows at least this much of survival.
const LEAST_SPAN: f64 = 0.1;

/// A panel a time, predicted survival to the right and observed upwards; on the diagonal they
/// agree. Each panel shows the part of 0 to 1 that its points and limits take. None without points.
pub fn figure(points: &[CalibrationPoint], screen: Screen) -> Option<Figure> {
    let panels: Vec<&[CalibrationPoint]> = points.chunk_by(|a, b| a.time == b.time).collect();
    let count = panels.len() as f64;
    if panels.is_empty() {
        return None;
    }
    let (columns, rows) = screen.pick((count, 1.0), (1.0, count));
    let panel_size = screen.pick(PANEL, 290.0);
    let below = 46.0 + TOP;
    let width = screen.pick(LEFT + columns * PANEL + (columns - 1.0) * SPACE + 16.0, screen.width());
    let height = rows * (panel_size + below);
    let mut figure = Figure::new(width, height, "Calibration: predicted and observed survival");
    for (i, panel) in panels.iter().enumerate() {
        let (column, row) = screen.pick((i as f64, 0.0), (0.0, i as f64));
        let left = LEFT + column * (PANEL + SPACE);
        let top = TOP + row * (panel_size + below);
        let (right, bottom) = (left + panel_size, top + panel_size);
        let (low, high, step) = range(panel);
        let x = Axis::new((low, high), (left, right));
        let y = Axis::new((low, high), (bottom, top));
        figure.text("strong", Anchor::Start, (left, top - 16.0), &format!("{:.1} months", panel[0].time));
        for tick in x.ticks(step) {
            let label = tick_label(tick, step);
            figure.line("grid", (left, y.at(tick)), (right, y.at(tick)));
            figure.line("axis", (x.at(tick), bottom), (x.at(tick), bottom + 5.0));
            figure.text("muted small", Anchor::Middle, (x.at(tick), bottom + 19.0), &label);
            figure.text("muted small", Anchor::End, (left - 8.0, y.at(tick) + 4.0), &label);
        }
        figure.line("axis", (left, bottom), (right, bottom));
        figure.line("guide", (left, bottom), (right, top));
        figure.text("muted small", Anchor::Middle, ((left + right) / 2.0, bottom + 37.0), "Predicted survival");
        figure.group("c0", |figure| {
            for point in *panel {
                let at = x.at(point.predicted);
                if let Some([lower, upper]) = point.interval {
                    figure.line("thin", (at, y.at(lower)), (at, y.at(upper)));
                }
                if let Some(observed) = point.observed {
                    figure.circle("solid", (at, y.at(observed)), 4.0);
                }
            }
        });
        if column == 0.0 {
            figure.vertical_text("muted small", (14.0, (top + bottom) / 2.0), "Observed survival");
        }
    }
    Some(figure)
}

/// The axes' ends, and the space between their ticks.
fn range(panel: &[CalibrationPoint]) -> (f64, f64, f64) {
    let values = || {
        let of = |p: &CalibrationPoint| {
            [Some(p.predicted), p.observed].into_iter().flatten().chain(p.interval.into_iter().flatten())
        };
        panel.iter().flat_map(of)
    };
    let (low, high) = (values().fold(1.0, f64::min), values().fold(0.0, f64::max));
    let middle = (0.5 * (low + high)).clamp(LEAST_SPAN / 2.0, 1.0 - LEAST_SPAN / 2.0);
    let (low, high) = (low.min(middle - LEAST_SPAN / 2.0), high.max(middle + LEAST_SPAN / 2.0));
    let step = nice_step(high - low, 5);
    let (low, high) = (((low / step) + 1e-9).floor() * step, ((high / step) - 1e-9).ceil() * step);
    (low.max(0.0), high.min(1.0), step)
}
