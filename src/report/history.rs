//! Training curves, one figure a fold.

use std::fmt::Write;

use super::{
    figure::{Anchor, Axis, Figure, nice_step, tick_label},
    plots::{cell, table},
};
use crate::{Result, folder::EpochMetrics};

const WIDTH: f64 = 300.0;
const LEFT: f64 = 42.0;
const RIGHT: f64 = 12.0;
const PANEL: f64 = 92.0;
const TOPS: [f64; 2] = [48.0, 182.0];

type Metric = fn(&EpochMetrics) -> Option<f64>;
const LOSS: [Metric; 2] = [|e| Some(e.train_loss), |e| Some(e.val_loss)];
const C_INDEX: [Metric; 2] = [|e| e.train_c_index, |e| e.val_c_index];

/// One figure for each fold, all on the same axes so that folds compare at a glance: the loss
/// above, the C-index below, training in grey, validation in blue, the best epoch marked. Epochs
/// come fold by fold and in order, and are shown from 1.
pub fn figures(epochs: &[EpochMetrics]) -> Vec<Figure> {
    let range = |metrics: [Metric; 2], start: (f64, f64)| {
        let values = epochs.iter().flat_map(|epoch| metrics.map(|metric| metric(epoch))).flatten();
        values.fold(start, |(low, high), value| (low.min(value), high.max(value)))
    };
    let loss = range(LOSS, (f64::INFINITY, f64::NEG_INFINITY));
    let ranges = [if loss.0 <= loss.1 { loss } else { (0.0, 1.0) }, range(C_INDEX, (0.5, 0.5))];
    let last = epochs.iter().map(|epoch| epoch.epoch).max().unwrap_or(0);
    epochs.chunk_by(|a, b| a.fold == b.fold).map(|fold| one_fold(fold, last, ranges)).collect()
}

/// A row an epoch, counted from 1; blank where a metric is undefined.
pub fn csv(epochs: &[EpochMetrics]) -> Result<Vec<u8>> {
    let row = |e: &EpochMetrics| {
        let metrics = [Some(e.train_loss), Some(e.val_loss), e.train_c_index, e.val_c_index].map(cell);
        let best = u8::from(e.best).to_string();
        [vec![e.fold.to_string(), (e.epoch + 1).to_string()], metrics.to_vec(), vec![best]].concat()
    };
    let heads = ["fold", "epoch", "train_loss", "val_loss", "train_c_index", "val_c_index", "best"];
    table(&heads, epochs.iter().map(row).collect())
}

/// A sentence where no fold's best epoch lies between the first that may be chosen, which follows
/// `warmup` others, and the last of `most`: the choice then was made by the ends of training and
/// not by the validation.
pub fn best_epoch_note(epochs: &[EpochMetrics], warmup: usize, most: usize) -> Option<String> {
    let (mut first, mut last) = (0, 0);
    for fold in epochs.chunk_by(|a, b| a.fold == b.fold) {
        let best = fold.iter().rfind(|epoch| epoch.best)?.epoch;
        match best {
            best if best <= warmup => first += 1,
            best if best + 1 >= most => last += 1,
            _ => return None,
        }
    }
    let folds = |n: usize| if n == 1 { "1 fold".to_string() } else { format!("{n} folds") };
    let of_first = format!(
        "the first that may be chosen, epoch {}, in {}: no later epoch had a higher validation C-index",
        warmup + 1,
        folds(first)
    );
    let of_last = format!("the last, epoch {most}, in {}: the validation C-index may still be rising", folds(last));
    match (first, last) {
        (0, 0) => None,
        (_, 0) => Some(format!("Every best epoch is {of_first}.")),
        (0, _) => Some(format!("Every best epoch is {of_last}.")),
        _ => Some(format!("Every best epoch is at an end of training: {of_first}; {of_last}.")),
    }
}

fn one_fold(epochs: &[EpochMetrics], last: usize, ranges: [(f64, f64); 2]) -> Figure {
    let fold = epochs[0].fold;
    let bottom = TOPS[1] + PANEL;
    let mut figure = Figure::new(WIDTH, bottom + 42.0, format!("Training curves of fold {fold}"));
    let x = Axis::new((1.0, (last + 1) as f64), (LEFT, WIDTH - RIGHT));
    let best = epochs.iter().rfind(|epoch| epoch.best).map(|epoch| epoch.epoch);
    figure.text("strong", Anchor::Start, (0.0, 12.0), &format!("Fold {fold}"));
    if let Some(best) = best {
        figure.text("muted small", Anchor::End, (WIDTH - RIGHT, 12.0), &format!("best epoch {}", best + 1));
        let at = x.at((best + 1) as f64);
        figure.line("guide", (at, TOPS[0] - 6.0), (at, bottom));
    }
    for (panel, metrics) in [LOSS, C_INDEX].into_iter().enumerate() {
        let (top, (low, high)) = (TOPS[panel], ranges[panel]);
        let step = nice_step(high - low, 4);
        let y = Axis::new(((low / step).floor() * step, (high / step).ceil() * step), (top + PANEL, top));
        figure.text("muted small", Anchor::Start, (0.0, top - 12.0), ["Loss", "C-index"][panel]);
        for tick in y.ticks(step) {
            figure.line("grid", (LEFT, y.at(tick)), (WIDTH - RIGHT, y.at(tick)));
            figure.text("muted small", Anchor::End, (LEFT - 8.0, y.at(tick) + 4.0), &tick_label(tick, step));
        }
        for (metric, class) in metrics.into_iter().zip(["grey", "c0"]) {
            figure.group(class, |figure| {
                figure.path("thin", &polyline(epochs, metric, x, y));
                let marked = epochs.iter().find(|epoch| epochs.len() == 1 || Some(epoch.epoch) == best);
                if let Some((epoch, value)) = marked.and_then(|epoch| Some((epoch, metric(epoch)?))) {
                    figure.circle("solid", (x.at((epoch.epoch + 1) as f64), y.at(value)), 3.0);
                }
            });
        }
    }
    let step = nice_step((last + 1) as f64, 6).max(1.0);
    for tick in x.ticks(step) {
        figure.text("muted small", Anchor::Middle, (x.at(tick), bottom + 17.0), &tick_label(tick, step));
    }
    figure.text("muted small", Anchor::Middle, ((LEFT + WIDTH - RIGHT) / 2.0, bottom + 35.0), "Epoch");
    figure
}

/// Broken where the metric is undefined.
fn polyline(epochs: &[EpochMetrics], metric: Metric, x: Axis, y: Axis) -> String {
    let (mut d, mut pen) = (String::new(), 'M');
    for epoch in epochs {
        match metric(epoch) {
            Some(value) => {
                let _ = write!(d, "{pen}{:.1} {:.1}", x.at((epoch.epoch + 1) as f64), y.at(value));
                pen = 'L';
            }
            None => pen = 'M',
        }
    }
    d
}
