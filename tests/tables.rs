//! Cohort tables: the real ones against what pandas makes of them (goldens labels_*.json), and odd ones that must be refused by row and
//! column.

mod common;

use std::path::{Path, PathBuf};

use crossfusion::{
    Error,
    data::{
        clinical::{Clinical, Columns},
        cohort::{Cohort, Slide},
        folds,
        labels::Bins,
        table::Table,
    },
};
use serde::Deserialize;

#[derive(Deserialize)]
struct Labels {
    cohort: String,
    joined_rows: usize,
    edges: Vec<f64>,
    class_counts: Vec<usize>,
    folds: Vec<Fold>,
    slides: Vec<Row>,
}

#[derive(Deserialize)]
struct Fold {
    train: usize,
    val: usize,
    val_events: usize,
    train_class_counts: Vec<usize>,
}

#[derive(Deserialize)]
struct Row {
    case_id: String,
    slide_id: String,
    months: f64,
    censorship: u8,
    label: usize,
}

fn counts(slides: &[&Slide], bins: &Bins) -> Vec<usize> {
    let mut counts = vec![0; 2 * bins.len()];
    slides.iter().for_each(|slide| counts[bins.class(slide)] += 1);
    counts
}

/// The labels alone, from the rows that the goldens carry: needs no data but them.
#[test]
fn labels_are_cut_as_pandas_does_it() {
    for name in ["blca", "coad", "luad", "ucec"] {
        let path = common::goldens().join(format!("labels_{name}.json"));
        let Ok(bytes) = std::fs::read(&path) else {
            eprintln!("SKIPPED {name}: {} not found", path.display());
            continue;
        };
        let golden: Labels = serde_json::from_slice(&bytes).unwrap();
        let slide = |row: &Row| Slide {
            case_id: row.case_id.clone(),
            slide_id: row.slide_id.clone(),
            months: row.months,
            censored: row.censorship == 1,
        };
        let slides: Vec<_> = golden.slides.iter().map(slide).collect();
        let bins = Bins::cut(&slides, 4).unwrap();
        for (slide, row) in slides.iter().zip(&golden.slides) {
            assert_eq!(bins.label(slide.months), row.label, "{name} {}", row.slide_id);
        }
        assert_eq!(counts(&slides.iter().collect::<Vec<_>>(), &bins), golden.class_counts, "{name}");
    }
}

#[test]
fn real_cohorts_are_joined_cut_and_split_as_pandas_does_it() {
    let data = match std::env::var_os("CROSSFUSION_DATA") {
        Some(folder) => PathBuf::from(folder),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
    };
    let folder = data.join("tcga");
    if !folder.is_dir() {
        eprintln!("SKIPPED real_cohorts_are_joined_cut_and_split_as_pandas_does_it: {} not found", folder.display());
        return;
    }
    for name in ["blca", "coad", "luad", "ucec"] {
        let path = common::goldens().join(format!("labels_{name}.json"));
        let Ok(bytes) = std::fs::read(&path) else {
            eprintln!("SKIPPED {name}: {} not found", path.display());
            continue;
        };
        let golden: Labels = serde_json::from_slice(&bytes).unwrap();
        let clinical = ["csv.zip", "csv"].map(|e| folder.join(format!("tcga_{name}_all_clean.{e}")));
        let clinical = clinical.iter().find(|path| path.exists()).unwrap();
        let manifest = folder.join(format!("manifests/gdc_manifest_{}.csv", name.to_uppercase()));
        let cohort = Cohort::read(clinical, &Columns::default(), Some(&manifest)).unwrap();
        let slides = &cohort.slides;
        assert_eq!(slides.len(), golden.joined_rows, "{name}");
        let bins = Bins::cut(slides, 4).unwrap();
        for (edge, expected) in bins.edges.iter().zip(&golden.edges) {
            assert!((edge - expected).abs() <= 1e-12 * expected.abs(), "{name}: edges {:?}", bins.edges);
        }
        for (slide, row) in slides.iter().zip(&golden.slides) {
            let got =
                (&slide.case_id, &slide.slide_id, slide.months, u8::from(slide.censored), bins.label(slide.months));
            assert_eq!(got, (&row.case_id, &row.slide_id, row.months, row.censorship, row.label), "{name}");
        }
        assert_eq!(counts(&slides.iter().collect::<Vec<_>>(), &bins), golden.class_counts, "{name}");
        for (i, fold) in golden.folds.iter().enumerate() {
            let path = folds::split_path(&folder.join(format!("splits/tcga_{name}")), i);
            let split = folds::read_split(&path, &cohort).unwrap();
            let of = |side| folds::slides_of(side, slides).into_iter().map(|i| &slides[i]).collect::<Vec<_>>();
            let (train, val) = (of(&split.train), of(&split.val));
            assert_eq!(split.without_outcome.len(), if name == "luad" { 9 } else { 0 }, "{name} fold {i}");
            assert_eq!((train.len(), val.len()), (fold.train, fold.val), "{name} fold {i}");
            assert_eq!(val.iter().filter(|s| !s.censored).count(), fold.val_events, "{name} fold {i}");
            assert_eq!(counts(&train, &bins), fold.train_class_counts, "{name} fold {i}");
        }
        println!("{}: {} slides agree", golden.cohort, slides.len());
    }
}

