//! The three distributions that the statistics refer to. Degrees of freedom are whole numbers here,
//! so every distribution function is a finite sum (Abramowitz & Stegun 1964) and no incomplete
//! gamma or beta is needed.

use std::f64::consts::{FRAC_2_PI, FRAC_PI_2, SQRT_2};

/// P(X > x), X chi-squared with `df` degrees of freedom (A&S 26.4.4, 26.4.5).
pub(super) fn chi_squared_upper(x: f64, df: usize) -> f64 {
    let half = 0.5 * x;
    if half <= 0.0 {
        return 1.0;
    }
    // Terms half^k exp(-half) / Gamma(k + 1), k = 0, 1, ... or 1/2, 3/2, ...; by logarithm, for
    // exp(-half) may underflow.
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

/// t with P(|T| <= t) = `level`, T Student's with `df` >= 1 degrees of freedom (A&S 26.7.3,
/// 26.7.4).
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
    // Odd: cos + 2/3 cos^3 + 2*4/(3*5) cos^5 ...; even: 1 + 1/2 cos^2 + 1*3/(2*4) cos^4 ...; df / 2
    // terms.
    for k in 1..=df / 2 {
        sum += term;
        let k = (2 * k + odd) as f64;
        term *= cos * cos * (k - 1.0) / k;
    }
    if odd == 1 { FRAC_2_PI * (theta + sin * sum) } else { sin * sum }
}

/// x >= 0 with `tail(x)` = `target`, for a tail that falls from 1 to 0: bisection of the angle of x
/// down to the last bit.
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

    // Numbers of R 4.2.2, to 15 digits.
    #[test]
    fn chi_squared_is_pchisq() {
        for (x, df, p) in [
            (0.01, 1, 0.920344325445942),
            (7.3, 1, 0.00689546106361897),
            (1044.81315131158, 1, 3.26372044271053e-229),
            (60.0, 2, 9.35762296884017e-14),
            (1.0, 3, 0.801251956901201),
            (7.3, 4, 0.120858748821212),
            (60.0, 7, 1.50955530229891e-10),
            (1044.81315131158, 10, 4.1386802513295e-218),
            (60.0, 151, 0.999999999997637),
            (1044.81315131158, 151, 1.67360780042332e-133),
        ] {
            assert_relative_eq!(chi_squared_upper(x, df), p, max_relative = 1e-11);
        }
        assert_eq!(chi_squared_upper(0.0, 3), 1.0);
    }

    #[test]
    fn normal_is_qnorm() {
        for (level, z) in [(0.5, 0.674489750196082), (0.95, 1.95996398454005), (0.999, 3.29052673149193)] {
            assert_relative_eq!(normal_two_sided(level), z, max_relative = 1e-12);
        }
    }

    #[test]
    fn student_is_qt() {
        for (level, df, t) in [
            (0.95, 1, 12.7062047361747),
            (0.999, 1, 636.61924876879),
            (0.5, 2, 0.816496580927726),
            (0.95, 3, 3.18244630528371),
            (0.95, 4, 2.77644510519779),
            (0.999, 5, 6.86882662588127),
            (0.95, 30, 2.04227245630124),
            (0.999, 101, 3.38947488404731),
        ] {
            assert_relative_eq!(student_two_sided(level, df), t, max_relative = 1e-11);
        }
    }
}
