//! Sums, exponentials and logarithms of long columns.

/// Every x becomes e^x, to 2 units in the last place, for x <= 709; below -708 (where e^x < 1e-307)
/// x counts as -708.
pub(super) fn exp_in_place(column: &mut [f64]) {
    // The loop is compiled for each vector width and the widest that the machine has is run. The
    // arithmetic is the same in all of them (no fused multiply-add), so the bits are too.
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || column.iter_mut().for_each(|x| *x = exp(*x)),
    );
}

/// e^x = 2^k e^r, k the nearest integer to x / log 2, |r| <= log(2) / 2; e^r by its Taylor series
/// to r^13 / 13!.
#[inline(always)]
fn exp(x: f64) -> f64 {
    const ROUND: f64 = 6755399441055744.0; // 1.5 * 2^52: the sum with it ends in an integer's bits
    const LN2_HIGH: f64 = 6.931_471_803_691_238e-1; // 33 bits of log 2, so that k * LN2_HIGH is exact (fdlibm)
    const LN2_LOW: f64 = 1.908_214_929_270_587_7e-10;
    let x = if x > -708.0 { x } else { -708.0 };
    let shifted = x * std::f64::consts::LOG2_E + ROUND;
    let k = shifted - ROUND;
    let r = (x - k * LN2_HIGH) - k * LN2_LOW;
    let mut series = 1.0 / 6227020800.0;
    for factorial in
        [479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0, 120.0, 24.0, 6.0, 2.0, 1.0, 1.0f64]
    {
        series = series * r + 1.0 / factorial;
    }
    f64::from_bits(series.to_bits().wrapping_add(shifted.to_bits() << 52))
}

/// A sum of logarithms as the logarithm of a product, which is `mantissa * 2^exponent`.
pub(super) struct LogSum {
    mantissa: f64,
    exponent: i64,
    rest: f64,
}

impl Default for LogSum {
    fn default() -> Self {
        Self { mantissa: 1.0, exponent: 0, rest: 0.0 }
    }
}

impl LogSum {
    /// Adds log x; x is a normal number.
    pub(super) fn add(&mut self, x: f64) {
        let bits = (self.mantissa * x).to_bits();
        self.exponent += (bits >> 52) as i64 - 1023;
        self.mantissa = f64::from_bits(bits & (u64::MAX >> 12) | 1023 << 52);
    }

    /// Adds c log x.
    pub(super) fn add_times(&mut self, c: f64, x: f64) {
        self.rest += c * x.ln();
    }

    pub(super) fn total(&self) -> f64 {
        self.rest + self.mantissa.ln() + self.exponent as f64 * std::f64::consts::LN_2
    }
}

/// Eight sums side by side: the adder's latency is hidden, and less is lost to rounding than in
/// one.
pub(super) fn sum(values: impl Iterator<Item = f64>) -> f64 {
    let mut lanes = [0.0; 8];
    for (i, value) in values.enumerate() {
        lanes[i % 8] += value;
    }
    lanes.iter().sum()
}

#[cfg(test)]
mod tests {
    use super::{LogSum, exp_in_place};

    #[test]
    fn is_exp() {
        let x: Vec<f64> = (-7080..=7090).map(|i| f64::from(i) * 0.1 + 1e-3).filter(|x| x.abs() < 708.0).collect();
        let mut got = x.clone();
        exp_in_place(&mut got);
        for (x, got) in x.iter().zip(got) {
            assert!((got / x.exp() - 1.0).abs() <= 2.0 * f64::EPSILON, "exp({x}) = {got}, not {}", x.exp());
        }
        let mut edges = [0.0, -0.0, -1e4, f64::MIN];
        exp_in_place(&mut edges);
        assert_eq!(edges[..2], [1.0, 1.0]);
        assert!(edges[2..].iter().all(|&e| e > 0.0 && e < 1e-307));
    }

    #[test]
    fn log_sum_is_the_sum_of_logarithms() {
        let mut logs = LogSum::default();
        let x = |i: i32| f64::from(i).powi(i % 60 - 20);
        (1..5000).for_each(|i| logs.add(x(i)));
        logs.add_times(-0.5, 1e300);
        let want = (1..5000).map(|i| x(i).ln()).sum::<f64>() - 0.5 * 1e300f64.ln();
        assert!((logs.total() / want - 1.0).abs() < 1e-13);
    }
}
