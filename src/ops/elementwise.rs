//! Sums of tensors, dropout and GELU on their own.

use bytemuck::{Pod, Zeroable};

use super::{
    Dropout,
    dropout::{BLOCK, KernelDropout},
    for_rows, gelu,
};
use crate::{
    Error, Result,
    device::{Arg, Cpu, Device, Element, Launch, Matrix, Real, Storage, View, round as store, storage, widen},
};

/// out = the sum of the terms, all `[m, n]`; out may be one of them.
pub(crate) fn sum<T: Element>(device: &Device, terms: &[View<T>], out: View<T>) -> Result<()> {
    for term in terms {
        term.check("sum", "term", &[out.rows(), out.cols()])?;
    }
    device.run(
        |cpu| cpu_sum(cpu, terms, out),
        || {
            terms.iter().chain([&out]).try_for_each(|&x| check_for_kernels("sum", x))?;
            if terms.len() > TERMS {
                return Err(Error::Usage(format!("sum: {} terms, a kernel takes at most {TERMS}", terms.len())));
            }
            let mut term = [Matrix::zeroed(); TERMS];
            term.iter_mut().zip(terms).for_each(|(place, &x)| *place = x.into());
            let sum = KernelSum { term, out: out.into(), terms: terms.len() as i32, padding: 0 };
            Ok(launch("elementwise_sum", storage::<T>()?, &[out.into()], vec![Arg::new(sum)]))
        },
    )
}

/// sums += x, both `[m, n]`: activations into a parameter's gradient.
pub(crate) fn accumulate<T: Element>(device: &Device, x: View<T>, sums: View<T::Sum>) -> Result<()> {
    x.check("accumulate", "x", &[sums.rows(), sums.cols()])?;
    device.run(
        |cpu| cpu_accumulate(cpu, x, sums),
        || {
            check_for_kernels("accumulate", x)?;
            check_for_kernels("accumulate", sums)?;
            let args = vec![Arg::new(Matrix::from(x)), Arg::new(Matrix::from(sums))];
            Ok(launch("elementwise_accumulate", storage::<T>()?, &[x.into()], args))
        },
    )
}

/// out = sums, rounded to the type of activations.
pub(crate) fn round<T: Element>(device: &Device, sums: View<T::Sum>, out: View<T>) -> Result<()> {
    sums.check("round", "sums", &[out.rows(), out.cols()])?;
    device.run(
        |cpu| cpu_sum(cpu, &[sums], out),
        || {
            check_for_kernels("round", sums)?;
            check_for_kernels("round", out)?;
            let args = vec![Arg::new(Matrix::from(sums)), Arg::new(Matrix::from(out))];
            Ok(launch("elementwise_round", storage::<T>()?, &[out.into()], args))
        },
    )
}

/// out = the sum of the terms, rounded once; out may be one of them.
pub(super) fn cpu_sum<T: Element, O: Element<Sum = T::Sum>>(cpu: &Cpu, terms: &[View<T>], out: View<O>) {
    for_rows(
        cpu,
        out.rows(),
        #[inline(always)]
        |i| {
            let mut block = [T::Sum::ZERO; BLOCK];
            for start in (0..out.cols()).step_by(BLOCK) {
                let cols = start..out.cols().min(start + BLOCK);
                let block = &mut block[..cols.len()];
                block.fill(T::Sum::ZERO);
                for term in terms {
                    // SAFETY: the views are live, and each row is one task's.
                    for (sum, &x) in block.iter_mut().zip(&unsafe { term.row(i) }[cols.clone()]) {
                        *sum += x.to_sum();
                    }
                }
                // SAFETY: as above: the row is this task's.
                store(block, unsafe { &mut out.row_mut(i)[cols] });
            }
        },
    );
}

fn cpu_accumulate<T: Element>(cpu: &Cpu, x: View<T>, sums: View<T::Sum>) {
    for_rows(
        cpu,
        sums.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row is one task's.
            let (x, sums) = unsafe { (x.row(i), sums.row_mut(i)) };
            for (sum, x) in sums.iter_mut().zip(x) {
                *sum += x.to_sum();
            }
        },
    );
}

/// out = dropout(x), or dropout(GELU(x)), both `[m, n]`: backward's dropout, and what backward
/// needs again of a product's epilogue.
#[derive(Clone, Copy)]
pub(crate) struct Map<T> {
    pub x: View<T>,
    pub gelu: bool,
    pub dropout: Option<Dropout>,
    pub out: View<T>,
}