/// A clinical table whose columns are named as by `--columns`.
fn read_columns(text: &str, columns: &str) -> Result<Clinical, Error> {
    let columns: Columns = columns.parse().unwrap();
    Clinical::parse(Path::new("clinical.csv"), text.as_bytes().to_vec(), &columns)
}

fn clinical(text: &str) -> Result<Vec<Slide>, Error> {
    read_columns(text, "").map(|clinical| clinical.slides)
}

fn message<T>(result: Result<T, Error>) -> String {
    result.map(|_| ()).unwrap_err().to_string()
}

const HEADER: &str = ",case_id,slide_id,censorship,survival_months\n";

#[test]
fn a_clinical_table_with_quotes_marks_and_windows_line_ends() {
    let text = "\u{feff},note,case_id,slide_id,censorship,survival_months\r\n0,\"a, b\",P1,S1.svs,1.0,12.5\r\n1,,P2,S2.svs,0,3\r\n";
    let slides = clinical(text).unwrap();
    assert_eq!(slides[0], Slide { case_id: "P1".into(), slide_id: "S1.svs".into(), months: 12.5, censored: true });
    assert_eq!((slides[1].name(), slides[1].censored), ("S2", false));
}

#[test]
fn odd_clinical_tables_are_refused_by_row_and_column() {
    let cases = [
        (",case_id,slide_id,censorship\n0,P,S,1\n".to_string(), "lacks the column `survival_months`"),
        (format!("{HEADER}0,P1,S1.svs,0,abc\n"), "row 2, column `survival_months`: `abc`"),
        (format!("{HEADER}0,P1,S1.svs,0,-1\n"), "row 2, column `survival_months`: `-1`"),
        (format!("{HEADER}0,P1,S1.svs,0,nan\n"), "row 2, column `survival_months`: `nan`"),
        (format!("{HEADER}0,P1,S1.svs,0,5\n1,P2,S2.svs,2,5\n"), "row 3, column `censorship`: `2`"),
        (
            format!("{HEADER}0,P1,S1.svs,0,5\n1,P2,S1.svs,0,5\n"),
            "row 3, column `slide_id`: slide `S1.svs` stands in row 2 already",
        ),
        (format!("{HEADER}0,,S1.svs,0,5\n"), "row 2, column `case_id`: the cell is empty"),
        (format!("{HEADER}0,P1,S1.svs\n"), "row 2, column `case_id`: the row has 3 cells, expected 5"),
        (format!("{HEADER}0,P1,S1,x.svs,0,5\n"), "row 2, column `case_id`: the row has 6 cells, expected 5"),
        (format!("{HEADER}0,P1,S1.svs,0,5\r\n\r\n1,P2,S2.svs,0,abc\r\n"), "row 4, column `survival_months`: `abc`"),
        ("case_id,case_id,slide_id,censorship,survival_months\n".into(), "two columns named `case_id`"),
        (String::new(), "lacks the column `case_id`"),
    ];
    for (text, expected) in cases {
        let message = message(clinical(&text));
        assert!(message.starts_with("clinical.csv") && message.contains(expected), "{message}\nexpected: {expected}");
    }
}

