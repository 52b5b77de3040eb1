//! Uncertainty by resampling patients: bootstrap intervals, the paired comparison of two runs, a
//! permutation test.
//!
//! Draws are counter-based: replicate b of a seed is the same whatever the number of threads.

use std::collections::HashMap;

use rayon::prelude::*;

use super::cohort::{check_length, check_level, undefined};
use super::concordance::concordance_index;
use crate::Result;

const NAME: &str = "the bootstrap";

/// What is drawn: whole patients, within folds.
#[derive(Debug, Clone)]
pub struct Patients {
    /// For each fold, for each of its patients, the rows (slides) of that patient.
    folds: Vec<Vec<Vec<usize>>>,
    rows: usize,
}

impl Patients {
    /// `patient` labels the patient of each row, `fold` its fold, from which as many patients are
    /// drawn as it has. Without `fold` all are drawn from one. An error if a patient is in two
    /// folds.
    pub fn new(patient: &[usize], fold: Option<&[usize]>) -> Result<Self> {
        if patient.is_empty() {
            return Err(undefined(NAME, "the cohort has no patients"));
        }
        check_length(NAME, "fold", fold.map_or(patient.len(), <[usize]>::len), patient.len())?;
        let fold_of = |row: usize| fold.map_or(0, |fold| fold[row]);
        let mut folds: Vec<Vec<Vec<usize>>> = Vec::new();
        let mut fold_places = HashMap::new();
        let mut patient_places = HashMap::new();
        for (row, label) in patient.iter().enumerate() {
            let f = *fold_places.entry(fold_of(row)).or_insert(folds.len());
            if f == folds.len() {
                folds.push(Vec::new());
            }
            let (first_row, home, p) = *patient_places.entry(label).or_insert((row, f, folds[f].len()));
            if home != f {
                let (a, b) = (fold_of(first_row), fold_of(row));
                return Err(undefined(NAME, format!("patient {label} is in two folds, {a} and {b}")));
            }
            if p == folds[f].len() {
                folds[f].push(Vec::new());
            }
            folds[f][p].push(row);
        }
        Ok(Self { folds, rows: patient.len() })
    }

    /// One row a patient, one fold.
    pub fn one_row_each(patients: usize) -> Result<Self> {
        Self::new(&(0..patients).collect::<Vec<usize>>(), None)
    }

    /// All rows, once each: the cohort itself.
    pub fn all(&self) -> Vec<usize> {
        (0..self.rows).collect()
    }

    /// A resampled cohort of this seed: rows of the patients drawn with replacement; a patient drawn
    /// twice brings its rows twice.
    pub fn draw(&self, seed: u64, replicate: usize) -> Vec<usize> {
        let mut random = Random::new(seed, replicate);
        let mut rows = Vec::with_capacity(self.rows);
        for fold in &self.folds {
            for _ in 0..fold.len() {
                rows.extend_from_slice(&fold[random.below(fold.len())]);
            }
        }
        rows
    }
}

/// How many replicates are drawn, from which seed, and the level of the interval.
#[derive(Debug, Clone, Copy)]
pub struct Bootstrap {
    /// Resampled cohorts.
    pub replicates: usize,
    /// Of the draws: the same seed gives the same intervals.
    pub seed: u64,
    /// Of the intervals: 0.95, say.
    pub level: f64,
}

impl Default for Bootstrap {
    fn default() -> Self {
        Self { replicates: 2000, seed: 0, level: 0.95 }
    }
}

impl Bootstrap {
    /// Whether there can be an interval at all.
    pub fn check(&self) -> Result<()> {
        check_level(NAME, self.level)?;
        if self.replicates < 2 {
            return Err(undefined(
                NAME,
                format!("{} replicates are asked for, at least 2 are needed", self.replicates),
            ));
        }
        Ok(())
    }

