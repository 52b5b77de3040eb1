//! The order of a million times: a radix sort of 64-bit words, key above, row number below.

use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rayon::prelude::*;

/// Rows in ascending order of time; equal times keep their order.
pub(super) struct TimeOrder<'a> {
    time: &'a [f64],
    /// For each place: a 32-bit prefix of the time's key above, its row below.
    words: Vec<u64>,
    /// Whether equal prefixes mean equal times.
    exact: bool,
}

impl<'a> TimeOrder<'a> {
    /// `time` is finite and has fewer than 2^32 rows.
    pub(super) fn sort(time: &'a [f64]) -> Self {
        let Some(&first) = time.first() else {
            return Self { time, words: Vec::new(), exact: true };
        };
        // The keys less their minimum, without the low bits in which no two differ (whole days, or
        // f32, leave most of a double's 52 bits zero), usually fit 32 bits; what is cut off is put
        // in order afterwards.
        let first = key(first);
        let (min, max, differing) = time
            .par_iter()
            .with_min_len(1 << 14)
            .map(|&t| (key(t), key(t), key(t) ^ first))
            .reduce(|| (u64::MAX, 0, 0), |a, b| (a.0.min(b.0), a.1.max(b.1), a.2 | b.2));
        let idle_bits = differing.trailing_zeros().min(63);
        let key_bits = 64 - (max - min).leading_zeros();
        let shift = idle_bits.max(key_bits.saturating_sub(32));

        let words = time.par_iter().with_min_len(1 << 14).enumerate();
        let words: Vec<AtomicU64> =
            words.map(|(row, &t)| ((key(t) - min) >> shift) << 32 | row as u64).map(AtomicU64::new).collect();
        let mut words = sort_upper_half(words, key_bits.saturating_sub(shift));
        let exact = shift <= idle_bits;
        if !exact {
            for run in words.chunk_by_mut(|a, b| a >> 32 == b >> 32).filter(|run| run.len() > 1) {
                run.sort_unstable_by_key(|&word| (key(time[row_of(word)]), row_of(word)));
            }
        }
        Self { time, words, exact }
    }

    /// Brings each stratum's rows together, in ascending order of its label.
    pub(super) fn sort_by_stratum(&mut self, strata: &[usize]) {
        self.words.sort_by_key(|&word| strata[row_of(word)]);
    }

    #[inline]
    pub(super) fn row(&self, place: usize) -> usize {
        row_of(self.words[place])
    }

    /// Whether the rows at `place - 1` and `place` have the same time.
    #[inline]
    pub(super) fn tied_with_previous(&self, place: usize) -> bool {
        let (a, b) = (self.words[place - 1], self.words[place]);
        a >> 32 == b >> 32 && (self.exact || self.time[row_of(a)] == self.time[row_of(b)])
    }
}

#[inline]
fn row_of(word: u64) -> usize {
    word as u32 as usize
}

/// An integer that orders as the time does; -0 and 0 have one key.
#[inline]
fn key(time: f64) -> u64 {
    let bits = (time + 0.0).to_bits();
    if bits >> 63 == 0 { bits | 1 << 63 } else { !bits }
}

/// Stable sort by the `bits` low bits of the upper halves: least significant digit first, at most
/// 11 bits a digit.
///
/// Every thread counts the digits of its block of words and then moves that block, to places that
/// no other thread has. Atomics say so without unsafe code; a relaxed load or store is an ordinary
/// one.
fn sort_upper_half(mut words: Vec<AtomicU64>, bits: u32) -> Vec<u64> {
    let digits = bits.div_ceil(11);
    let width = bits.div_ceil(digits.max(1));
    let block = words.len().div_ceil(rayon::current_num_threads()).max(1 << 14);
    let mut sorted: Vec<AtomicU64> = Vec::new();
    sorted.resize_with(words.len(), AtomicU64::default);
    for shift in (0..digits).map(|d| 32 + d * width) {
        let digit = |word: u64| (word >> shift) as usize & ((1 << width) - 1);
        let mut places: Vec<Vec<u32>> = words
            .par_chunks(block)
            .map(|block| {
                let mut counts = vec![0; 1 << width];
                block.iter().for_each(|word| counts[digit(word.load(Relaxed))] += 1);
                counts
            })
            .collect();
        let mut place = 0;
        for value in 0..1 << width {
            for counts in &mut places {
                place += std::mem::replace(&mut counts[value], place);
            }
        }
        words.par_chunks(block).zip(&mut places).for_each(|(block, places)| {
            for word in block {
                let word = word.load(Relaxed);
                let place = &mut places[digit(word)];
                sorted[*place as usize].store(word, Relaxed);
                *place += 1;
            }
        });
        std::mem::swap(&mut words, &mut sorted);
    }
    words.into_iter().map(AtomicU64::into_inner).collect()
}

#[cfg(test)]
mod tests {
    use super::TimeOrder;

    #[test]
    fn is_the_stable_order_of_any_finite_times() {
        let ties = (0..1000).map(|i| f64::from(i * 7919 % 37));
        let spread = (0..1000).map(|i| (f64::from(i * 7919 % 1009) - 500.0).powi(101));
        // Equal in their upper 32 bits.
        let close =
            (0..1000).map(|i| if i < 2 { i as f64 * 1e300 } else { 1.0 + f64::from(i * 7919 % 11) * f64::EPSILON });
        let zeros = [0.0, -0.0, 1.0, 0.0, -0.0].into_iter();
        let columns: [Vec<f64>; 6] =
            [ties.collect(), spread.collect(), close.collect(), zeros.collect(), vec![], vec![-3.5; 4]];
        for time in columns {
            let order = TimeOrder::sort(&time);
            let mut want: Vec<usize> = (0..time.len()).collect();
            want.sort_by(|&a, &b| time[a].partial_cmp(&time[b]).unwrap());
            let got: Vec<usize> = (0..time.len()).map(|place| order.row(place)).collect();
            assert_eq!(got, want);
            for place in 1..time.len() {
                assert_eq!(order.tied_with_previous(place), time[want[place - 1]] == time[want[place]]);
            }
        }
    }
}
