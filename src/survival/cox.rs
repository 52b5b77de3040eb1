//! The Cox partial likelihood and its gradient in the risks, in O(n) after one sort.

use rayon::prelude::*;

use super::cohort::{check_cohort, check_length, undefined};
use super::numeric::{LogSum, exp_in_place, sum};
use super::time_order::TimeOrder;
use crate::Result;

const NAME: &str = "the Cox partial likelihood";

/// What the events of one time share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[cfg_attr(feature = "programs", derive(serde::Serialize, serde::Deserialize))]
#[cfg_attr(feature = "programs", serde(rename_all = "snake_case"))]
pub enum Ties {
    /// Each is compared with the whole risk set (Breslow 1974).
    Breslow,
    /// The l-th of d is compared with the risk set less l/d of the tied events (Efron 1977); R's
    /// default.
    Efron,
}

/// How risks and gradients are stored: f32 or f64. All sums are f64.
pub trait Scalar: Copy + Send + Sync {
    /// The same number.
    fn to_f64(self) -> f64;
    /// The nearest number.
    fn from_f64(value: f64) -> Self;
}

impl Scalar for f32 {
    #[inline]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline]
    fn from_f64(value: f64) -> Self {
        value as f32
    }
}

impl Scalar for f64 {
    #[inline]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline]
    fn from_f64(value: f64) -> Self {
        value
    }
}

/// A cohort sorted for the Cox likelihood, once for any number of evaluations.
///
/// With w the weights (1 if none are given), t_g the distinct event times of a stratum, D_g the d
/// events at t_g, W = sum of w over D_g, R = sum of w e^r over the risk set {t >= t_g} and E that
/// over D_g:
///
/// ```text
/// loglik = sum over g of [ sum over D_g of w r  -  W/d  sum over l < d of log(R - c_l E) ]
/// ```
///
/// with c_l = l/d for Efron and 0 for Breslow. The gradient in r is w times R's martingale
/// residuals.
#[derive(Debug, Clone)]
pub struct CoxCohort {
    /// The row at each place in the order of (stratum, time); `None` if the rows came in that
    /// order.
    rows: Option<Vec<u32>>,
    flags: Vec<u8>,
    /// By place; empty if all weights are 1.
    weights: Vec<f64>,
    chunks: Vec<Chunk>,
    events: usize,
}

/// Flags of a place.
const EVENT: u8 = 1;
/// It is the first of the rows tied in time.
const FIRST: u8 = 2;
// For kernels: it is the last of them; the first, the last of its stratum.
const LAST: u8 = 4;
const STRATUM_FIRST: u8 = 8;
const STRATUM_LAST: u8 = 16;

/// A cohort by place (see [`CoxCohort`]).
pub(crate) struct Columns<'a> {
    /// Empty if the rows came in order.
    pub rows: &'a [u32],
    pub flags: Vec<u8>,
    /// The first and the last place of each place's tie.
    pub first: Vec<u32>,
    pub last: Vec<u32>,
    /// Empty if all are 1.
    pub weights: Vec<f32>,
}

/// Places `start..end`, whole ties of one stratum: the unit of parallel work, the same for any
/// number of threads.
#[derive(Debug, Clone)]
struct Chunk {
    start: usize,
    end: usize,
    last_of_stratum: bool,
}

const CHUNK: usize = 1 << 14;

impl CoxCohort {
    /// Sorts the cohort: O(n), a radix sort. `weights` are case weights, finite and above 0.
    pub fn new(time: &[f64], event: &[bool], strata: Option<&[usize]>, weights: Option<&[f64]>) -> Result<Self> {
        check_columns(time, event, strata, weights)?;
        let mut order = TimeOrder::sort(time);
        if let Some(strata) = strata {
            order.sort_by_stratum(strata);
        }
        let rows = (0..time.len()).into_par_iter().with_min_len(CHUNK).map(|place| order.row(place) as u32).collect();
        Ok(Self::build(time.len(), Some(rows), event, strata, weights, |place| order.tied_with_previous(place)))
    }