    /// What [`bootstrap`] makes of a statistic's estimate and replicates, for a statistic that cannot
    /// be handed over as a closure (another language's, say): `replicates[b]` is of the rows
    /// [`Patients::draw`]`(seed, b)`.
    pub fn interval(&self, estimate: f64, replicates: &[Result<f64>]) -> Result<Interval> {
        Ok(self.interval_of(estimate, &self.defined(replicates)?))
    }

    /// What [`bootstrap_difference`] makes of two estimates, and of replicates of their difference.
    pub fn comparison(&self, a: f64, b: f64, differences: &[Result<f64>]) -> Result<PairedComparison> {
        let differences = self.defined(differences)?;
        let below = differences.partition_point(|&d| d < 0.0);
        let not_above = differences.partition_point(|&d| d <= 0.0);
        let count = not_above.min(differences.len() - below);
        Ok(PairedComparison {
            a,
            b,
            difference: self.interval_of(a - b, &differences),
            p_value: (2.0 * (1 + count) as f64 / (1 + differences.len()) as f64).min(1.0),
        })
    }

    /// The finite replicates, ascending.
    fn defined(&self, replicates: &[Result<f64>]) -> Result<Vec<f64>> {
        self.check()?;
        if replicates.len() != self.replicates {
            let got = replicates.len();
            return Err(undefined(NAME, format!("{got} replicates came, {} are asked for", self.replicates)));
        }
        let mut values: Vec<f64> = replicates.iter().flatten().copied().filter(|value| value.is_finite()).collect();
        if values.len() * 10 < self.replicates * 9 {
            let error = replicates.iter().find_map(|r| r.as_ref().err());
            let why = error.map_or("it is not finite".into(), ToString::to_string);
            let failed = self.replicates - values.len();
            return Err(undefined(NAME, format!("{failed} of {} resampled cohorts fail: {why}", self.replicates)));
        }
        values.sort_unstable_by(f64::total_cmp);
        Ok(values)
    }

    fn interval_of(&self, estimate: f64, sorted: &[f64]) -> Interval {
        let n = sorted.len() as f64;
        let mean = sorted.iter().sum::<f64>() / n;
        let variance = sorted.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (n - 1.0);
        Interval {
            estimate,
            lower: percentile(sorted, 0.5 - 0.5 * self.level),
            upper: percentile(sorted, 0.5 + 0.5 * self.level),
            level: self.level,
            std_error: variance.sqrt(),
            undefined: self.replicates - sorted.len(),
        }
    }
}

/// An estimate with a percentile interval.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Interval {
    /// The statistic on the cohort itself.
    pub estimate: f64,
    /// Percentiles (1 - level) / 2 and (1 + level) / 2 of the replicates.
    pub lower: f64,
    /// The interval's upper end.
    pub upper: f64,
    /// The interval's level: 0.95, say.
    pub level: f64,
    /// Standard deviation of the replicates.
    pub std_error: f64,
    /// Replicates on which the statistic was not defined (no event drawn, say). They are left out;
    /// more than one in ten is an error.
    pub undefined: usize,
}

/// Percentile interval (Efron & Tibshirani 1993, chapter 13) of any statistic of a cohort:
/// `statistic` gets the row numbers of a resampled cohort, rows of a patient drawn twice occurring
/// twice.
///
/// ```
/// use crossfusion::survival::{Bootstrap, Patients, bootstrap, concordance_index};
///
/// let time: Vec<f64> = (0..50).map(|i| f64::from(i * 17 % 50)).collect();
/// let event = vec![true; 50];
/// let risk: Vec<f64> = time.iter().map(|t| -t + 20.0 * (t * 1.7).sin()).collect();
/// let c_index = |rows: &[usize]| {
///     let pick = |column: &[f64]| rows.iter().map(|&row| column[row]).collect::<Vec<f64>>();
///     let event: Vec<bool> = rows.iter().map(|&row| event[row]).collect();
///     Ok(concordance_index(&pick(&time), &event, &pick(&risk))?.index)
/// };
/// let interval = bootstrap(&Patients::one_row_each(50)?, Bootstrap::default(), c_index)?;
/// assert!(interval.lower < interval.estimate && interval.estimate < interval.upper);
/// # Ok::<(), crossfusion::Error>(())
/// ```
pub fn bootstrap<S>(patients: &Patients, plan: Bootstrap, statistic: S) -> Result<Interval>
where
    S: Fn(&[usize]) -> Result<f64> + Sync,
{
    let replicates = replicate(patients, plan, &statistic)?;
    plan.interval(statistic(&patients.all())?, &replicates)
}

