//! report.html: one page that holds everything it shows.

use std::fmt::Write;

use super::{
    About, Cell, FIGURES, FoldResult, SlideResult, StatisticRow, Summary, VERSION,
    accuracy::Unit,
    figure::{escape, page_style},
    groups::{Grouping, LABELS, SurvivalAt, ratio_text},
    p_text,
    plots::{Plot, Plots},
};
use crate::Result;

const STYLE: &str = include_str!("page.css");
/// Rows of the table of slides; predictions.csv has all.
const MOST_ROWS: usize = 1000;
const ICON: &str = "data:image/svg+xml,%3Csvg xmlns=%22http://www.w3.org/2000/svg%22 viewBox=%220 0 16 16%22%3E\
%3Cpath d=%22M2 3h4v4h4v3h4v3%22 fill=%22none%22 stroke=%22%23d96a00%22 stroke-width=%222.5%22/%3E%3C/svg%3E";

/// A page's beginning, up to its header; the title is escaped already.
pub fn head(title: &str) -> String {
    format!(
        "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width,initial-scale=1\">\n\
         <title>{title} \u{b7} CrossFusion</title>\n<link rel=\"icon\" href=\"{ICON}\">\n<style>\n{}{STYLE}</style>\n\
         </head>\n<body>\n<main>\n",
        page_style()
    )
}

/// A page's end.
pub fn foot(page: &mut String) {
    let _ = write!(
        page,
        "</main>\n<footer>Made by CrossFusion {VERSION}. Risk predictions of a research model: not for clinical use.</footer>\n\
         </body>\n</html>\n",
    );
}

/// The page, from the numbers, the predictions that they are of, and their plots.
pub fn page(about: &About, summary: &Summary, predictions: &[SlideResult], plots: &Plots) -> Result<String> {
    let title = escape(&about.title);
    let mut page = head(&title);
    header(&mut page, &title, about);
    key_figures(&mut page, summary, &about.protocol);
    list(&mut page, "warnings", &summary.warnings);
    list(&mut page, "notes", &summary.notes);

    section(&mut page, "Survival by predicted risk", |page| {
        for (plot, grouping) in plots.survival.iter().zip(&summary.risk_groups) {
            page.push_str("<div class=\"groups\">\n");
            figure(page, plot);
            group_table(page, grouping);
            page.push_str("</div>\n");
        }
        Ok(())
    })?;
    section(&mut page, "C-index", |page| {
        figure(page, &plots.c_index);
        fold_table(page, summary);
        Ok(())
    })?;
    section(&mut page, "Accuracy", |page| {
        statistics(page, summary);
        plots.auc.iter().for_each(|plot| figure(page, plot));
        Ok(())
    })?;
    if let Some(plot) = &plots.calibration {
        section(&mut page, "Calibration", |page| {
            figure(page, plot);
            Ok(())
        })?;
    }
    if !plots.training.is_empty() {
        section(&mut page, "Training", |page| {
            page.push_str(
                "<p class=\"legend\"><span class=\"key grey\"></span>training <span class=\"key c0\"></span>validation \
                 <span class=\"key guide\"></span>best epoch</p>\n<div class=\"folds\">\n",
            );
            for plot in &plots.training {
                let _ = writeln!(page, "<div>{}{}</div>", plot.figure.inline(""), links(plot));
            }
            page.push_str("</div>\n");
            Ok(())
        })?;
    }
    section(&mut page, "Predicted risk", |page| {
        plots.risk.iter().for_each(|plot| figure(page, plot));
        slide_table(page, summary, predictions);
        Ok(())
    })?;
    reproduce(&mut page, about)?;
    foot(&mut page);
    Ok(page)
}

fn section(page: &mut String, title: &str, content: impl FnOnce(&mut String) -> Result<()>) -> Result<()> {
    let _ = writeln!(page, "<section>\n<h2>{title}</h2>");
    content(page)?;
    page.push_str("\n</section>\n");
    Ok(())
}

fn figure(page: &mut String, plot: &Plot) {
    if !plot.title.is_empty() {
        let _ = writeln!(page, "<h3>{}</h3>", plot.title);
    }
    let figures = match &plot.phone {
        Some(phone) => plot.figure.inline("on-page") + &phone.inline("on-phone"),
        None => plot.figure.inline(""),
    };
    let _ =
        writeln!(page, "<figure>{figures}<figcaption>{} {}</figcaption></figure>", escape(&plot.caption), links(plot));
}

