//! Depthwise convolution of tokens on a grid, channels last: the CPU core of `ppeg` and
//! `conv_fusion`.
//!
//! A sum of convolutions with 7, 5, 3 (and 1) taps a side is one convolution whose kernel is the
//! sum of the small kernels, centred; each small kernel's gradient is the centre crop of the merged
//! kernel's.

use crate::{
    Error, Result,
    device::{Arg, Cpu, Element, Launch, Real, Storage, View, cpu::with_workspace},
};

/// The largest kernel's side.
const SIDE: usize = 7;
/// Channels that one task or inner loop takes.
const CHANNELS: usize = 32;

/// How tokens lie and how a kernel spans them: a `height x width` grid and a `tall x 7` kernel,
/// tall = 7 (or 1 for sequences).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Grid {
    pub height: usize,
    pub width: usize,
    tall: usize,
}

impl Grid {
    /// Tokens in row-major order on a square, kernels 7 x 7 and smaller.
    pub(crate) fn square(side: usize) -> Self {
        Self { height: side, width: side, tall: SIDE }
    }

    /// Tokens in a sequence, kernels of 7 taps and fewer.
    pub(crate) fn sequence(tokens: usize) -> Self {
        Self { height: 1, width: tokens, tall: 1 }
    }

    pub(crate) fn tokens(self) -> usize {
        self.height.saturating_mul(self.width)
    }

    /// An error where a side is so large that its square is no number of tokens.
    pub(crate) fn check(self, op: &'static str) -> Result<()> {
        if self.height.checked_mul(self.width).is_some() {
            return Ok(());
        }
        Err(Error::Usage(format!("{op}: a square grid of side {}: expected one of fewer tokens", self.width)))
    }

    /// Taps of the merged kernel.
    pub(crate) fn taps(self) -> usize {
        self.tall * SIDE
    }

    /// Taps of a small kernel of side `k`.
    pub(crate) fn taps_of(self, k: usize) -> usize {
        self.tall.min(k) * k
    }

    /// Where tap `t` of a kernel of side `k` lies in the merged kernel.
    fn merged_tap(self, k: usize, t: usize) -> usize {
        let tall = self.tall.min(k);
        ((self.tall - tall) / 2 + t / k) * SIDE + (SIDE - k) / 2 + t % k
    }

    /// The taps that see a token of the grid from token `t`, as (tap, token).
    #[inline(always)]
    fn neighbours(self, t: usize, mut visit: impl FnMut(usize, usize)) {
        let (row, col) = (t / self.width, t % self.width);
        let (up, left) = (self.tall / 2, SIDE / 2);
        for y in up.saturating_sub(row)..self.tall.min(self.height + up - row) {
            for x in left.saturating_sub(col)..SIDE.min(self.width + left - col) {
                visit(y * SIDE + x, (row + y - up) * self.width + col + x - left);
            }
        }
    }
}

/// merged `[taps, c]` = the sum of the small kernels, each given as (side, `[c, taps_of(side)]`),
/// plus the identity if asked.
pub(super) fn merge<T: Element>(grid: Grid, kernels: &[(usize, View<T>)], identity: bool, merged: View<T::Sum>) {
    // SAFETY: the views are live, and this is one thread.
    unsafe {
        for tap in 0..grid.taps() {
            let centre = identity && tap == grid.taps() / 2;
            merged.row_mut(tap).fill(if centre { T::Sum::ONE } else { T::Sum::ZERO });
        }
        for &(k, kernel) in kernels {
            for c in 0..kernel.rows() {
                for (t, &w) in kernel.row(c).iter().enumerate() {
                    merged.row_mut(grid.merged_tap(k, t))[c] += w.to_sum();
                }
            }
        }
    }
}

/// Each small kernel's gradient += the crop of the merged kernel's gradient `[taps, c]`.
pub(super) fn unmerge<T: Real>(grid: Grid, dmerged: View<T>, kernels: &[(usize, View<T>)]) {
    // SAFETY: as in `merge`.
    unsafe {
        for &(k, kernel) in kernels {
            for c in 0..kernel.rows() {
                for (t, dw) in kernel.row_mut(c).iter_mut().enumerate() {
                    *dw += dmerged.row(grid.merged_tap(k, t))[c];
                }
            }
        }
    }
}

