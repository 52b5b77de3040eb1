//! exp of a column, written so that the compiler vectorises it.

/// x becomes e^x, to 2 units in the last place, for x <= 709; below -708 (where e^x < 1e-307) x counts as -708.
pub(super) fn exp_in_place(column: &mut [f64]) {
    // The loop is compiled for each vector width and the widest that the machine has is run. The arithmetic is
    // the same in all of them (no fused multiply-add), so the bits are too.
    pulp::Arch::new().dispatch(
        #[inline(always)]
        || column.iter_mut().for_each(|x| *x = exp(*x)),
    );
}

/// e^x = 2^k e^r, k the nearest integer to x / log 2, |r| <= log(2) / 2; e^r by its Taylor series to r^13 / 13!.
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

#[cfg(test)]
mod tests {
    use super::exp_in_place;

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
}
