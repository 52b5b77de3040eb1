//! The Cox partial likelihood by kernels/cox.cu; the CPU's is [`CoxCohort::loglik_and_gradient`],
//! where the formula stands.

use bytemuck::{Pod, Zeroable};

use crate::{
    Error, Result,
    device::{Arg, Buffer, Device, Launch, Storage},
    survival::{CoxCohort, Ties},
};

use super::constants::cox::{THREADS, TILE};

/// Every block reads the totals of those before it, so there are few, whatever n.
const MOST_BLOCKS: usize = 512;

/// `Cox` of kernels/cox.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct KernelCox {
    risk: u64,
    gradient: u64,
    rows: u64,
    flags: u64,
    first: u64,
    last: u64,
    weights: u64,
    highest: u64,
    totals: u64,
    sets: u64,
    hazards: u64,
    loglik: u64,
    n: i32,
    span: i32,
    efron: i32,
    padding: i32,
}

/// A cohort on a device that runs kernels, with all memory that an evaluation needs.
pub struct DeviceCohort<'d> {
    device: &'d Device,
    n: usize,
    kernel: KernelCox,
    risk: Buffer,
    gradient: Buffer,
    loglik: Buffer,
    /// Order, flags, ties, weights and scratch.
    _others: Vec<Buffer>,
}

impl<'d> DeviceCohort<'d> {
    /// Copies a sorted cohort to the device.
    pub fn new(device: &'d Device, cohort: &CoxCohort) -> Result<Self> {
        let columns = cohort.columns();
        let n = columns.flags.len();
        if n > i32::MAX as usize {
            return Err(Error::Usage(format!("{n} patients: a GPU takes at most {}", i32::MAX)));
        }
        let mut others = Vec::new();
        let mut column = |bytes: &[u8]| -> Result<u64> {
            if bytes.is_empty() {
                return Ok(0);
            }
            let buffer = device.alloc(bytes.len())?;
            device.write(bytes, &buffer)?;
            let address = buffer.address();
            others.push(buffer);
            Ok(address)
        };
        let rows = column(bytemuck::cast_slice(columns.rows))?;
        let flags = column(&columns.flags)?;
        let (first, last) =
            (column(bytemuck::cast_slice(&columns.first))?, column(bytemuck::cast_slice(&columns.last))?);
        let weights = column(bytemuck::cast_slice(&columns.weights))?;
        let (blocks, span) = grid(n);
        let mut scratch = |bytes: usize| -> Result<u64> {
            let buffer = device.alloc(bytes)?;
            let address = buffer.address();
            others.push(buffer);
            Ok(address)
        };
        let (highest, totals) = (scratch(blocks * 4)?, scratch(blocks * 5 * 8)?);
        let (sets, hazards) = (scratch(n * 4 * 8)?, scratch(n * 2 * 8)?);
        let (risk, gradient, loglik) = (device.alloc(n * 4)?, device.alloc(n * 4)?, device.alloc((1 + blocks) * 8)?);
        let kernel = KernelCox {
            risk: risk.address(),
            gradient: gradient.address(),
            rows,
            flags,
            first,
            last,
            weights,
            highest,
            totals,
            sets,
            hazards,
            loglik: loglik.address(),
            n: n as i32,
            span: span as i32,
            efron: 0,
            padding: 0,
        };
        Ok(Self { device, n, kernel, risk, gradient, loglik, _others: others })
    }

    /// [`CoxCohort::loglik_and_gradient`] on the device, from and to host memory.
    pub fn loglik_and_gradient(&self, risk: &[f32], ties: Ties, gradient: &mut [f32]) -> Result<f64> {
        for (tensor, len) in [("risk", risk.len()), ("gradient", gradient.len())] {
            if len != self.n {
                let (got, expected) = (vec![len], vec![self.n]);
                return Err(Error::Shape { op: "cox", tensor: tensor.into(), got, expected });
            }
        }
        if let Some(row) = risk.iter().position(|risk| !risk.is_finite()) {
            let reason = format!("the risk of row {row} is {}, expected a finite number", risk[row]);
            return Err(Error::Statistic { statistic: "the Cox partial likelihood", reason });
        }
        if self.n == 0 {
            return Ok(0.0);
        }
        self.device.write(bytemuck::cast_slice(risk), &self.risk)?;
        self.device.launch(self.launches(ties))?;
        bytemuck::cast_slice_mut(gradient).copy_from_slice(&self.device.read(&self.gradient)?);
        self.loglik()
    }

    /// Where the risks are read from, f32 in the caller's row order.
    pub(crate) fn risk(&self) -> &Buffer {
        &self.risk
    }

    /// The kernels that write gradient and log-likelihood; O(n), the same bits on every run. None
    /// for an empty cohort.
    pub(crate) fn launches(&self, ties: Ties) -> Vec<Launch> {
        let (blocks, _) = grid(self.n);
        let args = vec![Arg::new(KernelCox { efron: i32::from(ties == Ties::Efron), ..self.kernel })];
        let kernels =
            ["cox_highest", "cox_risk_set_totals", "cox_risk_sets", "cox_hazard_totals", "cox_hazards", "cox_gradient"];
        let launch = |kernel| Launch {
            kernel,
            storage: Storage::F32,
            grid: [blocks as u32, 1, 1],
            block: [THREADS as u32, 1, 1],
            shared_bytes: 0,
            args: args.clone(),
        };
        if self.n == 0 { Vec::new() } else { kernels.map(launch).to_vec() }
    }

    /// The log-likelihood that the launches wrote; an error where the risks are too far apart for
    /// the sums.
    pub(crate) fn loglik(&self) -> Result<f64> {
        if self.n == 0 {
            return Ok(0.0);
        }
        let loglik: f64 = bytemuck::pod_read_unaligned(&self.device.read(&self.loglik)?[..8]);
        if loglik.is_finite() {
            return Ok(loglik);
        }
        let reason = "the risks are not finite, or differ by more than 700".into();
        Err(Error::Statistic { statistic: "the Cox partial likelihood", reason })
    }
}

/// Blocks, and places of each: whole tiles.
fn grid(n: usize) -> (usize, usize) {
    let span = n.div_ceil(MOST_BLOCKS).next_multiple_of(TILE).max(TILE);
    (n.div_ceil(span).max(1), span)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_cover_all_places_and_stay_few() {
        for n in [0, 1, 1023, 1024, 1025, 1_000_000, 100_000_000] {
            let (blocks, span) = grid(n);
            assert!(blocks * span >= n && blocks <= MOST_BLOCKS && span % TILE == 0, "{n}: {blocks} of {span}");
            assert!(blocks == 1 || (blocks - 1) * span < n);
        }
    }
}