    /// The same for rows already in ascending order of (stratum, time): no sort and no permutation.
    pub fn presorted(time: &[f64], event: &[bool], strata: Option<&[usize]>, weights: Option<&[f64]>) -> Result<Self> {
        check_columns(time, event, strata, weights)?;
        let stratum = |row: usize| strata.map_or(0, |strata| strata[row]);
        let descends = |row: &usize| (stratum(row - 1), time[row - 1]) > (stratum(*row), time[*row]);
        let blocks = (1..time.len()).into_par_iter().step_by(CHUNK);
        if let Some(row) = blocks.find_map_first(|i| (i..time.len().min(i + CHUNK)).find(descends)) {
            let (before, time) = (time[row - 1], time[row]);
            let reason =
                format!("its rows are not presorted by stratum and time: {before} comes before {time} (row {row})");
            return Err(undefined(NAME, reason));
        }
        Ok(Self::build(time.len(), None, event, strata, weights, |place| time[place - 1] == time[place]))
    }

    fn build(
        n: usize,
        rows: Option<Vec<u32>>,
        event: &[bool],
        strata: Option<&[usize]>,
        weights: Option<&[f64]>,
        tied_with_previous: impl Fn(usize) -> bool + Sync,
    ) -> Self {
        let row = |place: usize| rows.as_ref().map_or(place, |rows| rows[place] as usize);
        let opens_stratum =
            |place: usize| place == 0 || strata.is_some_and(|strata| strata[row(place - 1)] != strata[row(place)]);
        let flags: Vec<u8> = (0..n)
            .into_par_iter()
            .with_min_len(CHUNK)
            .map(|place| {
                let first = opens_stratum(place) || !tied_with_previous(place);
                u8::from(event[row(place)]) * EVENT + u8::from(first) * FIRST
            })
            .collect();
        let weights = weights.map_or(Vec::new(), |weights| (0..n).map(|place| weights[row(place)]).collect());
        let starts_of_strata = match strata {
            None => vec![0],
            Some(_) => (0..n).filter(|&place| opens_stratum(place)).collect(),
        };
        let mut chunks = Vec::new();
        for (i, &start) in starts_of_strata.iter().enumerate() {
            let end_of_stratum = starts_of_strata.get(i + 1).copied().unwrap_or(n);
            let mut start = start;
            while start < end_of_stratum {
                let at_least = (start + CHUNK).min(end_of_stratum);
                let end = (at_least..end_of_stratum).find(|&p| flags[p] & FIRST != 0).unwrap_or(end_of_stratum);
                chunks.push(Chunk { start, end, last_of_stratum: end == end_of_stratum });
                start = end;
            }
        }
        let events = event.iter().filter(|&&e| e).count();
        Self { rows, flags, weights, chunks, events }
    }

