//! The statistics of a report: closed cases, plain sums over pairs, and what no outcome may change.

use super::{PLAN, cohort, folds, summary};
use crossfusion::{
    report::{
        FoldFacts, SlideResult, Summary,
        accuracy::{Accuracy, Estimate, Unit, by_patient},
        figure::Screen,
        forest::{self, Forest, Row},
        plots::Plots,
    },
    survival::{Bootstrap, Limits, kaplan_meier},
};

/// The lines of a CSV below its head.
fn rows(csv: &[u8]) -> Vec<Vec<String>> {
    let mut table = csv::Reader::from_reader(csv);
    table.records().map(|row| row.unwrap().iter().map(String::from).collect()).collect()
}

fn number(cell: &str) -> f64 {
    cell.parse().unwrap_or_else(|_| panic!("`{cell}` is no number"))
}

/// G(t), the Kaplan-Meier curve of censoring, events of a time leaving first: a product over the
/// distinct times.
fn uncensored(rows: &[SlideResult], t: f64) -> f64 {
    let mut times: Vec<f64> = rows.iter().filter(|r| !r.event && r.time <= t).map(|r| r.time).collect();
    times.sort_by(f64::total_cmp);
    times.dedup();
    let factor = |&s: &f64| {
        let at = |event: bool| rows.iter().filter(|r| r.time == s && r.event == event).count() as f64;
        let at_risk = rows.iter().filter(|r| r.time >= s).count() as f64;
        1.0 - at(false) / (at_risk - at(true))
    };
    times.iter().map(factor).product()
}

/// Uno et al. 2011, eq. 6, pair by pair.
fn uno(rows: &[SlideResult], tau: f64) -> f64 {
    let (mut score, mut pairs) = (0.0, 0.0);
    for a in rows.iter().filter(|a| a.event && a.time < tau) {
        let weight = uncensored(rows, a.time).powi(-2);
        for b in rows.iter().filter(|b| a.time < b.time || (a.time == b.time && !b.event)) {
            pairs += weight;
            score += weight * if a.risk == b.risk { 0.5 } else { f64::from(a.risk > b.risk) };
        }
    }
    score / pairs
}

/// Uno et al. 2007: the weighted share of (case, control) pairs in which the case has the higher
/// risk.
fn auc(rows: &[SlideResult], t: f64) -> f64 {
    let (mut score, mut pairs) = (0.0, 0.0);
    for case in rows.iter().filter(|r| r.event && r.time <= t) {
        let weight = 1.0 / uncensored(rows, case.time);
        for control in rows.iter().filter(|r| r.time > t) {
            pairs += weight;
            score += weight * if case.risk == control.risk { 0.5 } else { f64::from(case.risk > control.risk) };
        }
    }
    score / pairs
}

/// Graf et al. 1999.
fn brier(rows: &[SlideResult], bin: usize, t: f64) -> f64 {
    let term = |r: &SlideResult| match r {
        r if r.time > t => (1.0 - r.survival[bin]).powi(2) / uncensored(rows, t),
        r if r.event => r.survival[bin].powi(2) / uncensored(rows, r.time),
        _ => 0.0,
    };
    rows.iter().map(term).sum::<f64>() / rows.len() as f64
}

#[test]
fn statistics_over_time_are_those_of_their_definitions() {
    let predictions = cohort(120, 3);
    let Accuracy { uno_c, horizon, auc: curve, brier: score, .. } = summary(&predictions, 3).by_slide;
    let close = |got: f64, want: f64| approx::assert_abs_diff_eq!(got, want, epsilon = 1e-12);
    assert_eq!(predictions.iter().filter(|p| p.time > horizon).count(), 12, "a tenth are followed longer");
    close(uno_c.estimate.unwrap(), uno(&predictions, horizon));
    assert_eq!(curve.times.len(), curve.auc.len());
    for (&t, got) in curve.times.iter().zip(&curve.auc) {
        close(got.estimate.unwrap(), auc(&predictions, t));
    }
    // the edges of tests/report.rs
    assert_eq!(score.times, [8.0, 16.0, 32.0]);
    let want: Vec<f64> = score.times.iter().enumerate().map(|(bin, &t)| brier(&predictions, bin, t)).collect();
    score.score.iter().zip(&want).for_each(|(&got, &want)| close(got, want));
    close(score.integrated.estimate.unwrap(), (4.0 * (want[0] + want[1]) + 8.0 * (want[1] + want[2])) / 24.0);
    for statistic in [&uno_c, &curve.mean, &score.integrated] {
        let [lower, upper] = statistic.interval.unwrap();
        let estimate = statistic.estimate.unwrap();
        assert!(lower < estimate && estimate < upper, "{lower} {estimate} {upper}");
    }
}

