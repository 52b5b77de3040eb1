//! kernels/attention_*.cu: what their launches are for given shapes.

use bytemuck::{Pod, Zeroable};

use super::{Attention, AttentionGrad, Merge};
use crate::{
    device::{Arg, Device, Element, Launch, Matrix, Storage},
    ops::{
        MULTIPROCESSORS,
        constants::{
            attention::{OWN, PROBLEMS, THREADS},
            attention_backward_wgmma as backward_wgmma,
            attention_dq::QUERIES,
            attention_forward_wgmma as wgmma,
            product::STAGES,
        },
        dropout::KernelDropout,
    },
};

/// Rows of a streamed tile in backward: `kQueries` of attention_backward.cu.
const STREAMED: usize = 32;

/// Keys that a split takes at least: below, joining the splits costs more than they save.
const SPLIT_KEYS: usize = 1024;

/// `Attention` of attention_forward.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelAttention {
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub out: Matrix,
    pub lse: u64,
    /// Scratch of [`parts_len`] and [`part_lse_len`] f32 if there are several splits.
    pub parts: u64,
    pub part_lse: u64,
    pub dropout: KernelDropout,
    pub heads: i32,
    pub splits: i32,
    first_block: i32,
    padding: i32,
}

/// `AttentionGrad` of attention_backward.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelAttentionGrad {
    pub q: Matrix,
    pub k: Matrix,
    pub v: Matrix,
    pub out: Matrix,
    pub dout: Matrix,
    pub dq: Matrix,
    pub dk: Matrix,
    pub dv: Matrix,
    pub lse: u64,
    /// Scratch of `heads * n` f32.
    pub delta: u64,
    /// Scratch of [`ds_len`] elements, or 0 where dS finds no room.
    pub ds: u64,
    pub dropout: KernelDropout,
    pub heads: i32,
    first_block: i32,
}

/// `Merge` of attention_forward.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct KernelMerge {
    pub part: Matrix,
    pub out: Matrix,
    pub part_lse: u64,
    pub lse: u64,
    pub heads: i32,
    pub first: i32,
}

impl<T: Element> From<&Merge<T>> for KernelMerge {
    fn from(p: &Merge<T>) -> Self {
        Self {
            part: p.part.into(),
            out: p.out.into(),
            part_lse: p.part_lse.address(),
            lse: p.lse.address(),
            heads: p.lse.rows() as i32,
            first: i32::from(p.first),
        }
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct Table<P> {
    problem: [P; PROBLEMS],
    count: i32,
    padding: i32,
}

// SAFETY: all problems are Pod with a size that is a multiple of 8, so there is no padding that is
// not a field.
unsafe impl<P: Zeroable> Zeroable for Table<P> {}
// SAFETY: as above.
unsafe impl<P: Pod> Pod for Table<P> {}

impl<T: Element> From<&Attention<T>> for KernelAttention {
    /// Without splits and scratch.
    fn from(p: &Attention<T>) -> Self {
        Self {
            q: p.q.into(),
            k: p.k.into(),
            v: p.v.into(),
            out: p.out.into(),
            lse: p.lse.address(),
            parts: 0,
            part_lse: 0,
            dropout: p.dropout.into(),
            heads: p.heads as i32,
            splits: 1,
            first_block: 0,
            padding: 0,
        }
    }
}

impl<T: Element> From<&AttentionGrad<T>> for KernelAttentionGrad {
    /// Without scratch.
    fn from(p: &AttentionGrad<T>) -> Self {
        let forward = &p.forward;
        Self {
            q: forward.q.into(),
            k: forward.k.into(),
            v: forward.v.into(),
            out: forward.out.into(),
            dout: p.dout.into(),
            dq: p.dq.into(),
            dk: p.dk.into(),
            dv: p.dv.into(),
            lse: forward.lse.address(),
            delta: 0,
            ds: 0,
            dropout: forward.dropout.into(),
            heads: forward.heads as i32,
            first_block: 0,
        }
    }
}

/// The compiled head width that holds the heads, as an index into lists of kernels.
fn width(q: Matrix, heads: i32) -> usize {
    match q.cols / heads as u32 {
        0..=32 => 0,
        33..=64 => 1,
        _ => 2,
    }
}

const WIDTHS: [usize; 3] = [32, 64, 128];

/// Which kernels compute.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Kernels {
    /// attention_forward.cu, attention_backward.cu and attention_dq.cu, any GPU since Ampere.
    Mma,
    /// attention_forward_wgmma.cu and attention_backward_wgmma.cu, Hopper, bf16 alone. Wide heads.
    Wgmma,
}

impl Kernels {
    /// The wanted ones, if the device, the storage type and all the problems' heads (their queries
    /// and number) have them.
    pub(crate) fn of(
        device: &Device,
        storage: Storage,
        wanted: Self,
        mut problems: impl Iterator<Item = (Matrix, i32)>,
    ) -> Self {
        let wide = problems.all(|(q, heads)| width(q, heads) == 2);
        if wide && device.has_wgmma() && storage == Storage::Bf16 { wanted } else { Self::Mma }
    }