    /// The cohort by place, as kernels take it.
    pub(crate) fn columns(&self) -> Columns<'_> {
        let n = self.flags.len();
        let mut flags = self.flags.clone();
        let mut stratum_starts = true;
        for chunk in &self.chunks {
            if std::mem::replace(&mut stratum_starts, chunk.last_of_stratum) {
                flags[chunk.start] |= STRATUM_FIRST;
            }
            if chunk.last_of_stratum {
                flags[chunk.end - 1] |= STRATUM_LAST;
            }
        }
        let (mut first, mut last) = (vec![0; n], vec![0; n]);
        let starts: Vec<usize> = (0..n).filter(|&place| flags[place] & FIRST != 0).chain([n]).collect();
        for tie in starts.windows(2) {
            flags[tie[1] - 1] |= LAST;
            first[tie[0]..tie[1]].fill(tie[0] as u32);
            last[tie[0]..tie[1]].fill(tie[1] as u32 - 1);
        }
        let weights = self.weights.iter().map(|&w| w as f32).collect();
        Columns { rows: self.rows.as_deref().unwrap_or_default(), flags, first, last, weights }
    }

    /// Number of events, by which the loss -loglik / events is averaged.
    pub fn events(&self) -> usize {
        self.events
    }

    /// Writes d loglik / d risk to `gradient` and returns loglik, risks and gradient in the
    /// caller's row order. O(n); the same bits for any number of threads. Without events both are
    /// 0. Risks may be of any finite size.
    pub fn loglik_and_gradient<T: Scalar>(&self, risk: &[T], ties: Ties, gradient: &mut [T]) -> Result<f64> {
        let n = self.flags.len();
        check_length(NAME, "risk", risk.len(), n)?;
        check_length(NAME, "gradient", gradient.len(), n)?;
        let mut exp_risk = vec![0.0; n]; // by place: first r, then w e^(r - shift)
        let highest = self.gather(risk, &mut exp_risk)?;
        let mut pieces = self.pieces(&exp_risk, &highest);

        parts(&pieces, &mut exp_risk).zip(&mut pieces).for_each(|(exp_risk, piece)| self.exponentiate(exp_risk, piece));
        // The risk set at the end of a piece, from the last time of a stratum to the first.
        for i in (1..pieces.len()).rev() {
            if let [earlier, later] = &mut pieces[i - 1..=i]
                && !earlier.last_of_stratum
            {
                earlier.later_at_risk = (later.later_at_risk + later.sum) * (later.shift - earlier.shift).exp();
            }
        }
        let mut hazard = vec![0.0; n]; // by place: what multiplies w e^r in the gradient
        parts(&pieces, &mut hazard).zip(&mut pieces).for_each_init(Vec::new, |increments, (hazard, piece)| {
            self.scan(&exp_risk[piece.start..piece.end], ties, piece, hazard, increments)
        });
        // The hazard before a piece, from the first time of a stratum to the last.
        for i in 1..pieces.len() {
            if let [earlier, later] = &mut pieces[i - 1..=i]
                && !earlier.last_of_stratum
            {
                later.earlier_hazard = (earlier.earlier_hazard + earlier.hazard) * (later.shift - earlier.shift).exp();
            }
        }
        match &self.rows {
            None => parts(&pieces, gradient).zip(&pieces).for_each(|(gradient, piece)| {
                let place = piece.start..piece.end;
                self.combine(&exp_risk[place.clone()], &hazard[place], piece, |i, g| gradient[i] = T::from_f64(g));
            }),
            Some(rows) => {
                for piece in &pieces {
                    let place = piece.start..piece.end;
                    let rows = &rows[place.clone()];
                    let put = |i: usize, g| gradient[rows[i] as usize] = T::from_f64(g);
                    self.combine(&exp_risk[place.clone()], &hazard[place], piece, put);
                }
            }
        }
        let loglik: f64 = pieces.iter().map(|piece| piece.loglik).sum();
        if loglik.is_finite() {
            Ok(loglik)
        } else {
            Err(undefined(NAME, "the risks differ by more than a double holds"))
        }
    }

    /// Brings the risks into order; the highest of each chunk.
    fn gather<T: Scalar>(&self, risk: &[T], ordered: &mut [f64]) -> Result<Vec<f64>> {
        let copy = |(chunk, ordered): (&Chunk, &mut [f64])| {
            match &self.rows {
                None => ordered.iter_mut().zip(&risk[chunk.start..chunk.end]).for_each(|(to, r)| *to = r.to_f64()),
                Some(rows) => {
                    let rows = &rows[chunk.start..chunk.end];
                    ordered.iter_mut().zip(rows).for_each(|(to, &row)| *to = risk[row as usize].to_f64());
                }
            }
            let finite = ordered.iter().fold(true, |finite, r| finite & r.is_finite());
            if finite { ordered.iter().copied().fold(f64::MIN, f64::max) } else { f64::NAN }
        };
        let ends = self.chunks.iter().map(|chunk| chunk.end);
        let highest: Vec<f64> = self.chunks.par_iter().zip(split_at(ends, ordered)).map(copy).collect();
        if highest.iter().any(|h| h.is_nan()) {
            let row = risk.iter().position(|r| !r.to_f64().is_finite()).unwrap_or(0);
            let reason = format!("entry {row} of `risk` is {}, not a finite number", risk[row].to_f64());
            return Err(undefined(NAME, reason));
        }
        Ok(highest)
    }

    /// Gives each chunk a shift such that e^(r - shift) neither overflows nor leaves a risk set
    /// empty: no risk exceeds it by more than [`HEADROOM`], and one in every risk set reaches it.
    /// Where the risks rise further (from one time to an earlier one) the chunk is split. Shifts
    /// only rise towards the earlier times of a stratum.
    fn pieces(&self, risk: &[f64], highest: &[f64]) -> Vec<Piece> {
        let mut pieces = Vec::with_capacity(self.chunks.len());
        let mut shift = f64::NEG_INFINITY;
        for (chunk, &highest) in self.chunks.iter().zip(highest).rev() {
            let mut last_of_stratum = chunk.last_of_stratum;
            if last_of_stratum {
                shift = f64::NEG_INFINITY;
            }
            let mut end = chunk.end;
            let mut place = chunk.end;
            while place > chunk.start && highest > shift + HEADROOM {
                place -= 1;
                if risk[place] <= shift + HEADROOM {
                    continue;
                }
                let mut tied = place + 1;
                while tied < end && self.flags[tied] & FIRST == 0 {
                    tied += 1;
                }
                if tied < end {
                    pieces.push(Piece::new(tied, end, shift, std::mem::take(&mut last_of_stratum)));
                    end = tied;
                }
                while self.flags[place] & FIRST == 0 {
                    place -= 1;
                }
                shift = risk[place..tied].iter().fold(shift, |max, &r| max.max(r));
            }
            pieces.push(Piece::new(chunk.start, end, shift, last_of_stratum));
        }
        pieces.reverse();
        pieces
    }

    /// `exp_risk` holds r and is given w e^(r - shift).
    fn exponentiate(&self, exp_risk: &mut [f64], piece: &mut Piece) {
        let flags = &self.flags[piece.start..piece.end];
        exp_risk.iter_mut().for_each(|r| *r -= piece.shift);
        if self.weights.is_empty() {
            piece.loglik = sum(exp_risk.iter().zip(flags).map(|(r, flag)| r * f64::from(flag & EVENT)));
            exp_in_place(exp_risk);
        } else {
            let weights = &self.weights[piece.start..piece.end];
            let events = exp_risk.iter().zip(weights).zip(flags);
            piece.loglik = sum(events.map(|((r, w), flag)| w * r * f64::from(flag & EVENT)));
            exp_in_place(exp_risk);
            exp_risk.iter_mut().zip(weights).for_each(|(e, w)| *e *= w);
        }
        piece.sum = sum(exp_risk.iter().copied());
    }

    /// Backward in time through a piece: the risk sets, and the increments of the hazard. Forward:
    /// their sums. Whether a patient had an event is chance, so wherever it can be it is an index
    /// and not a branch.
    fn scan(
        &self,
        exp_risk: &[f64],
        ties: Ties,
        piece: &mut Piece,
        hazard: &mut [f64],
        increments: &mut Vec<Increment>,
    ) {
        let flags = &self.flags[piece.start..piece.end];
        let weights = (!self.weights.is_empty()).then(|| &self.weights[piece.start..piece.end]);
        let mut at_risk = piece.later_at_risk;
        let mut logs = LogSum::default();
        increments.clear();
        let mut end = flags.len();
        while end > 0 {
            let (mut events, mut of_events, mut weight_of_events) = (0usize, 0.0, 0.0);
            loop {
                end -= 1;
                let event = flags[end] & EVENT;
                at_risk += exp_risk[end];
                of_events += exp_risk[end] * f64::from(event);
                weight_of_events += weights.map_or(1.0, |weights| weights[end]) * f64::from(event);
                events += usize::from(event);
                if flags[end] & FIRST != 0 {
                    break;
                }
            }
            let d = events as f64;
            if events < 2 && weights.is_none() {
                increments.push([d / at_risk; 2]);
                logs.add([1.0, at_risk][events]);
            } else if events < 2 || ties == Ties::Breslow {
                increments.push([weight_of_events / at_risk; 2]);
                logs.add_times(weight_of_events, at_risk);
            } else {
                let weight = weight_of_events / d;
                let mut increment = [0.0; 2];
                for l in 0..events {
                    let gone = l as f64 / d;
                    let denominator = at_risk - gone * of_events;
                    let hazard = weight / denominator;
                    increment[0] += hazard;
                    increment[1] += hazard * (1.0 - gone);
                    if weights.is_none() { logs.add(denominator) } else { logs.add_times(weight, denominator) }
                }
                increments.push(increment);
            }
        }
        piece.loglik -= logs.total();

        let (mut before, mut increment) = (0.0, [0.0; 2]);
        for (hazard, &flag) in hazard.iter_mut().zip(flags) {
            if flag & FIRST != 0 {
                before += increment[0];
                increment = increments.pop().unwrap_or_default();
            }
            *hazard = before + increment[usize::from(flag & EVENT)];
        }
        piece.hazard = before + increment[0];
    }

    fn combine(&self, exp_risk: &[f64], hazard: &[f64], piece: &Piece, mut put: impl FnMut(usize, f64)) {
        let flags = &self.flags[piece.start..piece.end];
        let weights = (!self.weights.is_empty()).then(|| &self.weights[piece.start..piece.end]);
        for i in 0..flags.len() {
            let event = f64::from(flags[i] & EVENT) * weights.map_or(1.0, |weights| weights[i]);
            put(i, event - exp_risk[i] * (hazard[i] + piece.earlier_hazard));
        }
    }
}

