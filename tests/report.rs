//! The report on a synthetic cohort: what it shows is what went in, and it is whole without
//! network, fonts or a model.
#![cfg(feature = "programs")]

#[path = "report/accuracy.rs"]
mod accuracy;
#[path = "report/raster.rs"]
mod raster;

use crossfusion::{
    folder::EpochMetrics,
    report::{
        self, About, FoldFacts, SlideResult, Summary,
        figure::{Screen, escape},
        history, html, km,
        plots::Plots,
    },
    survival::{Bootstrap, concordance_index, log_rank},
};
use resvg::{tiny_skia::Pixmap, usvg::roxmltree};

/// Uniform on [0, 1).
fn uniform(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    ((z ^ (z >> 31)) >> 11) as f64 * (0.5f64).powi(53)
}

/// Exponential survival whose rate rises with the risk, about half of it censored.
fn cohort(slides: usize, folds: usize) -> Vec<SlideResult> {
    let state = &mut 7;
    let mut slide = |i: usize| {
        let score = uniform(state) + uniform(state) + uniform(state) - 1.5;
        let event = -uniform(state).ln() * 40.0 * (-1.2 * score).exp();
        let censoring = 4.0 + 110.0 * uniform(state) * uniform(state);
        let hazards: Vec<f64> = (0..4).map(|bin| 1.0 / (1.0 + (1.2 - 0.3 * f64::from(bin) - score).exp())).collect();
        let survival: Vec<f64> = hazards
            .iter()
            .scan(1.0, |s, h| {
                Some({
                    *s *= 1.0 - h;
                    *s
                })
            })
            .collect();
        SlideResult {
            case_id: format!("TCGA-{:02X}-{:04}", i % 23, i),
            slide_id: format!("TCGA-{:02X}-{:04}-01Z-00-DX1.svs", i % 23, i),
            fold: i % folds,
            time: (event.min(censoring) * 100.0).round() / 100.0,
            event: event <= censoring,
            risk: -survival.iter().sum::<f64>(),
            hazards,
            survival,
        }
    };
    (0..slides).map(&mut slide).collect()
}

fn folds(predictions: &[SlideResult], folds: usize) -> Vec<FoldFacts> {
    let slides = |fold| predictions.iter().filter(|p| p.fold != fold).count();
    let fold = |fold| FoldFacts {
        fold,
        train_slides: Some(slides(fold)),
        best_epoch: Some(9 + 3 * fold),
        bin_edges: vec![0.0, 8.0, 16.0, 32.0, 120.0],
    };
    (0..folds).map(fold).collect()
}

/// Few replicates: most tests are not about them.
const PLAN: Bootstrap = Bootstrap { replicates: 40, seed: 0, level: 0.95 };

fn summary(predictions: &[SlideResult], n_folds: usize) -> Summary {
    Summary::new(&folds(predictions, n_folds), predictions, PLAN).unwrap()
}

/// metrics.jsonl of folds that learn for `9 + 3 * fold + 20` epochs.
fn metrics(folds: usize) -> String {
    let state = &mut 3;
    let mut lines = String::new();
    for fold in 0..folds {
        let mut best = 0.0;
        for epoch in 0..29 + 3 * fold {
            let progress = 1.0 - (-(epoch as f64) / 8.0).exp();
            let overfit = (epoch as f64 - 10.0 - 3.0 * fold as f64).max(0.0) * 0.012;
            let train_loss = 1.55 - 0.75 * progress + 0.03 * uniform(state);
            let val_loss = 1.5 - 0.4 * progress + overfit + 0.06 * uniform(state);
            let train_c = 0.5 + 0.35 * progress + 0.02 * uniform(state);
            let val_c = 0.5 + 0.16 * progress - 0.5 * overfit + 0.04 * uniform(state);
            let is_best = val_c > best && epoch <= 9 + 3 * fold || epoch == 9 + 3 * fold;
            best = if is_best { val_c } else { best };
            lines += &format!(
                "{{\"fold\":{fold},\"epoch\":{epoch},\"learning_rate\":1e-4,\"train_loss\":{train_loss},\
                 \"train_c_index\":{train_c},\"val_loss\":{val_loss},\"val_c_index\":{val_c},\"best\":{is_best},\
                 \"seconds\":41.2,\"patches_per_second\":15000}}\n"
            );
        }
    }
    lines
}

