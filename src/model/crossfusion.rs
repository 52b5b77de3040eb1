//! CrossFusion (Soraki et al. 2026, fig. 1): three streams of tokens, fused by a convolution over
//! their mix.

use super::{
    AttentionOf, BagGrads, Bags, Config, Context, Network, Scale, Scales, dropout_sites,
    encoder::{COARSE, CrossEncoder, EncoderNames, FINE, SOURCE, STREAMED, STREAMS, SavedEncoder},
    fusion::{ConvFuse, SavedConvFuse, SavedNorms, norms, norms_backward},
    layer::scratch,
    params::{Layout, NormWeights},
    readout::{Readout, SavedReadout},
};
use crate::{
    Result,
    device::{Element, Mark},
    ops::head::HeadGrad,
};

/// The published model: where its parameters lie, and the parts that compute with them.
pub struct CrossFusion {
    config: Config,
    layout: Layout,
    encoder: CrossEncoder,
    /// Of the streams.
    norms: [NormWeights; STREAMS],
    fuse: ConvFuse,
    readout: Readout,
}

pub(crate) struct Saved<'a, T: Element> {
    side: usize,
    encoder: SavedEncoder<'a, T>,
    before_norms: Mark,
    norms: SavedNorms<T, T::Sum>,
    fuse: SavedConvFuse<T>,
    readout: SavedReadout<T>,
}

const NAMES: EncoderNames = EncoderNames {
    projections: ["c_lin_proj", "f_lin_proj", "s_lin_proj"],
    cross: ["c_cross_attn", "f_cross_attn"],
    transformers: ["c_transformer", "f_transformer", "s_transformer"],
};
/// The order in which the published convolution mixes the streams.
const MIXED: [usize; STREAMS] = [SOURCE, FINE, COARSE];

impl CrossFusion {
    /// Lays the parameters out, without memory for them; [`Config::check`] has passed the settings.
    pub fn new(config: &Config) -> Self {
        let (layout, mut next_site) = (&mut Layout::default(), 0);
        let class_token = Readout::class_token(layout, config);
        let encoder = CrossEncoder::new(layout, &NAMES, config, &mut next_site);
        let norms = NAMES.transformers.map(|name| layout.norm(&format!("{name}_ln"), config.dim));
        let fuse = ConvFuse::new(layout, config, STREAMS, dropout_sites(&mut next_site, 1));
        let readout = Readout::new(layout, class_token, config, next_site);
        Self { config: config.clone(), layout: std::mem::take(layout), encoder, norms, fuse, readout }
    }
}

impl Network for CrossFusion {
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
        let mut streams = Vec::new();
        for _ in 0..STREAMS {
            streams.push(ctx.arena.save(n, self.config.dim)?);
        }
        let norms = norms(ctx, &self.norms, &encoded.streams, &streams)?;
        let fused = self.readout.fused(ctx, side)?;
        let fuse = self.fuse.forward(ctx, MIXED.map(|i| streams[i]), side, fused.rows_range(1..n + 1))?;
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
        self.fuse.backward(ctx, &saved.fuse, saved.side, dfused, MIXED.map(|i| dstreams[i]))?;
        ctx.arena.release_scratch(after);
        norms_backward(ctx, &self.norms, &saved.norms, &dstreams, &dstreams)?;
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
