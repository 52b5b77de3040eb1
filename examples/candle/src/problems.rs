//! Tensors of candle's as the library's lists of problems: one for each entry of the batch, by
//! addresses in the memory of any device.

use candle_core::{Layout, Result, bail};
use crossfusion::{
    device::{Device, Element, Mat, MatMut, Workspace},
    ops::{Attention, AttentionBackward, Dropout, attention, attention_backward},
};

use crate::Call;

/// The sizes of a call.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub batch: usize,
    pub queries: usize,
    pub keys: usize,
    pub heads: usize,
    /// Columns of all heads together.
    pub cols: usize,
}

impl Sizes {
    /// Of q, k and v; an error unless they fit together.
    pub(crate) fn of([q, k, v]: [&Layout; 3]) -> Result<Self> {
        let &[batch, queries, heads, head_dim] = q.dims() else {
            bail!("attention: q has shape {:?}, expected (batch, length, heads, head_dim)", q.dims());
        };
        let keys = match *k.dims() {
            [b, keys, h, d] if [b, h, d] == [batch, heads, head_dim] => keys,
            _ => bail!(
                "attention: k has shape {:?}, expected ({batch}, any length, {heads}, {head_dim}) as of q",
                k.dims()
            ),
        };
        if v.dims() != k.dims() {
            bail!("attention: v has shape {:?}, expected {:?} as of k", v.dims(), k.dims());
        }
        Ok(Self { batch, queries, keys, heads, cols: heads * head_dim })
    }

    /// An error if the heads' dropouts would leave the sites that there are.
    pub(crate) fn check_sites(&self, dropout: Dropout) -> Result<()> {
        let heads = self.batch * self.heads;
        if heads > (u32::MAX - dropout.site) as usize {
            bail!("attention: dropout at site {}: no room for the sites of {heads} heads", dropout.site);
        }
        Ok(())
    }

    /// Elements of q, of out and of their gradients.
    pub(crate) fn q_len(&self) -> usize {
        self.batch * self.queries * self.cols
    }

    /// Elements of k, of v and of their gradients.
    pub(crate) fn k_len(&self) -> usize {
        self.batch * self.keys * self.cols
    }

    /// Of the log-sum-exp.
    pub(crate) fn lse_dims(&self) -> (usize, usize, usize) {
        (self.batch, self.heads, self.queries)
    }

    pub(crate) fn lse_len(&self) -> usize {
        self.batch * self.heads * self.queries
    }
}

/// A tensor to read: a matrix for each entry of the batch, whose rows are tokens.
#[derive(Clone, Copy)]
pub(crate) struct Batch<T> {
    first: *const T,
    rows: usize,
    cols: usize,
    /// Elements from one row to the next.
    stride: usize,
    /// Elements from one entry to the next.
    apart: usize,
}

impl<T: Element> Batch<T> {
    /// The tensor of this layout in a storage that begins at this address; an error if its rows
    /// have gaps.
    pub(crate) fn new(storage: *const T, layout: &Layout) -> Result<Self> {
        let (&[_, rows, heads, head_dim], &[apart, stride, ..]) = (layout.dims(), layout.stride()) else {
            bail!("attention: a tensor of shape {:?}", layout.dims());
        };
        if !Batch::reads(layout) {
            bail!("attention: a tensor of shape {:?} and strides {:?}", layout.dims(), layout.stride());
        }
        let cols = heads * head_dim;
        let first = storage.wrapping_add(layout.start_offset());
        Ok(Self { first, rows, cols, stride: if rows > 1 { stride } else { cols }, apart })
    }

    /// # Safety
    /// As of [`Mat::from_raw`].
    unsafe fn entry<'d>(&self, device: &'d Device, i: usize) -> crossfusion::Result<Mat<'d, T>> {
        // SAFETY: the caller's.
        unsafe { Mat::from_raw(device, self.first.wrapping_add(i * self.apart), self.rows, self.cols, self.stride) }
    }
}