fn epochs(folds: usize) -> Vec<EpochMetrics> {
    metrics(folds).lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn about() -> About {
    let fact = |name: &str, value: &str| (name.to_string(), value.to_string());
    About {
        title: "TCGA-BLCA".into(),
        facts: vec![
            fact("Backbone", "resnet50_trunc"),
            fact("Model", "CrossFusion (conv2d), 24.5 M parameters"),
            fact("Loss", "nll_surv"),
            fact("Seed", "1"),
            fact("Run on", "2026-03-02, cpu, 2 h 41 min"),
        ],
        protocol: "Each fold's epoch was chosen by its validation C-index.".into(),
        config: "[model]\nfeatures = 2048\ndim = 512\nheads = 4\n\n[train]\nlearning_rate = 1e-4\nseed = 1\n".into(),
        commands: "cf-train --config runs/blca/config.toml --out runs/blca\ncf-eval runs/blca".into(),
    }
}

/// A file in the folder of cargo's temporary files, for whoever wants to look at it.
fn keep(name: &str, content: impl AsRef<[u8]>) {
    std::fs::write(std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join(name), content).unwrap();
}

fn page(predictions: &[SlideResult], n_folds: usize) -> String {
    let summary = summary(predictions, n_folds);
    let plots = Plots::new(&summary, &epochs(n_folds)).unwrap();
    html::page(&about(), &summary, predictions, &plots).unwrap()
}

#[test]
fn the_summary_equals_the_statistics_of_the_predictions() {
    let predictions = cohort(200, 5);
    let summary = summary(&predictions, 5);
    let columns = |keep: &dyn Fn(&SlideResult) -> bool| {
        let rows: Vec<&SlideResult> = predictions.iter().filter(|p| keep(p)).collect();
        let time: Vec<f64> = rows.iter().map(|p| p.time).collect();
        let event: Vec<bool> = rows.iter().map(|p| p.event).collect();
        let risk: Vec<f64> = rows.iter().map(|p| p.risk).collect();
        (time, event, risk)
    };
    let mut c = Vec::new();
    for (fold, result) in summary.folds.iter().enumerate() {
        let (time, event, risk) = columns(&|p| p.fold == fold);
        c.push(concordance_index(&time, &event, &risk).unwrap().index);
        assert_eq!(result.c_index, Some(c[fold]));
        assert_eq!((result.slides, result.patients, result.train_slides), (40, 40, Some(160)));
    }
    let mean = c.iter().sum::<f64>() / 5.0;
    let variance = c.iter().map(|c| c * c).sum::<f64>() / 5.0 - mean * mean;
    approx::assert_abs_diff_eq!(summary.c_index_mean.unwrap(), mean, epsilon = 1e-14);
    approx::assert_abs_diff_eq!(summary.c_index_std.unwrap(), variance.sqrt(), epsilon = 1e-9);
    assert!(mean > 0.6, "the planted signal is seen: {mean}");

    let (time, event, risk) = columns(&|_| true);
    let mut sorted = risk.clone();
    sorted.sort_by(f64::total_cmp);
    assert_eq!(summary.median_risk, 0.5 * (sorted[99] + sorted[100]));
    let high: Vec<usize> = risk.iter().map(|&risk| usize::from(risk >= summary.median_risk)).collect();
    let test = log_rank(&time, &event, &high, None).unwrap();
    assert_eq!(summary.log_rank.as_ref().map(|t| (t.chi_squared, t.p_value)), Some((test.chi_squared, test.p_value)));
    assert!(summary.notes.is_empty(), "{:?}", summary.notes);
}

#[test]
fn a_slide_on_the_median_is_of_high_risk() {
    let predictions = cohort(7, 1);
    let summary = summary(&predictions, 1);
    assert_eq!(summary.risk_groups[0].patients, [3, 4]);
}

#[test]
fn figures_are_xml_and_their_pngs_hold_text() {
    let predictions = cohort(437, 5);
    let summary = summary(&predictions, 5);
    let groups = summary.risk_groups[0].groups(&summary.rows);
    let p = summary.log_rank.as_ref().map(|test| test.p_value);
    let figure = km::figure(&groups, &km::Tests { p, hazard_ratio: None }, Screen::Page).unwrap();
    let svg = figure.standalone();
    keep("km.svg", &svg);
    let xml = roxmltree::Document::parse(&svg).expect("the figure is XML");
    let text: String = xml.descendants().filter_map(|node| node.text()).collect::<Vec<_>>().join("\n");
    for group in &groups {
        assert!(text.contains(&group.label));
        let events = group.event.iter().filter(|&&event| event).count();
        assert!(text.contains(&format!("n = {}, {events} events, median", group.time.len())), "{text}");
    }
    assert!(text.contains("log-rank p < 0.0001"), "{text}");
    assert!(!svg.contains("var("), "a colour of the palette is missing");

    let png = figure.png(2.0).unwrap();
    keep("km.png", &png);
    let pixels = Pixmap::decode_png(&png).unwrap();
    let root = xml.root_element();
    let size = |name: &str| root.attribute(name).unwrap().parse::<f64>().unwrap() * 2.0;
    assert_eq!((f64::from(pixels.width()), f64::from(pixels.height())), (size("width"), size("height")));
    // The legend's first line is nothing but text and the swatch. resvg has only the fonts that it
    // is given.
    let dark = |pixels: &Pixmap, (x0, x1): (u32, u32), (y0, y1): (u32, u32)| {
        let at = (y0..y1).flat_map(|y| (x0..x1).map(move |x| (x, y)));
        at.filter_map(|(x, y)| pixels.pixel(x, y)).filter(|p| p.red() < 128 && p.green() < 128).count()
    };
    assert!(dark(&pixels, (270, 420), (8, 48)) > 300, "the legend's text is missing from the PNG");
    assert!(dark(&pixels, (20, 160), (860, 940)) > 300, "the labels of the numbers at risk are missing from the PNG");

    for plot in Plots::new(&summary, &epochs(5)).unwrap().all() {
        let svg = plot.figure.standalone();
        roxmltree::Document::parse(&svg).expect("the figure is XML");
        keep(&format!("{}.svg", plot.name), svg);
    }
}

#[test]
fn the_page_is_self_contained_and_shows_the_numbers() {
    let predictions = cohort(437, 5);
    let summary = summary(&predictions, 5);
    let html = page(&predictions, 5);
    keep("report.html", &html);
    for fetched in ["src=", "<script", "<link rel=\"stylesheet", "@import", "url(", "<iframe", "<img", "srcset"] {
        assert!(!html.contains(fetched), "the page must not fetch: {fetched}");
    }
    for address in html.split("href=\"").skip(1).map(|rest| rest.split('"').next().unwrap()) {
        let beside = ["figures/", "predictions.csv", "predictions_patients.csv", "summary.json", "README.md"];
        let link = ["https://arxiv.org/", "data:"].iter().chain(&beside).any(|start| address.starts_with(start));
        assert!(link, "unexpected address {address}");
    }
    let cell = |number: String| assert!(html.contains(&format!("<td>{number}")), "the page lacks the cell {number}");
    for fold in &summary.folds {
        cell(format!("{:.4}", fold.c_index.unwrap()));
        cell(fold.events.to_string());
        cell(fold.train_slides.unwrap().to_string());
        cell((fold.best_epoch.unwrap() + 1).to_string());
    }
    let (mean, std) = (summary.c_index_mean.unwrap(), summary.c_index_std.unwrap());
    cell(format!("{mean:.4}"));
    cell(format!("{std:.4}"));
    assert!(html.contains(&format!("{mean:.3} <small>\u{b1} {std:.3}")));
    for p in &predictions {
        cell(format!("{:.4}</td>", p.risk));
        assert!(html.contains(&p.slide_id));
    }
    assert_eq!(html.matches("aria-label=\"Training curves of fold").count(), 5);
}

#[test]
fn names_are_escaped() {
    let evil = "<script>alert('1')</script>&\"\u{1}";
    let mut predictions = cohort(30, 2);
    predictions[0].case_id = evil.into();
    predictions[1].slide_id = evil.into();
    let about = About {
        title: evil.into(),
        facts: vec![(evil.into(), evil.into())],
        protocol: evil.into(),
        config: evil.into(),
        commands: evil.into(),
    };
    let summary = summary(&predictions, 2);
    let plots = Plots::new(&summary, &[]).unwrap();
    let html = html::page(&about, &summary, &predictions, &plots).unwrap();
    assert!(!html.contains("<script"));
    assert_eq!(html.matches(&escape(evil)).count(), 9);
    assert_eq!(escape(evil), "&lt;script&gt;alert(&#39;1&#39;)&lt;/script&gt;&amp;&quot;\u{fffd}");

    let groups = [km::Group { label: evil.into(), time: vec![1.0, 2.0], event: vec![true, false] }];
    let svg = km::figure(&groups, &km::Tests::default(), Screen::Page).unwrap().standalone();
    let xml = roxmltree::Document::parse(&svg).expect("escaped text is XML");
    let label = "<script>alert('1')</script>&\"\u{fffd}";
    assert_eq!(xml.descendants().filter(|node| node.is_text() && node.text() == Some(label)).count(), 2);
}

/// No number of the page, of summary.json, of a plot or of its table is NaN or infinite.
fn all_finite(predictions: &[SlideResult], n_folds: usize) {
    let summary = summary(predictions, n_folds);
    let plots = Plots::new(&summary, &[]).unwrap();
    let mut texts = vec![page(predictions, n_folds), summary.table(), format!("{summary:?}")];
    for plot in plots.all() {
        texts.push(String::from_utf8(plot.csv.clone()).unwrap());
        texts.push(plot.figure.standalone());
    }
    for text in texts {
        let numbers = text.replace("is infinite", "").replace("info", "");
        assert!(!numbers.contains("NaN") && !numbers.contains("inf"), "a number is not finite: {text}");
    }
}

#[test]
fn degenerate_cohorts_give_notes_and_a_page() {
    // A fold without events, a fold without slides, and one risk for all.
    let mut predictions = cohort(60, 2);
    predictions.iter_mut().filter(|p| p.fold == 1).for_each(|p| p.event = false);
    predictions.iter_mut().for_each(|p| p.risk = -2.5);
    let summary = summary(&predictions, 3);
    assert_eq!(summary.folds[0].c_index, Some(0.5));
    assert_eq!((summary.folds[1].c_index, summary.folds[2].c_index), (None, None));
    assert_eq!((summary.c_index_mean, summary.c_index_std, &summary.log_rank), (Some(0.5), None, &None));
    assert!(!summary.table().contains("+-"), "one fold has no spread");
    let notes = summary.notes.join("\n");
    for part in [
        "Fold 1 has no C-index: ",
        "none of the 30 patients had an event",
        "Fold 2 has no C-index: ",
        "1 of 3 folds",
        "low-risk group is empty",
    ] {
        assert!(notes.contains(part), "{notes}");
    }
    let html = page(&predictions, 3);
    keep("degenerate.html", &html);
    assert!(html.contains("none of the 30 patients had an event"));
    all_finite(&predictions, 3);

    // One slide; nobody has an event; everybody has one; all at time zero.
    for (events, time) in [(true, 3.0), (false, 3.0), (true, 0.0)] {
        let mut one = cohort(1, 1);
        (one[0].event, one[0].time) = (events, time);
        all_finite(&one, 1);
    }
    assert!(Summary::new(&[], &[], PLAN).is_err());
    predictions[3].risk = f64::NAN;
    let error = Summary::new(&folds(&predictions, 2), &predictions, PLAN).unwrap_err().to_string();
    assert!(error.contains(&predictions[3].slide_id), "{error}");
}

#[test]
fn an_undefined_metric_breaks_its_curve_alone() {
    let mut epochs = epochs(1);
    epochs[4].val_c_index = None;
    let svg = history::figures(&epochs)[0].standalone();
    let curves = svg.lines().filter(|line| line.contains("class=\"thin\""));
    assert_eq!(curves.map(|line| line.matches('M').count()).collect::<Vec<_>>(), [1, 1, 1, 2]);
}

#[test]
fn the_files_hold_the_predictions_in_full() {
    let predictions = cohort(40, 2);
    let summary = summary(&predictions, 2);
    let folder = tempfile::tempdir().unwrap();
    report::write(&folder.path().join("new"), &about(), &summary, &predictions, &epochs(2)).unwrap();
    let mut names: Vec<_> =
        std::fs::read_dir(folder.path().join("new")).unwrap().map(|f| f.unwrap().file_name()).collect();
    names.sort();
    let all = ["README.md", "figures", "predictions.csv", "predictions_patients.csv", "report.html", "summary.json"];
    assert_eq!(names, all);
    let figures = [
        "c_index",
        "km",
        "km_tertiles",
        "km_one_cut",
        "km_learnt_cut",
        "auc",
        "calibration",
        "risk",
        "training_fold_0",
        "training_fold_1",
    ];
    for (figure, extension) in figures.iter().flat_map(|figure| ["svg", "png", "csv"].map(|e| (figure, e))) {
        assert!(folder.path().join(format!("new/figures/{figure}.{extension}")).is_file(), "{figure}.{extension}");
    }
    assert_eq!(report::read_predictions(&folder.path().join("new/predictions.csv")).unwrap(), predictions);

    let mut table = csv::Reader::from_path(folder.path().join("new/predictions.csv")).unwrap();
    let heads: Vec<String> = table.headers().unwrap().iter().map(String::from).collect();
    assert_eq!(heads[..7], ["case_id", "slide_id", "fold", "time", "event", "risk", "hazard_0"]);
    assert_eq!((heads.len(), heads[10].as_str()), (14, "survival_0"));
    for (row, p) in table.records().zip(&predictions) {
        let row = row.unwrap();
        assert_eq!(
            (&row[0], &row[1], &row[4]),
            (p.case_id.as_str(), p.slide_id.as_str(), if p.event { "1" } else { "0" })
        );
        let numbers: Vec<f64> = row.iter().skip(5).map(|cell| cell.parse().unwrap()).collect();
        assert_eq!(numbers, [&[p.risk], p.hazards.as_slice(), p.survival.as_slice()].concat());
    }
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.path().join("new/summary.json")).unwrap()).unwrap();
    assert_eq!(json["c_index_mean"].as_f64(), summary.c_index_mean);
    assert_eq!(json["folds"][1]["c_index"].as_f64(), summary.folds[1].c_index);
    assert_eq!(json["log_rank"]["p_value"].as_f64(), summary.log_rank.map(|test| test.p_value));
}