/// Risks that order a cohort without a fault order every resampled one so, too: the interval is a
/// point.
#[test]
fn a_perfect_order_has_an_interval_of_no_width() {
    let mut predictions = cohort(40, 2);
    predictions.iter_mut().for_each(|p| p.risk = -p.time);
    let summary = summary(&predictions, 2);
    for c in summary.by_slide.c_index_by_fold.iter().chain([&summary.by_slide.c_index_pooled]) {
        assert_eq!((c.estimate, c.interval), (Some(1.0), Some([1.0, 1.0])));
    }
    // no permutation of 40 reaches C = 1
    assert_eq!(summary.by_slide.c_index_permutation_p.estimate, Some(1.0 / (1.0 + PLAN.replicates as f64)));
    let mean = &summary.by_slide.c_index_fold_mean;
    assert_eq!((mean.estimate, mean.interval), (Some(1.0), None));
    assert!(mean.note.as_ref().unwrap().contains("two folds are too few"), "{mean:?}");
}

/// Folds of three patients, whose C-indices are 1/3, 2/3 and 1 by hand; R's t.test(c(1, 2, 3) /
/// 3)$conf.int is -0.16 to 1.49, which no C-index is. On the logit scale, by scipy:
/// tests/survival/uncertainty.rs.
#[test]
fn the_mean_of_folds_has_an_interval_between_0_and_1() {
    let template = cohort(1, 1).remove(0);
    let mut predictions = Vec::new();
    for (fold, risks) in [[1.0, 3.0, 2.0], [3.0, 1.0, 2.0], [3.0, 2.0, 1.0]].into_iter().enumerate() {
        for (i, risk) in risks.into_iter().enumerate() {
            let case_id = format!("{fold}-{i}");
            let time = 1.0 + i as f64;
            predictions.push(SlideResult { case_id, fold, time, risk, event: true, ..template.clone() });
        }
    }
    let accuracy = summary(&predictions, 3).by_slide;
    let c: Vec<f64> = accuracy.c_index_by_fold.iter().map(|c| c.estimate.unwrap()).collect();
    assert_eq!(c, [1.0 / 3.0, 2.0 / 3.0, 1.0]);
    let [lower, upper] = accuracy.c_index_fold_mean.interval.unwrap();
    approx::assert_abs_diff_eq!(lower, 0.045_954_508_795_885_35, epsilon = 1e-12);
    approx::assert_abs_diff_eq!(upper, 0.988_101_272_673_851_6, epsilon = 1e-12);
}

#[test]
fn intervals_do_not_depend_on_the_number_of_threads() {
    let predictions = cohort(60, 2);
    let on = |threads: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        pool.install(|| summary(&predictions, 2))
    };
    assert_eq!(on(1), on(3));
    let other = Summary::new(&folds(&predictions, 2), &predictions, Bootstrap { seed: 1, ..PLAN }).unwrap();
    assert_ne!(on(1).by_slide.c_index_pooled.interval, other.by_slide.c_index_pooled.interval);
}

#[test]
fn a_patients_slides_are_averaged() {
    let mut predictions = cohort(60, 2);
    // slides 0 and 2 are of one patient, as are 1, 3 and 5
    for (slide, first) in [(2, 0), (3, 1), (5, 1)] {
        let SlideResult { case_id, time, event, .. } = predictions[first].clone();
        predictions[slide] = SlideResult { case_id, time, event, ..predictions[slide].clone() };
    }
    let patients = by_patient(&predictions).unwrap();
    assert_eq!(patients.len(), 57);
    approx::assert_abs_diff_eq!(patients[0].risk, 0.5 * (predictions[0].risk + predictions[2].risk), epsilon = 1e-15);
    let survival = [1, 3, 5].map(|slide: usize| predictions[slide].survival[2]).iter().sum::<f64>() / 3.0;
    approx::assert_abs_diff_eq!(patients[1].survival[2], survival, epsilon = 1e-15);
    let all = summary(&predictions, 2);
    let of_patients = all.by_patient.as_ref().unwrap();
    assert_eq!((of_patients.unit, of_patients.rows, all.by_slide.rows), (Unit::Patient, 57, 60));
    assert_eq!(of_patients.c_index_pooled, summary(&patients, 2).by_slide.c_index_pooled);
    let why = all.by_slide.c_index_permutation_p.note.unwrap();
    assert!(why.contains("cannot be exchanged"), "{why}");
    assert_eq!(all.risk_groups[0].patients.iter().sum::<usize>(), 57);

    predictions[5].time += 1.0;
    let error = by_patient(&predictions).unwrap_err().to_string();
    assert!(error.contains("different outcomes") && error.contains(&predictions[5].case_id), "{error}");
    let notes = summary(&predictions, 2).notes.join("\n");
    assert!(notes.contains("Nothing is reported by patient"), "{notes}");
}

