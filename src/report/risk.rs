//! The histogram of predicted risk by group and outcome.

use super::{
    SlideResult,
    figure::{Anchor, Axis, Figure, Screen, nice_step, tick_label},
    plots::table,
};
use crate::Result;

const TOP: f64 = 52.0;
const BOTTOM: f64 = 232.0;
const RIGHT: f64 = 20.0;
const BINS: f64 = 30.0;

/// Patients (or slides) by risk.
pub struct Histogram {
    /// The edge that lies on the cut between low and high risk is 0.
    first: i64,
    width: f64,
    cut: f64,
    /// The censored, and the events, of each bin.
    bins: Vec<[usize; 2]>,
}

impl Histogram {
    /// A bin's edge lies on `cut`, so that every bin is of one group. None where all risks are
    /// equal.
    pub fn new(rows: &[SlideResult], cut: f64) -> Option<Self> {
        let risks = || rows.iter().map(|row| row.risk);
        let (low, high) = (risks().fold(f64::INFINITY, f64::min), risks().fold(f64::NEG_INFINITY, f64::max));
        let width = nice_step(high - low, BINS as usize);
        if high <= low {
            return None;
        }
        let bin_of = |risk: f64| ((risk - cut) / width).floor() as i64;
        let first = bin_of(low);
        let mut bins = vec![[0; 2]; (bin_of(high) - first + 1) as usize];
        for row in rows {
            bins[(bin_of(row.risk) - first) as usize][usize::from(row.event)] += 1;
        }
        Some(Self { first, width, cut, bins })
    }

    fn edge(&self, bin: usize) -> f64 {
        self.cut + (self.first + bin as i64) as f64 * self.width
    }

    /// A row a bin: its edges, and who is in it by outcome.
    pub fn csv(&self) -> Result<Vec<u8>> {
        let row = |(i, bin): (usize, &[usize; 2])| {
            let [censored, events] = bin.map(|n| n.to_string());
            vec![self.edge(i).to_string(), self.edge(i + 1).to_string(), events, censored]
        };
        table(&["from", "to", "events", "censored"], self.bins.iter().enumerate().map(row).collect())
    }
}

/// `who` is what is counted: "Patients".
pub fn figure(histogram: &Histogram, who: &str, screen: Screen) -> Figure {
    let (width, left) = (screen.width(), screen.pick(104.0, 66.0));
    let Histogram { first, cut, bins, .. } = histogram;
    let (first, cut) = (*first, *cut);
    let edge = |bin: usize| histogram.edge(bin);
    let mut figure = Figure::new(width, BOTTOM + 44.0, "Histogram of risk by outcome");
    let most = bins.iter().map(|bin| bin[0] + bin[1]).max().unwrap_or(1) as f64;
    let x = Axis::new((edge(0), edge(bins.len())), (left, width - RIGHT));
    let y = Axis::new((0.0, most), (BOTTOM, TOP));
    let step = nice_step(most, 5).max(1.0);
    for tick in y.ticks(step) {
        figure.line("grid", (left, y.at(tick)), (width - RIGHT, y.at(tick)));
        figure.text("muted", Anchor::End, (left - 10.0, y.at(tick) + 4.0), &tick_label(tick, step));
    }
    figure.vertical_text("muted", (left - 52.0, (TOP + BOTTOM) / 2.0), who);
    for (i, [censored, events]) in bins.iter().enumerate() {
        let (start, end) = (x.at(edge(i)) + 0.75, x.at(edge(i + 1)) - 0.75);
        figure.group(if first + (i as i64) < 0 { "c0" } else { "c1" }, |figure| {
            let tops = [y.at(*events as f64), y.at((events + censored) as f64)];
            if *events > 0 {
                figure.rect("solid", (start, tops[0]), end - start, BOTTOM - tops[0]);
            }
            if *censored > 0 {
                figure.rect("faint", (start, tops[1]), end - start, tops[0] - tops[1]);
            }
        });
    }
    figure.line("axis", (left, BOTTOM), (width - RIGHT, BOTTOM));
    let step = nice_step(edge(bins.len()) - edge(0), screen.pick(8, 4));
    for tick in x.ticks(step) {
        figure.line("axis", (x.at(tick), BOTTOM), (x.at(tick), BOTTOM + 5.0));
        figure.text("muted", Anchor::Middle, (x.at(tick), BOTTOM + 19.0), &tick_label(tick, step));
    }
    figure.text("muted", Anchor::Middle, ((left + width - RIGHT) / 2.0, BOTTOM + 38.0), "Predicted risk");
    figure.line("axis", (x.at(cut), TOP - 24.0), (x.at(cut), BOTTOM));
    figure.group("c0", |f| f.text("strong tint", Anchor::End, (x.at(cut) - 8.0, TOP - 13.0), "Low risk"));
    figure.group("c1", |f| f.text("strong tint", Anchor::Start, (x.at(cut) + 8.0, TOP - 13.0), "High risk"));
    figure.text("muted small", Anchor::Middle, (x.at(cut), TOP - 31.0), &format!("median {}", tick_label(cut, 1e-3)));
    for (i, (class, text)) in [("solid", "event"), ("faint", "censored")].into_iter().enumerate() {
        let at = (width - RIGHT - 70.0, 8.0 + 17.0 * i as f64);
        figure.group("grey", |figure| figure.rect(class, (at.0 - 16.0, at.1 - 5.0), 10.0, 10.0));
        figure.text("muted", Anchor::Start, (at.0, at.1 + 4.0), text);
    }
    figure
}
