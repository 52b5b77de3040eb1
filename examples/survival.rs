//! The survival statistics on a classic: 42 children with leukaemia, 21 pairs, remission under
//! 6-mercaptopurine against placebo (Freireich et al., Blood 21:699-716, 1963; as tabulated by Cox
//! 1972 and Gehan 1965), beside what R's survival 3.5.3 and scikit-survival 0.28 print for it. The
//! risk of a child on placebo is 1.5, else 0.
//!
//!     cargo run --release --example survival

use crossfusion::Result;
use crossfusion::survival::*;

/// Weeks in remission; a minus sign marks a child still in remission when last seen.
const MERCAPTOPURINE: [i32; 21] =
    [6, 6, 6, -6, 7, -9, 10, -10, -11, 13, 16, -17, -19, -20, 22, 23, -25, -32, -32, -34, -35];
const PLACEBO: [i32; 21] = [1, 1, 2, 2, 3, 4, 4, 5, 5, 8, 8, 8, 8, 11, 11, 12, 12, 15, 17, 22, 23];

fn main() -> Result<()> {
    let weeks: Vec<i32> = MERCAPTOPURINE.into_iter().chain(PLACEBO).collect();
    let time: Vec<f64> = weeks.iter().map(|w| f64::from(w.abs())).collect();
    let event: Vec<bool> = weeks.iter().map(|&w| w > 0).collect();
    let placebo: Vec<usize> = (0..42).map(|row| row / 21).collect();
    let risk: Vec<f64> = placebo.iter().map(|&p| 1.5 * p as f64).collect();

    println!("{:<44} {:>15} {:>15}  by", "statistic", "crossfusion", "reference");
    let r = |name: &str, got: f64, reference: f64| row(name, got, reference, "R");
    let sksurv = |name: &str, got: f64, reference: f64| row(name, got, reference, "scikit-survival");

    for (name, arm, medians, at_22) in [
        ("6-MP", 0..21, [23.0, 13.0], [0.53781513, 0.26777894, 0.74679072]),
        ("placebo", 21..42, [8.0, 4.0], [0.047619048, 0.003324463, 0.19704491]),
    ] {
        let curve = kaplan_meier(&time[arm.clone()], &event[arm], Limits::LogLog, 0.95)?;
        let median = curve.median();
        r(&format!("median weeks, {name}"), median.estimate.unwrap_or(f64::INFINITY), medians[0]);
        r("  lower 95% limit", median.lower.unwrap_or(f64::INFINITY), medians[1]);
        if let Some(step) = curve.steps.iter().find(|step| step.time == 22.0) {
            let (lower, upper) = step.limits.unwrap_or((0.0, 1.0));
            r(&format!("S(22 weeks), {name}"), step.survival, at_22[0]);
            r("  lower log-log limit", lower, at_22[1]);
            r("  upper log-log limit", upper, at_22[2]);
        }
    }
    let test = log_rank(&time, &event, &placebo, None)?;
    r("log-rank chi-squared", test.chi_squared, 16.7929409892);
    r("  p", test.p_value, 4.16880910933e-05);
    r("  expected relapses, 6-MP", test.expected[0], 19.2505009480);

    let (hazard, std_error) = nelson_aalen(&time, &event)?;
    r("Nelson-Aalen H(35 weeks), all", hazard.hazard_at(35.0).unwrap_or(0.0), 1.53866303085);
    r("  standard error", std_error[std_error.len() - 1], 0.33569588783);
    for (name, ties, loglik, score, baseline) in [
        ("Efron", Ties::Efron, -85.023852854382, 0.429665149422, 0.844436922281),
        ("Breslow", Ties::Breslow, -86.3798741750958, 0.0548872668156, 0.7831999166756),
    ] {
        let (got, gradient) = cox_loglik_and_gradient(&time, &event, &risk, ties)?;
        r(&format!("Cox log-likelihood, {name}"), got, loglik);
        r("  its slope in the placebo's risk", gradient[21..].iter().sum(), score);
        let baseline_at_35 = baseline_hazard(&time, &event, &risk, ties)?.hazard_at(35.0).unwrap_or(0.0);
        r("  baseline hazard H0(35 weeks)", baseline_at_35, baseline);
    }

    let c = concordance_index(&time, &event, &risk)?;
    sksurv("Harrell's C", c.index, 0.6900420757363254);
    sksurv("  concordant pairs", c.concordant as f64, 335.0);
    sksurv("  discordant pairs", c.discordant as f64, 64.0);
    sksurv("  pairs of equal risk", c.tied_risk as f64, 314.0);
    let censoring = CensoringDistribution::fit(&time, &event)?;
    let uno = concordance_index_ipcw(&censoring, &time, &event, &risk, Some(24.0))?;
    sksurv("Uno's C to 24 weeks", uno, 0.6905504216492231);
    let times = [5.0, 10.0, 20.0];
    let auc = dynamic_auc(&censoring, &time, &event, &risk, &times)?;
    sksurv("AUC at 10 weeks", auc.auc[1], 0.66640237);
    sksurv("mean AUC over 5, 10, 20 weeks", auc.mean, 0.745072886508882);
    let survival: Vec<f64> = risk.iter().flat_map(|risk| times.map(|t: f64| (-risk.exp() * t / 40.0).exp())).collect();
    let brier = brier_score(&censoring, &time, &event, &survival, &times)?;
    sksurv("Brier score at 10 weeks", brier.score[1], 0.22429824);
    sksurv("integrated Brier score", brier.integrated()?, 0.19175793106662364);

    let c_index = |rows: &[usize]| {
        let pick = |column: &[f64]| rows.iter().map(|&row| column[row]).collect::<Vec<f64>>();
        let event: Vec<bool> = rows.iter().map(|&row| event[row]).collect();
        Ok(concordance_index(&pick(&time), &event, &pick(&risk))?.index)
    };
    let interval = bootstrap(&Patients::one_row_each(42)?, Bootstrap::default(), c_index)?;
    println!("\nHarrell's C {:.3}, bootstrap 95% interval {:.3} to {:.3}", c.index, interval.lower, interval.upper);
    let test = concordance_permutation_test(&time, &event, &risk, None, 9999, 0)?;
    println!("permutation test of C against chance: p = {:.4}", test.p_value);
    Ok(())
}

fn row(name: &str, got: f64, reference: f64, by: &str) {
    println!("{name:<44} {got:>15.9} {reference:>15.9}  {by}");
}
