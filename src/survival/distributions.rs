//! The three distributions that the statistics refer to. Degrees of freedom are whole numbers here, so every
//! distribution function is a finite sum (Abramowitz & Stegun 1964) and no incomplete gamma or beta is needed.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2, SQRT_2};

/// P(X > x), X chi-squared with `df` degrees of freedom (A&S 26.4.4, 26.4.5).
pub(super) fn chi_squared_upper(x: f64, df: usize) -> f64 {
    let half = 0.5 * x;
    if half <= 0.0 {
        return 1.0;
    }
    // Terms half^k exp(-half) / Gamma(k + 1), k = 0, 1, ... or 1/2, 3/2, ...; by logarithm, for exp(-half) may underflow.
    let (mut tail, first) = if df.is_multiple_of(2) { (0.0, 0.0) } else { (libm::erfc(half.sqrt()), 0.5) };
    for i in 0..df / 2 {
        let k = first + i as f64;
        tail += (k * half.ln() - half - libm::lgamma(k + 1.0)).exp();
    }
    tail.min(1.0)
}

/// z with P(|Z| <= z) = `level`, Z standard normal.
pub(super) fn normal_two_sided(level: f64) -> f64 {
    invert(|z| libm::erfc(z / SQRT_2), 1.0 - level)
}

/// t with P(|T| <= t) = `level`, T Student's with `df` >= 1 degrees of freedom (A&S 26.7.3, 26.7.4).
pub(super) fn student_two_sided(level: f64, df: usize) -> f64 {
    invert(|t| 1.0 - student_within(t, df), 1.0 - level)
}

/// P(|T| <= t).
fn student_within(t: f64, df: usize) -> f64 {
    let theta = (t / (df as f64).sqrt()).atan();
    let (sin, cos) = theta.sin_cos();
    let odd = df % 2;
    let mut term = if odd == 1 { cos } else { 1.0 };
    let mut sum = 0.0;
    // Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ...; df / 2 terms.
    for k in 1..=df / 2 {
        sum += term;
        let k = (2 * k + odd) as f64;
        term *= cos * cos * (k - 1.0) / k;
    }
    if odd == 1 { FRAC_2_PI * (theta + sin * sum) } else { sin * sum }
}

/// x >= 0 with `tail(x)` = `target`, for a tail that falls from 1 to 0: bisection of the angle of x down to the last bit.
fn invert(tail: impl Fn(f64) -> f64, target: f64) -> f64 {
    let (mut low, mut high) = (0.0, FRAC_PI_2);
    loop {
        let middle = 0.5 * (low + high);
        if middle <= low || middle >= high {
            return low.tan();
        }
        if tail(middle.tan()) > target { low = middle } else { high = middle }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use approx::assert_relative_eq;

    // Numbers of R 4.2.2, printed to 17 digits.
    #[test]
    fn chi_squared_is_pchisq() {
        for (x, df, p) in [
            (0.01, 1, 0.92034432544594202),
            (7.3, 1, 0.006895461063618968),
            (1044.8131513115777, 1, 3.2637204427105309e-229),
            (60.0, 2, 9.3576229688401748e-14),
            (1.0, 3, 0.80125195690120077),
            (7.3, 4, 0.12085874882121238),
            (60.0, 7, 1.5095553022989121e-10),
            (1044.8131513115777, 10, 4.1386802513294994e-218),
            (60.0, 151, 0.99999999999763689),
            (1044.8131513115777, 151, 1.6736078004233221e-133),
        ] {
            assert_relative_eq!(chi_squared_upper(x, df), p, max_relative = 1e-11);
        }
        assert_eq!(chi_squared_upper(0.0, 3), 1.0);
    }

    #[test]
    fn normal_is_qnorm() {
        for (level, z) in [(0.5, 0.67448975019608171), (0.95, 1.9599639845400536), (0.999, 3.2905267314919255)] {
            assert_relative_eq!(normal_two_sided(level), z, max_relative = 1e-13);
        }
    }

    #[test]
    fn student_is_qt() {
        for (level, df, t) in [
            (0.95, 1, 12.706204736174694),
            (0.999, 1, 636.6192487687897),
            (0.5, 2, 0.81649658092772592),
            (0.95, 3, 3.1824463052837078),
            (0.95, 4, 2.7764451051977934),
            (0.999, 5, 6.8688266258812734),
            (0.95, 30, 2.0422724563012378),
            (0.999, 101, 3.3894748840473059),
        ] {
            assert_relative_eq!(student_two_sided(level, df), t, max_relative = 1e-11);
        }
    }
}
