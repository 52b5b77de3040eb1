//! CrossFusionConcat, the ablation of the paper's repository whose streams are put side by side and
//! projected instead of convolved.

use super::{
    AttentionOf, BagGrads, Bags, Config, Context, Network, Scale, Scales,
    encoder::{COARSE, CrossEncoder, EncoderNames, FINE, SOURCE, STREAMED, STREAMS, SavedEncoder},
    fusion::{LinearNorm, SavedLinearNorm, SavedNorms, norms, norms_backward},
    layer::scratch,
    params::{Layout, NormWeights},
    readout::{Readout, SavedReadout},
};
use crate::{
    Result,
    device::{Element, Mark, View},
    ops::head::HeadGrad,
};

/// The ablation without a convolution: where its parameters lie, and the parts that use them.
pub struct CrossFusionConcat {
    config: Config,
    layout: Layout,
    encoder: CrossEncoder,
    /// Of the streams.
    norms: [NormWeights; STREAMS],
    fuse: LinearNorm,
    readout: Readout,
}

pub(crate) struct Saved<'a, T: Element> {
    side: usize,
    encoder: SavedEncoder<'a, T>,
    before_norms: Mark,
    norms: SavedNorms<T, T::Sum>,
    fuse: SavedLinearNorm<T>,
    readout: SavedReadout<T>,
}

const NAMES: EncoderNames = EncoderNames {
    projections: ["coarse_pre_cross_attn", "fine_pre_cross_attn", "source_pre_cross_attn"],
    cross: ["coarse_cross_attn", "fine_cross_attn"],
    transformers: ["coarse_transformer", "fine_transformer", "source_transformer"],
};
const NORMS: [&str; STREAMS] = ["coarse_ln", "fine_ln", "source_ln"];
/// The order in which the streams stand side by side.
const BESIDE: [usize; STREAMS] = [SOURCE, FINE, COARSE];

/// A stream's columns where all stand side by side.
fn columns<T: Element>(all: View<T>, stream: usize) -> View<T> {
    let dim = all.cols() / STREAMS;
    let place = BESIDE.iter().position(|&i| i == stream).unwrap_or(0);
    all.cols_range(place * dim..(place + 1) * dim)
}

impl CrossFusionConcat {
    /// Lays the parameters out, without memory for them; [`Config::check`] has passed the settings.
    pub fn new(config: &Config) -> Self {
        let (layout, mut next_site) = (&mut Layout::default(), 0);
        let class_token = Readout::class_token(layout, config);
        let encoder = CrossEncoder::new(layout, &NAMES, config, &mut next_site);
        let norms = NORMS.map(|name| layout.norm(name, config.dim));
        let fuse = LinearNorm::new(layout, "pre_final_linear", config.dim, STREAMS * config.dim);
        let readout = Readout::new(layout, class_token, config, next_site);
        Self { config: config.clone(), layout: std::mem::take(layout), encoder, norms, fuse, readout }
    }
}

impl Network for CrossFusionConcat {
    type Saved<'a, T: Element> = Saved<'a, T>;
    const SCALES: &'static [Scale] = &Scale::ALL;
    const STREAMED: &'static [Scale] = &STREAMED;

    fn config(&self) -> &Config {
        &self.config
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn forward<'a, T: Element>(&self, ctx: &mut Context, bags: Bags<'a, T>) -> Result<Saved<'a, T>> {
        let (encoder, encoded) = self.encoder.forward(ctx, bags)?;
        let before_norms = ctx.arena.mark();
        let (side, n) = (encoded.side, encoded.side * encoded.side);
        let beside = ctx.arena.save(n, STREAMS * self.config.dim)?;
        let streams = [COARSE, FINE, SOURCE].map(|i| columns(beside, i));
        let norms = norms(ctx, &self.norms, &encoded.streams, &streams)?;
        let fused = self.readout.fused(ctx, side)?;
        let fuse = self.fuse.forward(ctx, beside, fused.rows_range(1..n + 1))?;
        let readout = self.readout.forward(ctx, fused, side)?;
        Ok(Saved { side, encoder, before_norms, norms, fuse, readout })
    }

    fn head<T: Element>(&self, saved: &Saved<'_, T>) -> HeadGrad<T> {
        saved.readout.head()
    }

    fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Saved<'_, T>,
        dbags: Option<&BagGrads<'_, T>>,
    ) -> Result<()> {
        let before = ctx.arena.mark();
        let like = saved.norms.iter().map(|(x, _)| *x).collect::<Vec<_>>();
        let dstreams = scratch(ctx, &like, self.config.dim)?;
        let after = ctx.arena.mark();
        let dfused = self.readout.backward(ctx, saved.readout, saved.side)?;
        let dbeside = ctx.arena.scratch(dfused.rows(), STREAMS * self.config.dim)?;
        self.fuse.backward(ctx, saved.fuse, dfused, dbeside)?;
        let dys = [COARSE, FINE, SOURCE].map(|i| columns(dbeside, i));
        norms_backward(ctx, &self.norms, &saved.norms, &dys, &dstreams)?;
        ctx.arena.release_scratch(after);
        ctx.arena.release_saved(saved.before_norms);
        self.encoder.backward(ctx, saved.encoder, &dstreams, dbags)?;
        ctx.arena.release_scratch(before);
        Ok(())
    }

    fn attention<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Saved<'_, T>,
        of: AttentionOf,
    ) -> Result<Scales<Vec<f64>>> {
        let weights = match of {
            AttentionOf::Patches => None,
            AttentionOf::ClassToken => {
                Some(self.readout.received(ctx, &saved.readout, saved.side, saved.encoder.tokens())?)
            }
        };
        ctx.arena.release_saved(saved.before_norms);
        self.encoder.received(ctx, saved.encoder, weights)
    }
}
