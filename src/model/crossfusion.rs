//! CrossFusion (Soraki et al. 2026, fig. 1): three bags in, survival logits out, and the way back.

use super::{
    Bag, Bags, Config, Context, Fusion,
    layer::{self, Layer, LayerGrad, Names, SavedLayer, norm, norm_grad, scratch, sites},
    params::{Layout, Linear, Norm, Param},
    streamed::Stream,
    transformer::{PadTransformer, SavedTransformer, transformer_sites},
};
use crate::{
    Error, Result,
    device::{Buffer, Element, Mark, View},
    ops::{
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, Weights},
        elementwise,
        head::{self, Head, HeadGrad, SlideLoss},
        layer_norm,
        matmul::{self, Epilogue, Matmul, WeightGrad},
    },
};

// The three scales, in the order of the arrays below. The names in a checkpoint start with these letters.
const COARSE: usize = 0;
const FINE: usize = 1;
pub(super) const SOURCE: usize = 2;
const LETTERS: [&str; 3] = ["c", "f", "s"];

pub struct CrossFusion {
    pub config: Config,
    pub layout: Layout,
    class_token: Param,
    /// None where features are as wide as the model.
    projections: [Option<(Linear, Norm)>; 3],
    /// Of the coarse and the fine context.
    pub(super) cross: [Layer; 2],
    transformers: [PadTransformer; 3],
    norms: [Norm; 3],
    mix: (Param, Param),
    convolutions: [(Param, Param); 4],
    fusion_linear: Linear,
    fusion_norm: Norm,
    fusion_site: u32,
    last: PadTransformer,
    last_norm: Norm,
    head: Linear,
}

/// What backward needs of a forward pass; its views lie on the arena's saved stack.
pub struct Saved<'a, T: Element> {
    side: usize,
    contexts: Contexts<'a, T>,
    source: Input<T>,
    before_cross: Mark,
    cross: Vec<SavedLayer<T>>,
    transformers: SavedTransformer<T>,
    before_norms: Mark,
    /// Inputs and statistics of the streams' norms.
    norms: Vec<(View<T>, View<T::Sum>)>,
    fusion: SavedFusion<T>,
    last: SavedTransformer<T>,
    head: Head<T>,
    /// `[1, n_classes]`, see [`Start::Dlogits`].
    pub dlogits: View<T::Sum>,
}

/// What backward starts from.
pub enum Start<'a> {
    /// The loss's gradient in what [`CrossFusion::logits`] found, written to [`Saved::dlogits`].
    Dlogits,
    /// A loss of the slide alone; it and the risk, f64, go to the buffer. The head's way there and back is one kernel.
    Loss(&'a SlideLoss, &'a Buffer),
}

/// x5 and x20.
enum Contexts<'a, T: Element> {
    Held(Inputs<T>),
    Streamed(Stream<'a, T>),
}

/// A bag, or a part of one, on its way into the model.
#[derive(Clone, Copy)]
pub(super) struct Input<T: Element> {
    pub scale: usize,
    bag: View<T>,
    /// None where a bag is its own projection.
    projection: Option<SavedProjection<T>>,
    pub tokens: View<T>,
}

pub(super) type Inputs<T> = Vec<Input<T>>;

#[derive(Clone, Copy)]
struct SavedProjection<T: Element> {
    /// Before the norm.
    projected: View<T>,
    stats: View<T::Sum>,
}

struct SavedFusion<T: Element> {
    streams: [View<T>; 3],
    convolved: View<T>,
    /// Before the norm.
    projected: View<T>,
    stats: View<T::Sum>,
}

