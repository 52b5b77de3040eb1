//! `cf-bench op cox`: the Cox partial likelihood and its gradient over a large cohort.

use std::time::Instant;

use serde::Serialize;

use super::{Seconds, op::OpArguments};
use crate::{
    Error, Result,
    device::Device,
    ops::cox::DeviceCohort,
    survival::{CoxCohort, Ties},
};

#[derive(Serialize)]
struct Report {
    device: String,
    n: usize,
    ties: &'static str,
    /// Loss and gradient of rows that come in order of time; on a GPU of a cohort and risks that
    /// lie on it.
    sorted_s: Seconds,
    /// The same with the sort (and, on a GPU, the copies there and back).
    unsorted_s: Seconds,
}

/// Half the rows have an event; times are whole days, so that there are ties.
struct Rows {
    time: Vec<f64>,
    event: Vec<bool>,
    risk: Vec<f32>,
}

impl Rows {
    fn new(n: usize) -> Self {
        let uniform = super::random(3 * n);
        let day = |u: &f32| (1000.0 * -(0.5 * f64::from(*u) + 0.500_001).ln()).ceil();
        Self {
            time: uniform[..n].iter().map(day).collect(),
            event: uniform[n..2 * n].iter().map(|&u| u < 0.0).collect(),
            risk: uniform[2 * n..].iter().map(|u| 2.0 * u).collect(),
        }
    }

    fn sorted(&self) -> Self {
        let mut order: Vec<usize> = (0..self.time.len()).collect();
        order.sort_by(|&a, &b| self.time[a].total_cmp(&self.time[b]));
        let of = |i: &usize| (self.time[*i], self.event[*i], self.risk[*i]);
        let (mut time, mut event, mut risk) = (Vec::new(), Vec::new(), Vec::new());
        for (t, e, r) in order.iter().map(of) {
            time.push(t);
            event.push(e);
            risk.push(r);
        }
        Self { time, event, risk }
    }
}

pub fn cox(device: &Device, arguments: &OpArguments) -> Result<()> {
    let ties = Ties::from(arguments.ties);
    let rows = Rows::new(arguments.n);
    let sorted = rows.sorted();
    let mut gradient = vec![0.0; arguments.n];
    let repeat = arguments.repeat;
    let (sorted_s, unsorted_s) = match device {
        Device::Cpu(_) => (
            time(repeat, || {
                let cohort = CoxCohort::presorted(&sorted.time, &sorted.event, None, None)?;
                cohort.loglik_and_gradient(&sorted.risk, ties, &mut gradient).map(drop)
            })?,
            time(repeat, || {
                let cohort = CoxCohort::new(&rows.time, &rows.event, None, None)?;
                cohort.loglik_and_gradient(&rows.risk, ties, &mut gradient).map(drop)
            })?,
        ),
        Device::Cuda(cuda) => {
            let cohort = CoxCohort::presorted(&sorted.time, &sorted.event, None, None)?;
            let cohort = DeviceCohort::new(device, &cohort)?;
            device.write(bytemuck::cast_slice(&sorted.risk), cohort.risk())?;
            let mut times = Vec::new();
            for run in 0..=repeat {
                let seconds = cuda.time(|| device.launch(cohort.launches(ties)))?;
                if run > 0 {
                    times.push(seconds);
                }
            }
            let unsorted = time(repeat, || {
                let cohort = CoxCohort::new(&rows.time, &rows.event, None, None)?;
                let cohort = DeviceCohort::new(device, &cohort)?;
                cohort.loglik_and_gradient(&rows.risk, ties, &mut gradient).map(drop)
            })?;
            (Seconds::of(times), unsorted)
        }
        _ => return Err(Error::Usage("cf-bench op cox measures cpu or cuda".into())),
    };
    let ties = if ties == Ties::Efron { "efron" } else { "breslow" };
    let report = Report { device: device.description(), n: arguments.n, ties, sorted_s, unsorted_s };
    if arguments.json {
        crate::say(serde_json::to_string(&report).map_err(|e| Error::Device(e.to_string()))?);
        return Ok(());
    }
    crate::say(format!("{}: Cox loss and gradient of {} patients, {ties} ties", report.device, report.n));
    for (name, seconds) in [("in order of time", &report.sorted_s), ("with the sort", &report.unsorted_s)] {
        crate::say(format!("{name:<18}{:>10.3} ms min{:>10.3} ms median", 1e3 * seconds.min, 1e3 * seconds.median));
    }
    Ok(())
}

fn time(repeat: u32, mut work: impl FnMut() -> Result<()>) -> Result<Seconds> {
    let mut times = Vec::new();
    for run in 0..=repeat {
        let start = Instant::now();
        work()?;
        if run > 0 {
            times.push(start.elapsed().as_secs_f64());
        }
    }
    Ok(Seconds::of(times))
}
