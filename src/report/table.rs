//! The summary as rows of text: the table that a terminal shows, and the rows that the page shares
//! with it.

use super::{
    FoldResult, Summary,
    accuracy::{Accuracy, Estimate},
    groups::{Grouping, LABELS, SurvivalAt},
    p_text,
};

/// A statistic with its interval, by slide and, where that is another matter, by patient.
pub struct StatisticRow {
    /// What it is called: "Uno's C before 60.0 months".
    pub name: String,
    /// By slide, and by patient where that is another matter.
    pub cells: Vec<Cell>,
}

/// A statistic's text, by slide or by patient.
pub struct Cell {
    /// The number with its interval, or what there is of it; "-" where there is nothing.
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
        let pooled = if self.folds.len() > 1 { "C-index, all folds pooled" } else { "C-index" };
        rows.push(row(pooled, &|unit| of(&unit.c_index_pooled)));
        rows.push(row(&format!("Uno's C before {:.1} months", main.horizon), &|unit| of(&unit.uno_c)));
        rows.push(row(&format!("Mean AUC{}", span(&main.auc.times)), &|unit| of(&unit.auc.mean)));
        rows.push(row(&format!("Brier score{}", span(&main.brier.times)), &|unit| of(&unit.brier.integrated)));
        if main.brier.kaplan_meier.is_some() {
            let score = |unit: &Accuracy| unit.brier.kaplan_meier.map_or("-".into(), |score| format!("{score:.4}"));
            rows.push(row("Brier score of Kaplan-Meier alone", &|unit| Cell { text: score(unit), note: None }));
        }
        rows.push(row("Permutation test of C", &|unit| {
            let p = &unit.c_index_permutation_p;
            Cell { text: p.estimate.map_or("-".into(), p_text), note: p.note.clone() }
        }));
        rows
    }

    /// The table that a terminal shows.
    pub fn table(&self) -> String {
        let number = |value: Option<usize>| value.map_or("-".into(), |value| value.to_string());
        let percent = 100.0 * self.resampling.level;
        let row = |cells: [&str; 9]| {
            let [fold, train, slides, slide_events, patients, events, best, c_index, interval] = cells;
            let line = format!(
                "{fold:>5}{train:>7}{slides:>8}{slide_events:>8}{patients:>8}{events:>8}{best:>7}{c_index:>9}{interval:>18}"
            );
            line.trim_end().to_string()
        };
        let mut lines = vec![
            format!("{:12}{:^16}{:^16}{:>7}", "", "    - slides -", "    - patients -", "best"),
            row([
                "fold",
                "train",
                "n",
                "events",
                "n",
                "events",
                "epoch",
                "C-index",
                &format!("{percent:.0} % interval"),
            ]),
        ];
        for (f, c) in self.folds.iter().zip(&self.by_slide.c_index_by_fold) {
            let (train, best) = (number(f.train_slides), number(f.best_epoch.map(|epoch| epoch + 1)));
            let c_index = f.c_index.map_or("-".into(), |c| format!("{c:.4}"));
            let interval = c.interval.map_or("-".into(), |[low, high]| format!("{low:.4} to {high:.4}"));
            let FoldResult { fold, slides, patients, events, patient_events, .. } = f;
            let [fold, slides, events, patients, patient_events] =
                [fold, slides, events, patients, patient_events].map(usize::to_string);
            lines.push(row([&fold, &train, &slides, &events, &patients, &patient_events, &best, &c_index, &interval]));
        }
        if self.folds.len() > 1 {
            let [slides, events, patients, patient_events] =
                [self.slides, self.events, self.patients, self.patient_events].map(|n| n.to_string());
            lines.push(row(["all", "", &slides, &events, &patients, &patient_events, "", "", ""]));
        }
        if let Some((mean, std)) = self.c_index_over_folds() {
            lines.push(format!("C-index {mean:.4} +- {std:.4} (by slide; mean and standard deviation over folds)"));
        }
        lines.extend((!self.protocol.is_empty()).then(|| self.protocol.clone()));
        lines.extend(self.warnings.iter().map(|warning| format!("WARNING: {warning}")));
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
        for grouping in &self.risk_groups {
            lines.push(String::new());
            lines.extend(group_lines(grouping));
            let title = grouping.title().replace('\u{2019}', "'");
            notes.extend(grouping.hazard_ratio.note.iter().map(|note| format!("note: {title}: {note}.")));
        }
        if !notes.is_empty() || !self.notes.is_empty() {
            lines.push(String::new());
        }
        lines.extend(notes);
        lines.extend(self.notes.iter().map(|note| format!("note: {note}")));
        lines.join("\n") + "\n"
    }
}

/// A grouping for a terminal: its tests, and a line a group with survival after 1, 3 and 5 years.
fn group_lines(grouping: &Grouping) -> Vec<String> {
    let head = |at: &SurvivalAt| format!("{:.0} y", at.time / 12.0);
    let times = grouping.survival.first().map_or(Vec::new(), |group| group.iter().map(head).collect());
    let line = |name: &str, counts: [&str; 2], survival: &[String]| {
        let survival: String = survival.iter().map(|cell| format!("{cell:>8}")).collect();
        format!("{name:<14}{:>10}{:>8}{survival}", counts[0], counts[1])
    };
    let p = grouping.log_rank.as_ref().map_or("-".into(), |test| p_text(test.p_value));
    let ratio = grouping.hazard_ratio.text();
    let step = if grouping.patients.len() > 2 && !ratio.ends_with('-') { " a group" } else { "" };
    let mut lines = vec![
        format!("{}: log-rank {p}, {ratio}{step}", grouping.title().replace('\u{2019}', "'")),
        line("", ["patients", "events"], &times),
    ];
    for (g, label) in LABELS[grouping.patients.len()].iter().enumerate() {
        let survival = |at: &SurvivalAt| at.survival.map_or("-".into(), |s| format!("{s:.3}"));
        let cells: Vec<String> = grouping.survival[g].iter().map(survival).collect();
        lines.push(line(label, [&grouping.patients[g].to_string(), &grouping.events[g].to_string()], &cells));
    }
    lines
}