impl CrossFusion {
    pub fn new(config: &Config) -> Result<Self> {
        config.check()?;
        let (layout, dim) = (&mut Layout::default(), config.dim);
        let class_token = layout.token("cls_token", dim, 1e-6);
        let projections = LETTERS.map(|scale| {
            (config.features != dim).then(|| {
                let name = format!("{scale}_lin_proj");
                (layout.linear(&format!("{name}.0"), dim, config.features), layout.norm(&format!("{name}.1"), dim))
            })
        });
        let mut site = 0;
        let mut next_site = |used: u32| {
            site += used;
            site - used
        };
        let cross = [COARSE, FINE].map(|scale| {
            let of = |part: &str| format!("{}_cross_attn{part}", LETTERS[scale]);
            let names = Names { attention: &of(""), norm: &of("_ln"), ffn: &of("_ffn") };
            Layer::new(layout, &names, dim, Some(0.02), 0.0, next_site(sites(config.heads)))
        });
        let transformers = LETTERS.map(|scale| {
            PadTransformer::new(layout, &format!("{scale}_transformer"), config, next_site(transformer_sites(config)))
        });
        let norms = LETTERS.map(|scale| layout.norm(&format!("{scale}_transformer_ln"), dim));
        let mix = layout.convolution("conv_processor.conv3d", 1, 3, &[1, 1, 1]);
        let parts = ["proj", "proj1", "proj2", "x_proj"];
        let convolutions = [0, 1, 2, 3].map(|i| {
            let side = conv_fusion::SIDES[i];
            let taps: &[usize] = if config.fusion == Fusion::Conv2d { &[side, side] } else { &[side] };
            layout.convolution(&format!("conv_processor.conv_block.0.{}", parts[i]), dim / 2, 2, taps)
        });
        let fusion_linear = layout.linear("conv_processor.linear.0", dim, dim / 2);
        let fusion_norm = layout.norm("conv_processor.linear.1", dim);
        let fusion_site = next_site(1);
        let last = PadTransformer::new(layout, "final_transformer", config, next_site(transformer_sites(config)));
        let last_norm = layout.norm("final_ln", dim);
        let head = layout.linear("mlp_head.0", config.n_classes, dim);
        Ok(Self {
            config: config.clone(),
            layout: std::mem::take(layout),
            class_token,
            projections,
            cross,
            transformers,
            norms,
            mix,
            convolutions,
            fusion_linear,
            fusion_norm,
            fusion_site,
            last,
            last_norm,
            head,
        })
    }