/// The other folds teach a fold's cut: its own outcomes do not move it, nor does the scale of its
/// risks.
#[test]
fn a_learnt_cut_knows_nothing_of_the_patients_it_cuts() {
    let predictions = cohort(150, 3);
    let learnt = |predictions: &[SlideResult]| summary(predictions, 3).risk_groups[3].clone();
    let before = learnt(&predictions);
    assert_eq!((before.name, before.cuts.len()), ("learnt_cut", 3));
    let mut changed = predictions.clone();
    for p in changed.iter_mut().filter(|p| p.fold == 1) {
        (p.time, p.event) = (100.0 - p.time, !p.event);
    }
    let after = learnt(&changed);
    assert_eq!(after.cuts[1], before.cuts[1]);
    assert_ne!((&after.cuts[0], &after.cuts[2]), (&before.cuts[0], &before.cuts[2]), "the others do learn from it");
    let of_fold = |group: &[usize]| group.iter().skip(1).step_by(3).copied().collect::<Vec<_>>();
    assert_eq!(of_fold(&after.group), of_fold(&before.group));

    let mut scaled = predictions;
    scaled.iter_mut().filter(|p| p.fold == 2).for_each(|p| p.risk = p.risk.exp() * 7.0);
    assert_eq!(learnt(&scaled).group, before.group);
}

#[test]
fn the_tables_of_the_plots_are_what_is_drawn() {
    let predictions = cohort(160, 2);
    let summary = summary(&predictions, 2);
    let plots = Plots::new(&summary, &super::epochs(2)).unwrap();
    let table = |name: &str| rows(&plots.all().find(|plot| plot.name == name).unwrap().csv);

    let c = table("c_index");
    let names: Vec<&str> = c.iter().map(|row| row[0].as_str()).collect();
    assert_eq!(names, ["Fold 0", "Fold 1", "Mean of folds", "All folds pooled"]);
    assert!(c.iter().all(|row| row[1] == "slide"));
    assert_eq!(Some(number(&c[1][2])), summary.folds[1].c_index);
    assert_eq!(Some([number(&c[3][3]), number(&c[3][4])]), summary.by_slide.c_index_pooled.interval);

    // Kaplan-Meier of the group of high risk, as a plain product: cut at each fold's median, and at
    // one
    let median = |fold: usize| {
        let mut risks: Vec<f64> = predictions.iter().filter(|p| p.fold == fold).map(|p| p.risk).collect();
        risks.sort_by(f64::total_cmp);
        0.5 * (risks[39] + risks[40])
    };
    let medians = [median(0), median(1)];
    assert_ne!(medians[0], medians[1]);
    for (name, cuts) in [("km", medians), ("km_one_cut", [summary.median_risk; 2])] {
        let km = table(name);
        let high: Vec<&SlideResult> = predictions.iter().filter(|p| p.risk >= cuts[p.fold]).collect();
        let drawn: Vec<_> = km.iter().filter(|row| row[0] == "High risk").collect();
        let mut survival = 1.0;
        for row in &drawn {
            let t = number(&row[1]);
            let (at_risk, events) = (number(&row[2]), number(&row[3]));
            assert_eq!(at_risk as usize, high.iter().filter(|p| p.time >= t).count());
            assert_eq!(events as usize, high.iter().filter(|p| p.time == t && p.event).count());
            survival *= 1.0 - events / at_risk;
            approx::assert_abs_diff_eq!(number(&row[5]), survival, epsilon = 1e-12);
        }
        assert_eq!(drawn.iter().map(|row| number(&row[3]) + number(&row[4])).sum::<f64>() as usize, high.len());
    }

    let calibration = table("calibration");
    assert_eq!(calibration.len(), 12, "four groups at three times");
    for (bin, at_time) in calibration.chunks(4).enumerate() {
        let mut sorted: Vec<&SlideResult> = predictions.iter().collect();
        sorted.sort_by(|a, b| a.survival[bin].total_cmp(&b.survival[bin]));
        for (group, row) in at_time.iter().enumerate() {
            let members = &sorted[40 * group..40 * (group + 1)];
            let t = [8.0, 16.0, 32.0][bin];
            assert_eq!((number(&row[0]), number(&row[2])), (t, 40.0));
            let mean = members.iter().map(|p| p.survival[bin]).sum::<f64>() / 40.0;
            approx::assert_abs_diff_eq!(number(&row[4]), mean, epsilon = 1e-12);
            let time: Vec<f64> = members.iter().map(|p| p.time).collect();
            let event: Vec<bool> = members.iter().map(|p| p.event).collect();
            let curve = kaplan_meier(&time, &event, Limits::Log, 0.95).unwrap();
            assert_eq!(row[5], curve.survival_at(t).map_or(String::new(), |s| s.to_string()));
        }
    }

    let risk = table("risk");
    let count = |column: usize| risk.iter().map(|row| number(&row[column])).sum::<f64>() as usize;
    assert_eq!((count(2), count(2) + count(3)), (summary.events, 160));
    for row in &risk {
        let (from, to) = (number(&row[0]), number(&row[1]));
        let inside = predictions.iter().filter(|p| (from + 1e-9..to - 1e-9).contains(&p.risk)).count();
        assert!(inside as f64 <= number(&row[2]) + number(&row[3]), "{row:?}");
        assert!(to <= summary.median_risk + 1e-9 || from >= summary.median_risk - 1e-9, "a bin is of one group");
    }
    let epochs = super::epochs(2);
    let training = [table("training_fold_0"), table("training_fold_1")].concat();
    assert_eq!(training.len(), epochs.len());
    for (row, epoch) in training.iter().zip(&epochs) {
        let shown = (number(&row[1]) as usize, number(&row[2]), number(&row[5]));
        assert_eq!(shown, (epoch.epoch + 1, epoch.train_loss, epoch.val_c_index.unwrap()));
    }
}