/// The kernel that carries gradients back: taps in reverse order.
pub(super) fn flip<T: Real>(merged: View<T>, flipped: View<T>) {
    for tap in 0..merged.rows() {
        // SAFETY: as in `merge`.
        unsafe { flipped.row_mut(tap).copy_from_slice(merged.row(merged.rows() - 1 - tap)) };
    }
}

/// Gives `store` the convolution at token t of x `[tokens, c]` with the merged kernel `[taps, c]`, 32
/// channels at a time, with the first one's number.
///
/// # Safety
/// The views must be live.
#[inline(always)]
pub(super) unsafe fn convolve<T: Element>(
    grid: Grid,
    x: View<T>,
    kernel: View<T::Sum>,
    t: usize,
    mut store: impl FnMut(usize, &[T::Sum]),
) {
    for c in (0..x.cols()).step_by(CHANNELS) {
        let channels = c..x.cols().min(c + CHANNELS);
        let mut sum = [T::Sum::ZERO; CHANNELS];
        grid.neighbours(
            t,
            #[inline(always)]
            |tap, token| {
                // SAFETY: the views are live, and nobody writes them.
                let (w, x) = unsafe { (&kernel.row(tap)[channels.clone()], &x.row(token)[channels.clone()]) };
                if w.len() == CHANNELS {
                    for j in 0..CHANNELS {
                        sum[j] += w[j] * x[j].to_sum();
                    }
                } else {
                    for j in 0..w.len() {
                        sum[j] += w[j] * x[j].to_sum();
                    }
                }
            },
        );
        store(c, &sum[..channels.len()]);
    }
}

/// dkernel `[taps, c]` = the merged kernel's gradient from x and dy, both `[tokens, c]`.
pub(super) fn kernel_gradient<T: Element>(cpu: &Cpu, grid: Grid, x: View<T>, dy: View<T>, dkernel: View<T::Sum>) {
    let c = x.cols();
    let taps = grid.taps();
    cpu.parallel(
        c.div_ceil(CHANNELS),
        #[inline(always)]
        |task| {
            let channels = task * CHANNELS..c.min((task + 1) * CHANNELS);
            let cols = channels.len();
            // a block's sum and the total apart, so that long bags lose no precision
            with_workspace(
                2 * taps * CHANNELS,
                #[inline(always)]
                |sums: &mut [T::Sum]| {
                    let (total, block) = sums.split_at_mut(taps * CHANNELS);
                    total.fill(T::Sum::ZERO);
                    for start in (0..grid.tokens()).step_by(64) {
                        block.fill(T::Sum::ZERO);
                        for t in start..grid.tokens().min(start + 64) {
                            // SAFETY: the views are live, and each task writes its own channels.
                            let dy = &unsafe { dy.row(t) }[channels.clone()];
                            grid.neighbours(
                                t,
                                #[inline(always)]
                                |tap, token| {
                                    // SAFETY: the view is live, and nobody writes it.
                                    let x = &unsafe { x.row(token) }[channels.clone()];
                                    let sum = &mut block[tap * CHANNELS..(tap + 1) * CHANNELS];
                                    if cols == CHANNELS {
                                        for j in 0..CHANNELS {
                                            sum[j] += dy[j].to_sum() * x[j].to_sum();
                                        }
                                    } else {
                                        for j in 0..cols {
                                            sum[j] += dy[j].to_sum() * x[j].to_sum();
                                        }
                                    }
                                },
                            );
                        }
                        for (total, &block) in total.iter_mut().zip(block.iter()) {
                            *total += block;
                        }
                    }
                    for tap in 0..taps {
                        // SAFETY: the view is live, and these channels are one task's.
                        let to = unsafe { dkernel.cols_range(channels.clone()).row_mut(tap) };
                        to.copy_from_slice(&total[tap * CHANNELS..][..cols]);
                    }
                },
            );
        },
    );
}

