//! Which slides an epoch shows: draws with replacement in which every stratum is as likely as its
//! share of 1 / count, so that rare strata are seen as often as common ones.

/// Draws slides by weight; a pure function of seed, fold and epoch, so that a resumed run needs no
/// generator state.
#[derive(Clone, Debug)]
pub struct Sampler {
    /// Running sums of the weights.
    cumulative: Vec<f64>,
}

impl Sampler {
    /// `strata`: each slide's stratum. A slide's weight is n / count(its stratum); strata without a
    /// slide take no part.
    pub fn new(strata: &[usize]) -> Self {
        let mut counts = vec![0usize; strata.iter().max().map_or(0, |max| max + 1)];
        strata.iter().for_each(|&stratum| counts[stratum] += 1);
        let mut total = 0.0;
        let weight = |&stratum: &usize| {
            total += strata.len() as f64 / counts[stratum] as f64;
            total
        };
        Self { cumulative: strata.iter().map(weight).collect() }
    }

    /// As many draws as there are slides.
    pub fn epoch(&self, seed: u64, fold: usize, epoch: usize) -> Vec<usize> {
        let stream = mix(mix(mix(seed) ^ fold as u64) ^ epoch as u64);
        let total = self.cumulative.last().copied().unwrap_or(0.0);
        let draw = |i: usize| {
            let uniform = (mix(stream.wrapping_add(i as u64)) >> 11) as f64 * (0.5f64).powi(53);
            let target = uniform * total;
            self.cumulative.partition_point(|&sum| sum <= target).min(self.cumulative.len() - 1)
        };
        (0..self.cumulative.len()).map(draw).collect()
    }
}

/// 0 .. n in an order of its own for each seed, fold and epoch (Fisher & Yates): everybody once,
/// for losses that balance nothing.
pub fn shuffled(n: usize, seed: u64, fold: usize, epoch: usize) -> Vec<usize> {
    let stream = mix(mix(mix(seed) ^ fold as u64) ^ epoch as u64);
    let mut order: Vec<usize> = (0..n).collect();
    for i in (1..n).rev() {
        // the bias of the remainder is below n / 2^64
        order.swap(i, (mix(stream.wrapping_add(i as u64)) % (i as u64 + 1)) as usize);
    }
    order
}

/// The finaliser of splitmix64 (Steele et al. 2014), after its increment.
fn mix(x: u64) -> u64 {
    let z = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strata_are_drawn_equally_often() {
        // 100 slides of stratum 0, 10 of stratum 3, 1 of stratum 7
        let strata: Vec<usize> = (0..111)
            .map(|i| {
                if i < 100 {
                    0
                } else if i < 110 {
                    3
                } else {
                    7
                }
            })
            .collect();
        let sampler = Sampler::new(&strata);
        let mut drawn = [0.0f64; 8];
        for epoch in 0..200 {
            sampler.epoch(5, 1, epoch).into_iter().for_each(|i| drawn[strata[i]] += 1.0);
        }
        let (n, expected) = (200.0 * 111.0, 200.0 * 37.0);
        for stratum in [0, 3, 7] {
            // six standard deviations of a binomial share of 1/3
            let six_sigma = 6.0 * f64::sqrt(n * 2.0 / 9.0);
            assert!((drawn[stratum] - expected).abs() < six_sigma, "stratum {stratum} drawn {} times", drawn[stratum]);
        }
    }

    /// Everybody once, and everybody as often in every place: a shuffle that never leaves i where
    /// it is, or favours a place, fails.
    #[test]
    fn a_shuffle_is_a_fair_permutation() {
        const N: usize = 5;
        let mut places = [[0.0f64; N]; N];
        for epoch in 0..4000 {
            let order = shuffled(N, 3, 1, epoch);
            let mut sorted = order.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, [0, 1, 2, 3, 4]);
            order.iter().enumerate().for_each(|(place, &i)| places[place][i] += 1.0);
        }
        // six standard deviations of a binomial share of 1/5
        let six_sigma = 6.0 * f64::sqrt(4000.0 * 0.2 * 0.8);
        assert!(places.iter().flatten().all(|count| (count - 800.0).abs() < six_sigma), "{places:?}");
        assert_eq!(shuffled(N, 1, 2, 3), shuffled(N, 1, 2, 3));
        assert!(shuffled(0, 1, 2, 3).is_empty());
    }

    #[test]
    fn epochs_repeat_and_differ() {
        let sampler = Sampler::new(&[0, 1, 1, 2, 0, 5]);
        assert_eq!(sampler.epoch(1, 2, 3), sampler.epoch(1, 2, 3));
        let others = [sampler.epoch(2, 2, 3), sampler.epoch(1, 3, 3), sampler.epoch(1, 2, 4)];
        assert!(others.iter().all(|other| *other != sampler.epoch(1, 2, 3)));
        assert!(Sampler::new(&[]).epoch(1, 0, 0).is_empty());
    }
}