/// Log-likelihood and gradient of one cohort that is used once; see [`CoxCohort`] for the formula
/// and for more.
pub fn cox_loglik_and_gradient<T: Scalar>(
    time: &[f64],
    event: &[bool],
    risk: &[T],
    ties: Ties,
) -> Result<(f64, Vec<T>)> {
    let mut gradient = vec![T::from_f64(0.0); time.len()];
    let loglik = CoxCohort::new(time, event, None, None)?.loglik_and_gradient(risk, ties, &mut gradient)?;
    Ok((loglik, gradient))
}

/// A chunk, or part of one, with its shift: e^r = e^(r - shift) e^shift, and a hazard h stands for
/// h e^-shift.
struct Piece {
    start: usize,
    end: usize,
    shift: f64,
    last_of_stratum: bool,
    /// Of w e^(r - shift) here, and in the later pieces of the stratum.
    sum: f64,
    later_at_risk: f64,
    /// Of the events here, and in the earlier pieces of the stratum.
    hazard: f64,
    earlier_hazard: f64,
    loglik: f64,
}

impl Piece {
    fn new(start: usize, end: usize, shift: f64, last_of_stratum: bool) -> Self {
        let (sum, later_at_risk, hazard, earlier_hazard, loglik) = (0.0, 0.0, 0.0, 0.0, 0.0);
        Self { start, end, shift, last_of_stratum, sum, later_at_risk, hazard, earlier_hazard, loglik }
    }
}