// ---- kernels/depthwise.cuh: what a block takes -------------------------------------------------------------------

use super::constants::depthwise as kernel;

impl Grid {
    /// Whether kernels have one row; the other kernels are for squares.
    pub(super) fn is_sequence(self) -> bool {
        self.tall == 1
    }

    fn tile(self) -> (usize, usize) {
        if self.is_sequence() { (1, 128) } else { (16, 16) }
    }

    fn tiles(self) -> usize {
        let (rows, cols) = self.tile();
        self.height.div_ceil(rows) * self.width.div_ceil(cols)
    }

    fn parts(self) -> usize {
        self.tiles().min(kernel::MAX_PARTS)
    }

    /// Elements of the partial sums of backward, for c channels.
    pub(super) fn partial_len(self, c: usize) -> usize {
        self.parts() * (self.taps() + 1) * c
    }

    /// Backward's blocks for c channels.
    pub(super) fn backward_blocks(self, c: usize) -> usize {
        self.parts() * c.div_ceil(kernel::CHANNELS)
    }

    /// Shared memory of a block with `position` bytes for a token of the tile and its border.
    fn shared_bytes(self, position: usize, backward: bool) -> usize {
        let (rows, cols) = self.tile();
        let window = (rows + self.tall - 1) * (cols + SIDE - 1) * position;
        let sums = if backward { kernel::THREADS * (self.taps() + 1) * size_of::<f32>() } else { 0 };
        let merged = self.taps() * (kernel::CHANNELS + 1) * size_of::<f32>();
        window.max(sums).next_multiple_of(128) + merged
    }
}

/// The part of a launch that depends on shapes: `problems` are (grid, channels); a kernel's table
/// holds them in this order.
pub(super) struct KernelShape<'a> {
    pub problems: &'a [(Grid, usize)],
    pub storage: Storage,
    pub args: Arg,
}

impl KernelShape<'_> {
    fn launch(&self, kernel: &'static str, blocks: usize, shared_bytes: usize) -> Launch {
        Launch {
            kernel,
            storage: self.storage,
            grid: [blocks as u32, 1, 1],
            block: [kernel::THREADS as u32, 1, 1],
            shared_bytes: shared_bytes as u32,
            args: vec![self.args.clone()],
        }
    }

    fn tiled(&self, kernel: &'static str, backward: bool, position: usize, extra: usize) -> Launch {
        let most = |count: &dyn Fn(&(Grid, usize)) -> usize| self.problems.iter().map(count).max().unwrap_or(0);
        let blocks = most(&|(grid, _)| if backward { grid.parts() } else { grid.tiles() });
        let groups = most(&|&(_, c)| c.div_ceil(kernel::CHANNELS));
        let launch = self.launch(kernel, blocks, most(&|(grid, _)| grid.shared_bytes(position, backward)) + extra);
        Launch { grid: [blocks as u32, groups as u32, self.problems.len() as u32], ..launch }
    }

    /// A block a tile and 32 channels; `position`: bytes of a token in its shared memory.
    pub(super) fn forward(&self, kernel: &'static str, position: usize) -> Launch {
        self.tiled(kernel, false, position, 0)
    }

    /// A block a part and 32 channels; `extra`: bytes of shared memory beside the tile and the
    /// merged kernel.
    pub(super) fn backward(&self, kernel: &'static str, position: usize, extra: usize) -> Launch {
        self.tiled(kernel, true, position, extra)
    }

    /// A thread an element of the merged kernels' and biases' gradients, and `extra` blocks.
    pub(super) fn reduce(&self, kernel: &'static str, extra: usize) -> Launch {
        let elements = self.problems.iter().map(|(grid, c)| (grid.taps() + 1) * c).max().unwrap_or(0);
        let launch = self.launch(kernel, elements.div_ceil(kernel::THREADS) + extra, 0);
        Launch { grid: [launch.grid[0], 1, self.problems.len() as u32], ..launch }
    }
}