impl Batch<()> {
    /// Whether all heads of a token lie side by side, and tokens do not overlap. The strides of
    /// dimensions of one element say nothing.
    pub(crate) fn reads(layout: &Layout) -> bool {
        let (&[_, rows, heads, head_dim], &[_, row, head, column]) = (layout.dims(), layout.stride()) else {
            return false;
        };
        (head_dim <= 1 || column == 1) && (heads <= 1 || head == head_dim) && (rows <= 1 || row >= heads * head_dim)
    }
}

/// Entry i of a batch of contiguous matrices that begin at this address, to write.
///
/// # Safety
/// As of [`MatMut::from_raw`].
unsafe fn written<T: Element>(
    device: &Device,
    first: *mut T,
    i: usize,
    rows: usize,
    cols: usize,
) -> crossfusion::Result<MatMut<'_, T>> {
    // SAFETY: the caller's.
    unsafe { MatMut::from_raw(device, first.wrapping_add(i * rows * cols), rows, cols, cols) }
}

/// out and lse of q, k and v.
///
/// # Safety
/// The inputs are alive in the device's memory and of these sizes, out and lse have room for theirs
/// and are nobody else's.
pub(crate) unsafe fn forward<T: Element>(
    call: &Call,
    sizes: Sizes,
    [q, k, v]: [Batch<T>; 3],
    out: *mut T,
    lse: *mut T::Sum,
) -> crossfusion::Result<()> {
    let device = &call.on.device;
    let Sizes { batch, queries, heads, cols, .. } = sizes;
    let problem = |i| {
        // SAFETY: the caller's; entries do not overlap.
        unsafe {
            Ok(Attention {
                q: q.entry(device, i)?,
                k: k.entry(device, i)?,
                v: v.entry(device, i)?,
                heads,
                dropout: dropout(call, sizes, i),
                out: written(device, out, i, queries, cols)?,
                lse: written(device, lse, i, heads, queries)?,
            })
        }
    };
    let mut problems = (0..batch).map(problem).collect::<crossfusion::Result<Vec<_>>>()?;
    attention(&mut workspace(call)?, &mut problems)
}

/// dq, dk and dv of q, k, v, out and its gradient.
///
/// # Safety
/// As of [`forward`], with lse one of the inputs.
pub(crate) unsafe fn backward<T: Element>(
    call: &Call,
    sizes: Sizes,
    [q, k, v, out, dout]: [Batch<T>; 5],
    lse: *const T::Sum,
    [dq, dk, dv]: [*mut T; 3],
) -> crossfusion::Result<()> {
    let device = &call.on.device;
    let Sizes { batch, queries, keys, heads, cols } = sizes;
    let problem = |i| {
        // SAFETY: the caller's; entries do not overlap.
        unsafe {
            Ok(AttentionBackward {
                q: q.entry(device, i)?,
                k: k.entry(device, i)?,
                v: v.entry(device, i)?,
                heads,
                dropout: dropout(call, sizes, i),
                out: out.entry(device, i)?,
                lse: Mat::from_raw(device, lse.wrapping_add(i * heads * queries), heads, queries, queries)?,
                dout: dout.entry(device, i)?,
                dq: written(device, dq, i, queries, cols)?,
                dk: written(device, dk, i, keys, cols)?,
                dv: written(device, dv, i, keys, cols)?,
            })
        }
    };
    let mut problems = (0..batch).map(problem).collect::<crossfusion::Result<Vec<_>>>()?;
    attention_backward(&mut workspace(call)?, &mut problems)
}

/// Of entry i: each of its heads draws at a site of its own.
fn dropout(call: &Call, sizes: Sizes, i: usize) -> Option<Dropout> {
    call.dropout.map(|dropout| dropout.at((i * sizes.heads) as u32))
}

/// A program of one thread would keep one. Candle's default stream is another in every thread, and
/// scratch that two streams share would be written by both at a time; this one is freed in the
/// order of its stream's work.
fn workspace(call: &Call) -> crossfusion::Result<Workspace> {
    Workspace::new(&call.on.device)
}
