//! Harrell's C and Uno's C by one O(n log n) count of pairs.

use super::cohort::{check_cohort, check_column, order_by, short, undefined};
use super::ipcw::CensoringDistribution;
use crate::Result;

/// Two risks are tied when they differ by no more than this, as in scikit-survival.
pub const RISK_TIE: f64 = 1e-8;

/// Harrell's C-index and the comparable pairs it counts.
///
/// A pair is comparable when one patient's event came before the other's time, or at the same time
/// if the other was censored. It is concordant when the patient with the event has the higher risk.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Concordance {
    /// (concordant + tied_risk / 2) / (concordant + discordant + tied_risk)
    pub index: f64,
    /// Pairs whose risks are in the order of their times.
    pub concordant: u64,
    /// Pairs whose risks are in the opposite order.
    pub discordant: u64,
    /// Comparable pairs whose risks differ by [`RISK_TIE`] or less.
    pub tied_risk: u64,
    /// Comparable pairs (counted above as well) of an event and a censoring at the same time.
    pub tied_time: u64,
}

/// Harrell's C (Harrell et al., JAMA 1982); scikit-survival's `concordance_index_censored`. O(n log
/// n).
pub fn concordance_index(time: &[f64], event: &[bool], risk: &[f64]) -> Result<Concordance> {
    const NAME: &str = "the C-index";
    check_cohort(NAME, time, event)?;
    check_column(NAME, "risk", risk, time.len())?;
    let mut total = Pairs::default();
    for_each_event(time, event, risk, |_, pairs| total.add(pairs));
    let Pairs { concordant, discordant, tied_risk, tied_time } = total;
    if total.comparable() == 0 {
        return Err(no_comparable_pairs(NAME, event));
    }
    Ok(Concordance { index: total.score() / total.comparable() as f64, concordant, discordant, tied_risk, tied_time })
}

/// Uno's C (Uno et al., Statistics in Medicine 2011, eq. 6): as Harrell's, but the pairs of an
/// event at t count 1 / G(t)^2, where G is the `censoring` distribution (of the training patients,
/// or of the same cohort). Events at or after `tau` are not counted. scikit-survival's
/// `concordance_index_ipcw`. O(n log n).
///
/// An error if G is not known, or zero, at an event that counts: choose `tau` within the training
/// follow-up.
pub fn concordance_index_ipcw(
    censoring: &CensoringDistribution,
    time: &[f64],
    event: &[bool],
    risk: &[f64],
    tau: Option<f64>,
) -> Result<f64> {
    const NAME: &str = "Uno's C-index";
    check_cohort(NAME, time, event)?;
    check_column(NAME, "risk", risk, time.len())?;
    let tau = tau.unwrap_or(f64::INFINITY);
    if tau.is_nan() {
        return Err(undefined(NAME, "`tau` is NaN"));
    }
    let mut weight = vec![0.0; time.len()];
    for row in (0..time.len()).filter(|&row| event[row] && time[row] < tau) {
        weight[row] = censoring.weight(NAME, time[row])?.powi(2);
    }
    let (mut score, mut comparable) = (0.0, 0.0);
    for_each_event(time, event, risk, |row, pairs| {
        score += weight[row] * pairs.score();
        comparable += weight[row] * pairs.comparable() as f64;
    });
    if comparable > 0.0 {
        return Ok(score / comparable);
    }
    if event.iter().any(|&e| e) && !weight.iter().any(|&w| w > 0.0) {
        return Err(undefined(NAME, format!("no event came before tau = {}", short(tau))));
    }
    Err(no_comparable_pairs(NAME, event))
}

fn no_comparable_pairs(statistic: &'static str, event: &[bool]) -> crate::Error {
    if event.iter().any(|&e| e) {
        undefined(statistic, "no two patients are comparable: nobody was followed beyond another's event")
    } else {
        undefined(statistic, format!("none of the {} patients had an event", event.len()))
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Pairs {
    concordant: u64,
    discordant: u64,
    tied_risk: u64,
    tied_time: u64,
}

impl Pairs {
    fn comparable(&self) -> u64 {
        self.concordant + self.discordant + self.tied_risk
    }

    fn score(&self) -> f64 {
        self.concordant as f64 + 0.5 * self.tied_risk as f64
    }

    fn add(&mut self, other: Pairs) {
        self.concordant += other.concordant;
        self.discordant += other.discordant;
        self.tied_risk += other.tied_risk;
        self.tied_time += other.tied_time;
    }
}

/// Calls `visit(row, pairs)` for every event with the pairs in which it is the earlier one, latest
/// event first.
///
/// The comparable patients so far are held in a Fenwick tree by their rank in risk. "Within 1e-8"
/// is not transitive, so the ties of a patient are no class of equals but a window `first..end` of
/// ranks of its own.
fn for_each_event(time: &[f64], event: &[bool], risk: &[f64], mut visit: impl FnMut(usize, Pairs)) {
    let by_risk = order_by(risk);
    let ranks = rank_windows(&by_risk, risk);
    let mut comparable = Fenwick::new(time.len());
    for tied in order_by(time).chunk_by(|&a, &b| time[a] == time[b]).rev() {
        let censored = tied.iter().filter(|&&row| !event[row]);
        for &row in censored.clone() {
            comparable.insert(ranks[row].rank);
        }
        let tied_time = censored.count() as u64;
        for &row in tied.iter().filter(|&&row| event[row]) {
            let below = comparable.count_below(ranks[row].first);
            let not_above = comparable.count_below(ranks[row].end);
            let pairs = Pairs {
                concordant: below,
                tied_risk: not_above - below,
                discordant: comparable.len - not_above,
                tied_time,
            };
            visit(row, pairs);
        }
        for &row in tied.iter().filter(|&&row| event[row]) {
            comparable.insert(ranks[row].rank);
        }
    }
}

/// A patient's place in the order of risk, and the half-open range of places whose risks are tied
/// with its own.
#[derive(Clone, Copy, Default)]
struct RankWindow {
    rank: usize,
    first: usize,
    end: usize,
}

/// Both ends of the windows only move up as the risk does (rounded subtraction is monotone), so one
/// sweep finds all.
fn rank_windows(by_risk: &[usize], risk: &[f64]) -> Vec<RankWindow> {
    let mut windows = vec![RankWindow::default(); risk.len()];
    let (mut first, mut end) = (0, 0);
    for (rank, &row) in by_risk.iter().enumerate() {
        while risk[row] - risk[by_risk[first]] > RISK_TIE {
            first += 1;
        }
        while end < by_risk.len() && risk[by_risk[end]] - risk[row] <= RISK_TIE {
            end += 1;
        }
        windows[row] = RankWindow { rank, first, end };
    }
    windows
}

/// Counts of ranks, with prefix sums in O(log n) (Fenwick 1994).
struct Fenwick {
    counts: Vec<u32>,
    len: u64,
}

impl Fenwick {
    fn new(n: usize) -> Self {
        Self { counts: vec![0; n + 1], len: 0 }
    }

    fn insert(&mut self, rank: usize) {
        self.len += 1;
        let mut i = rank + 1;
        while i < self.counts.len() {
            self.counts[i] += 1;
            i += i & i.wrapping_neg();
        }
    }

    /// How many of the inserted ranks are below `rank`.
    fn count_below(&self, rank: usize) -> u64 {
        let mut sum = 0;
        let mut i = rank;
        while i > 0 {
            sum += u64::from(self.counts[i]);
            i &= i - 1;
        }
        sum
    }
}
