//! The curve of the cumulative/dynamic AUC over time, with its band.

use super::{
    accuracy::AucCurve,
    figure::{Anchor, Axis, Figure, Screen, month_step, nice_step, path_through, tick_label},
};

const TOP: f64 = 34.0;
const BOTTOM: f64 = 282.0;
const RIGHT: f64 = 20.0;

/// None where the curve is undefined.
pub fn figure(curve: &AucCurve, screen: Screen) -> Option<Figure> {
    let (width, left) = (screen.width(), screen.pick(104.0, 66.0));
    let known: Vec<(f64, f64)> =
        curve.times.iter().zip(&curve.auc).filter_map(|(&t, auc)| Some((t, auc.estimate?))).collect();
    let (&(_, first), &last) = (known.first()?, curve.times.last()?);
    let band: Vec<(f64, [f64; 2])> =
        curve.times.iter().zip(&curve.auc).filter_map(|(&t, auc)| Some((t, auc.interval?))).collect();
    let lows = band.iter().map(|(_, [low, _])| *low).chain(known.iter().map(|(_, auc)| *auc));
    let low = (lows.fold(first.min(0.5), f64::min) * 10.0 + 1e-9).floor() / 10.0;

    let mut figure = Figure::new(width, BOTTOM + 46.0, "Cumulative/dynamic AUC over time");
    let x = Axis::new((0.0, last), (left, width - RIGHT));
    let y = Axis::new((low, 1.0), (BOTTOM, TOP));
    let step = nice_step(1.0 - low, 6);
    for tick in y.ticks(step) {
        figure.line("grid", (left, y.at(tick)), (width - RIGHT, y.at(tick)));
        figure.text("muted", Anchor::End, (left - 10.0, y.at(tick) + 4.0), &tick_label(tick, step));
    }
    figure.line("guide", (left, y.at(0.5)), (width - RIGHT, y.at(0.5)));
    figure.vertical_text("muted", (left - 52.0, (TOP + BOTTOM) / 2.0), "AUC");
    figure.line("axis", (left, BOTTOM), (width - RIGHT, BOTTOM));
    let step = month_step(last);
    for tick in x.ticks(step) {
        figure.line("axis", (x.at(tick), BOTTOM), (x.at(tick), BOTTOM + 5.0));
        figure.text("muted", Anchor::Middle, (x.at(tick), BOTTOM + 19.0), &tick_label(tick, step));
    }
    figure.text("muted", Anchor::Middle, ((left + width - RIGHT) / 2.0, BOTTOM + 38.0), "Months");
    figure.group("c0", |figure| {
        let upper = band.iter().map(|(t, [_, upper])| (x.at(*t), y.at(*upper)));
        let lower = band.iter().rev().map(|(t, [lower, _])| (x.at(*t), y.at(*lower)));
        if band.len() > 1 {
            figure.path("band", &(path_through(upper.chain(lower)) + "Z"));
        }
        figure.path("curve", &path_through(known.iter().map(|&(t, auc)| (x.at(t), y.at(auc)))));
        for &(t, auc) in &known {
            figure.circle("solid", (x.at(t), y.at(auc)), 3.0);
        }
    });
    figure.text("strong", Anchor::Start, (left, 16.0), &format!("mean AUC {}", curve.mean.text()));
    Some(figure)
}
