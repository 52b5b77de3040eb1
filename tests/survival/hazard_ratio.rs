//! The hazard ratio against statsmodels 0.14.6 (PHReg, ties = "efron", Newton steps on its score
//! and Hessian until they end; lifelines agrees to 1e-7) and R, and what has none.

use super::*;

/// 1 at the median risk and above, the golden's `risk` itself, and the coefficient, its standard
/// error, and the 95 % limits of the ratio.
const STATSMODELS: [(&str, &str, f64, f64, f64, f64); 10] = [
    ("colon_death", "median", 0.07886574383149046, 0.09530956497807391, 0.89768363625573, 1.3043033392426073),
    ("colon_death", "risk", -0.05936032792221847, 0.12604266487022, 0.7360925568404179, 1.2064458892733132),
    ("lung", "median", 0.19651317953206107, 0.15724696295501106, 0.894325742878223, 1.6565076544463895),
    ("lung", "risk", 0.13420492983106996, 0.06187857450318799, 1.0130090432165684, 1.2910872686205173),
    ("pbc", "median", -0.2341672965871695, 0.1590022303804297, 0.5793746529936825, 1.080551272513822),
    ("pbc", "risk", -0.10460910435862289, 0.05273148165597452, 0.8122387871100443, 0.9987434906083368),
    ("pbc_years", "median", 0.7759069645939033, 0.16532248141156303, 1.5712647293909756, 3.0039649738449885),
    ("pbc_years", "risk", 0.45980027307689675, 0.07193054383652633, 1.3755023333815182, 1.8235434310323646),
    ("veteran", "median", 0.20976589310103136, 0.17853001433760812, 0.8692308792607379, 1.7501093844152098),
    ("veteran", "risk", 0.11834699603326733, 0.16341954755091198, 0.8171362482221408, 1.5506022806244115),
];

#[test]
fn hazard_ratio_equals_statsmodels() {
    let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    for (name, of, coefficient, std_error, lower, upper) in STATSMODELS {
        let Golden { time, event, risk, .. } = Golden::read(&tests.join(format!("survival_{name}.json")));
        let high: Vec<f64> = risk.iter().map(|&r| f64::from(r >= median(&risk))).collect();
        let covariate = if of == "median" { &high } else { &risk };
        let got = hazard_ratio(&time, &event, covariate, 0.95).unwrap();
        for (got, want) in [
            (got.coefficient, coefficient),
            (got.std_error, std_error),
            (got.ratio, coefficient.exp()),
            (got.lower, lower),
            (got.upper, upper),
        ] {
            assert_relative_eq!(got, want, max_relative = 1e-10);
        }
        // the other group as the high one turns the ratio over, and a unit of another size takes
        // its power
        let other: Vec<f64> = covariate.iter().map(|z| 100.0 - 3.0 * z).collect();
        let turned = hazard_ratio(&time, &event, &other, 0.95).unwrap();
        assert_relative_eq!(turned.coefficient, -coefficient / 3.0, max_relative = 1e-9);
        assert_relative_eq!(turned.upper, lower.powf(-1.0 / 3.0), max_relative = 1e-9);
    }
}

/// Two patients a group, by hand: times 1, 2, 3, 4 of groups 1, 0, 1, 0, all events. With h the
/// ratio the likelihood is h / (2h + 2) * 1 / (h + 2) * h / (h + 1), greatest where h^2 - h - 4 =
/// 0.
#[test]
fn a_small_ratio_is_that_of_hand() {
    let got = hazard_ratio(&[1.0, 2.0, 3.0, 4.0], &[true; 4], &[1.0, 0.0, 1.0, 0.0], 0.95).unwrap();
    assert_relative_eq!(got.ratio, (1.0 + 17.0f64.sqrt()) / 2.0, max_relative = 1e-12);
}

#[test]
fn a_ratio_without_a_maximum_is_a_sentence() {
    let of = |time: &[f64], event: &[bool], z: &[f64]| reason(hazard_ratio(time, event, z, 0.95));
    let time = [1.0, 2.0, 3.0, 4.0];
    assert!(of(&time, &[true; 4], &[1.0, 1.0, 0.0, 0.0]).contains("it is infinite"));
    assert!(of(&time, &[true, true, false, false], &[0.0, 0.0, 1.0, 1.0]).contains("it is zero"));
    assert!(of(&time, &[true; 4], &[1.0; 4]).contains("at no event did those at risk differ"));
    assert!(of(&time, &[false; 4], &[1.0, 0.0, 1.0, 0.0]).contains("none of the 4 patients had an event"));
    assert!(of(&time, &[true; 4], &[1.0, 0.0, 1.0, f64::NAN]).contains("entry 3 of `covariate`"));
    // tied events of both groups are no separation, though no one else follows
    let tied = hazard_ratio(&[1.0, 1.0, 2.0, 2.0], &[true; 4], &[1.0, 0.0, 1.0, 0.0], 0.95).unwrap();
    assert_relative_eq!(tied.ratio, 1.0, max_relative = 1e-12);
    // nearly separated: 40 of one group before 40 of the other, but one
    let time: Vec<f64> = (0..80).map(f64::from).collect();
    let z: Vec<f64> = (0..80).map(|i| f64::from(i < 40 && i != 7 || i == 79)).collect();
    let ratio = hazard_ratio(&time, &[true; 80], &z, 0.95).unwrap();
    assert!(ratio.ratio > 5.0 && ratio.lower > 1.0 && ratio.upper.is_finite(), "{ratio:?}");
}
