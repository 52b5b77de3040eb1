//! The summary as rows of text: the table that a terminal shows, and the rows that the page shares with it.

use super::{
    FoldResult, Summary,
    accuracy::{Accuracy, Estimate},
    p_text,
};

/// A statistic with its interval, by slide and, where that is another matter, by patient.
pub struct StatisticRow {
    pub name: String,
    pub cells: Vec<Cell>,
}

pub struct Cell {
    pub text: String,
    /// Why there is no number, or no interval.
    pub note: Option<String>,
}

impl Summary {
    /// The rows below the folds.
    pub fn statistics(&self) -> Vec<StatisticRow> {
        let units: Vec<&Accuracy> = std::iter::once(&self.by_slide).chain(&self.by_patient).collect();
        let row = |name: &str, cell: &dyn Fn(&Accuracy) -> Cell| StatisticRow {
            name: name.into(),
            cells: units.iter().map(|unit| cell(unit)).collect(),
        };
        let of = |estimate: &Estimate| Cell { text: estimate.text(), note: estimate.note.clone() };
        let main = self.of_patients();
        let span = |times: &[f64]| match times {
            [first, .., last] => format!(", {first:.1} to {last:.1} months"),
            _ => String::new(),
        };
        let mut rows = Vec::new();
        if self.folds.len() > 1 {
            rows.push(row("C-index, mean of folds", &|unit| of(&unit.c_index_fold_mean)));
        }
        rows.push(row("C-index, all folds pooled", &|unit| of(&unit.c_index_pooled)));
        rows.push(row(&format!("Uno's C before {:.1} months", main.horizon), &|unit| of(&unit.uno_c)));
        rows.push(row(&format!("Mean AUC{}", span(&main.auc.times)), &|unit| of(&unit.auc.mean)));
        rows.push(row(&format!("Brier score{}", span(&main.brier.times)), &|unit| of(&unit.brier.integrated)));
        if main.brier.kaplan_meier.is_some() {
            let score =
                |unit: &Accuracy| unit.brier.kaplan_meier.map_or("undefined".into(), |score| format!("{score:.4}"));
            rows.push(row("Brier score of Kaplan-Meier alone", &|unit| Cell { text: score(unit), note: None }));
        }
        rows.push(row("Permutation test of C", &|unit| {
            let p = &unit.c_index_permutation_p;
            Cell { text: p.estimate.map_or("undefined".into(), p_text), note: p.note.clone() }
        }));
        rows
    }

    /// The table that a terminal shows.
    pub fn table(&self) -> String {
        let number = |value: Option<usize>| value.map_or("-".into(), |value| value.to_string());
        let percent = 100.0 * self.resampling.level;
        let mut lines = vec![format!(
            " fold   train  slides  patients  events  best epoch  C-index  {:>16}",
            format!("{percent:.0} % interval")
        )];
        for (f, c) in self.folds.iter().zip(&self.by_slide.c_index_by_fold) {
            let (train, best) = (number(f.train_slides), number(f.best_epoch.map(|epoch| epoch + 1)));
            let c_index = f.c_index.map_or("-".into(), |c| format!("{c:.4}"));
            let interval = c.interval.map_or("-".into(), |[low, high]| format!("{low:.4} to {high:.4}"));
            let FoldResult { fold, slides, patients, events, .. } = f;
            lines.push(format!(
                "{fold:>5}  {train:>6}  {slides:>6}  {patients:>8}  {events:>6}  {best:>10}  {c_index:>7}  {interval:>16}"
            ));
        }
        if let Some((mean, std)) = self.c_index_over_folds() {
            lines.push(format!("C-index {mean:.4} +- {std:.4} (mean and standard deviation over folds)"));
        }
        let heads: &[&str] = if self.by_patient.is_some() { &["by slide", "by patient"] } else { &[""] };
        let line = |name: &str, cells: &mut dyn Iterator<Item = &str>| {
            let cells: String = cells.map(|cell| format!("{cell:<28}")).collect();
            format!("{name:<36}{cells}").trim_end().to_string()
        };
        lines.push(String::new());
        lines.push(line(&format!("statistic ({percent:.0} % interval)"), &mut heads.iter().copied()));
        let mut notes = Vec::new();
        for StatisticRow { name, cells } in self.statistics() {
            lines.push(line(&name, &mut cells.iter().map(|cell| cell.text.as_str())));
            for (head, note) in heads.iter().zip(cells).filter_map(|(head, cell)| Some((head, cell.note?))) {
                let unit = if head.is_empty() { String::new() } else { format!(" {head}") };
                notes.push(format!("note: {name}{unit}: {note}."));
            }
        }
        if let Some(test) = &self.log_rank {
            lines.push(format!("log-rank {} (high against low risk, cut at the median)", p_text(test.p_value)));
        }
        lines.extend((!self.protocol.is_empty()).then(|| self.protocol.clone()));
        lines.extend(notes);
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines.join("\n") + "\n"
    }
}