pub(crate) fn map<T: Element>(device: &Device, problems: &[Map<T>]) -> Result<()> {
    for p in problems {
        p.x.check("gelu_dropout", "x", &[p.out.rows(), p.out.cols()])?;
    }
    device.run(
        |cpu| problems.iter().for_each(|p| cpu_map(cpu, p)),
        || {
            problems.iter().flat_map(|p| [p.x, p.out]).try_for_each(|x| check_for_kernels("gelu_dropout", x))?;
            let kernels: Vec<_> = problems.iter().map(KernelMap::from).collect();
            Ok(map_launches(storage::<T>()?, &kernels))
        },
    )
}

fn cpu_map<T: Element>(cpu: &Cpu, p: &Map<T>) {
    let &Map { x, gelu, dropout, out } = p;
    for_rows(
        cpu,
        out.rows(),
        #[inline(always)]
        |i| {
            // SAFETY: the views are live, and each row is one task's.
            let (x, out) = unsafe { (x.row(i), out.row_mut(i)) };
            let mut block = [T::Sum::ZERO; BLOCK];
            for (j, (x, out)) in x.chunks(BLOCK).zip(out.chunks_mut(BLOCK)).enumerate() {
                let block = &mut block[..x.len()];
                widen(x, block);
                if gelu {
                    block.iter_mut().for_each(|x| *x = gelu::value(*x));
                }
                if let Some(dropout) = dropout {
                    dropout.apply_block(i, j, block);
                }
                store(block, out);
            }
        },
    );
}

/// Fills sums with zeros.
pub(crate) fn zero<T: Real>(device: &Device, out: View<T>) -> Result<()> {
    let fill = |cpu: &Cpu| {
        for_rows(
            cpu,
            out.rows(),
            #[inline(always)]
            // SAFETY: the view is live, and each row is one task's.
            |i| unsafe { out.row_mut(i) }.fill(T::ZERO),
        );
    };
    device.run(fill, || {
        check_for_kernels("zero", out)?;
        let args = vec![Arg::new(Matrix::from(out))];
        Ok(launch("elementwise_zero", Storage::F32, &[out.into()], args))
    })
}

// ---- kernels/elementwise.cu: a thread for eight columns ----------------------------------------------------------

/// A thread takes eight columns.
fn check_for_kernels<T: Element>(op: &'static str, x: View<T>) -> Result<()> {
    if !x.cols().is_multiple_of(8) {
        return Err(Error::Usage(format!("{op}: {} columns: kernels take multiples of 8", x.cols())));
    }
    x.check_for_kernels(op, "a matrix")
}

use super::constants::elementwise::{PROBLEMS, TERMS, THREADS};

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelSum {
    term: [Matrix; TERMS],
    out: Matrix,
    terms: i32,
    padding: i32,
}

#[repr(C)]
#[derive(Clone, Copy, Pod, Zeroable)]
struct KernelMap {
    x: Matrix,
    out: Matrix,
    dropout: KernelDropout,
    gelu: i32,
    padding: i32,
}

impl<T: Element> From<&Map<T>> for KernelMap {
    fn from(p: &Map<T>) -> Self {
        Self { x: p.x.into(), out: p.out.into(), dropout: p.dropout.into(), gelu: i32::from(p.gelu), padding: 0 }
    }
}

fn map_launches(storage: Storage, problems: &[KernelMap]) -> Vec<Launch> {
    let launches = problems.chunks(PROBLEMS).map(|problems| {
        let mut table = [KernelMap::zeroed(); PROBLEMS];
        table[..problems.len()].copy_from_slice(problems);
        let outs: Vec<_> = problems.iter().map(|p| p.out).collect();
        launch("elementwise_map", storage, &outs, vec![Arg::new(table)])
    });
    launches.flatten().collect()
}

/// A kernel over all pieces of eight columns of each matrix; none where there is nothing to do.
fn launch(kernel: &'static str, storage: Storage, over: &[Matrix], args: Vec<Arg>) -> Option<Launch> {
    let threads = |m: &Matrix| m.rows as usize * (m.cols as usize).div_ceil(32) * 4;
    let blocks = over.iter().map(threads).max().unwrap_or(0).div_ceil(THREADS);
    (blocks > 0).then_some(Launch {
        kernel,
        storage,
        grid: [blocks as u32, over.len() as u32, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: 0,
        args,
    })
}
