//! kernels/attention_*.cu against src/ops/attention.rs.

use crossfusion::{
    Result,
    device::{Element, Storage, View},
    ops::{
        Draw, Dropout,
        attention::{self, Attention, AttentionGrad, Merge, kernel::Kernels},
    },
};

use half::bf16;

use super::{
    bed::{Bed, Case, check, check_races},
    common::Law,
};

/// Forward and backward of a group of problems, each n queries and m keys.
struct Attentions {
    heads: usize,
    head_dim: usize,
    rate: f64,
    sizes: Vec<[usize; 2]>,
    /// Moves q up and k down, and with them the scores.
    apart: f64,
    /// Bytes of scratch for dS, that backward has to do with; None: as many as it takes.
    most_ds: Option<usize>,
    /// By Hopper's kernels.
    wgmma: bool,
}

impl Case for Attentions {
    fn name(&self) -> String {
        let Self { heads, head_dim, rate, sizes, apart, most_ds, wgmma } = self;
        let how = [
            most_ds.map_or(String::new(), |most| format!(", dS of {most}")),
            if *wgmma { ", wgmma" } else { "" }.into(),
        ]
        .concat();
        format!("{heads} heads of {head_dim}, dropout {rate}, {sizes:?}, {apart} apart{how}")
    }

    fn storages(&self) -> &[Storage] {
        if self.wgmma { &[Storage::Bf16] } else { &[Storage::F32, Storage::Bf16] }
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let unit = Law { offset: 0.0, scale: 1.5 };
        let d = self.heads * self.head_dim;
        let (mut forward, mut backward) = (Vec::new(), Vec::new());
        for (i, &[n, m]) in self.sizes.iter().enumerate() {
            let of = |name: &str| format!("{name} {i}");
            let q = bed.input(&of("q"), n, d, Law { offset: self.apart, ..unit });
            // keys and values are the halves of one matrix
            let kv = bed.input(&of("kv"), m, 2 * d, Law { offset: -self.apart, ..unit });
            let (out, lse) = (bed.output(&of("out"), n, d), bed.sums(&of("lse"), self.heads, n));
            let draw = Some(Draw { seed: 5 << 33 | 1, step: 9 });
            let dropout = Dropout::new(draw, (3 + i * self.heads) as u32, self.rate);
            let (k, v) = (kv.cols_range(0..d), kv.cols_range(d..2 * d));
            let problem = Attention { q, k, v, out, lse, heads: self.heads, dropout };
            let dout = bed.input(&of("dout"), n, d, unit);
            let (dq, dkv) = (bed.output(&of("dq"), n, d), bed.output(&of("dkv"), m, 2 * d));
            let (dk, dv) = (dkv.cols_range(0..d), dkv.cols_range(d..2 * d));
            forward.push(problem);
            backward.push(AttentionGrad { forward: problem, dout, dq, dk, dv });
        }
        if bed.plainly {
            backward.iter().for_each(|p| plainly(bed, p));
            return Ok(());
        }
        let by = if self.wgmma { Kernels::Wgmma } else { Kernels::Mma };
        attention::forward_by(bed.device, &mut bed.arena, &forward, by)?;
        let most_ds = self.most_ds.unwrap_or(attention::MOST_DS);
        attention::backward_by(bed.device, &mut bed.arena, &backward, most_ds, by)
    }
}

/// Attention to a context in parts, an empty one first and one in between.
struct Parts {
    heads: usize,
    head_dim: usize,
    n: usize,
    keys: Vec<usize>,
}

