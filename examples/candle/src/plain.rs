//! The same attention of candle's own ops, which keep all scores: what the fused one is compared
//! to.

use candle_core::{D, Result, Tensor};

/// softmax(q kᵀ / sqrt(head_dim)) times `factors`, dropout's `(batch, heads, queries, keys)`, v.
/// Shapes as in [`FusedAttention::forward`](crate::FusedAttention::forward).
pub fn attention(q: &Tensor, k: &Tensor, v: &Tensor, factors: Option<&Tensor>) -> Result<Tensor> {
    let heads = |tensor: &Tensor| tensor.transpose(1, 2)?.contiguous();
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    let weights = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?.detach())?.exp()?;
    let weights = weights.broadcast_div(&weights.sum_keepdim(D::Minus1)?)?;
    let weights = match factors {
        Some(factors) => (weights * factors)?,
        None => weights,
    };
    weights.matmul(&v)?.transpose(1, 2)
}
