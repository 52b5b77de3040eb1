//! Products: the grouped ones of a step forward and back, and the one with the heaviest epilogue.

use super::{D, DRAW, Maker, Operand, Product};
use crate::{
    Result,
    device::{Element, View},
    ops::{
        Dropout,
        matmul::{self, Epilogue, Matmul, WeightGrad, kernel::Kernels},
    },
};

/// The portable kernels, on a GPU that takes Hopper's by itself.
const MMA: Option<Kernels> = Some(Kernels::Mma);

pub(super) fn cases<T: Element>(make: &mut Maker) -> Result<()> {
    let ([m5, m10, m20], n) = (make.slide.bags, make.tokens());
    grouped::<T>(make, "input", &[m5, m20, m10], D, make.slide.features)?;
    grouped::<T>(make, "3 branches, kv", &[n; 3], 2 * D, D)?;
    grouped::<T>(make, "3 branches, out", &[n; 3], D, D)?;
    grouped::<T>(make, "3 branches, ffn 2", &[n; 3], D, 2 * D)?;
    feed_forward::<T>(make, n)
}

/// `[rows, inner]` times `[out, inner]` transposed, for each of `rows` in one launch.
fn grouped<T: Element>(make: &mut Maker, name: &str, rows: &[usize], out: usize, inner: usize) -> Result<()> {
    let (mut forward, mut backward, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    let mut plain = (Vec::new(), Vec::new(), Vec::new());
    for &m in rows {
        let (x, y, w) = (make.matrix(m, inner)?, make.matrix(m, out)?, make.matrix(out, inner)?);
        let [bias] = make.rows(out)?;
        let (dw, [db]) = (make.matrix(out, inner)?, make.rows(out)?);
        let epilogue = Epilogue { bias: Some(bias), ..Default::default() };
        let [plain_x, plain_y, plain_w]: [Operand; 3] = [x, y, w].map(|m: View<T>| Operand::plain(m.into()));
        plain.0.push(Product { a: plain_x, b: plain_w.transposed(), out: plain_y, depth: inner });
        plain.1.push(Product { a: plain_y, b: plain_w, out: plain_x, depth: out });
        forward.push(Matmul { a: x, b: w, out: y, epilogue });
        backward.push(Matmul::<T> { a: y, b: w, out: x, epilogue: Epilogue::default() });
        let plain_dw = Operand::plain(dw.into());
        plain.2.push(Product { a: plain_y.transposed(), b: plain_x, out: plain_dw, depth: m });
        weights.push(WeightGrad::<T> { dy: y, x, dw, db });
    }
    let total: usize = rows.iter().sum();
    let (flop, element) = (2.0 * (total * out * inner) as f64, size_of::<T>());
    let bytes = (element * (total * (out + inner) + rows.len() * out * inner)) as f64;
    let weight_bytes = bytes + (rows.len() * out * inner * (2 * size_of::<T::Sum>() - element)) as f64;
    let shape = format!("{name}: {total} x {out} x {inner}");
    let again = (forward.clone(), backward.clone(), weights.clone());
    let run = move |device: &_, _: &mut _| matmul::forward(device, &forward);
    make.case::<T>("matmul forward", &shape, flop, bytes, run).products = plain.0;
    let run = move |device: &_, _: &mut _| matmul::backward_input(device, &backward);
    make.case::<T>("matmul backward input", &shape, flop, bytes, run).products = plain.1;
    let run = move |device: &_, arena: &mut _| matmul::backward_weight(device, arena, &weights);
    make.case::<T>("matmul backward weight", &shape, flop, weight_bytes, run).products = plain.2;
    if make.hopper::<T>() {
        let (forward, backward, weights) = again;
        make.case::<T>("matmul forward mma", &shape, flop, bytes, move |device, _| {
            matmul::forward_by(device, &forward, MMA)
        });
        make.case::<T>("matmul backward input mma", &shape, flop, bytes, move |device, _| {
            matmul::backward_input_by(device, &backward, MMA)
        });
        make.case::<T>("matmul backward weight mma", &shape, flop, weight_bytes, move |device, arena| {
            matmul::backward_weight_by(device, arena, &weights, MMA)
        });
    }
    Ok(())
}

/// A feed-forward's first product: bias, GELU and dropout.
fn feed_forward<T: Element>(make: &mut Maker, n: usize) -> Result<()> {
    let (a, b, out) = (make.matrix::<T>(n, D)?, make.matrix(2 * D, D)?, make.matrix(n, 2 * D)?);
    let (pre, [bias]) = (make.matrix(n, 2 * D)?, make.rows(2 * D)?);
    let dropout = Dropout::new(Some(DRAW), 0, 0.3);
    let epilogue = Epilogue { bias: Some(bias), gelu: Some(pre), dropout, ..Default::default() };
    let problem = Matmul { a, b, out, epilogue };
    let shape = format!("ffn 1, bias + GELU + dropout: {n} x {} x {D}", 2 * D);
    let (flop, bytes) = (4.0 * (n * D * D) as f64, (size_of::<T>() * (5 * n * D + 2 * D * D)) as f64);
    make.case::<T>("matmul forward", &shape, flop, bytes, move |device, _| matmul::forward(device, &[problem]));
    if make.hopper::<T>() {
        make.case::<T>("matmul forward mma", &shape, flop, bytes, move |device, _| {
            matmul::forward_by(device, &[problem], MMA)
        });
    }
    Ok(())
}