/// To the plot's files, which lie beside the page.
fn links(plot: &Plot) -> String {
    let link = |kind: &str| {
        let name = kind.to_lowercase();
        format!("<a href=\"{FIGURES}/{}.{name}\">{kind}</a>", plot.name)
    };
    format!("<span class=\"files\">{}</span>", ["SVG", "PNG", "CSV"].map(link).join(" "))
}

fn header(page: &mut String, title: &str, about: &About) {
    let _ = write!(page, "<header>\n<p class=\"kind\">CrossFusion survival report</p>\n<h1>{title}</h1>\n<dl>");
    for (name, value) in &about.facts {
        let _ = write!(page, "<div><dt>{}</dt><dd>{}</dd></div>", escape(name), escape(value));
    }
    page.push_str("</dl>\n</header>\n");
}

fn key_figures(page: &mut String, summary: &Summary, protocol: &str) {
    let (all, folds) = (summary.folds.len(), summary.folds.iter().filter(|fold| fold.c_index.is_some()).count());
    let which = if folds < all { format!("{folds} of {all} folds") } else { format!("{all} folds") };
    let (c_index, name) = match (summary.c_index_over_folds(), summary.c_index_mean) {
        (Some((mean, std)), _) => {
            (format!("{mean:.3} <small>\u{b1} {std:.3}</small>"), format!("C-index by slide, mean of {which}"))
        }
        (None, Some(c_index)) => (format!("{c_index:.3}"), "C-index by slide".to_string()),
        (None, None) => ("\u{2013}".to_string(), "C-index, undefined here".to_string()),
    };
    let leading = &summary.risk_groups[0];
    let p = leading.log_rank.as_ref().map_or("\u{2013}".to_string(), |test| escape(&p_text(test.p_value)));
    let ratio = &leading.hazard_ratio;
    let (hazard, limits) = match (ratio.ratio, ratio.interval) {
        (Some(ratio), Some([lower, upper])) => {
            (ratio_text(ratio), format!(" ({} to {})", ratio_text(lower), ratio_text(upper)))
        }
        _ => ("\u{2013}".into(), String::new()),
    };
    let (count, events) = match summary.unit {
        Unit::Patient => (summary.patients, summary.patient_events),
        Unit::Slide => (summary.slides, summary.events),
    };
    let censored = 100.0 - 100.0 * events as f64 / count.max(1) as f64;
    let who = if summary.unit == Unit::Patient { "patients" } else { "slides" };
    let figures = [
        (c_index, name),
        (hazard, format!("hazard ratio{limits}, high vs low risk")),
        (p, "log-rank, high vs low risk".to_string()),
        (count.to_string(), format!("{who}, {events} with an event, {censored:.0}% censored")),
    ];
    page.push_str("<div class=\"keys\">\n");
    for (value, name) in figures {
        let _ = writeln!(page, "<div><strong>{value}</strong><span>{name}</span></div>");
    }
    page.push_str("</div>\n");
    if !protocol.is_empty() {
        let _ = writeln!(page, "<p class=\"protocol\">{}</p>", escape(protocol));
    }
}

/// Sentences, if there are any.
pub fn list(page: &mut String, class: &str, sentences: &[String]) {
    let items: String = sentences.iter().map(|sentence| format!("<li>{}</li>\n", escape(sentence))).collect();
    if !items.is_empty() {
        let _ = writeln!(page, "<ul class=\"{class}\">\n{items}</ul>");
    }
}

/// Sentences below a table, to which its dashes point.
#[derive(Default)]
struct Footnotes(Vec<String>);

impl Footnotes {
    /// The mark of this sentence; the same sentence has one mark.
    fn mark(&mut self, sentence: &str) -> String {
        let place = self.0.iter().position(|known| known == sentence).unwrap_or_else(|| {
            self.0.push(sentence.into());
            self.0.len() - 1
        });
        format!("<sup>{}</sup>", place + 1)
    }

    fn write(&self, page: &mut String) {
        for (i, sentence) in self.0.iter().enumerate() {
            let _ = writeln!(page, "<p class=\"footnote\"><sup>{}</sup> {}.</p>", i + 1, escape(sentence));
        }
    }
}

