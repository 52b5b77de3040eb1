//! Bootstrap, paired comparison, permutation test, mean over folds.

use super::*;

/// 200 patients of two rows each, in four folds, with a risk `signal` that tells something and one
/// that is noise.
struct Cohort {
    time: Vec<f64>,
    event: Vec<bool>,
    signal: Vec<f64>,
    noise: Vec<f64>,
    patient: Vec<usize>,
    fold: Vec<usize>,
}

impl Cohort {
    fn made_up() -> Self {
        let mut random = Random(7);
        let patient: Vec<usize> = (0..400).map(|row| row / 2).collect();
        let of_patient: Vec<(f64, bool)> = (0..200).map(|_| (random.below(1000) as f64, random.below(3) > 0)).collect();
        let time: Vec<f64> = patient.iter().map(|&p| of_patient[p].0).collect();
        Self {
            event: patient.iter().map(|&p| of_patient[p].1).collect(),
            signal: time.iter().map(|t| -t + 100.0 * random.below(10) as f64).collect(),
            noise: time.iter().map(|_| random.below(1000) as f64).collect(),
            fold: patient.iter().map(|p| p % 4).collect(),
            time,
            patient,
        }
    }

    fn c_index(&self, risk: &[f64], rows: &[usize]) -> Result<f64> {
        Ok(concordance_index(&pick(&self.time, rows), &pick(&self.event, rows), &pick(risk, rows))?.index)
    }
}

#[test]
fn bootstrap_draws_whole_patients_within_folds() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, Some(&cohort.fold)).unwrap();
    let plan = Bootstrap { replicates: 50, seed: 3, level: 0.9 };
    let drawn = std::sync::Mutex::new(Vec::new());
    bootstrap(&patients, plan, |rows| {
        drawn.lock().unwrap().push(rows.to_vec());
        Ok(1.0)
    })
    .unwrap();
    let mut drawn = drawn.into_inner().unwrap();
    assert_eq!(drawn.len(), 51);
    for rows in &drawn {
        let mut of_fold = [0; 4];
        let mut of_row = [0; 400];
        for &row in rows {
            of_fold[cohort.fold[row]] += 1;
            of_row[row] += 1;
        }
        assert_eq!(of_fold, [100; 4]);
        assert!(of_row.chunks(2).all(|of_patient| of_patient[0] == of_patient[1]));
    }
    drawn.sort();
    drawn.dedup();
    assert_eq!(drawn.len(), 51, "replicates differ from each other and from the cohort");
}

#[test]
fn bootstrap_is_the_same_on_any_number_of_threads_and_another_with_another_seed() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, Some(&cohort.fold)).unwrap();
    let run = |seed| {
        let plan = Bootstrap { replicates: 200, seed, level: 0.95 };
        bootstrap(&patients, plan, |rows| cohort.c_index(&cohort.signal, rows)).unwrap()
    };
    let threads = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
    let first = run(1);
    assert_eq!(first, threads(1).install(|| run(1)));
    assert_eq!(first, threads(3).install(|| run(1)));
    assert_ne!(first, run(2));
    assert!(first.lower < first.estimate && first.estimate < first.upper && first.undefined == 0);
}

#[test]
fn bootstrap_of_a_mean_has_its_known_error() {
    // The standard error of a mean of n values under resampling is sqrt(sum (x - mean)^2) / n.
    let values: Vec<f64> = (0..100).map(|i| f64::from(i * i)).collect();
    let mean = |rows: &[usize]| Ok(pick(&values, rows).iter().sum::<f64>() / rows.len() as f64);
    let plan = Bootstrap { replicates: 20_000, seed: 5, level: 0.95 };
    let interval = bootstrap(&Patients::one_row_each(100).unwrap(), plan, mean).unwrap();
    let centre = values.iter().sum::<f64>() / 100.0;
    let known = values.iter().map(|x| (x - centre).powi(2)).sum::<f64>().sqrt() / 100.0;
    assert_eq!(interval.estimate, centre);
    // Five standard errors of a standard deviation, and of a 2.5% quantile, of 20,000 normal draws.
    assert!((interval.std_error / known - 1.0).abs() < 5.0 / 40_000f64.sqrt());
    assert!(((interval.upper - interval.lower) / (2.0 * 1.96 * known) - 1.0).abs() < 0.05);
}

#[test]
fn paired_comparison_and_permutation_tell_signal_from_noise() {
    let cohort = Cohort::made_up();
    let patients = Patients::new(&cohort.patient, None).unwrap();
    let (signal, noise) =
        (|rows: &[usize]| cohort.c_index(&cohort.signal, rows), |rows: &[usize]| cohort.c_index(&cohort.noise, rows));
    let plan = Bootstrap { replicates: 999, ..Bootstrap::default() };
    let compared = bootstrap_difference(&patients, plan, signal, noise).unwrap();
    assert_eq!(compared.difference.estimate, compared.a - compared.b);
    assert!(compared.difference.lower > 0.0 && compared.p_value < 0.05, "{compared:?}");
    let same = bootstrap_difference(&patients, plan, signal, signal).unwrap();
    assert_eq!((same.difference.lower, same.difference.upper, same.p_value), (0.0, 0.0, 1.0));

    // Every second row: one a patient.
    let rows: Vec<usize> = (0..400).step_by(2).collect();
    let (time, event, fold) = (pick(&cohort.time, &rows), pick(&cohort.event, &rows), pick(&cohort.fold, &rows));
    let test =
        |risk: &[f64]| concordance_permutation_test(&time, &event, &pick(risk, &rows), Some(&fold), 499, 1).unwrap();
    assert_eq!(test(&cohort.time.iter().map(|t| -t).collect::<Vec<f64>>()).p_value, 1.0 / 500.0);
    assert!(test(&cohort.noise).p_value > 0.02);
    assert_eq!(test(&vec![1.0; 400]).p_value, 1.0);
}