impl Case for Parts {
    fn name(&self) -> String {
        format!("{} heads of {}, {} queries, parts of {:?} keys", self.heads, self.head_dim, self.n, self.keys)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let Self { heads, n, .. } = *self;
        let (unit, d) = (Law { offset: 0.0, scale: 1.5 }, heads * self.head_dim);
        let (mut parts, mut merges) = (Vec::new(), Vec::new());
        // two contexts of the same parts, the second one's the other way around
        for context in 0..2 {
            let q = bed.input(&format!("q {context}"), n, d, unit);
            let (out, lse) = (bed.sums(&format!("out {context}"), n, d), bed.sums(&format!("lse {context}"), heads, n));
            for i in 0..self.keys.len() {
                let m = self.keys[if context == 0 { i } else { self.keys.len() - 1 - i }];
                let kv = bed.input(&format!("kv {context} {i}"), m, 2 * d, unit);
                let (k, v) = (kv.cols_range(0..d), kv.cols_range(d..2 * d));
                let part = bed.output(&format!("part {context} {i}"), n, d);
                let part_lse = bed.sums(&format!("part lse {context} {i}"), heads, n);
                parts.push(Attention { q, k, v, out: part, lse: part_lse, heads, dropout: None });
                merges.push(Merge { part, part_lse, out, lse, first: i == 0 });
            }
        }
        attention::forward(bed.device, &mut bed.arena, &parts)?;
        if bed.plainly {
            parts.iter().for_each(|p| bed.write(&round(bed.read(p.out)), p.out)); // each part's output is a tensor
        }
        let each = self.keys.len();
        for i in 0..each {
            attention::merge(bed.device, &[merges[i], merges[each + i]])?;
        }
        Ok(())
    }
}

#[test]
fn parts_of_a_context_merge() {
    check(&Parts { heads: 4, head_dim: 32, n: 70, keys: vec![0, 33, 0, 130, 1] });
    check(&Parts { heads: 1, head_dim: 128, n: 5, keys: vec![9, 64, 3] });
    check(&Parts { heads: 2, head_dim: 8, n: 1, keys: vec![0, 0] });
}

#[test]
fn merging_has_no_races() {
    check_races(&Parts { heads: 2, head_dim: 128, n: 6, keys: vec![0, 5, 9] });
}

/// As eager PyTorch does it: scores, probabilities and their gradients are tensors of their own, in
/// bf16.
fn plainly<T: Element>(bed: &Bed<T>, p: &AttentionGrad<T>) {
    let Attention { q, k, v, out, lse, heads, dropout } = p.forward;
    let (n, m, head_dim) = (q.rows(), k.rows(), q.cols() / heads);
    let scale = 1.0 / (head_dim as f64).sqrt();
    for head in 0..heads {
        let of = |view: View<T>| view.cols_range(head * head_dim..(head + 1) * head_dim);
        let rows = |view: View<T>| Rows { values: bed.read(of(view)), cols: head_dim };
        let (q, k, v, dout) = (rows(q), rows(k), rows(v), rows(p.dout));
        let mut factors = vec![1.0; n * m];
        if let Some(dropout) = dropout {
            factors.chunks_mut(m.max(1)).enumerate().for_each(|(i, row)| dropout.at(head as u32).apply(i, row));
        }
        let scores = round(table(n, m, |i, j| scale * dot(q.row(i), k.row(j))));
        let sum = |i: usize| (0..m).map(|j| scores[i * m + j].exp()).sum::<f64>();
        let sums: Vec<f64> = (0..n).map(sum).collect();
        let probs = round(table(n, m, |i, j| scores[i * m + j].exp() / sums[i]));
        let dropped = round(table(n, m, |i, j| probs[i * m + j] * factors[i * m + j]));
        let over_keys = |weights: &[f64], x: &Rows| {
            table(n, head_dim, |i, c| (0..m).map(|j| weights[i * m + j] * x.row(j)[c]).sum())
        };
        let over_queries = |weights: &[f64], x: &Rows| {
            table(m, head_dim, |j, c| (0..n).map(|i| weights[i * m + j] * x.row(i)[c]).sum())
        };
        bed.write(&over_keys(&dropped, &v), of(out));
        bed.write(&sums.iter().map(|s| s.ln()).collect::<Vec<_>>(), lse.rows_range(head..head + 1));
        let ddropped = round(table(n, m, |i, j| dot(dout.row(i), v.row(j))));
        let dprobs = round(table(n, m, |i, j| ddropped[i * m + j] * factors[i * m + j]));
        let delta = |i: usize| dot(&dprobs[i * m..(i + 1) * m], &probs[i * m..(i + 1) * m]);
        let deltas: Vec<f64> = (0..n).map(delta).collect();
        let dscores = round(table(n, m, |i, j| scale * probs[i * m + j] * (dprobs[i * m + j] - deltas[i])));
        bed.write(&over_queries(&dropped, &dout), of(p.dv));
        bed.write(&over_keys(&dscores, &k), of(p.dq));
        bed.write(&over_queries(&dscores, &q), of(p.dk));
    }
}