/// Survival after 1, 3 and 5 years by group.
fn group_table(page: &mut String, grouping: &Grouping) {
    let mut notes = Footnotes::default();
    let head =
        |at: &SurvivalAt| format!("<th>{:.0} {}</th>", at.time / 12.0, if at.time > 12.0 { "years" } else { "year" });
    let heads: String = grouping.survival.first().map_or(String::new(), |group| group.iter().map(head).collect());
    let _ = write!(
        page,
        "<table class=\"group-table\">\n<thead><tr><th class=\"word\">Survival (95% CI)</th>{heads}</tr></thead>\n<tbody>\n"
    );
    for (label, group) in LABELS[grouping.patients.len()].iter().zip(&grouping.survival) {
        let cells = group.iter().map(|at| match (at.survival, at.interval) {
            (Some(s), Some([lower, upper])) => {
                format!("<td>{s:.2} <small>({lower:.2} to {upper:.2})</small></td>")
            }
            (Some(s), None) => format!("<td>{s:.2}</td>"),
            _ => format!("<td>\u{2013}{}</td>", notes.mark("nobody of the group was followed so long")),
        });
        let _ = writeln!(page, "<tr><td class=\"word\">{label}</td>{}</tr>", cells.collect::<String>());
    }
    page.push_str("</tbody>\n</table>\n");
    notes.write(page);
}

fn fold_table(page: &mut String, summary: &Summary) {
    let percent = 100.0 * summary.resampling.level;
    let _ = write!(
        page,
        "<table class=\"fold-table\">\n<thead><tr><th></th><th>Training</th><th colspan=\"2\">Evaluated slides</th>\
         <th colspan=\"2\">Patients</th><th>Best</th><th colspan=\"2\">C-index by slide</th></tr>\n\
         <tr><th>Fold</th><th>slides</th><th>n</th><th>events</th><th>n</th><th>events</th><th>epoch</th><th></th>\
         <th>{percent:.0}% interval</th></tr></thead>\n<tbody>\n",
    );
    let mut notes = Footnotes::default();
    let dash = || "\u{2013}".to_string();
    for (fold, c) in summary.folds.iter().zip(&summary.by_slide.c_index_by_fold) {
        let FoldResult { fold: number, slides, patients, events, patient_events, c_index, note, .. } = fold;
        let train = fold.train_slides.map_or_else(dash, |n| n.to_string());
        let best = fold.best_epoch.map_or_else(dash, |epoch| (epoch + 1).to_string());
        let mark = note.as_ref().map_or(String::new(), |note| notes.mark(note));
        let interval = c.interval.map_or_else(|| dash() + &mark, |[low, high]| format!("{low:.4}&nbsp;to {high:.4}"));
        let c_index = c_index.map_or_else(dash, |c| format!("{c:.4}"));
        let _ = writeln!(
            page,
            "<tr><td>{number}</td><td>{train}</td><td>{slides}</td><td>{events}</td><td>{patients}</td>\
             <td>{patient_events}</td><td>{best}</td><td>{c_index}</td><td>{interval}</td></tr>"
        );
    }
    if let Some((mean, std)) = summary.c_index_over_folds() {
        let Summary { slides, events, patients, patient_events, .. } = summary;
        let over_folds = &summary.by_slide.c_index_fold_mean;
        let t = match (over_folds.interval, &over_folds.note) {
            (Some([low, high]), _) => format!("{low:.4}&nbsp;to {high:.4}"),
            (None, Some(note)) => dash() + &notes.mark(note),
            (None, None) => dash(),
        };
        let _ = writeln!(
            page,
            "<tr class=\"total\"><td>All</td><td></td><td>{slides}</td><td>{events}</td><td>{patients}</td>\
             <td>{patient_events}</td><td>Mean</td><td>{mean:.4}</td><td>{t}</td></tr>\n\
             <tr class=\"total\"><td></td><td></td><td></td><td></td><td></td><td></td><td>S.d.</td><td>{std:.4}</td>\
             <td></td></tr>",
        );
    }
    page.push_str("</tbody>\n</table>\n");
    notes.write(page);
}

/// Each statistic with its interval, by slide and by patient; below, why one is undefined.
fn statistics(page: &mut String, summary: &Summary) {
    let units = if summary.by_patient.is_some() { "<th>By slide</th><th>By patient</th>" } else { "<th></th>" };
    let percent = 100.0 * summary.resampling.level;
    let _ = write!(
        page,
        "<table class=\"statistics\">\n<thead><tr><th class=\"word\">Statistic, {percent:.0}% interval</th>{units}</tr></thead>\n<tbody>\n"
    );
    let mut notes = Footnotes::default();
    for StatisticRow { name, cells } in summary.statistics() {
        let cell = |Cell { text, note }: Cell| {
            let note = note.map_or(String::new(), |note| notes.mark(&note));
            let text = if text == "-" { "\u{2013}" } else { &text };
            format!("<td>{}{note}</td>", escape(text))
        };
        let cells: String = cells.into_iter().map(cell).collect();
        let _ = writeln!(page, "<tr><td class=\"word\">{}</td>{cells}</tr>", escape(&name));
    }
    page.push_str("</tbody>\n</table>\n");
    notes.write(page);
    let _ = writeln!(
        page,
        "<p class=\"caption\">Intervals are percentiles of {} bootstrap cohorts (seed {}); \
         the mean of folds has Student\u{2019}s t interval on the logit scale. Weights for censoring come from the evaluated cohort itself. \
         Lower Brier scores are better. The permutation test deals risks anew within folds, one-sided.</p>",
        summary.resampling.replicates, summary.resampling.seed
    );
}

