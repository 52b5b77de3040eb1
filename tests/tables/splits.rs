//! Tables of folds.

use super::*;

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
fn folds_of_every_form_are_checked() {
    let text = format!(
        "{HEADER}0,A,S1.svs,0,5\n1,A,S2.svs,0,5\n2,B,S3.svs,0,5\n3,C,S4.svs,0,5\n4,10,S5.svs,0,5\n5,20.0,S6.svs,0,5\n"
    );
    let cohort = Cohort::new(read_columns(&text, "").unwrap(), None);
    let split = |text: &str| folds::parse_split(Path::new("splits_0.csv"), text.as_bytes().to_vec(), &cohort);
    let sorted = |side: &HashSet<String>| {
        let mut ids: Vec<_> = side.iter().cloned().collect();
        ids.sort();
        ids
    };
    let fold = split("train,val,test\nA,B,C\n10.0,,20\n").unwrap();
    assert_eq!(sorted(&fold.train), ["S1.svs", "S2.svs", "S5.svs"]);
    assert_eq!(
        (sorted(&fold.val), sorted(&fold.test)),
        (vec!["S3.svs".into()], vec!["S4.svs".into(), "S6.svs".into()])
    );
    // by slide, with and without the extension; S2 of the same case is in no side
    let fold = split("train,val\nS1,S3.svs\nS4,\n").unwrap();
    assert_eq!(
        (sorted(&fold.train), sorted(&fold.val)),
        (vec!["S1.svs".into(), "S4.svs".into()], vec!["S3.svs".into()])
    );
    let fold = split("slide_id,split\nS1,Train\nS3,validation\nS4,NA\nS5,test\n").unwrap();
    assert_eq!((fold.train.len(), fold.val.len(), sorted(&fold.test)), (1, 1, vec!["S5.svs".into()]));
    for (text, expected) in [
        ("train,val,test\nA,B,A\n", "row 2, column `test`: case `A` is in `train` in row 2 already"),
        ("train,val\nA,B\n10,10.0\n", "row 3, column `val`: case `10.0` is in `train` in row 3 already"),
        (
            "train,val\nS1,S2\n",
            "row 2, column `val`: slide `S2` is of case `A`, whose slide `S1.svs` is in `train` in row 2",
        ),
        ("train,val\nS1,S3\nS1.svs,\n", "row 3, column `train`: slide `S1.svs` is in `train` twice"),
        ("train,val\nS1,S9\n", "column `val`: slide `S9` is not in the clinical table; one whose outcome is not known"),
        (",train,val\nA,True,True\n", "row 2, column `(unnamed)`: `A` is in `train` and in `val`"),
        (",train,val\nA,True,False\n,False,True\n", "row 3, column `(unnamed)`: the cell is empty"),
        (
            ",train,val\nA,True,False\nX,False,True\n",
            "row 3, column `(unnamed)`: case `X` is not in the clinical table",
        ),
        ("case_id,split\nA,train\nB,holdout\n", "row 3, column `split`: `holdout`, expected train, val or test"),
        ("case_id,split\nA,train\n", "no case in its column `val`"),
        ("train,test\nA,B\n", "lacks the column `val`"),
        ("train,val\nA,\u{1b}[0m\n", "case `\\u{1b}[0m` is not in"),
    ] {
        let message = message(split(text));
        assert!(message.contains(expected), "{message}\nexpected: {expected}");
    }
}

#[test]
fn folds_are_counted_by_their_files() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    let choose = |wanted| folds::choose(path, wanted);
    assert!(message(choose(None)).contains("holds no fold, expected splits_0.csv"));
    assert!(message(folds::choose(&path.join("no"), None)).contains("is not a folder"));
    let write = |name: &str| std::fs::write(path.join(name), "").unwrap();
    let names =
        ["splits_1.csv", "splits_2_bool.csv", "splits_2.csv", "splits_1_descriptor.csv", "splits_00.csv", "notes"];
    names.into_iter().for_each(write);
    assert_eq!(choose(None).unwrap(), 1..3);
    write("splits_4.csv");
    assert!(message(choose(None)).contains("has splits_1.csv to splits_4.csv, but no splits_3.csv"));
    assert_eq!(choose(Some(2)).unwrap(), 1..3);
    let error = message(choose(Some(3)));
    assert!(
        error.contains("--folds 3: ") && error.contains("holds splits_1.csv, splits_2.csv, splits_4.csv"),
        "{error}"
    );
    let error = message(folds::require(path, 0));
    assert!(error.contains("--fold 0: ") && folds::require(path, 4).is_ok(), "{error}");
    assert_eq!(folds::notes(path, &(1..3)), ["The folder of folds holds 3, of which --folds takes 2"]);
    write("splits_3_bool.csv");
    assert_eq!(choose(None).unwrap(), 1..5);
    assert_eq!(folds::notes(path, &(1..5)), [""; 0]);
    assert_eq!(folds::split_path(path, 3), path.join("splits_3_bool.csv"));
    assert_eq!(folds::split_path(path, 2), path.join("splits_2.csv"));
    for name in ["splits_1.csv", "splits_2_bool.csv", "splits_2.csv"] {
        std::fs::remove_file(path.join(name)).unwrap();
    }
    assert!(message(choose(Some(1))).contains("begins with splits_3.csv, expected splits_0.csv or splits_1.csv"));
}