/// Two runs on the same patients.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PairedComparison {
    /// The first statistic's estimate.
    pub a: f64,
    /// The second statistic's estimate.
    pub b: f64,
    /// Of a - b.
    pub difference: Interval,
    /// Two-sided: twice the smaller share of replicates on either side of 0, counting the observed
    /// one: 2 (1 + count) / (1 + replicates), at most 1.
    pub p_value: f64,
}

/// Bootstrap of the difference of two statistics on the same draws, which keeps what the two runs
/// have in common.
pub fn bootstrap_difference<A, B>(patients: &Patients, plan: Bootstrap, a: A, b: B) -> Result<PairedComparison>
where
    A: Fn(&[usize]) -> Result<f64> + Sync,
    B: Fn(&[usize]) -> Result<f64> + Sync,
{
    let replicates = replicate(patients, plan, &|rows: &[usize]| Ok(a(rows)? - b(rows)?))?;
    let all = patients.all();
    plan.comparison(a(&all)?, b(&all)?, &replicates)
}

/// The statistic on every resampled cohort.
fn replicate<S>(patients: &Patients, plan: Bootstrap, statistic: &S) -> Result<Vec<Result<f64>>>
where
    S: Fn(&[usize]) -> Result<f64> + Sync,
{
    plan.check()?;
    Ok((0..plan.replicates).into_par_iter().map(|b| statistic(&patients.draw(plan.seed, b))).collect())
}

/// R's default quantile (type 7) of sorted values: linear between the order statistics.
fn percentile(sorted: &[f64], p: f64) -> f64 {
    let place = p * (sorted.len() - 1) as f64;
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    low + (high - low) * place.fract()
}

/// What a permutation test found.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PermutationTest {
    /// Harrell's C of the cohort.
    pub index: f64,
    /// One-sided, against C no better than chance: (1 + permutations with a C as high) / (1 +
    /// permutations) (Phipson & Smyth 2010), so never 0.
    pub p_value: f64,
}

/// Is the C-index better than chance? Risks are dealt out anew among the patients of each fold. One
/// row a patient.
pub fn concordance_permutation_test(
    time: &[f64],
    event: &[bool],
    risk: &[f64],
    fold: Option<&[usize]>,
    permutations: usize,
    seed: u64,
) -> Result<PermutationTest> {
    let index = concordance_index(time, event, risk)?.index;
    let patients: Vec<usize> = (0..time.len()).collect();
    let folds = Patients::new(&patients, fold)?.folds;
    let as_high = (0..permutations)
        .into_par_iter()
        .map(|b| {
            let mut random = Random::new(seed, b);
            let mut dealt = risk.to_vec();
            for fold in &folds {
                for i in (1..fold.len()).rev() {
                    dealt.swap(fold[i][0], fold[random.below(i + 1)][0]); // Fisher-Yates
                }
            }
            Ok(usize::from(concordance_index(time, event, &dealt)?.index >= index))
        })
        .sum::<Result<usize>>()?;
    Ok(PermutationTest { index, p_value: (1 + as_high) as f64 / (1 + permutations) as f64 })
}

/// splitmix64 (Steele et al. 2014), started at a hash of (seed, stream).
struct Random(u64);

impl Random {
    fn new(seed: u64, stream: usize) -> Self {
        let mut start = Self(seed);
        start.0 = start.next() ^ stream as u64;
        Self(start.next())
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Uniform in 0..n; the bias, n / 2^64, is beyond notice.
    fn below(&mut self, n: usize) -> usize {
        ((u128::from(self.next()) * n as u128) >> 64) as usize
    }
}