/// Of estimates that are one number, and of intervals beyond what the axis shows.
#[test]
fn a_forest_has_a_readable_axis_whatever_its_estimates() {
    let forest = |estimates: &[(f64, [f64; 2])]| {
        let row = |&(estimate, interval): &(f64, [f64; 2])| Row {
            label: "row".into(),
            estimates: vec![Estimate { estimate: Some(estimate), interval: Some(interval), note: None }],
            total: false,
        };
        let axis = Forest { label: "", axis: "", series: &["only"], reference: 0.5, bounds: (0.0, 1.0), signed: false };
        forest::figure(&axis, &estimates.iter().map(row).collect::<Vec<_>>(), Screen::Page).standalone()
    };
    for (estimates, arrows) in [
        (&[(0.5, [0.5, 0.5]), (0.5, [0.5, 0.5])][..], 0),
        (&[(0.5, [0.499, 0.5001])], 0),
        (&[(0.8, [-0.4, 1.9]), (0.7, [0.6, 0.8])], 2),
        (&[(1.0, [1.0, 1.0])], 0),
    ] {
        let svg = forest(estimates);
        let ticks = svg.matches("class=\"grid\"").count();
        assert!((2..=9).contains(&ticks), "{ticks} ticks for {estimates:?}");
        let inside = |path: &str| path.split_once("l-6 5").is_some() || path.split_once("l6 5l-6").is_some();
        assert_eq!(svg.lines().filter(|line| inside(line)).count(), arrows, "{svg}");
    }
}

#[test]
fn undefined_statistics_say_why() {
    // a model that does not say its bins, four events, one fold
    let mut predictions = cohort(30, 1);
    let mut left = 4;
    for p in &mut predictions {
        p.event = p.event && left > 0;
        left -= usize::from(p.event);
    }
    let fold = FoldFacts { fold: 0, train_slides: None, best_epoch: None, bin_edges: Vec::new() };
    let summary = Summary::new(&[fold], &predictions, PLAN).unwrap();
    let Accuracy { auc, brier, c_index_fold_mean, .. } = &summary.by_slide;
    assert!(auc.mean.note.as_ref().unwrap().contains("needs 5 events, and there are 4"), "{auc:?}");
    assert!(brier.integrated.note.as_ref().unwrap().contains("does not say where they end"), "{brier:?}");
    assert_eq!((c_index_fold_mean.estimate.is_some(), c_index_fold_mean.interval), (true, None));
    let notes = summary.notes.join("\n");
    assert!(notes.contains("There is no calibration: the model has no time bins"), "{notes}");
    let table = summary.table();
    assert!(table.contains("needs 5 events") && !table.contains("NaN"), "{table}");
}