fn slide_table(page: &mut String, summary: &Summary, predictions: &[SlideResult]) {
    let mut sorted: Vec<&SlideResult> = predictions.iter().collect();
    sorted.sort_by(|a, b| b.risk.total_cmp(&a.risk));
    let shown = sorted.len().min(MOST_ROWS);
    let which = if shown < sorted.len() {
        format!("{shown} of highest risk of {} slides", sorted.len())
    } else {
        format!("All {shown} slides, by risk")
    };
    let _ = write!(
        page,
        "<details>\n<summary>{which}</summary>\n<div class=\"tall\"><table class=\"slides\">\n<thead><tr>\
         <th>Rank</th><th class=\"word\">Case</th><th class=\"word\">Slide</th><th>Fold</th><th>Risk</th>\
         <th class=\"word\">Group</th><th>Months</th><th class=\"word\">Outcome</th></tr></thead>\n<tbody>\n"
    );
    let groups = summary.leading_groups();
    for (i, p) in sorted[..shown].iter().enumerate() {
        let group = match groups.get(&summary.row_of(p)) {
            Some(0) => "<td class=\"word c0\">low",
            _ => "<td class=\"word c1\">high",
        };
        let _ = writeln!(
            page,
            "<tr><td>{}</td><td class=\"word\">{}</td><td class=\"word\">{}</td><td>{}</td><td>{:.4}</td>{group}</td>\
             <td>{:.2}</td><td class=\"word\">{}</td></tr>",
            i + 1,
            escape(&p.case_id),
            escape(&p.slide_id),
            p.fold,
            p.risk,
            p.time,
            if p.event { "event" } else { "censored" }
        );
    }
    let patients = if summary.unit == Unit::Patient {
        "; <a href=\"predictions_patients.csv\">predictions_patients.csv</a> has all patients, with their groups"
    } else {
        ""
    };
    let _ = write!(
        page,
        "</tbody>\n</table></div>\n<p class=\"caption\">The group is the patient\u{2019}s, of the leading figure. <a href=\"predictions.csv\">predictions.csv</a> has all slides, with hazards and survival by time bin{patients}.</p></details>\n"
    );
}

fn reproduce(page: &mut String, about: &About) -> Result<()> {
    section(page, "Reproduce and cite", |page| {
        if !about.commands.is_empty() {
            let _ = writeln!(page, "<pre><code>{}</code></pre>", escape(&about.commands));
        }
        if !about.config.is_empty() {
            let _ = write!(
                page,
                "<details>\n<summary>Configuration, as resolved</summary>\n<pre><code>{}</code></pre>\n</details>\n",
                escape(&about.config)
            );
        }
        let _ = writeln!(
            page,
            "<p class=\"caption\">Every plot lies in the folder {FIGURES} beside this page, as SVG, PNG and CSV; the numbers \
             are in <a href=\"summary.json\">summary.json</a>, and <a href=\"README.md\">README.md</a> is the model\u{2019}s card.</p>"
        );
        page.push_str(
            "<p class=\"caption\">The model: Soraki et al., <cite>CrossFusion</cite>, Medical Imaging with Deep Learning (MIDL) 2026, \
             <a href=\"https://arxiv.org/abs/2503.02064\">arXiv:2503.02064</a>. C-index: Harrell et al., JAMA 1982, with \
             risks within 1e-8 tied. Survival curves: Kaplan and Meier, JASA 1958, with Greenwood\u{2019}s variance on \
             the log scale. Log-rank test: Mantel 1966. Hazard ratio: Cox 1972, with Efron\u{2019}s ties. Uno\u{2019}s C: Uno et al. 2011. AUC: Uno et al. 2007. Brier score: Graf et al. 1999.</p>",
        );
        Ok(())
    })
}