    /// Of forward: queries that a block owns, and blocks that a multiprocessor runs at a time.
    fn block(self) -> [usize; 2] {
        match self {
            Self::Mma => [OWN, 2],
            Self::Wgmma => [wgmma::QUERIES, 1],
        }
    }

    fn blocks(self, p: &KernelAttention) -> usize {
        p.heads as usize * (p.q.rows as usize).div_ceil(self.block()[0])
    }
}

/// In how many parts each problem's keys are attended to: the number, of few enough blocks, with
/// which a large GPU is done first, if the keys are long enough.
pub(crate) fn splits(kernels: Kernels, problems: &[KernelAttention]) -> Vec<usize> {
    let blocks: usize = problems.iter().map(|p| kernels.blocks(p)).sum();
    let at_a_time = MULTIPROCESSORS * kernels.block()[1];
    // waves of blocks, of 1 / splits of the work each; of equals the first
    let time = |splits: usize| (blocks * splits).div_ceil(at_a_time) as f64 / splits as f64;
    let all = 1..=(2 * at_a_time / blocks.max(1)).max(1);
    let best = all.min_by(|&a, &b| time(a).total_cmp(&time(b))).unwrap_or(1);
    let of = |p: &KernelAttention| best.min((p.k.rows as usize).div_ceil(SPLIT_KEYS).max(1));
    problems.iter().map(of).collect()
}

/// f32 elements of a problem's partial outputs, and of their log-sum-exps.
pub(crate) fn parts_len(splits: usize, n: usize, d: usize) -> usize {
    if splits > 1 { splits * n * d } else { 0 }
}

pub(crate) fn part_lse_len(splits: usize, n: usize, heads: usize) -> usize {
    if splits > 1 { splits * n * heads } else { 0 }
}

/// A table of up to [`PROBLEMS`] problems with their blocks counted.
fn table<P: Pod>(
    problems: &[P],
    blocks_of: impl Fn(&P) -> usize,
    first_block: impl Fn(&mut P, i32),
) -> (Table<P>, usize) {
    let mut table = Table { problem: [P::zeroed(); PROBLEMS], count: problems.len() as i32, padding: 0 };
    let mut blocks = 0;
    for (place, p) in table.problem.iter_mut().zip(problems) {
        *place = *p;
        first_block(place, blocks as i32);
        blocks += blocks_of(p);
    }
    (table, blocks)
}

fn launch<P: Pod>(
    kernel: &'static str,
    storage: Storage,
    grid: [usize; 2],
    shared_bytes: usize,
    table: Table<P>,
) -> Option<Launch> {
    (grid[0] * grid[1] > 0).then(|| Launch {
        kernel,
        storage,
        grid: [grid[0] as u32, grid[1] as u32, 1],
        block: [THREADS as u32, 1, 1],
        shared_bytes: shared_bytes as u32,
        args: vec![Arg::new(table)],
    })
}

/// All problems of a call have heads of one width.
pub(crate) fn forward_launches(kernels: Kernels, storage: Storage, problems: &[KernelAttention]) -> Vec<Launch> {
    let mut launches = Vec::new();
    for problems in problems.chunks(PROBLEMS) {
        let blocks = |p: &KernelAttention| p.splits as usize * kernels.blocks(p);
        let (table, blocks) = table(problems, blocks, |p, first| p.first_block = first);
        launches.extend(match kernels {
            Kernels::Mma => {
                let width = problems.iter().map(|p| width(p.q, p.heads)).max().unwrap_or(0);
                let kernel = ["attention_forward_32", "attention_forward_64", "attention_forward_128"][width];
                let keys = if storage == Storage::Bf16 { 64 } else { 32 };
                let shared = (OWN + 4 * keys) * WIDTHS[width] * storage.bytes();
                launch(kernel, storage, [blocks, 1], shared, table)
            }
            Kernels::Wgmma => {
                // queries, two stages of keys and of values, 128 rows each
                let shared = 5 * 128 * 128 * storage.bytes();
                let launch = launch("attention_forward_wgmma_128", storage, [blocks, 1], shared, table);
                launch.map(|launch| Launch { block: [256, 1, 1], ..launch })
            }
        });
        let rows = problems.iter().filter(|p| p.splits > 1).map(|p| p.q.rows as usize).max().unwrap_or(0);
        launches.extend(launch(
            "attention_join_splits",
            storage,
            [rows.div_ceil(THREADS / 32), problems.len()],
            0,
            table,
        ));
    }
    launches
}

pub(crate) fn merge_launches(storage: Storage, problems: &[KernelMerge]) -> Vec<Launch> {
    let launches = problems.chunks(PROBLEMS).map(|problems| {
        let rows = problems.iter().map(|p| p.part.rows as usize).max().unwrap_or(0);
        let (table, _) = table(problems, |_| 0, |_, _| {});
        launch("attention_merge_parts", storage, [rows.div_ceil(THREADS / 32), problems.len()], 0, table)
    });
    launches.flatten().collect()
}

/// By seven products, without scratch for dS.
pub(crate) fn backward_launches_without_ds(
    kernels: Kernels,
    storage: Storage,
    problems: &[KernelAttentionGrad],
) -> Vec<Launch> {
    let mut launches = Vec::new();
    for problems in problems.chunks(PROBLEMS) {
        let width = widest(problems);
        // the queries' kernel first: it finds delta for both
        let kernel = ["attention_dq_32", "attention_dq_64", "attention_dq_128"][width];
        let (queries, blocks) = by_queries(problems, OWN);
        launches.extend(launch(kernel, storage, [blocks, 1], tiles_bytes(storage, width), queries));
        launches.extend(launch_by_keys(kernels, storage, problems, width));
    }
    launches
}

/// A table whose blocks own so many queries of a head.
fn by_queries(problems: &[KernelAttentionGrad], own: usize) -> (Table<KernelAttentionGrad>, usize) {
    let blocks = |p: &KernelAttentionGrad| p.heads as usize * (p.q.rows as usize).div_ceil(own);
    table(problems, blocks, |p, first| p.first_block = first)
}

/// By five products: every problem has scratch for dS, `ds`.
pub(crate) fn backward_launches(kernels: Kernels, storage: Storage, problems: &[KernelAttentionGrad]) -> Vec<Launch> {
    let mut launches = Vec::new();
    for problems in problems.chunks(PROBLEMS) {
        let width = widest(problems);
        let (by_rows, _) = table(problems, |_| 0, |_, _| {});
        let rows = problems.iter().map(|p| p.q.rows as usize).max().unwrap_or(0);
        let grid = [rows.div_ceil(THREADS / 32), problems.len()];
        launches.extend(launch("attention_delta", storage, grid, 0, by_rows));
        launches.extend(launch_by_keys(kernels, storage, problems, width));
        let (kernel, columns) = match (kernels, width) {
            (Kernels::Wgmma, _) => ("attention_dq_product_wgmma_128", 128),
            (Kernels::Mma, 2) => ("attention_dq_product_128", 128),
            (Kernels::Mma, _) => ("attention_dq_product_64", 64),
        };
        // a stage is 128 bytes of the keys for each query and each column
        let shared = STAGES * (QUERIES + columns) * 128;
        let (queries, blocks) = by_queries(problems, QUERIES);
        let launch = launch(kernel, storage, [blocks, 1], shared, queries);
        launches.extend(launch.map(|launch| Launch { block: [2 * columns as u32, 1, 1], ..launch }));
    }
    launches
}

/// Elements of dS^T of so many heads of a problem: rows of whole 16-byte chunks.
pub(crate) fn ds_len(storage: Storage, heads: usize, n: usize, m: usize) -> usize {
    heads * m * n.next_multiple_of(16 / storage.bytes())
}

fn widest(problems: &[KernelAttentionGrad]) -> usize {
    problems.iter().map(|p| width(p.q, p.heads)).max().unwrap_or(0)
}

/// Stages of backward's streams.
fn stages(storage: Storage, width: usize) -> usize {
    if storage == Storage::Bf16 || width < 2 { 2 } else { 1 }
}

/// Of backward's tiles: a block's own rows of two matrices, and streamed rows of two.
fn tiles_bytes(storage: Storage, width: usize) -> usize {
    (2 * OWN + 2 * stages(storage, width) * STREAMED) * WIDTHS[width] * storage.bytes()
}

/// The kernel whose blocks own keys.
fn launch_by_keys(
    kernels: Kernels,
    storage: Storage,
    problems: &[KernelAttentionGrad],
    width: usize,
) -> Option<Launch> {
    let own = if kernels == Kernels::Wgmma { backward_wgmma::OWN_KEYS } else { OWN };
    let by_keys = |p: &KernelAttentionGrad| p.heads as usize * (p.k.rows as usize).div_ceil(own);
    let (keys, blocks) = table(problems, by_keys, |p, first| p.first_block = first);
    if kernels == Kernels::Wgmma {
        // own rows of two matrices; two stages of streamed rows of two, with lse, delta and dropout's bits
        use backward_wgmma::{BLOCK, D, OWN_KEYS, QUERIES};
        let shared = 2 * (OWN_KEYS + 2 * QUERIES) * D * storage.bytes() + 2 * 4 * (2 * QUERIES + BLOCK);
        let launch = launch("attention_dkv_wgmma_128", storage, [blocks, 1], shared, keys);
        return launch.map(|launch| Launch { block: [BLOCK as u32, 1, 1], ..launch });
    }
    // lse and delta of the streamed rows, and two stages of dropout's bits
    let others = (2 * stages(storage, width) * STREAMED * 4).next_multiple_of(128) + 2 * 2 * 4 * (STREAMED + 8) * 4;
    let kernel = ["attention_dkv_32", "attention_dkv_64", "attention_dkv_128"][width];
    launch(kernel, storage, [blocks, 1], tiles_bytes(storage, width) + others, keys)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::{Dry, Facts};

    fn problem(n: usize, m: usize) -> KernelAttention {
        KernelAttention {
            q: Matrix::new(0, n, 512),
            k: Matrix::new(0, m, 512),
            heads: 4,
            splits: 1,
            ..Zeroable::zeroed()
        }
    }

    #[test]
    fn few_queries_split_long_contexts() {
        assert_eq!(splits(Kernels::Mma, &[problem(3025, 3025); 3]), [1, 1, 1]);
        assert_eq!(splits(Kernels::Mma, &[problem(200, 800), problem(200, 250_000)]), [1, 8]);
        assert_eq!(splits(Kernels::Mma, &[problem(1, 3026)]), [3]);
        // 192 blocks: two halves each are no sooner done than the wholes
        assert_eq!(splits(Kernels::Mma, &[problem(3025, 3025)]), [1]);
        assert_eq!(parts_len(3, 5, 512), 3 * 5 * 512);
    }

    #[test]
    fn blocks_are_those_of_all_problems_and_heads() {
        let launches = forward_launches(Kernels::Mma, Storage::Bf16, &[problem(3000, 800), problem(65, 12000)]);
        assert_eq!(launches.len(), 1);
        assert_eq!((launches[0].kernel, launches[0].grid), ("attention_forward_128", [4 * (47 + 2), 1, 1]));
        assert_eq!(launches[0].shared_bytes, 80 << 10);
        let split =
            forward_launches(Kernels::Mma, Storage::F32, &[KernelAttention { splits: 3, ..problem(65, 12000) }]);
        assert_eq!(
            split.iter().map(|l| (l.kernel, l.grid[0])).collect::<Vec<_>>(),
            [("attention_forward_128", 24), ("attention_join_splits", 17)]
        );
        assert!(forward_launches(Kernels::Mma, Storage::F32, &[problem(0, 10)]).is_empty());
    }

    #[test]
    fn hopper_s_blocks_own_128_queries_of_wide_heads() {
        let problems = [problem(3000, 800), problem(65, 12000)];
        let facts = |has_wgmma| Facts { runs_kernels: true, has_wgmma };
        let [hopper, ampere] = [true, false].map(|has_wgmma| Device::Dry(Dry::new(facts(has_wgmma))));
        let of = |device, storage, wanted, problems: &[KernelAttention]| {
            Kernels::of(device, storage, wanted, problems.iter().map(|p| (p.q, p.heads)))
        };
        let wanted = Kernels::Wgmma;
        assert_eq!(of(&hopper, Storage::Bf16, wanted, &problems), Kernels::Wgmma);
        assert_eq!(of(&ampere, Storage::Bf16, wanted, &problems), Kernels::Mma);
        assert_eq!(of(&hopper, Storage::F32, wanted, &problems), Kernels::Mma);
        assert_eq!(of(&hopper, Storage::Bf16, Kernels::Mma, &problems), Kernels::Mma);
        let narrow = KernelAttention { heads: 8, ..problem(3000, 800) };
        assert_eq!(of(&hopper, Storage::Bf16, wanted, &[problems[0], narrow]), Kernels::Mma);
        let launches = forward_launches(Kernels::Wgmma, Storage::Bf16, &problems);
        assert_eq!(launches.len(), 1);
        assert_eq!((launches[0].kernel, launches[0].grid), ("attention_forward_wgmma_128", [4 * (24 + 1), 1, 1]));
        assert_eq!((launches[0].block[0], launches[0].shared_bytes), (256, 160 << 10));
        // 288 blocks on 132 multiprocessors: three waves of wholes, five of halves
        assert_eq!(splits(Kernels::Wgmma, &[problem(3025, 3025); 3]), [1, 1, 1]);
        assert_eq!(splits(Kernels::Wgmma, &[problem(200, 250_000)]), [33]);
        let grads = [(3000, 800), (65, 12000)].map(|(n, m)| KernelAttentionGrad {
            q: Matrix::new(0, n, 512),
            k: Matrix::new(0, m, 512),
            heads: 4,
            ..Zeroable::zeroed()
        });
        let launches = backward_launches(Kernels::Wgmma, Storage::Bf16, &grads);
        let of = |l: &Launch| (l.kernel, l.grid[0], l.block[0], l.shared_bytes);
        assert_eq!(
            launches.iter().map(of).collect::<Vec<_>>(),
            [
                ("attention_delta", 750, 128, 0),
                ("attention_dkv_wgmma_128", 4 * (7 + 94), 256, 131 << 10),
                ("attention_dq_product_wgmma_128", 4 * (24 + 1), 256, 96 << 10),
            ]
        );
    }

    #[test]
    fn every_block_fits_the_shared_memory_of_any_gpu_since_ampere() {
        let grad = |d: usize| KernelAttentionGrad {
            q: Matrix::new(0, 100, d),
            k: Matrix::new(0, 100, d),
            heads: 1,
            ..Zeroable::zeroed()
        };
        for storage in [Storage::F32, Storage::Bf16] {
            for d in [32, 64, 128] {
                let forward = KernelAttention { q: Matrix::new(0, 100, d), heads: 1, ..problem(1, 1) };
                let backward =
                    [backward_launches, backward_launches_without_ds].map(|of| of(Kernels::Mma, storage, &[grad(d)]));
                let launches = [forward_launches(Kernels::Mma, storage, &[forward]), backward.concat()].concat();
                assert!(launches.iter().all(|l| l.shared_bytes <= 99 << 10), "{launches:?}");
            }
        }
    }
}