#[test]
fn permutation_p_is_uniform_without_signal() {
    // Exact test: the share of p <= alpha is at most alpha; over 200 cohorts of noise within 4
    // standard errors.
    let mut random = Random(9);
    let small = (0..200)
        .filter(|&seed| {
            let (time, event, _) = random.cohort(30);
            let risk: Vec<f64> = (0..30).map(|_| random.below(1 << 30) as f64).collect();
            concordance_permutation_test(&time, &event, &risk, None, 99, seed).unwrap().p_value <= 0.2
        })
        .count();
    assert!((small as f64 - 40.0).abs() < 4.0 * (200.0 * 0.2 * 0.8f64).sqrt(), "{small} of 200 have p <= 0.2");
}

#[test]
fn uncertainty_says_why_it_is_undefined() {
    assert_eq!(reason(Patients::new(&[], None)), "the cohort has no patients");
    assert_eq!(reason(Patients::new(&[4, 4], Some(&[0, 1]))), "patient 4 is in two folds, 0 and 1");
    assert_eq!(reason(Patients::new(&[4, 5], Some(&[0]))), "`fold` has 1 entries for 2 patients");
    let patients = Patients::one_row_each(2).unwrap();
    let c =
        |rows: &[usize]| Ok(concordance_index(&pick(&[1.0, 2.0], rows), &[true; 2], &pick(&[0.0, 1.0], rows))?.index);
    let why = reason(bootstrap(&patients, Bootstrap::default(), c));
    assert!(why.contains("of 2000 resampled cohorts fail: the C-index is undefined: no two patients"), "{why}");
    assert!(
        reason(bootstrap(&patients, Bootstrap { replicates: 1, ..Bootstrap::default() }, c)).contains("at least 2")
    );
    assert!(reason(bootstrap(&patients, Bootstrap { level: 1.0, ..Bootstrap::default() }, c)).contains("level is 1"));
    assert!(reason(concordance_permutation_test(&[1.0], &[false], &[0.0], None, 9, 0)).contains("had an event"));
}

#[test]
fn fold_mean_equals_r() {
    // R: x <- c(0.61, 0.66, 0.58, 0.70, 0.63); mean(x); sd(x); t.test(x)
    let values = [0.61, 0.66, 0.58, 0.70, 0.63];
    let got = fold_mean(&values, 1, 0.95).unwrap();
    for (got, want) in [
        (got.mean, 0.636),
        (got.sd, 0.0461519230368573),
        (got.lower, 0.578694818717263),
        (got.upper, 0.693305181282737),
    ] {
        assert_relative_eq!(got, want, max_relative = 1e-12);
    }
    let zero = fold_mean(&values, 0, 0.95).unwrap();
    assert_relative_eq!(zero.sd, got.sd * 0.8f64.sqrt(), max_relative = 1e-14);
    assert_eq!((zero.lower, zero.upper), (got.lower, got.upper));
    assert!(reason(fold_mean(&[0.6], 0, 0.95)).contains("1 folds are too few"));
    assert!(reason(fold_mean(&[0.6, f64::NAN], 0, 0.95)).contains("entry 1 of `values` is NaN"));
}

/// scipy: m, e = mean(x), sem(x); l, d = logit(m), t.ppf(0.975, k - 1) * e / (m (1 - m)); expit(l -
/// d), expit(l + d).
#[test]
fn a_mean_of_shares_stays_between_0_and_1() {
    for (values, mean, lower, upper) in [
        (&[1.0 / 3.0, 2.0 / 3.0, 1.0][..], 0.6666666666666666, 0.04595450879588535, 0.9881012726738516),
        (&[0.61, 0.66, 0.58, 0.70, 0.63], 0.636, 0.5770098373090009, 0.6911666164506176),
        (&[0.9, 0.95, 0.99, 1.0], 0.96, 0.784866111603806, 0.9937060656540985),
    ] {
        let got = fold_mean_in_unit(values, 0, 0.95).unwrap();
        for (got, want) in [(got.mean, mean), (got.lower, lower), (got.upper, upper)] {
            assert_relative_eq!(got, want, max_relative = 1e-12);
        }
        assert_eq!(got.sd, fold_mean(values, 0, 0.95).unwrap().sd);
    }
    for same in [0.0, 0.5, 1.0] {
        let got = fold_mean_in_unit(&[same; 3], 1, 0.95).unwrap();
        assert_eq!((got.mean, got.lower, got.upper), (same, same, same));
    }
    let random = &mut Random(5);
    for folds in 3..9 {
        let values: Vec<f64> = (0..folds).map(|_| random.below(1001) as f64 / 1000.0).collect();
        let got = fold_mean_in_unit(&values, 1, 0.95).unwrap();
        assert!(0.0 <= got.lower && got.lower <= got.mean && got.mean <= got.upper && got.upper <= 1.0, "{got:?}");
    }
    assert!(reason(fold_mean_in_unit(&[0.6, 0.7], 0, 0.95)).contains("2 folds are too few"));
    assert!(reason(fold_mean_in_unit(&[0.6, 0.7, 1.1], 0, 0.95)).contains("entry 2 of `values` is 1.1"));
}

#[test]
fn numbers_in_sentences_are_short() {
    let why = reason(concordance_index_ipcw(
        &CensoringDistribution::fit(&[50.0, 60.0], &[true, true]).unwrap(),
        &[50.0, 60.0],
        &[true, true],
        &[0.0, 1.0],
        Some(41.114000000000004),
    ));
    assert_eq!(why, "no event came before tau = 41.114");
}
