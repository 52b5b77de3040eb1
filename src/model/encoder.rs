//! The three streams of tokens (Soraki et al. 2026, fig. 1, left): x10's own, and what it finds at
//! x5 and at x20 by cross-attention; each then goes through a transformer.

use super::{
    BagGrads, Bags, Config, Context, Scale, Scales,
    cross::{Contexts, CrossAttention, CrossGrad, HeldGrads, SavedCross},
    dropout_sites,
    layer::{Layer, Names, scratch, sites},
    params::Layout,
    projection::{Input, Projection, project, project_backward},
    square_side,
    stream::Stream,
    transformer::{PadTransformer, SavedTransformer, TokenGrid, transformer_sites},
};
use crate::{
    Result,
    device::{Element, View},
    ops::elementwise,
};

// The three streams, in the order of the arrays below.
pub(super) const COARSE: usize = 0;
pub(super) const FINE: usize = 1;
pub(super) const SOURCE: usize = 2;
pub(super) const STREAMS: usize = 3;

/// The streams' scales; those of the contexts come part by part where a policy streams.
const SCALES: [Scale; STREAMS] = [Scale::X5, Scale::X20, Scale::X10];
pub(super) const STREAMED: [Scale; 2] = [Scale::X5, Scale::X20];

pub(super) struct CrossEncoder {
    cross: CrossAttention,
    source: Projection,
    transformers: [PadTransformer; STREAMS],
}

/// Names of the parts in a checkpoint, of the streams in the order above.
pub(super) struct EncoderNames {
    pub projections: [&'static str; STREAMS],
    pub cross: [&'static str; 2],
    pub transformers: [&'static str; STREAMS],
}

/// What backward needs of the streams.
pub(super) struct SavedEncoder<'a, T: Element> {
    side: usize,
    /// Of x5, x20 and x10.
    patches: [usize; STREAMS],
    source: Input<T>,
    cross: SavedCross<'a, T>,
    transformers: SavedTransformer<T>,
}

/// Tokens of the square grid, `[side^2, dim]` of each stream.
pub(super) struct Encoded<T> {
    pub side: usize,
    pub streams: Vec<View<T>>,
}

impl CrossEncoder {
    pub fn new(layout: &mut Layout, names: &EncoderNames, config: &Config, next_site: &mut u32) -> Self {
        let dim = config.dim;
        let [coarse, fine, source] = names.projections.map(|name| Projection::new(layout, name, dim, config.features));
        let layers = names.cross.map(|name| {
            let of = |part: &str| format!("{name}{part}");
            let names = Names { attention: &of(""), norm: &of("_ln"), ffn: &of("_ffn") };
            Layer::new(layout, &names, dim, Some(0.02), 0.0, dropout_sites(next_site, sites(config.heads)))
        });
        let transformers = names
            .transformers
            .map(|name| PadTransformer::new(layout, name, config, dropout_sites(next_site, transformer_sites(config))));
        Self { cross: CrossAttention { projections: [coarse, fine], layers }, source, transformers }
    }

    pub fn forward<'a, T: Element>(
        &self,
        ctx: &mut Context,
        bags: Bags<'a, T>,
    ) -> Result<(SavedEncoder<'a, T>, Encoded<T>)> {
        let features = ctx.config.features;
        let [x5, x20, x10] = SCALES.map(|scale| bags.get(scale, features));
        let (x5, x20, x10) = (x5?, x20?, x10?);
        let patches = [x5, x20, x10].map(|bag| bag.patches());
        let side = square_side(x10.patches());
        let x10 = ctx.stage(&x10)?;
        let (source, contexts) = match ctx.policy.stream {
            Some(patches) => {
                let stream = Stream::new(ctx, vec![x5, x20], patches)?;
                (project(ctx, &[self.source], &[x10], true)?[0], Contexts::Streamed(stream))
            }
            None => {
                let [coarse, fine] = self.cross.projections;
                let staged = [ctx.stage(&x5)?, ctx.stage(&x20)?, x10];
                let mut held = project(ctx, &[coarse, fine, self.source], &staged, true)?;
                (held.remove(SOURCE), Contexts::Held(held))
            }
        };
        let (cross, crossed) = self.cross.forward(ctx, source.tokens, contexts)?;
        let group = self.transformers.each_ref();
        let tokens = [crossed[COARSE], crossed[FINE], source.tokens];
        let n = side * side;
        let (transformers, streams) = PadTransformer::forward(ctx, &group, &tokens, TokenGrid { rows: n, side }, n)?;
        Ok((SavedEncoder { side, patches, source, cross, transformers }, Encoded { side, streams }))
    }

    /// From the streams' gradients, which are overwritten.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: SavedEncoder<'_, T>,
        dstreams: &[View<T>],
        dbags: Option<&BagGrads<'_, T>>,
    ) -> Result<()> {
        let (features, dim) = (ctx.config.features, ctx.config.dim);
        let group = self.transformers.each_ref();
        let dencoded = PadTransformer::backward(ctx, &group, saved.transformers, saved.side, dstreams, dstreams)?;

        let x = saved.source.tokens;
        let dout = [dencoded[COARSE], dencoded[FINE]].map(|dx| dx.rows_range(0..x.rows()));
        let dx = scratch(ctx, &[x; 2], dim)?;
        let dsource = ctx.arena.scratch(x.rows(), dim)?;
        let [x5, x20, x10] = saved.patches;
        let dbags = match dbags {
            None => None,
            Some(dbags) => {
                let of = |scale, patches| dbags.get(scale, patches, features);
                Some([of(Scale::X5, x5)?, of(Scale::X20, x20)?, of(Scale::X10, x10)?])
            }
        };
        let grad = CrossGrad { x, dout: &dout, dx: &dx, dbags: dbags.map(|[x5, x20, _]| [x5, x20]) };
        let HeldGrads { mut inputs, mut dtokens } = self.cross.backward(ctx, saved.cross, &grad)?;
        elementwise::sum(ctx.device, &[dencoded[SOURCE].rows_range(0..x.rows()), dx[0], dx[1]], dsource)?;

        let [coarse, fine] = self.cross.projections;
        let all = [coarse, fine, self.source];
        // what the cross-attention has not projected back itself
        let first = STREAMS - 1 - inputs.len();
        inputs.push(saved.source);
        dtokens.push(dsource);
        project_backward(ctx, &all[first..], &inputs, &dtokens, dbags.as_ref().map(|dbags| &dbags[first..]))
    }

    /// The attention that the patches of x5 and of x20 receive in the cross-attention, where each
    /// x10 patch gives as much as `weights` says; all the same without them. With them, they are
    /// x10's own.
    pub fn received<T: Element>(
        &self,
        ctx: &mut Context,
        saved: SavedEncoder<'_, T>,
        weights: Option<Vec<f64>>,
    ) -> Result<Scales<Vec<f64>>> {
        ctx.arena.release_saved(saved.transformers.before());
        let x = saved.source.tokens;
        let alike = || vec![1.0 / x.rows() as f64; x.rows()];
        let of_queries = weights.as_ref().map_or_else(alike, Vec::clone);
        let [coarse, fine] = self.cross.received(ctx, saved.cross, x, &of_queries)?;
        let all = [(Scale::X5, Some(coarse)), (Scale::X10, weights), (Scale::X20, Some(fine))];
        Ok(all.into_iter().filter_map(|(scale, received)| Some((scale, received?))).collect())
    }
}

impl<T: Element> SavedEncoder<'_, T> {
    /// Tokens of x10, without those that pad the grid.
    pub fn tokens(&self) -> usize {
        self.source.tokens.rows()
    }
}