/// Cut within each fold, the groups do not know the scales of the folds' risks; cut over all, they
/// do.
#[test]
fn groups_by_rank_lead_and_know_no_scale_of_risk() {
    let predictions = cohort(150, 3);
    let before = summary(&predictions, 3);
    let mut scaled = predictions;
    scaled.iter_mut().filter(|p| p.fold == 2).for_each(|p| p.risk = p.risk.exp() * 7.0);
    let after = summary(&scaled, 3);
    let names: Vec<&str> = before.risk_groups.iter().map(|grouping| grouping.name).collect();
    assert_eq!(names, ["fold_median", "fold_tertiles", "median", "learnt_cut"]);
    for (same, place) in [(true, 0), (true, 1), (false, 2), (true, 3)] {
        assert_eq!(before.risk_groups[place].group == after.risk_groups[place].group, same, "{}", names[place]);
    }
    assert_eq!(before.risk_groups[0].patients, [75, 75]);
    // the key `log_rank` of summary.json is of one cut, as ever
    assert_eq!(before.log_rank, before.risk_groups[2].log_rank);
    let one = summary(&scaled, 1);
    assert_eq!(one.risk_groups.iter().map(|grouping| grouping.name).collect::<Vec<_>>(), ["median", "tertiles"]);
}

/// By the functions that tests/survival.rs holds against R and statsmodels, on the groups picked by
/// hand.
#[test]
fn groups_have_their_hazard_ratio_and_survival_by_year() {
    let predictions = cohort(150, 3);
    let summary = summary(&predictions, 3);
    for grouping in &summary.risk_groups {
        let number: Vec<f64> = grouping.group.iter().map(|&g| g as f64).collect();
        let time: Vec<f64> = predictions.iter().map(|p| p.time).collect();
        let event: Vec<bool> = predictions.iter().map(|p| p.event).collect();
        let want = crossfusion::survival::hazard_ratio(&time, &event, &number, 0.95).unwrap();
        let got = &grouping.hazard_ratio;
        assert_eq!((got.ratio, got.interval), (Some(want.ratio), Some([want.lower, want.upper])));
        assert!(!got.reversed && want.ratio > 1.0 && got.note.is_none());
        assert_eq!(grouping.events.iter().sum::<usize>(), summary.patient_events);
        for (g, at) in grouping.survival.iter().enumerate() {
            let of: Vec<usize> = (0..150).filter(|&row| grouping.group[row] == g).collect();
            let time: Vec<f64> = of.iter().map(|&row| time[row]).collect();
            let event: Vec<bool> = of.iter().map(|&row| event[row]).collect();
            let curve = kaplan_meier(&time, &event, Limits::Log, 0.95).unwrap();
            for (at, t) in at.iter().zip([12.0, 36.0, 60.0]) {
                assert_eq!((at.time, at.at_risk), (t, time.iter().filter(|&&time| time >= t).count()));
                assert_eq!(at.survival, curve.survival_at(t));
                let step = curve.steps.iter().rfind(|step| step.time <= t).unwrap();
                assert_eq!(at.interval.map(|[a, b]| (a, b)), at.survival.and(step.limits));
            }
        }
    }
}

