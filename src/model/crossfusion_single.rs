//! CrossFusionSingle, the ablation of the paper's repository that looks at x20 alone: one stream,
//! convolved without a mix.

use super::{
    AttentionOf, BagGrads, Bags, Config, Context, Network, Scale, Scales, dropout_sites,
    fusion::{ConvFuse, SavedConvFuse, SavedNorms, norms, norms_backward},
    params::{Layout, NormWeights},
    projection::{
        Input, Projection, StreamedInput, project, project_backward, project_streamed, project_streamed_backward,
    },
    readout::{Readout, SavedReadout},
    square_side,
    stream::Stream,
    transformer::{PadTransformer, SavedTransformer, TokenGrid, transformer_sites},
};
use crate::{
    Error, Result,
    device::{Element, Mark},
    ops::head::HeadGrad,
};

/// The ablation of x20 alone: where its parameters lie, and the parts that compute with them.
pub struct CrossFusionSingle {
    config: Config,
    layout: Layout,
    projection: Projection,
    transformer: PadTransformer,
    norm: NormWeights,
    fuse: ConvFuse,
    readout: Readout,
}

pub(crate) struct Saved<'a, T: Element> {
    side: usize,
    source: Source<'a, T>,
    transformer: SavedTransformer<T>,
    before_norm: Mark,
    norm: SavedNorms<T, T::Sum>,
    fuse: SavedConvFuse<T>,
    readout: SavedReadout<T>,
}

/// The bag on its way in.
enum Source<'a, T: Element> {
    Held(Input<T>),
    Streamed(Stream<'a, T>, StreamedInput<T>),
}

const SCALE: Scale = Scale::X20;

impl CrossFusionSingle {
    /// Lays the parameters out, without memory for them; [`Config::check`] has passed the settings.
    pub fn new(config: &Config) -> Self {
        let (layout, mut next_site) = (&mut Layout::default(), 0);
        let class_token = Readout::class_token(layout, config);
        let projection = Projection::new(layout, "source_pre_cross_attn", config.dim, config.features);
        let site = dropout_sites(&mut next_site, transformer_sites(config));
        let transformer = PadTransformer::new(layout, "source_transformer", config, site);
        let norm = layout.norm("source_ln", config.dim);
        let fuse = ConvFuse::new(layout, config, 1, dropout_sites(&mut next_site, 1));
        let readout = Readout::new(layout, class_token, config, next_site);
        Self { config: config.clone(), layout: std::mem::take(layout), projection, transformer, norm, fuse, readout }
    }
}

impl Network for CrossFusionSingle {
    type Saved<'a, T: Element> = Saved<'a, T>;
    const SCALES: &'static [Scale] = &[SCALE];
    const STREAMED: &'static [Scale] = &[SCALE];

    fn config(&self) -> &Config {
        &self.config
    }

    fn layout(&self) -> &Layout {
        &self.layout
    }

    fn forward<'a, T: Element>(&self, ctx: &mut Context, bags: Bags<'a, T>) -> Result<Saved<'a, T>> {
        let bag = bags.get(SCALE, self.config.features)?;
        let side = square_side(bag.patches());
        let n = side * side;
        let (source, tokens) = match ctx.policy.stream {
            Some(patches) => {
                let stream = Stream::new(ctx, vec![bag], patches)?;
                let input = project_streamed(ctx, self.projection, &stream)?;
                (Source::Streamed(stream, input), input.tokens)
            }
            None => {
                let bag = ctx.stage(&bag)?;
                let input = project(ctx, &[self.projection], &[bag], true)?[0];
                (Source::Held(input), input.tokens)
            }
        };
        let (transformer, encoded) =
            PadTransformer::forward(ctx, &[&self.transformer], &[tokens], TokenGrid { rows: n, side }, n)?;
        let before_norm = ctx.arena.mark();
        let stream = ctx.arena.save(n, self.config.dim)?;
        let norm = norms(ctx, &[self.norm], &encoded, &[stream])?;
        let fused = self.readout.fused(ctx, side)?;
        let fuse = self.fuse.forward(ctx, [stream; 3], side, fused.rows_range(1..n + 1))?;
        let readout = self.readout.forward(ctx, fused, side)?;
        Ok(Saved { side, source, transformer, before_norm, norm, fuse, readout })
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
        let (side, features) = (saved.side, self.config.features);
        let before = ctx.arena.mark();
        let dstream = ctx.arena.scratch(side * side, self.config.dim)?;
        let after = ctx.arena.mark();
        let dfused = self.readout.backward(ctx, saved.readout, side)?;
        self.fuse.backward(ctx, &saved.fuse, side, dfused, [dstream; 3])?;
        ctx.arena.release_scratch(after);
        norms_backward(ctx, &[self.norm], &saved.norm, &[dstream], &[dstream])?;
        ctx.arena.release_saved(saved.before_norm);
        let transformer = &[&self.transformer];
        let dencoded = PadTransformer::backward(ctx, transformer, saved.transformer, side, &[dstream], &[dstream])?[0];
        let of = |rows: usize| dbags.map(|dbags| dbags.get(SCALE, rows, features)).transpose();
        match saved.source {
            Source::Held(input) => {
                let rows = input.tokens.rows();
                let dbag = of(rows)?.map(|dbag| [dbag]);
                let dtokens = dencoded.rows_range(0..rows);
                let dbag = dbag.as_ref().map(|dbag| &dbag[..]);
                project_backward(ctx, &[self.projection], &[input], &[dtokens], dbag)?;
            }
            Source::Streamed(stream, input) => {
                let rows = input.tokens.rows();
                let dtokens = dencoded.rows_range(0..rows);
                project_streamed_backward(ctx, self.projection, &stream, &input, dtokens, of(rows)?)?;
            }
        }
        ctx.arena.release_scratch(before);
        Ok(())
    }

    fn attention<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Saved<'_, T>,
        of: AttentionOf,
    ) -> Result<Scales<Vec<f64>>> {
        if of == AttentionOf::Patches {
            let message = "crossfusion-single has no cross-attention, whose weights were asked for; the class token's are \
                           there for every model";
            return Err(Error::Usage(message.into()));
        }
        let tokens = match &saved.source {
            Source::Held(input) => input.tokens,
            Source::Streamed(_, input) => input.tokens,
        };
        let received = self.readout.received(ctx, &saved.readout, saved.side, tokens.rows())?;
        Ok(std::iter::once((SCALE, received)).collect())
    }
}
