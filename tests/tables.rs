//! Cohort tables: the real ones against what pandas makes of them (goldens labels_*.json), and odd
//! ones that must be refused by row and column.
#![cfg(feature = "programs")]

mod common;
#[path = "tables/splits.rs"]
mod splits;

use std::{
    collections::{BTreeMap, HashSet},
    path::{Path, PathBuf},
};

use crossfusion::{
    Error,
    data::{
        clinical::{Clinical, Columns},
        cohort::{Cohort, Slide},
        folds,
        labels::Bins,
        table::{Table, is_missing},
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
    slides.iter().for_each(|slide| counts[bins.stratum(slide)] += 1);
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
        // pandas' joined.case_id.nunique() and joined.case_id.str[:12].nunique() are 424 and 416 of
        // COAD, and equal of the others
        let note = cohort.notes.iter().any(|note| note.contains("424 cases are counted as patients, and are 416"));
        assert_eq!(note, name == "coad", "{name}: {:?}", cohort.notes);
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

#[derive(Deserialize)]
struct Expected {
    missing: Vec<String>,
    /// case_id, slide_id, months, censorship of each row, by file.
    clinical: BTreeMap<String, Vec<(String, String, f64, u8)>>,
    /// Ids of cases by side, by file.
    folds: BTreeMap<String, BTreeMap<String, Vec<String>>>,
}

/// fixtures/tables/make.py wrote the tables with pandas, and what pandas reads from them.
#[test]
fn tables_are_read_as_pandas_reads_them() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tables");
    let expected = std::fs::read(folder.join("expected.json")).unwrap();
    let expected: Expected = serde_json::from_slice(&expected).unwrap();
    assert!(expected.missing.iter().all(|word| is_missing(word)), "{:?}", expected.missing);
    assert_eq!(expected.missing.len(), 19);
    assert!(["na", "none", "0", "NULLS", "-"].iter().all(|word| !is_missing(word)));
    assert_eq!(expected.clinical.len(), 5);
    for (name, rows) in &expected.clinical {
        let clinical = Clinical::read(&folder.join(name), &Columns::default()).unwrap();
        let got =
            clinical.slides.iter().map(|s| (s.case_id.clone(), s.slide_id.clone(), s.months, u8::from(s.censored)));
        assert_eq!(got.collect::<Vec<_>>(), *rows, "{name}");
    }
    let cohort = Clinical::read(&folder.join("comma.csv"), &Columns::default()).unwrap();
    let cohort = Cohort::new(cohort, None);
    assert_eq!(expected.folds.len(), 4);
    for (name, sides) in &expected.folds {
        let split = folds::read_split(&folder.join(name), &cohort).unwrap();
        for (side, got) in [("train", &split.train), ("val", &split.val), ("test", &split.test)] {
            let mut cases: Vec<_> = got.iter().map(|slide| slide.strip_suffix("-A.svs").unwrap()).collect();
            cases.sort_unstable();
            assert_eq!(cases, sides[side], "{name}, {side}");
        }
    }
}

#[test]
fn columns_of_other_names_are_read_and_said() {
    let note = |text: &str, columns: &str| read_columns(text, columns).unwrap().note;
    assert_eq!(note("case_id,slide_id,censorship,survival_months\nP,S,1,2\n", ""), None);
    assert_eq!(
        note("Patient ID,slide_id,OS_STATUS,OS_DAYS\nP,S,0:LIVING,2\n", "").unwrap(),
        "The clinical table is read by other columns: case_id from `Patient ID`; censorship from `OS_STATUS`, in which 1 is the \
         event; survival_months from `OS_DAYS`, in days"
    );
    let table = "case_id,slide_id,censorship,dead,survival_months,pfs,os days\nP,S,1,1,12,2,730.5\n";
    let read = |columns: &str| {
        let slide = read_columns(table, columns).unwrap().slides.remove(0);
        (slide.months, slide.censored)
    };
    assert_eq!(read(""), (12.0, true));
    assert_eq!(read("time=pfs,event=dead"), (2.0, false));
    assert_eq!(read("time=pfs:years"), (24.0, true));
    assert_eq!(read("survival_months=pfs"), (2.0, true));
    assert_eq!(read("time=os days"), (24.0, true));
    assert_eq!(read("time=os days:months"), (730.5, true));
    for (text, columns, expected) in [
        (
            "case_id,slide_id,censorship,OS_MONTHS,os_days\n",
            "",
            "both `OS_MONTHS` and `os_days` may stand for it; choose by --columns time=",
        ),
        ("case_id,slide_id,censorship,survival_months\n", "event=dead", "lacks the column `dead`"),
        ("case_id,slide_id,status,survival_months\n", "", "lacks the column `censorship`"),
        (
            "case_id,slide_id,event,survival_months\nP,S,2,1\n",
            "",
            "row 2, column `event`: `2`, expected 1 (the event was seen)",
        ),
        (
            "case_id,slide_id,censorship,survival_months\nP,S,1:DECEASED,1\n",
            "",
            "column `censorship`: `1:DECEASED`, expected 1 (censored)",
        ),
        (
            "case_id,slide_id,OS_STATUS,survival_months\nP,S,NA,1\n",
            "",
            "column `OS_STATUS`: `NA` is a missing value, expected",
        ),
    ] {
        let message = message(read_columns(text, columns));
        assert!(message.starts_with("clinical.csv") && message.contains(expected), "{message}\nexpected: {expected}");
    }
    for (columns, expected) in [
        ("case_id", "`case_id`, expected KEY=COLUMN"),
        ("age=x", "`age`, expected case_id, slide_id, time, censorship or event"),
        ("time=a,time=b", "`time` is given twice"),
        ("time=:days", "`time` names no column"),
        ("time=OS:weeks", "`weeks` in `time=OS:weeks`, expected the unit days, months or years"),
        ("censorship=a,event=b", "censorship and event are both given"),
    ] {
        let message = columns.parse::<Columns>().unwrap_err();
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
    }
    for text in ["case_id=A b,event=C,slide_id=D,time=E:days", "", "time=OS: x"] {
        assert_eq!(text.parse::<Columns>().unwrap().to_string(), text);
    }
}

#[test]
fn cells_that_no_cohort_has_are_refused() {
    let row = |cells: &str| format!("{HEADER}0,{cells}\n");
    for (text, expected) in [
        (row("P1,S1.svs,0,1e308"), "`1e308`, expected a number of months, at most a century; days are read by"),
        (row("P1,S1.svs,0,1201"), "at most a century"),
        (row("P1,S1.svs,0,inf"), "`inf`, expected a number of months"),
        (row("P1,S1.svs,0,NA"), "`NA` is a missing value, expected a number of months"),
        (row("P1,S1.svs,0,\"12,5\""), "`12,5`, expected a number of months with a point for its decimals"),
        (row("NA,S1.svs,0,5"), "row 2, column `case_id`: `NA` is a missing value, expected an identifier"),
        (row("P1,\u{1b}[2J,0,5"), "column `slide_id`: `\\u{1b}[2J` holds a control character"),
        (row("P1,S1,\u{1b}]0;x\u{7},5"), "`\\u{1b}]0;x\\u{7}`, expected 1 (censored)"),
        (row("P1,S1,\u{202e}1,5"), "`\\u{202e}1`, expected 1 (censored)"),
        (
            "case_id,slide_id,censorship,\u{1b}]0;pwn\u{7}\u{1b}[31msurvival\n1,2,3,4\n".into(),
            "starts with `case_id, slide_id, censorship, \\u{1b}]0;pwn\\u{7}\\u{1b}[31msurvival`",
        ),
        // the quote would swallow the second row without a word
        (
            "case_id,slide_id,censorship,survival_months,note\nP1,S1,0,5,\"a\nP2,S2,0,6,b\n".into(),
            "row 2 has a quote that is not closed",
        ),
    ] {
        let message = message(clinical(&text));
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
        assert!(!message.contains(char::is_control), "{message:?}");
    }
    assert_eq!(clinical(&row("P1,S1.svs,0,1200")).unwrap()[0].months, 1200.0);
    // no unclosed quote: a line end within quotes, and a literal quote
    let text = "case_id,slide_id,censorship,survival_months,note\nP1,S1,0,5,\"a\nb\"\nP2,S2,0,6,5\" long\n";
    assert_eq!(clinical(text).unwrap().len(), 2);
    // what pandas would keep, people do not see: spaces that do not break around a cell
    assert_eq!(clinical(&row("\u{a0}P1 ,S1.svs\u{a0},0,5")).unwrap()[0].case_id, "P1");
}

#[test]
fn what_is_no_table_is_refused_in_a_sentence() {
    let folder = tempfile::tempdir().unwrap();
    let read = |path: &Path| message(Table::read(path, &["train"]));
    assert!(read(Path::new("/dev/zero")).contains("/dev/zero: is a pipe or device, expected a file with a table"));
    assert!(read(folder.path()).contains("is a folder, expected a file with a table"));
    let pipe = folder.path().join("pipe");
    assert!(std::process::Command::new("mkfifo").arg(&pipe).status().unwrap().success());
    assert!(read(&pipe).contains("is a pipe or device"));
    let parse = |bytes: &[u8]| message(Table::parse(Path::new("t"), bytes.to_vec(), &["train"]));
    let mut no_member = b"PK\x05\x06".to_vec();
    no_member.resize(22, 0);
    assert_eq!(parse(&no_member), "t: holds 0 files, expected one table");
    assert!(parse(b"\x1f\x8b\x08").contains("is compressed by gzip, expected a table"));
    assert!(parse(b"\xff\xfet\0r\0").contains("is text in UTF-16"));
    assert!(parse(b"train\n\xff\n").contains("is not a table"));
    // a primary key, and not a zip
    assert_eq!(Table::parse(Path::new("t"), b"PK,train\n1,A\n".to_vec(), &["train"]).unwrap().rows().count(), 1);
}

#[test]
fn what_is_odd_about_a_cohort_is_said() {
    let notes = |text: &str, manifest: Option<&str>| {
        let manifest =
            manifest.map(|text| Table::parse(Path::new("m"), text.as_bytes().to_vec(), &["filename"]).unwrap());
        Cohort::new(read_columns(text, "").unwrap(), manifest.as_ref()).notes
    };
    let text = format!("{HEADER}0,A,S1,0,5\n1,B,S2,1,5\n2,B,S3,1,5\n3,C,S4,0,5\n");
    assert_eq!(notes(&text, None), [""; 0]);
    assert_eq!(
        notes(&text.replace("B,S3,1", "B,S3,0"), None),
        [
            "Case `B` has two outcomes, 5 months and censored (row 3, slide `S2`) and 5 months and an event (row 4, slide `S3`); \
          that is nearly always a wrong join"
        ]
    );
    let manifest = "id\tfilename\n1\tS2\n2\tS3\n3\tS3\n";
    assert_eq!(
        notes(&text, Some(manifest)),
        [
            "2 of 4 slides left out, not in the manifest; the first is `S1`",
            "Slides that the manifest lists twice are shown twice, as by pandas\u{2019} merge: 1, the first is `S3`"
        ]
    );
    let barcodes = "TCGA-AA-3488-01Z-00-DX1,S1,0,5\n1,TCGA-AA-3488-01Z-00-DX2,S2,0,5\n2,TCGA-AA-3489-01Z-00-DX1,S3,0,5";
    let said = notes(&format!("{HEADER}0,{barcodes}\n"), None);
    assert!(said.len() == 1 && said[0].contains("`TCGA-AA-3488-01Z-00-DX1` and `TCGA-AA-3488-01Z-00-DX2`"), "{said:?}");
    assert!(said[0].contains("3 cases are counted as patients, and are 2"), "{said:?}");
}

#[test]
fn the_names_of_slides_and_patients_are_told() {
    let slide =
        |case: &str, slide: &str| Slide { case_id: case.into(), slide_id: slide.into(), months: 1.0, censored: true };
    let names =
        ["a.svs", "a.SVS", "a.ndpi", "a.TIFF", "a.mrxs", "a.isyntax", "a.b.svslide", "a.b", "a", ".svs", "1.2.840.dcm"];
    let stems = ["a", "a", "a", "a", "a", "a", "a.b", "a.b", "a", ".svs", "1.2.840"];
    assert_eq!(names.map(|name| slide("", name).name().to_string()), stems);
    let cases = [
        "TCGA-AA-3488-01Z-00-DX1",
        "TCGA-AA-3488",
        "TCGA-AA-348",
        "TCGA-é-3488-01Z",
        "C3L-00017-21",
        "C3L-00017",
        "X-1-2-3",
    ];
    let patients = ["TCGA-AA-3488", "TCGA-AA-3488", "TCGA-AA-348", "TCGA-é-3488", "C3L-00017", "C3L-00017", "X-1-2-3"];
    assert_eq!(cases.map(|case| slide(case, "").patient().to_string()), patients);
}