    /// From the bags to the class token that the head looks at, and all that backward needs.
    pub fn forward<'a, T: Element>(&self, ctx: &mut Context, bags: Bags<'a, T>) -> Result<Saved<'a, T>> {
        for (bag, name) in [(bags.x5, "x5"), (Bag::Memory(bags.x10), "x10"), (bags.x20, "x20")] {
            let (patches, features) = (bag.patches(), bag.view().map_or(self.config.features, |view| view.cols()));
            if patches == 0 || features != self.config.features {
                let (got, expected) = (vec![patches, features], vec![patches.max(1), self.config.features]);
                return Err(Error::Shape { op: "CrossFusion", tensor: name.into(), got, expected });
            }
        }
        let n0 = bags.x10.rows();
        let side = (1..).find(|side| side * side >= n0).unwrap_or(n0);
        let (n, dim) = (side * side, self.config.dim);

        let x10 = ctx.stage(&Bag::Memory(bags.x10))?;
        let (source, contexts) = match ctx.policy.stream {
            Some(patches) => {
                let stream = Stream::new(ctx, [bags.x5, bags.x20], patches)?;
                let source = self.project(ctx, &[(SOURCE, x10)], true)?;
                (source[0], Contexts::Streamed(stream))
            }
            None => {
                let staged = [(COARSE, ctx.stage(&bags.x5)?), (FINE, ctx.stage(&bags.x20)?), (SOURCE, x10)];
                let mut held = self.project(ctx, &staged, true)?;
                let source = held.remove(SOURCE);
                (source, Contexts::Held(held))
            }
        };
        let before_cross = ctx.arena.mark();
        let (cross, crossed) = match &contexts {
            Contexts::Held(inputs) => {
                let layers: Vec<_> = self.cross.iter().collect();
                let context: Vec<_> = inputs.iter().map(|input| input.tokens).collect();
                layer::forward(ctx, &layers, &[source.tokens; 2], &context)?
            }
            Contexts::Streamed(stream) => self.cross_streamed(ctx, source.tokens, stream)?,
        };

        let group: Vec<_> = self.transformers.iter().collect();
        let (transformers, encoded) =
            PadTransformer::forward(ctx, &group, &[crossed[COARSE], crossed[FINE], source.tokens], (n, side), n)?;

        let before_norms = ctx.arena.mark();
        let mut problems = Vec::new();
        for (scale, &x) in encoded.iter().enumerate() {
            let (y, stats) = (ctx.arena.save(n, dim)?, ctx.arena.save(n, 2)?);
            problems.push(norm(ctx, self.norms[scale], x, stats, y));
        }
        layer_norm::forward(ctx.device, &problems)?;
        let norms = problems.iter().map(|p| (p.x, p.stats)).collect();
        let (fusion, fused) = self.fuse(ctx, [SOURCE, FINE, COARSE].map(|scale| problems[scale].y), side)?;

        let (last, out) = PadTransformer::forward(ctx, &[&self.last], &[fused], (n + 1, side), 1)?;
        let linear = ctx.linear::<T>(self.head);
        let (stats, normed) = (ctx.arena.save(1, 2)?, ctx.arena.save(1, dim)?);
        let (logits, dlogits) = (ctx.arena.save(1, self.config.n_classes)?, ctx.arena.save(1, self.config.n_classes)?);
        let head = Head {
            norm: norm(ctx, self.last_norm, out[0], stats, normed),
            weight: linear.weight,
            bias: linear.bias,
            logits,
        };
        Ok(Saved {
            side,
            contexts,
            source,
            before_cross,
            cross,
            transformers,
            before_norms,
            norms,
            fusion,
            last,
            head,
            dlogits,
        })
    }

    /// The head on top of a forward pass: logits `[1, n_classes]`.
    pub fn logits<T: Element>(&self, ctx: &Context, saved: &Saved<'_, T>) -> Result<View<T::Sum>> {
        head::forward(ctx.device, &saved.head)?;
        Ok(saved.head.logits)
    }

    /// Step 1: Linear and LayerNorm of each bag, on the saved stack if backward shall find them.
    pub(super) fn project<T: Element>(
        &self,
        ctx: &mut Context,
        bags: &[(usize, View<T>)],
        save: bool,
    ) -> Result<Inputs<T>> {
        let dim = self.config.dim;
        let mut inputs = Vec::new();
        let (mut products, mut norms) = (Vec::new(), Vec::new());
        for &(scale, bag) in bags {
            let mut input = Input { scale, bag, projection: None, tokens: bag };
            if let Some((linear, layer_norm)) = self.projections[scale] {
                let rows = bag.rows();
                let (projected, stats) = (ctx.room(save, rows, dim)?, ctx.room(save, rows, 2)?);
                input.tokens = ctx.room(save, rows, dim)?;
                input.projection = Some(SavedProjection { projected, stats });
                let linear = ctx.linear::<T>(linear);
                let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
                products.push(Matmul { a: bag, b: linear.weight, out: projected, epilogue });
                norms.push(norm(ctx, layer_norm, projected, stats, input.tokens));
            }
            inputs.push(input);
        }
        matmul::forward(ctx.device, &products)?;
        layer_norm::forward(ctx.device, &norms)?;
        Ok(inputs)
    }

    fn fusion_weights<T: Element>(&self, arena: &Buffer) -> Weights<T> {
        Weights {
            mix: (self.mix.0.of(arena), self.mix.1.of(arena)),
            kernels: self.convolutions.map(|c| c.0.of(arena)),
            biases: self.convolutions.map(|c| c.1.of(arena)),
        }
    }

    fn grid(&self, side: usize) -> Grid {
        match self.config.fusion {
            Fusion::Conv2d => Grid::square(side),
            Fusion::Conv1d => Grid::sequence(side * side),
        }
    }

    /// Step 4, and the class token in front.
    fn fuse<T: Element>(
        &self,
        ctx: &mut Context,
        streams: [View<T>; 3],
        side: usize,
    ) -> Result<(SavedFusion<T>, View<T>)> {
        let (n, dim) = (side * side, self.config.dim);
        let convolved = ctx.arena.save(n, dim / 2)?;
        let (projected, stats) = (ctx.arena.save(n, dim)?, ctx.arena.save(n, 2)?);
        let fused = ctx.arena.save(n + 1, dim)?;
        let dropout = ctx.dropout(self.fusion_site, self.config.fusion_dropout);
        let weights = self.fusion_weights(ctx.params);
        let problem = ConvFusion { streams, weights, grid: self.grid(side), dropout, out: convolved };
        conv_fusion::forward(ctx.device, ctx.arena, &problem)?;
        let linear = ctx.linear::<T>(self.fusion_linear);
        let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
        matmul::forward(ctx.device, &[Matmul { a: convolved, b: linear.weight, out: projected, epilogue }])?;
        layer_norm::forward(ctx.device, &[norm(ctx, self.fusion_norm, projected, stats, fused.rows_range(1..n + 1))])?;
        elementwise::sum(ctx.device, &[self.class_token.of(ctx.params)], fused.rows_range(0..1))?;
        Ok((SavedFusion { streams, convolved, projected, stats }, fused))
    }

    /// Adds the parameters' gradients of one slide to `ctx.grads`. `inputs` receives the bags' gradients, which training does not need.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Saved<'_, T>,
        start: Start,
        inputs: Option<Bags<'_, T>>,
    ) -> Result<()> {
        let (side, dim) = (saved.side, self.config.dim);
        let n = side * side;
        let before = ctx.arena.mark();
        let mut dstreams = Vec::new();
        for _ in 0..3 {
            dstreams.push(ctx.arena.scratch(n, dim)?);
        }

        let after_streams = ctx.arena.mark();
        let gradient = ctx.arena.scratch(n + 1, dim)?;
        let linear = ctx.linear::<T>(self.head);
        let head_grad = HeadGrad {
            forward: saved.head,
            dlogits: saved.dlogits,
            dx: gradient.rows_range(0..1),
            dnorm_weight: self.last_norm.weight.of(ctx.grads),
            dnorm_bias: self.last_norm.bias.of(ctx.grads),
            dweight: linear.dweight,
            dbias: linear.dbias,
        };
        match start {
            Start::Dlogits => head::backward(ctx.device, ctx.arena, &head_grad)?,
            Start::Loss(loss, result) => head::train(ctx.device, ctx.arena, &head_grad, loss, result)?,
        }
        let dfused = PadTransformer::backward(ctx, &[&self.last], saved.last, side, &[gradient])?[0];
        self.fuse_backward(ctx, &saved.fusion, side, dfused, [dstreams[SOURCE], dstreams[FINE], dstreams[COARSE]])?;
        ctx.arena.release_scratch(after_streams);

        let norms = saved.norms.iter().zip(&dstreams).enumerate();
        let norms = norms.map(|(scale, (&(x, stats), &dy))| norm_grad(ctx, self.norms[scale], x, stats, dy, dy));
        let norms: Vec<_> = norms.collect();
        layer_norm::backward(ctx.device, ctx.arena, &norms)?;
        ctx.arena.release_saved(saved.before_norms);
        let group: Vec<_> = self.transformers.iter().collect();
        let dencoded = PadTransformer::backward(ctx, &group, saved.transformers, side, &dstreams)?;

        let x = saved.source.tokens;
        let dout = [dencoded[COARSE], dencoded[FINE]].map(|dx| dx.rows_range(0..x.rows()));
        let dx = scratch(ctx, &[x; 2], dim)?;
        let dsource = ctx.arena.scratch(x.rows(), dim)?;
        let dbags = inputs.map(|d| [d.x5.view(), d.x20.view(), Some(d.x10)].map(|view| view.unwrap_or(d.x10)));
        let mut held = Vec::new();
        let mut dtokens = Vec::new();
        match saved.contexts {
            Contexts::Held(contexts) => {
                let tokens: Vec<_> = contexts.iter().map(|input| input.tokens).collect();
                dtokens = scratch(ctx, &tokens, dim)?;
                let layers: Vec<_> = self.cross.iter().collect();
                let grads =
                    (0..2).map(|g| LayerGrad { x, context: tokens[g], dout: dout[g], dx: dx[g], dcontext: dtokens[g] });
                let grads: Vec<_> = grads.collect();
                layer::backward(ctx, &layers, &saved.cross, &grads, false)?;
                held = contexts;
            }
            Contexts::Streamed(stream) => {
                self.cross_streamed_backward(ctx, (&saved.cross, x), &stream, &dout, &dx, dbags)?;
            }
        }
        ctx.arena.release_saved(saved.before_cross);
        elementwise::sum(ctx.device, &[dencoded[SOURCE].rows_range(0..x.rows()), dx[0], dx[1]], dsource)?;
        held.push(saved.source);
        dtokens.push(dsource);
        let dbags = dbags.map(|dbags| held.iter().map(|input| dbags[input.scale]).collect::<Vec<_>>());
        self.project_backward(ctx, &held, &dtokens, dbags.as_deref())?;
        ctx.arena.release_scratch(before);
        Ok(())
    }

    fn fuse_backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: &SavedFusion<T>,
        side: usize,
        dfused: View<T>,
        dstreams: [View<T>; 3],
    ) -> Result<()> {
        let n = side * side;
        elementwise::accumulate(ctx.device, dfused.rows_range(0..1), self.class_token.of(ctx.grads))?;
        let dprojected = dfused.rows_range(1..n + 1);
        layer_norm::backward(
            ctx.device,
            ctx.arena,
            &[norm_grad(ctx, self.fusion_norm, saved.projected, saved.stats, dprojected, dprojected)],
        )?;
        let linear = ctx.linear::<T>(self.fusion_linear);
        let weight_grad = WeightGrad { dy: dprojected, x: saved.convolved, dw: linear.dweight, db: linear.dbias };
        matmul::backward_weight(ctx.device, ctx.arena, &[weight_grad])?;
        let dconvolved = ctx.arena.scratch(n, self.config.dim / 2)?;
        let product = Matmul { a: dprojected, b: linear.weight, out: dconvolved, epilogue: Epilogue::default() };
        matmul::backward_input(ctx.device, &[product])?;
        let dropout = ctx.dropout(self.fusion_site, self.config.fusion_dropout);
        let weights = self.fusion_weights(ctx.params);
        let forward =
            ConvFusion { streams: saved.streams, weights, grid: self.grid(side), dropout, out: saved.convolved };
        let grads = self.fusion_weights(ctx.grads);
        let problem = ConvFusionGrad { forward, dout: dconvolved, dstreams, grads };
        conv_fusion::backward(ctx.device, ctx.arena, &problem)
    }

    /// `dtokens` are overwritten; `dbags` receives the bags' gradients.
    pub(super) fn project_backward<T: Element>(
        &self,
        ctx: &mut Context,
        inputs: &[Input<T>],
        dtokens: &[View<T>],
        dbags: Option<&[View<T>]>,
    ) -> Result<()> {
        // where the ops write dbags: not the host's memory, if they are kernels
        let mut written = dbags.map(<[_]>::to_vec);
        if let (Some(written), true) = (&mut written, ctx.device.runs_kernels()) {
            for x in written {
                *x = ctx.arena.scratch(x.rows(), x.cols())?;
            }
        }
        let (mut norms, mut weights, mut products) = (Vec::new(), Vec::new(), Vec::new());
        for (i, input) in inputs.iter().enumerate() {
            let (dy, dx) = (dtokens[i], written.as_ref().map(|written| written[i]));
            let (Some((linear, layer_norm)), Some(saved)) = (self.projections[input.scale], &input.projection) else {
                if let Some(dx) = dx {
                    elementwise::sum(ctx.device, &[dy], dx)?;
                }
                continue;
            };
            let linear = ctx.linear::<T>(linear);
            norms.push(norm_grad(ctx, layer_norm, saved.projected, saved.stats, dy, dy));
            weights.push(WeightGrad { dy, x: input.bag, dw: linear.dweight, db: linear.dbias });
            if let Some(dx) = dx {
                products.push(Matmul { a: dy, b: linear.weight, out: dx, epilogue: Epilogue::default() });
            }
        }
        layer_norm::backward(ctx.device, ctx.arena, &norms)?;
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        matmul::backward_input(ctx.device, &products)?;
        if let (Some(dbags), Some(written), true) = (dbags, written, ctx.device.runs_kernels()) {
            for (dbag, written) in dbags.iter().zip(written) {
                // SAFETY: the bags' gradients borrow host memory for writing.
                unsafe { dbag.slice_mut() }.copy_from_slice(&ctx.device.download(written)?);
            }
        }
        Ok(())
    }
}
