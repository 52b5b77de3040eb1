//! Attention: the three self-attentions with and without dropout, and the two cross-attentions.

use super::{ARENA, D, DRAW, Maker};
use crate::{
    Result,
    device::{Arena, Element},
    ops::{
        Dropout,
        attention::{self, Attention, AttentionGrad, MOST_DS, kernel::Kernels},
    },
};

const HEADS: usize = 4;

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let ([m5, m10, m20], n) = (make.slide.bags, make.tokens());
    grouped::<T>(make, &format!("3 x {n} x {n}"), &[(n, n); 3], 0.0)?;
    grouped::<T>(make, &format!("3 x {n} x {n}, dropout 0.2"), &[(n, n); 3], 0.2)?;
    grouped::<T>(make, &format!("{m10} x {m5} and {m20}"), &[(m10, m5), (m10, m20)], 0.0)
}

/// Each of `sizes`, queries and keys, in one launch.
fn grouped<T: Element>(make: &mut Maker, shape: &str, sizes: &[(usize, usize)], rate: f64) -> Result<()> {
    let (mut forward, mut backward) = (Vec::new(), Vec::new());
    let (mut flop, mut rows) = (0.0, 0);
    for (site, &(n, m)) in sizes.iter().enumerate() {
        let (q, kv) = (make.matrix::<T>(n, D)?, make.matrix::<T>(m, 2 * D)?);
        let (out, lse) = (make.matrix(n, D)?, make.matrix(HEADS, n)?);
        let dropout = Dropout::new(Some(DRAW), (site * HEADS) as u32, rate);
        let (k, v) = (kv.cols_range(0..D), kv.cols_range(D..2 * D));
        let problem = Attention { q, k, v, out, lse, heads: HEADS, dropout };
        let (dout, dq, dkv) = (make.matrix(n, D)?, make.matrix(n, D)?, make.matrix::<T>(m, 2 * D)?);
        let (dk, dv) = (dkv.cols_range(0..D), dkv.cols_range(D..2 * D));
        forward.push(problem);
        backward.push(AttentionGrad { forward: problem, dout, dq, dk, dv });
        flop += 4.0 * (n * m * D) as f64;
        rows += 2 * n + 2 * m;
    }
    // backward needs what forward wrote
    let (first, by_mma) = (forward.clone(), forward.clone());
    let bytes = (size_of::<T>() * rows * D) as f64;
    make.case::<T>("attention forward", shape, flop, bytes, move |device, arena| {
        attention::forward(device, arena, &forward)
    });
    if make.hopper::<T>() {
        make.case::<T>("attention forward mma", shape, flop, bytes, move |device, arena| {
            attention::forward_by(device, arena, &by_mma, Kernels::Mma)
        });
    }
    attention::forward(make.device, &mut Arena::new(make.device, ARENA)?, &first)?;
    let (again, by_mma) = (backward.clone(), backward.clone());
    make.case::<T>("attention backward", shape, 2.5 * flop, 2.0 * bytes, move |device, arena| {
        attention::backward(device, arena, &backward)
    });
    if make.hopper::<T>() {
        make.case::<T>("attention backward mma", shape, 2.5 * flop, 2.0 * bytes, move |device, arena| {
            attention::backward_by(device, arena, &by_mma, MOST_DS, Kernels::Mma)
        });
    }
    if make.device.runs_kernels() {
        make.case::<T>("attention backward, seven products", shape, 2.5 * flop, 2.0 * bytes, move |device, arena| {
            attention::backward_by(device, arena, &again, 0, Kernels::Wgmma)
        });
    }
    Ok(())
}
