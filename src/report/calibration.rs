//! Calibration: the survival that a model predicts against the survival that was observed, by group of predicted survival.

use serde::Serialize;

use super::{
    Fold, SlideResult,
    accuracy::{edge_times, quantile, survival_at},
    figure::{Anchor, Axis, Figure},
};
use crate::survival::{Limits, kaplan_meier};

/// Patients of like predicted survival at one time.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CalibrationPoint {
    /// Months.
    pub time: f64,
    /// From the lowest predicted survival up.
    pub group: usize,
    pub patients: usize,
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

/// Up to three of the times at which bins meet, and up to four groups a time, of equal size; or why there are none.
pub fn calibration(rows: &[SlideResult], folds: &[Fold]) -> Result<Vec<CalibrationPoint>, String> {
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
            let step = curve.steps.iter().rfind(|step| step.time <= time);
            let limits = step.map_or(Some((1.0, 1.0)), |step| step.limits);
            points.push(CalibrationPoint {
                time,
                group,
                patients: members.len(),
                events: events.iter().zip(&times).filter(|(event, t)| **event && **t <= time).count(),
                predicted: members.iter().map(|&row| predicted[row]).sum::<f64>() / members.len() as f64,
                observed,
                interval: observed.and(limits).map(|(lower, upper)| [lower, upper]),
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

/// A panel a time, predicted survival to the right and observed upwards; on the diagonal they agree. None without points.
pub fn figure(points: &[CalibrationPoint]) -> Option<Figure> {
    let panels: Vec<&[CalibrationPoint]> = points.chunk_by(|a, b| a.time == b.time).collect();
    let count = panels.len() as f64;
    if panels.is_empty() {
        return None;
    }
    let width = LEFT + count * PANEL + (count - 1.0) * SPACE + 16.0;
    let bottom = TOP + PANEL;
    let mut figure = Figure::new(width, bottom + 46.0, "Calibration: predicted and observed survival");
    for (i, panel) in panels.iter().enumerate() {
        let left = LEFT + i as f64 * (PANEL + SPACE);
        let x = Axis::new((0.0, 1.0), (left, left + PANEL));
        let y = Axis::new((0.0, 1.0), (bottom, TOP));
        figure.text("strong", Anchor::Start, (left, 14.0), &format!("{:.1} months", panel[0].time));
        for tick in [0.0, 0.25, 0.5, 0.75, 1.0] {
            figure.line("grid", (left, y.at(tick)), (left + PANEL, y.at(tick)));
            figure.line("axis", (x.at(tick), bottom), (x.at(tick), bottom + 5.0));
            figure.text("muted small", Anchor::Middle, (x.at(tick), bottom + 19.0), &format!("{tick}"));
            figure.text("muted small", Anchor::End, (left - 8.0, y.at(tick) + 4.0), &format!("{tick}"));
        }
        figure.line("axis", (left, bottom), (left + PANEL, bottom));
        figure.line("guide", (x.at(0.0), y.at(0.0)), (x.at(1.0), y.at(1.0)));
        figure.text("muted small", Anchor::Middle, (left + PANEL / 2.0, bottom + 37.0), "Predicted survival");
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
    }
    figure.vertical_text("muted small", (14.0, TOP + PANEL / 2.0), "Observed survival");
    Some(figure)
}
