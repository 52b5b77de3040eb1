//! The log-rank test.

use super::cohort::{check_cohort, check_length, undefined};
use super::distributions::chi_squared_upper;
use crate::Result;

const NAME: &str = "the log-rank test";

/// The log-rank test of several groups (Mantel 1966).
#[derive(Debug, Clone, PartialEq)]
pub struct LogRank {
    /// Of as many degrees of freedom as there are groups, less one.
    pub chi_squared: f64,
    /// Number of groups less one.
    pub degrees_of_freedom: usize,
    /// Of the chi-squared.
    pub p_value: f64,
    /// For each group: patients, events, and the events expected if all groups had one hazard.
    pub patients: Vec<usize>,
    /// Events of each group.
    pub observed: Vec<usize>,
    /// Events of each group that the hypothesis expects.
    pub expected: Vec<f64>,
}

/// Log-rank test of two or more groups (Mantel 1966; Kalbfleisch & Prentice 2002, section 1.5),
/// stratified if `strata` are given: sums over strata of O - E and of its hypergeometric
/// covariance. R's `survdiff`.
///
/// `group` numbers each patient's group from 0; `strata` may be any labels. O(n log n + k^2 event
/// times), k groups. An error if a group is empty or was never at risk when an event occurred.
pub fn log_rank(time: &[f64], event: &[bool], group: &[usize], strata: Option<&[usize]>) -> Result<LogRank> {
    check_cohort(NAME, time, event)?;
    check_length(NAME, "group", group.len(), time.len())?;
    let patients = group_sizes(group)?;
    let groups = patients.len();
    let mut order: Vec<usize> = (0..time.len()).collect();
    let stratum = |row: usize| strata.map_or(0, |s| s[row]);
    if let Some(strata) = strata {
        check_length(NAME, "strata", strata.len(), time.len())?;
    }
    order.sort_by(|&a, &b| stratum(a).cmp(&stratum(b)).then(time[a].total_cmp(&time[b])));

    let mut observed = vec![0; groups];
    let mut expected = vec![0.0; groups];
    let mut covariance = vec![0.0; groups * groups];
    for members in order.chunk_by(|&a, &b| stratum(a) == stratum(b)) {
        let mut at_risk = vec![0usize; groups];
        for &row in members {
            at_risk[group[row]] += 1;
        }
        let mut all_at_risk = members.len();
        for tied in members.chunk_by(|&a, &b| time[a] == time[b]) {
            let events = tied.iter().filter(|&&row| event[row]).count();
            if events > 0 {
                let (d, n) = (events as f64, all_at_risk as f64);
                let spread = if all_at_risk > 1 { d * (n - d) / (n - 1.0) } else { 0.0 };
                for g in 0..groups {
                    let share = at_risk[g] as f64 / n;
                    expected[g] += d * share;
                    for h in 0..groups {
                        let same = if g == h { 1.0 } else { 0.0 };
                        covariance[g * groups + h] += spread * share * (same - at_risk[h] as f64 / n);
                    }
                }
            }
            for &row in tied {
                observed[group[row]] += usize::from(event[row]);
                at_risk[group[row]] -= 1;
            }
            all_at_risk -= tied.len();
        }
    }

    if !event.iter().any(|&e| e) {
        return Err(undefined(NAME, format!("none of the {} patients had an event", time.len())));
    }
    if let Some(g) = expected.iter().position(|&e| e == 0.0) {
        return Err(undefined(NAME, format!("group {g} had nobody at risk when an event occurred")));
    }
    let excess: Vec<f64> = observed.iter().zip(&expected).map(|(&o, e)| o as f64 - e).collect();
    let chi_squared = quadratic_form(&covariance, &excess).ok_or_else(|| {
        undefined(NAME, "its variance is zero: the groups were never at risk together when an event occurred")
    })?;
    let degrees_of_freedom = groups - 1;
    let p_value = chi_squared_upper(chi_squared, degrees_of_freedom);
    Ok(LogRank { chi_squared, degrees_of_freedom, p_value, patients, observed, expected })
}

/// Patients in each of the groups 0, 1, ... up to the highest number used.
fn group_sizes(group: &[usize]) -> Result<Vec<usize>> {
    let groups = group.iter().max().map_or(0, |&g| g.saturating_add(1));
    if groups < 2 {
        return Err(undefined(NAME, "all patients are in one group"));
    }
    if groups > group.len() {
        return Err(undefined(NAME, format!("{groups} groups are numbered, more than the {} patients", group.len())));
    }
    let mut sizes = vec![0; groups];
    for &g in group {
        sizes[g] += 1;
    }
    match sizes.iter().position(|&size| size == 0) {
        Some(empty) => Err(undefined(NAME, format!("group {empty} of {groups} is empty"))),
        None => Ok(sizes),
    }
}

/// u' V^-1 u without the last group, which the others determine: by the Cholesky factor L of V, it
/// is |L^-1 u|^2. `None` if V is singular.
fn quadratic_form(covariance: &[f64], excess: &[f64]) -> Option<f64> {
    let (groups, n) = (excess.len(), excess.len() - 1);
    let mut factor = vec![0.0; n * n];
    let mut solved = vec![0.0; n];
    for i in 0..n {
        for j in 0..=i {
            let known: f64 = (0..j).map(|k| factor[i * n + k] * factor[j * n + k]).sum();
            let rest = covariance[i * groups + j] - known;
            if i > j {
                factor[i * n + j] = rest / factor[j * n + j];
            } else if rest > 1e-12 * covariance[i * groups + i] {
                factor[i * n + i] = rest.sqrt();
            } else {
                return None;
            }
        }
        let known: f64 = (0..i).map(|k| factor[i * n + k] * solved[k]).sum();
        solved[i] = (excess[i] - known) / factor[i * n + i];
    }
    Some(solved.iter().map(|x| x * x).sum())
}