/// A row a patient, with the risk that its slides have on average and its groups.
#[test]
fn the_patients_have_a_table_with_their_groups() {
    let mut predictions = cohort(60, 2);
    let SlideResult { case_id, time, event, .. } = predictions[0].clone();
    predictions[2] = SlideResult { case_id, time, event, ..predictions[2].clone() };
    let summary = summary(&predictions, 2);
    let folder = tempfile::tempdir().unwrap();
    report::write(folder.path(), &about(), &summary, &predictions, &[]).unwrap();
    let path = folder.path().join("predictions_patients.csv");
    let mut table = csv::Reader::from_path(&path).unwrap();
    let heads: Vec<String> = table.headers().unwrap().iter().map(String::from).collect();
    let groups = ["group_fold_median", "group_fold_tertiles", "group_median", "group_learnt_cut"];
    assert_eq!(heads[..6], ["case_id", "fold", "slides", "time", "event", "risk"]);
    assert_eq!((&heads[6..10], heads[10].as_str(), heads.len()), (&groups.map(String::from)[..], "survival_0", 14));
    let rows: Vec<csv::StringRecord> = table.records().map(Result::unwrap).collect();
    assert_eq!(rows.len(), 59);
    assert_eq!((&rows[0][0], &rows[0][2]), (predictions[0].case_id.as_str(), "2"));
    let risk: f64 = rows[0][5].parse().unwrap();
    approx::assert_relative_eq!(risk, 0.5 * (predictions[0].risk + predictions[2].risk), max_relative = 1e-14);
    // every patient of high risk is at or above its fold's median, no other is
    for row in &rows {
        let of_fold: Vec<f64> = rows.iter().filter(|r| r[1] == row[1]).map(|r| r[5].parse().unwrap()).collect();
        let own: f64 = row[5].parse().unwrap();
        let below = of_fold.iter().filter(|&&risk| risk < own).count();
        assert_eq!(&row[6] == "high", 2 * below + 1 >= of_fold.len(), "{row:?}");
    }
    // slides of a patient that disagree: no table, and no old one either
    predictions[2].time += 1.0;
    let disagree = Summary::new(&folds(&predictions, 2), &predictions, PLAN).unwrap();
    report::write(folder.path(), &about(), &disagree, &predictions, &[]).unwrap();
    assert!(!path.exists());
}