const HEADROOM: f64 = 300.0;

/// What the events of one time add to the hazard of the others in the risk set (0), and to their
/// own (1 = [`EVENT`]).
type Increment = [f64; 2];

/// The pieces' parts of a column.
fn parts<'a, T: Send>(pieces: &[Piece], column: &'a mut [T]) -> rayon::vec::IntoIter<&'a mut [T]> {
    split_at(pieces.iter().map(|piece| piece.end), column)
}

fn split_at<T: Send>(ends: impl Iterator<Item = usize>, column: &mut [T]) -> rayon::vec::IntoIter<&mut [T]> {
    let (mut rest, mut start) = (column, 0);
    let parts: Vec<&mut [T]> = ends
        .map(|end| {
            let (part, after) = std::mem::take(&mut rest).split_at_mut(end - start);
            (rest, start) = (after, end);
            part
        })
        .collect();
    parts.into_par_iter()
}

fn check_columns(time: &[f64], event: &[bool], strata: Option<&[usize]>, weights: Option<&[f64]>) -> Result<()> {
    check_cohort(NAME, time, event)?;
    if time.len() > u32::MAX as usize {
        return Err(undefined(NAME, format!("{} patients are more than 2^32", time.len())));
    }
    if let Some(strata) = strata {
        check_length(NAME, "strata", strata.len(), time.len())?;
    }
    let Some(weights) = weights else { return Ok(()) };
    check_length(NAME, "weights", weights.len(), time.len())?;
    match weights.iter().position(|w| !(w.is_finite() && *w > 0.0)) {
        Some(row) => Err(undefined(NAME, format!("the weight of patient {row} is {}, not above 0", weights[row]))),
        None => Ok(()),
    }
}
