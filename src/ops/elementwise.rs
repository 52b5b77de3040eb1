//! Sums of tensors and dropout's backward.

use super::{Dropout, for_rows};
use crate::{
    Result,
    device::{Device, Real, View},
};

/// out = the sum of the terms, all `[m, n]`; out may be one of them.
pub fn sum<T: Real>(device: &Device, terms: &[View<T>], out: View<T>) -> Result<()> {
    for term in terms {
        term.check("sum", "term", &[out.rows(), out.cols()])?;
    }
    if let Device::Cpu(cpu) = device {
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
    Ok(())
}

/// out = x times dropout's factors, both `[m, n]`.
pub fn dropout<T: Real>(device: &Device, x: View<T>, dropout: Dropout, out: View<T>) -> Result<()> {
    x.check("dropout", "x", &[out.rows(), out.cols()])?;
    if let Device::Cpu(cpu) = device {
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
    Ok(())
}

/// Fills with zeros.
pub fn zero<T: Real>(device: &Device, out: View<T>) {
    if let Device::Cpu(cpu) = device {
        // SAFETY: the view is live, and each row is one task's.
        for_rows(
            cpu,
            out.rows(),
            #[inline(always)]
            |i| unsafe { out.row_mut(i) }.fill(T::ZERO),
        );
    }
}
