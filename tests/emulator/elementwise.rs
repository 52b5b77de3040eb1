//! kernels/elementwise.cu, adam.cu and scale_embedding.cu against their CPU twins.

use crossfusion::{
    Result,
    device::Element,
    ops::{
        Draw, Dropout,
        adam::{self, Adam, Arenas},
        elementwise::{self, Map},
        scale_embedding::{self, FoldEmbedding, FoldEmbeddingGrad},
    },
};

use super::{
    bed::{Bed, Case, check, check_races},
    common::Law,
};

const UNIT: Law = Law { offset: 0.0, scale: 1.0 };
/// Less than a piece of eight, ragged quads, several blocks.
const SHAPES: [[usize; 2]; 4] = [[1, 8], [3, 40], [67, 96], [300, 136]];

/// sum, sum into a term, dropout and GELU of several matrices, accumulate and zero.
struct Elementwise {
    rows: usize,
    cols: usize,
}

impl Case for Elementwise {
    fn name(&self) -> String {
        format!("elementwise {} x {}", self.rows, self.cols)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let Self { rows, cols } = *self;
        let wide = bed.input("wide", rows, cols + 16, UNIT).cols_range(8..cols + 8);
        let x = bed.input("x", rows, cols, UNIT);
        let (sum, in_place) = (bed.output("sum", rows, cols), bed.in_place("in place", rows, cols, UNIT));
        elementwise::sum(bed.device, &[x, wide, in_place], sum)?;
        elementwise::sum(bed.device, &[in_place, x], in_place)?;
        let draw = Some(Draw { seed: 3 << 40, step: 1 });
        let dropout = Dropout::new(draw, 4, 0.3);
        let mut maps = vec![Map { x: wide, gelu: false, dropout, out: bed.output("dropped", rows, cols) }];
        for i in 0..8 {
            let out = bed.output(&format!("gelu {i}"), rows + i, cols);
            let x = bed.input(&format!("pre {i}"), rows + i, cols, Law { offset: 0.0, scale: 4.0 });
            maps.push(Map { x, gelu: true, dropout: Dropout::new(draw, i as u32, [0.0, 0.4][i % 2]), out });
        }
        elementwise::map(bed.device, &maps)?;
        let sums = bed.accumulated("accumulated", rows, cols);
        elementwise::accumulate(bed.device, wide, sums)?;
        let rounded = bed.output("rounded", rows, cols);
        elementwise::round(bed.device, sums, rounded)?;
        let zeros = bed.accumulated("zeros", rows, cols);
        elementwise::zero(bed.device, zeros)
    }
}

struct Optimizer {
    n: usize,
}

impl Case for Optimizer {
    fn name(&self) -> String {
        format!("adam {}", self.n)
    }

    /// Two steps.
    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let n = self.n;
        let (params, grads, m) = (bed.accumulated("p", 1, n), bed.accumulated("g", 1, n), bed.accumulated("m", 1, n));
        let v = bed.sums("v", 1, n);
        elementwise::zero(bed.device, v)?;
        let weights = bed.rounded(params);
        let arenas = Arenas { params, weights, grads, m, v };
        let adam = Adam { learning_rate: 0.01, weight_decay: 0.1, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        adam::step(bed.device, &adam, arenas, 1)?;
        adam::step(bed.device, &adam, arenas, 2)?;
        Ok(())
    }
}

/// Two projections of one embedding, and one of another.
struct Embedding {
    d: usize,
}

impl Case for Embedding {
    fn name(&self) -> String {
        format!("scale embedding {}", self.d)
    }

    fn run<T: Element>(&self, bed: &mut Bed<T>) -> Result<()> {
        let d = self.d;
        let shared = (bed.input("e", 1, d, UNIT), bed.accumulated("de", 1, d));
        let (mut forward, mut backward) = (Vec::new(), Vec::new());
        for (i, out) in [d, 2 * d, 8].into_iter().enumerate() {
            let of = |name: &str| format!("{name} {i}");
            let (embedding, dembedding) =
                if i < 2 { shared } else { (bed.input("f", 1, d, UNIT), bed.accumulated("df", 1, d)) };
            let (weight, bias) = (bed.input(&of("w"), out, d, UNIT), bed.input(&of("b"), 1, out, UNIT));
            let folded = bed.output(&of("folded"), 1, out);
            forward.push(FoldEmbedding { weight, bias, embedding, folded });
            let dfolded = bed.accumulated(&of("dfolded"), 1, out);
            let (dweight, dbias) = (bed.accumulated(&of("dw"), out, d), bed.accumulated(&of("db"), 1, out));
            backward.push(FoldEmbeddingGrad { weight, embedding, dfolded, dweight, dbias, dembedding });
        }
        scale_embedding::forward(bed.device, &forward)?;
        scale_embedding::backward(bed.device, &backward)
    }
}

#[test]
fn matches_the_cpu() {
    SHAPES.iter().for_each(|&[rows, cols]| check(&Elementwise { rows, cols }));
}

#[test]
fn adam_matches_the_cpu() {
    [8, 64, 4096 + 64].into_iter().for_each(|n| check(&Optimizer { n }));
}

#[test]
fn scale_embedding_matches_the_cpu() {
    [8, 40, 96].into_iter().for_each(|d| check(&Embedding { d }));
}

#[test]
fn has_no_races() {
    SHAPES[..3].iter().for_each(|&[rows, cols]| check_races(&Elementwise { rows, cols }));
}

#[test]
fn adam_has_no_races() {
    check_races(&Optimizer { n: 1088 });
}

#[test]
fn scale_embedding_has_no_races() {
    check_races(&Embedding { d: 40 });
}
