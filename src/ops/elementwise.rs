//! Sums of tensors and dropout's backward.

use super::{Dropout, for_rows};
use crate::{
    Result,
    device::{Cpu, Device, Element, Real, View, on_cpu},
};

/// out = the sum of the terms, all `[m, n]`; out may be one of them.
pub fn sum<T: Element>(device: &Device, terms: &[View<T>], out: View<T>) -> Result<()> {
    for term in terms {
        term.check("sum", "term", &[out.rows(), out.cols()])?;
    }
    if let Some(cpu) = device.cpu() {
        cpu_sum::<T::Sum>(cpu, &on_cpu(terms)?, on_cpu(&[out])?[0]);
    }
    Ok(())
}

/// sums += x, both `[m, n]`: activations into a parameter's gradient.
pub fn accumulate<T: Element>(device: &Device, x: View<T>, sums: View<T::Sum>) -> Result<()> {
    x.check("accumulate", "x", &[sums.rows(), sums.cols()])?;
    if let Some(cpu) = device.cpu() {
        cpu_sum(cpu, &[sums, on_cpu(&[x])?[0]], sums);
    }
    Ok(())
}

fn cpu_sum<T: Real>(cpu: &Cpu, terms: &[View<T>], out: View<T>) {
    for_rows(
        cpu,
        out.rows(),
        #[inline(always)]
        |i| {
            let mut block = [T::ZERO; 128];
            for start in (0..out.cols()).step_by(128) {
                let cols = start..out.cols().min(start + 128);
                let block = &mut block[..cols.len()];
                block.fill(T::ZERO);
                for term in terms {
                    // SAFETY: the views are live, and each row is one task's.
                    for (sum, &x) in block.iter_mut().zip(&unsafe { term.row(i) }[cols.clone()]) {
                        *sum += x;
                    }
                }
                let out = unsafe { &mut out.row_mut(i)[cols] };
                out.copy_from_slice(block);
            }
        },
    );
}

/// out = x times dropout's factors, both `[m, n]`.
pub fn dropout<T: Element>(device: &Device, x: View<T>, dropout: Dropout, out: View<T>) -> Result<()> {
    x.check("dropout", "x", &[out.rows(), out.cols()])?;
    if let Some(cpu) = device.cpu() {
        cpu_dropout::<T::Sum>(cpu, on_cpu(&[x])?[0], dropout, on_cpu(&[out])?[0]);
    }
    Ok(())
}

fn cpu_dropout<T: Real>(cpu: &Cpu, x: View<T>, dropout: Dropout, out: View<T>) {
    for_rows(
        cpu,
        out.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row is one task's.
            let out = unsafe { out.row_mut(i) };
            out.copy_from_slice(unsafe { x.row(i) });
            dropout.apply(i, out);
        },
    );
}

/// Fills with zeros.
pub fn zero<T: Element>(device: &Device, out: View<T>) -> Result<()> {
    if let Some(cpu) = device.cpu() {
        // SAFETY: the view is live, and each row is one task's.
        for_rows(
            cpu,
            out.rows(),
            #[inline(always)]
            |i| unsafe { out.row_mut(i) }.fill(T::default()),
        );
    }
    Ok(())
}