#[test]
fn odd_folds_are_refused_by_row_and_column() {
    let slides = read_columns(&format!("{HEADER}0,A,S1,0,5\n1,B,S2,0,5\n2,C,S3,0,5\n"), "").unwrap();
    let manifest = b"filename\nS1\nS2\nS3\nD-01.svs\n".to_vec();
    let cohort = Cohort::new(slides, Some(&Table::parse(Path::new("manifest"), manifest, &["filename"]).unwrap()));
    let split = |text: &str| folds::parse_split(Path::new("splits_0.csv"), text.as_bytes().to_vec(), &cohort);
    let good = split(",train,val\n0,A,C\n1,B,\n").unwrap();
    assert_eq!((good.train.len(), good.val.len()), (2, 1));
    assert_eq!(split(",train,val\n0,A,C\n1,D,\n").unwrap().without_outcome, ["D"]);
    for (text, expected) in [
        (",train,val\n0,A,X\n", "row 2, column `val`: case `X` is neither in the clinical table nor in the manifest"),
        (",train,val\n0,A,D-0\n", "row 2, column `val`: case `D-0` is neither"),
        (",train,val\n0,A,B\n1,B,\n", "row 3, column `train`: case `B` is in `val` in row 2 already"),
        (",train,val\n0,A,B\n1,A,\n", "row 3, column `train`: case `A` is in `train` in row 2 already"),
        (",train,val\n0,A,\n", "no case in its column `val`"),
        (",train\n0,A\n", "lacks the column `val`"),
    ] {
        let message = message(split(text));
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
    }
}

#[test]
fn zips_hold_one_table() {
    let zip = |members: &[(&str, &str)]| {
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        for (name, text) in members {
            writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            std::io::Write::write_all(&mut writer, text.as_bytes()).unwrap();
        }
        writer.finish().unwrap().into_inner()
    };
    let read = |bytes| Table::parse(Path::new("t.zip"), bytes, &["train"]);
    let good = zip(&[("../t.csv", "train\nA\n"), ("__MACOSX/._t.csv", "x")]);
    assert_eq!(read(good.clone()).unwrap().rows().count(), 1);
    assert!(message(read(zip(&[("a.csv", "train\n"), ("b.csv", "train\n")]))).contains("holds 2 files"));
    assert!(message(read(good[..good.len() / 2].to_vec())).contains("not a readable zip"));
}

#[test]
fn bins_that_cannot_be_cut_say_why() {
    let slide = |months: f64, censored| Slide { case_id: "P".into(), slide_id: "S".into(), months, censored };
    assert!(message(Bins::cut(&[slide(1.0, true)], 4)).contains("all 1 slides are censored"));
    let tied: Vec<_> = (0..9).map(|_| slide(5.0, false)).collect();
    assert!(message(Bins::cut(&tied, 4)).contains("distinct quantiles"));
}

/// Whatever the bytes, a table is read or refused; nothing panics.
#[test]
fn mutated_tables_never_panic() {
    let seed = format!("{HEADER}0,P1,S1.svs,0,5\n1,\"P2\",S2.svs,1,7.5\n2,P3,S3.svs,0,1e3\n");
    let mut state = 1u64;
    let mut random = |below: usize| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as usize % below
    };
    for _ in 0..3000 {
        let mut bytes = seed.clone().into_bytes();
        for _ in 0..=random(4) {
            let at = random(bytes.len());
            match random(3) {
                0 => bytes[at] = random(256) as u8,
                1 => bytes.truncate(at + 1),
                _ => bytes.insert(at, b",\"\n\r\t\0"[random(6)]),
            }
        }
        let path = Path::new("mutated.csv");
        if let Ok(table) = Clinical::parse(path, bytes.clone(), &Columns::default()) {
            let _ = Bins::cut(&table.slides, 4);
        }
        let text = String::from_utf8_lossy(&bytes).replace("case_id", "train").replace("slide_id", "val");
        let _ = folds::parse_split(path, text.into_bytes(), &Cohort::default());
    }
}
