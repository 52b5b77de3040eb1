//! The fused attention beside candle's own ops: what each takes, and how far apart they are, as a
//! part of the largest number.
//!
//! ```sh
//! cargo run --release                 # CPU
//! cargo run --release --features cuda # GPU
//! ```

use std::time::{Duration, Instant};

use candle_core::{Device, Result, Tensor, Var};
use crossfusion_candle_example::{FusedAttention, plain};

/// Of a cross-attention from 300 patches of a slide to 1200 others, and to more.
const SIZES: [(usize, usize); 3] = [(300, 1200), (1200, 1200), (1200, 4800)];
const HEADS: usize = 4;
const HEAD_DIM: usize = 64;
const REPEATS: usize = 5;

fn main() -> Result<()> {
    let device = if cfg!(feature = "cuda") { Device::new_cuda_with_stream(0)? } else { Device::Cpu };
    let attention = FusedAttention::new(&device)?;
    println!("{HEADS} heads of {HEAD_DIM}, f32, forward and backward, best of {REPEATS}");
    println!("{:>8} {:>8} {:>12} {:>12} {:>12}", "queries", "keys", "fused", "plain", "difference");
    for (queries, keys) in SIZES {
        let variable = |length| Var::randn(0f32, 1., (1, length, HEADS, HEAD_DIM), &device);
        let inputs = [variable(queries)?, variable(keys)?, variable(keys)?];
        let (fused_time, fused) = best(&inputs, |[q, k, v]| attention.forward(q, k, v, None))?;
        let (plain_time, plain) = best(&inputs, |[q, k, v]| plain::attention(q, k, v, None))?;
        let mut difference = 0f32;
        for (fused, plain) in fused.iter().zip(&plain) {
            difference = difference.max(largest(&(fused - plain)?)? / largest(plain)?);
        }
        println!("{queries:>8} {keys:>8} {fused_time:>12.1?} {plain_time:>12.1?} {difference:>12.1e}");
    }
    Ok(())
}

fn largest(tensor: &Tensor) -> Result<f32> {
    tensor.abs()?.flatten_all()?.max(0)?.to_scalar()
}

/// The least time of several passes forward and backward; the output and the inputs' gradients.
fn best(inputs: &[Var; 3], attention: impl Fn(&[Var; 3]) -> Result<Tensor>) -> Result<(Duration, Vec<Tensor>)> {
    let (mut least, mut result) = (Duration::MAX, Vec::new());
    for _ in 0..REPEATS {
        let start = Instant::now();
        let out = attention(inputs)?;
        let gradients = out.sqr()?.mean_all()?.backward()?;
        out.device().synchronize()?;
        least = least.min(start.elapsed());
        result = inputs.iter().filter_map(|input| gradients.get(input).cloned()).collect();
        result.push(out);
    }
    Ok((least, result))
}