/// An escape sequence, a line's end, a quote and a bar in an id or a name break no file.
#[test]
fn control_characters_break_nothing() {
    let evil = "A\u{1b}]0;title\u{7}\r\n|\"',<b>`_\u{0}";
    let mut predictions = cohort(40, 2);
    (predictions[0].case_id, predictions[0].slide_id) = (evil.into(), evil.into());
    let about = About { title: evil.into(), facts: vec![(evil.into(), evil.into())], commands: evil.into(), ..about() };
    let summary = summary(&predictions, 2);
    let folder = tempfile::tempdir().unwrap();
    report::write(folder.path(), &about, &summary, &predictions, &epochs(2)).unwrap();
    let read = |name: &str| std::fs::read_to_string(folder.path().join(name)).unwrap();
    assert_eq!(report::read_predictions(&folder.path().join("predictions.csv")).unwrap(), predictions);
    let mut table = csv::Reader::from_path(folder.path().join("predictions_patients.csv")).unwrap();
    assert_eq!(&table.records().next().unwrap().unwrap()[0], evil);
    let controls = |text: &str| text.chars().filter(|c| c.is_control() && *c != '\n').count();
    for name in ["report.html", "README.md", "figures/km.svg", "figures/c_index.svg"] {
        assert_eq!(controls(&read(name)), 0, "{name}");
    }
    assert!(!read("report.html").contains("<b>"));
    let card = read("README.md");
    assert!(card.contains("# CrossFusion on A\u{fffd}\\]0;title\u{fffd}"), "{card}");
    // but in the commands, which are code
    assert!(card.lines().all(|line| line.starts_with("    ") || !line.contains("<b>")), "{card}");
}

