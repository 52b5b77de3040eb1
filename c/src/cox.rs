//! The Cox partial likelihood of a cohort.

use engine::{
    Result,
    ops::cox::DeviceCohort,
    survival::{CoxCohort, Ties},
};

use crate::{array, cf_status, context::cf_context, given, given_mut, guard, usage};

/// How tied events count.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum cf_ties {
    CF_BRESLOW = 0,
    /// As R's `coxph` does.
    CF_EFRON = 1,
}

/// Patients sorted by time, made once for many evaluations.
pub struct cf_cohort {
    cohort: CoxCohort,
    n: usize,
}

/// A cohort of `n` patients: times (any unit), 1 where the event was seen, strata and weights (or
/// null).
///
/// # Safety
/// The arrays must hold `n` numbers; `out` must be a place for a pointer, which [`cf_cohort_free`]
/// takes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_cohort_new(
    time: *const f64,
    event: *const u8,
    strata: *const u64,
    weights: *const f64,
    n: usize,
    out: *mut *mut cf_cohort,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let out = given_mut("out", out)?;
        *out = std::ptr::null_mut();
        let time = array("time", time, n)?;
        let event = array("event", event, n)?;
        if let Some((i, other)) = event.iter().enumerate().find(|(_, seen)| **seen > 1) {
            return Err(usage(format!("event[{i}] = {other}: expected 1 (observed) or 0 (censored)")));
        }
        let event: Vec<bool> = event.iter().map(|&seen| seen == 1).collect();
        let strata = (!strata.is_null()).then(|| array("strata", strata, n)).transpose()?;
        let strata: Option<Vec<usize>> = strata.map(|strata| strata.iter().map(|&s| s as usize).collect());
        let weights = (!weights.is_null()).then(|| array("weights", weights, n)).transpose()?;
        let cohort = CoxCohort::new(time, &event, strata.as_deref(), weights)?;
        *out = Box::into_raw(Box::new(cf_cohort { cohort, n }));
        Ok(())
    })
}

/// Ends a cohort; null does nothing.
///
/// # Safety
/// `cohort` must be null or a cohort that no call uses now or later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_cohort_free(cohort: *mut cf_cohort) {
    if !cohort.is_null() {
        // SAFETY: the caller's; it is from `Box::into_raw`.
        drop(unsafe { Box::from_raw(cohort) });
    }
}

/// The log-likelihood of log-risks in the host's memory, and its gradient in them (either may be
/// null): Cox 1972, O(n). On a GPU's context the kernels find it, and this waits for them.
///
/// # Safety
/// `risk` and `gradient` must hold as many numbers as the cohort has patients.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cf_cox(
    context: *const cf_context,
    cohort: *const cf_cohort,
    ties: i32,
    risk: *const f32,
    loglik: *mut f64,
    gradient: *mut f32,
) -> cf_status {
    // SAFETY: the caller's.
    guard(|| unsafe {
        let (context, cohort) = (given("context", context)?, given("cohort", cohort)?);
        let ties = match ties {
            n if n == cf_ties::CF_BRESLOW as i32 => Ties::Breslow,
            n if n == cf_ties::CF_EFRON as i32 => Ties::Efron,
            other => return Err(usage(format!("ties = {other}: expected 0 (breslow) or 1 (efron)"))),
        };
        let risk = array("risk", risk, cohort.n)?;
        let mut found = vec![0f32; cohort.n];
        let value = evaluate(context, &cohort.cohort, risk, ties, &mut found)?;
        if !loglik.is_null() {
            *loglik = value;
        }
        if !gradient.is_null() {
            std::ptr::copy_nonoverlapping(found.as_ptr(), gradient, cohort.n);
        }
        Ok(())
    })
}

fn evaluate(context: &cf_context, cohort: &CoxCohort, risk: &[f32], ties: Ties, gradient: &mut [f32]) -> Result<f64> {
    let device = context.device();
    if device.gpu().is_none() {
        return device.install(|| cohort.loglik_and_gradient(risk, ties, gradient));
    }
    DeviceCohort::new(device, cohort)?.loglik_and_gradient(risk, ties, gradient)
}