struct Rows {
    values: Vec<f64>,
    cols: usize,
}

impl Rows {
    fn row(&self, i: usize) -> &[f64] {
        &self.values[i * self.cols..(i + 1) * self.cols]
    }
}

fn table(rows: usize, cols: usize, of: impl Fn(usize, usize) -> f64) -> Vec<f64> {
    (0..rows * cols).map(|i| of(i / cols, i % cols)).collect()
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn round(mut values: Vec<f64>) -> Vec<f64> {
    values.iter_mut().for_each(|x| *x = bf16::from_f64(*x).to_f64());
    values
}

fn case(heads: usize, head_dim: usize, rate: f64, sizes: &[[usize; 2]]) -> Attentions {
    Attentions { heads, head_dim, rate, sizes: sizes.to_vec(), apart: 0.0, most_ds: None, wgmma: false }
}

/// One query, one key, no queries, no keys, ragged tiles, each width, dropout, groups.
fn small() -> Vec<Attentions> {
    vec![
        case(1, 8, 0.0, &[[1, 1]]),
        case(2, 8, 0.3, &[[3, 40]]),
        case(1, 8, 0.0, &[[0, 5], [3, 0], [2, 2]]),
        case(1, 32, 0.0, &[[65, 33], [2, 130]]),
        case(2, 64, 0.3, &[[66, 70]]),
        case(1, 128, 0.2, &[[34, 67], [1, 5]]),
        // log-sum-exps of about -270: exp(0 - lse) is infinite, so what lies past the end must not
        // count at all
        Attentions { apart: 7.0, ..case(1, 32, 0.0, &[[35, 37]]) },
    ]
}

fn large() -> Vec<Attentions> {
    vec![
        case(4, 32, 0.2, &[[130, 257], [65, 64], [257, 100]]),
        case(2, 128, 0.2, &[[129, 200]]),
        // keys in three and in two parts
        case(3, 16, 0.2, &[[20, 2100], [70, 1500]]),
        case(1, 8, 0.0, &[[5, 9]; 6]),
    ]
}

#[test]
fn matches_the_cpu() {
    small().iter().for_each(check);
}

#[test]
fn groups_and_splits_match_the_cpu() {
    large().iter().for_each(check);
}

#[test]
fn has_no_races() {
    small().iter().for_each(check_races);
}

#[test]
fn seven_products_match_the_cpu() {
    let without = |case| Attentions { most_ds: Some(0), ..case };
    small().into_iter().chain(large()).map(without).for_each(|case| check(&case));
}

/// Room for dS of some heads of a problem, so that launches share out the heads, and of less than
/// one of another's.
#[test]
fn backward_makes_do_with_the_room_there_is() {
    let sizes = [[20, 70], [66, 130], [1, 9]];
    check(&Attentions { most_ds: Some(40_000), ..case(4, 32, 0.2, &sizes) });
}

#[test]
fn seven_products_have_no_races() {
    small().into_iter().for_each(|case| check_races(&Attentions { most_ds: Some(0), ..case }));
}

/// With wider heads: 8, 16, 32, 64 and 128 columns become 128, 120, 104, 72 and 128.
fn by_wgmma(cases: Vec<Attentions>) -> impl Iterator<Item = Attentions> {
    let widened = |head_dim| if head_dim < 128 { 136 - head_dim } else { 128 };
    cases.into_iter().map(move |case| Attentions { head_dim: widened(case.head_dim), wgmma: true, ..case })
}

#[test]
fn wgmma_matches_the_cpu() {
    by_wgmma([small(), large()].into_iter().flatten().collect()).for_each(|case| check(&case));
    let sizes = [[20, 70], [66, 130], [1, 9]];
    check(&Attentions { most_ds: Some(40_000), wgmma: true, ..case(4, 128, 0.2, &sizes) });
}

#[test]
fn wgmma_has_no_races() {
    by_wgmma(small()).for_each(|case| check_races(&case));
    // three tiles of keys, and two blocks of queries; three tiles of queries, and blocks of keys
    by_wgmma(vec![case(1, 128, 0.2, &[[130, 270]])]).for_each(|case| check_races(&case));
    let without = |case| Attentions { most_ds: Some(0), ..case };
    by_wgmma(small()).map(without).for_each(|case| check_races(&case));
}