/// The headings of a model card, its numbers, and somebody else's README left alone.
#[test]
fn the_card_says_what_the_model_is_and_is_not() {
    let predictions = cohort(160, 2);
    let mut summary = summary(&predictions, 2);
    summary.warnings.push("It is upside down.".into());
    let folder = tempfile::tempdir().unwrap();
    report::write(folder.path(), &about(), &summary, &predictions, &[]).unwrap();
    let path = folder.path().join("README.md");
    let card = std::fs::read_to_string(&path).unwrap();
    keep("card.md", &card);
    let headings: Vec<&str> = card.lines().filter(|line| line.starts_with('#')).collect();
    let want = [
        "# CrossFusion on TCGA-BLCA",
        "## Model details",
        "## Uses",
        "## Data",
        "## Evaluation",
        "### Protocol",
        "### Results",
        "## Bias, risks and limitations",
        "## How to use it again",
        "## Files",
    ];
    assert_eq!(headings, want);
    let pooled = summary.by_slide.c_index_pooled.text();
    let events = summary.events;
    for part in [
        "Not for clinical use".to_string(),
        format!("160 slides ({events} with an event) of 160 patients ({events} with an event)"),
        format!("| C-index, all folds pooled | {pooled} |"),
        "**Warning.** It is upside down.".into(),
        "    cf-eval runs/blca".into(),
        summary.risk_groups[0].hazard_ratio.text(),
    ] {
        assert!(card.contains(&part), "{part}: {card}");
    }
    // replaced by the next evaluation, but not if it is somebody else's
    report::write(folder.path(), &about(), &summary, &predictions, &[]).unwrap();
    assert!(!folder.path().join("MODEL_CARD.md").exists());
    std::fs::write(&path, "# Mine\n").unwrap();
    report::write(folder.path(), &about(), &summary, &predictions, &[]).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "# Mine\n");
    assert!(folder.path().join("MODEL_CARD.md").is_file());
}

#[test]
fn the_version_names_the_commit_of_a_checkout() {
    let version = report::VERSION;
    let plain = env!("CARGO_PKG_VERSION");
    assert!(version == plain || version.starts_with(&format!("{plain} (")) && version.ends_with(')'), "{version}");
}