/// Risks turned round: the ratio is turned over, and it is said wherever the log-rank test is.
#[test]
fn a_reversed_model_is_no_success() {
    let right = cohort(150, 3);
    let mut wrong = right.clone();
    wrong.iter_mut().for_each(|p| p.risk = -p.risk);
    let [right, wrong] = [right, wrong].map(|predictions| summary(&predictions, 3));
    assert!(right.warnings.is_empty(), "{:?}", right.warnings);
    let warnings = wrong.warnings.join("\n");
    for part in ["The C-index is below 0.5 (0.", "mean of folds", "The high-risk group lives longer", "HR 0."] {
        assert!(warnings.contains(part), "{warnings}");
    }
    assert!(wrong.table().contains("WARNING: The high-risk group lives longer"));
    let ratio = |summary: &Summary| summary.risk_groups[0].hazard_ratio.ratio.unwrap();
    approx::assert_relative_eq!(ratio(&wrong), 1.0 / ratio(&right), max_relative = 1e-9);
    let plots = Plots::new(&wrong, &[]).unwrap();
    for plot in &plots.survival {
        for figure in [&plot.figure, plot.phone.as_ref().unwrap()] {
            let svg = figure.standalone();
            assert!(
                svg.contains("HR 0.") && svg.contains("Reversed: the high-risk group lives longer"),
                "{}",
                plot.name
            );
        }
    }
    for plot in Plots::new(&right, &[]).unwrap().survival {
        let svg = plot.figure.standalone();
        assert!(svg.contains("HR ") && svg.contains("log-rank p") && !svg.contains("Reversed"), "{}", plot.name);
    }

    // groups apart have no ratio, and a direction all the same
    let mut apart = cohort(40, 1);
    apart.iter_mut().for_each(|p| (p.event, p.risk) = (true, p.time));
    let apart = summary(&apart, 1);
    let ratio = &apart.risk_groups[0].hazard_ratio;
    assert_eq!((ratio.ratio, ratio.reversed), (None, true));
    assert!(ratio.note.as_ref().unwrap().contains("it is zero"), "{ratio:?}");
    assert!(apart.warnings[1].contains("lives longer"), "{:?}", apart.warnings);
    assert!(!apart.warnings[1].contains("HR -"), "{:?}", apart.warnings);

    // of eight patients every second is of high risk and dies a month later: no more than chance
    let mut even = cohort(8, 1);
    for (i, p) in even.iter_mut().enumerate() {
        (p.time, p.event, p.risk) = ((i + 1) as f64, true, (i % 2) as f64);
    }
    let even = summary(&even, 1);
    let ratio = &even.risk_groups[0].hazard_ratio;
    assert!(ratio.ratio.unwrap() < 1.0 && ratio.interval.unwrap()[1] > 1.0 && !ratio.reversed, "{ratio:?}");
    assert!(even.warnings.iter().all(|warning| !warning.contains("reversed")), "{:?}", even.warnings);
}

/// fault-11: three slides a patient, of 6 patients 3 with an event; 18 slides, 9 of them of such a
/// patient.
#[test]
fn events_of_slides_and_of_patients_are_two_numbers() {
    let predictions: Vec<SlideResult> = (0..18)
        .map(|i| {
            let patient = i / 3;
            let slide_id = format!("S{i}");
            let (time, event) = (1.0 + patient as f64, patient % 2 == 0);
            SlideResult {
                case_id: format!("P{patient}"),
                slide_id,
                time,
                event,
                risk: -(i as f64),
                ..SlideResult::default()
            }
        })
        .collect();
    let fold = FoldFacts { fold: 0, train_slides: None, best_epoch: None, bin_edges: Vec::new() };
    let summary = Summary::new(&[fold], &predictions, PLAN).unwrap();
    let fold = &summary.folds[0];
    assert_eq!((fold.slides, fold.events, fold.patients, fold.patient_events), (18, 9, 6, 3));
    assert_eq!((summary.slides, summary.events, summary.patients, summary.patient_events), (18, 9, 6, 3));
    let table = summary.table();
    let row: Vec<&str> = table.lines().nth(2).unwrap().split_whitespace().collect();
    assert_eq!(row[..6], ["0", "-", "18", "9", "6", "3"], "{table}");
    assert!(table.lines().take(3).all(|line| line.chars().count() <= 80), "{table}");
    let json = serde_json::to_value(&summary).unwrap();
    assert_eq!((&json["folds"][0]["patient_events"], &json["patient_events"]), (&3.into(), &3.into()));
}

/// Training that ends at its first or last epoch is said to.
#[test]
fn best_epochs_at_the_ends_are_told() {
    let note = |best: [usize; 2], warmup: usize| {
        let mut epochs = super::epochs(2);
        epochs.iter_mut().for_each(|epoch| epoch.best = epoch.epoch == best[epoch.fold]);
        crossfusion::report::best_epoch_note(&epochs, warmup, 29)
    };
    assert_eq!(note([5, 9], 5), None);
    assert_eq!(note([7, 9], 5), None);
    let first = note([5, 5], 5).unwrap();
    assert!(first.contains("the first that may be chosen, epoch 6, in 2 folds"), "{first}");
    let last = note([28, 28], 5).unwrap();
    assert!(last.contains("the last, epoch 29, in 2 folds") && !last.contains("first"), "{last}");
    let both = note([5, 28], 5).unwrap();
    assert!(both.contains("epoch 6, in 1 fold") && both.contains("epoch 29, in 1 fold"), "{both}");
}
