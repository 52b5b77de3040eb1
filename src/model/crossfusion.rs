//! CrossFusion (Soraki et al. 2026, fig. 1): three bags in, survival logits out, and the way back.

use std::marker::PhantomData;

use super::{
    Config, Context, Fusion,
    layer::{self, Layer, LayerGrad, Names, SavedLayer, norm, norm_grad, sites},
    params::{Layout, Linear, Norm, Param},
    transformer::{PadTransformer, SavedTransformer, transformer_sites},
};
use crate::{
    Error, Result,
    device::{Element, Mark, View},
    ops::{
        conv_fusion::{self, ConvFusion, ConvFusionGrad, Grid, Weights},
        elementwise,
        head::{self, Head, HeadGrad},
        layer_norm,
        matmul::{self, Epilogue, Matmul, WeightGrad},
    },
};

/// A slide's patch features at 5x, 10x and 20x, `[M5, F]`, `[N, F]`, `[M20, F]`, borrowed from host memory.
#[derive(Clone, Copy, Debug)]
pub struct Bags<'a, T> {
    pub(crate) x5: View<T>,
    pub(crate) x10: View<T>,
    pub(crate) x20: View<T>,
    owner: PhantomData<&'a [T]>,
}

impl<'a, T: Element> Bags<'a, T> {
    /// Row-major features of x5, x10 and x20, `features` values a patch.
    pub fn new(bags: [&'a [T]; 3], features: usize) -> Result<Self> {
        // SAFETY: `owner` keeps the slices borrowed as long as the views can be reached.
        let view = |x: &[T]| Ok::<_, Error>(unsafe { View::of_slice(x, patches(x, features)?, features) });
        let [x5, x10, x20] = bags;
        Ok(Self::of_views(view(x5)?, view(x10)?, view(x20)?))
    }

    /// Memory that receives the bags' gradients.
    pub fn new_mut(bags: [&'a mut [T]; 3], features: usize) -> Result<Self> {
        // SAFETY: as above.
        let view = |x: &mut [T]| Ok::<_, Error>(unsafe { View::of_slice_mut(x, patches(x, features)?, features) });
        let [x5, x10, x20] = bags;
        Ok(Self::of_views(view(x5)?, view(x10)?, view(x20)?))
    }

    /// Views that the caller keeps alive.
    pub(crate) fn of_views(x5: View<T>, x10: View<T>, x20: View<T>) -> Self {
        Self { x5, x10, x20, owner: PhantomData }
    }
}

/// Rows of `features` values in a bag.
fn patches<T>(bag: &[T], features: usize) -> Result<usize> {
    if features == 0 || !bag.len().is_multiple_of(features) {
        let message =
            format!("a bag of {} values: expected a whole number of patches of {features} features", bag.len());
        return Err(Error::Usage(message));
    }
    Ok(bag.len() / features)
}

// The three scales, in the order of the arrays below. The names in a checkpoint start with these letters.
const COARSE: usize = 0;
const FINE: usize = 1;
const SOURCE: usize = 2;
const LETTERS: [&str; 3] = ["c", "f", "s"];

pub struct CrossFusion {
    pub config: Config,
    pub layout: Layout,
    class_token: Param,
    /// None where features are as wide as the model.
    projections: [Option<(Linear, Norm)>; 3],
    /// Of the coarse and the fine context.
    cross: [Layer; 2],
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
pub struct Saved<T: Element> {
    /// x5, x20, x10
    bags: [View<T>; 3],
    side: usize,
    projections: SavedProjections<T>,
    tokens: [View<T>; 3],
    before_cross: Mark,
    cross: Vec<SavedLayer<T>>,
    transformers: SavedTransformer<T>,
    before_norms: Mark,
    /// Inputs and statistics of the streams' norms.
    norms: Vec<(View<T>, View<T::Sum>)>,
    fusion: SavedFusion<T>,
    last: SavedTransformer<T>,
    head: Head<T>,
    /// `[1, n_classes]`
    pub logits: View<T::Sum>,
}

/// None where a bag is its own projection.
type SavedProjections<T> = [Option<SavedProjection<T>>; 3];

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

    /// Logits `[1, n_classes]`, and all that backward needs.
    pub fn forward<T: Element>(&self, ctx: &mut Context, bags: Bags<'_, T>) -> Result<Saved<T>> {
        let inputs = [ctx.stage(bags.x5)?, ctx.stage(bags.x20)?, ctx.stage(bags.x10)?];
        for (x, name) in inputs.iter().zip(["x5", "x20", "x10"]) {
            x.check("CrossFusion", name, &[x.rows().max(1), self.config.features])?;
        }
        let n0 = bags.x10.rows();
        let side = (1..).find(|side| side * side >= n0).unwrap_or(n0);
        let (n, dim) = (side * side, self.config.dim);

        let (projections, tokens) = self.project(ctx, inputs)?;
        let before_cross = ctx.arena.mark();
        let layers: Vec<_> = self.cross.iter().collect();
        let (cross, crossed) = layer::forward(ctx, &layers, &[tokens[SOURCE]; 2], &tokens[..2])?;

        let group: Vec<_> = self.transformers.iter().collect();
        let (transformers, encoded) =
            PadTransformer::forward(ctx, &group, &[crossed[COARSE], crossed[FINE], tokens[SOURCE]], (n, side), n)?;

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
        let logits = ctx.arena.save(1, self.config.n_classes)?;
        let head = Head {
            norm: norm(ctx, self.last_norm, out[0], stats, normed),
            weight: linear.weight,
            bias: linear.bias,
            logits,
        };
        head::forward(ctx.device, &head)?;
        Ok(Saved {
            bags: inputs,
            side,
            projections,
            tokens,
            before_cross,
            cross,
            transformers,
            before_norms,
            norms,
            fusion,
            last,
            head,
            logits,
        })
    }

    /// Step 1: Linear and LayerNorm of each bag.
    fn project<T: Element>(
        &self,
        ctx: &mut Context,
        inputs: [View<T>; 3],
    ) -> Result<(SavedProjections<T>, [View<T>; 3])> {
        let mut tokens = inputs;
        let mut saved = [None, None, None];
        let (mut products, mut norms) = (Vec::new(), Vec::new());
        for scale in 0..3 {
            let Some((linear, layer_norm)) = self.projections[scale] else { continue };
            let (rows, dim) = (inputs[scale].rows(), self.config.dim);
            let (projected, stats) = (ctx.arena.save(rows, dim)?, ctx.arena.save(rows, 2)?);
            tokens[scale] = ctx.arena.save(rows, dim)?;
            let linear = ctx.linear::<T>(linear);
            let epilogue = Epilogue { bias: Some(linear.bias), ..Default::default() };
            products.push(Matmul { a: inputs[scale], b: linear.weight, out: projected, epilogue });
            norms.push(norm(ctx, layer_norm, projected, stats, tokens[scale]));
            saved[scale] = Some(SavedProjection { projected, stats });
        }
        matmul::forward(ctx.device, &products)?;
        layer_norm::forward(ctx.device, &norms)?;
        Ok((saved, tokens))
    }

    fn fusion_weights<T: Element>(&self, arena: &crate::device::Buffer) -> Weights<T> {
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

    /// Adds the parameters' gradients of one slide to `ctx.grads`, from the loss's gradient in the logits. `inputs` receives the bags'
    /// gradients, which training does not need.
    pub fn backward<T: Element>(
        &self,
        ctx: &mut Context,
        saved: Saved<T>,
        dlogits: &[T::Sum],
        inputs: Option<Bags<'_, T>>,
    ) -> Result<()> {
        if dlogits.len() != self.config.n_classes {
            let (got, expected) = (vec![1, dlogits.len()], vec![1, self.config.n_classes]);
            return Err(Error::Shape { op: "CrossFusion backward", tensor: "dlogits".into(), got, expected });
        }
        let (side, dim) = (saved.side, self.config.dim);
        let n = side * side;
        let start = ctx.arena.mark();
        let mut dstreams = Vec::new();
        for _ in 0..3 {
            dstreams.push(ctx.arena.scratch(n, dim)?);
        }

        let after_streams = ctx.arena.mark();
        let gradient = ctx.arena.scratch(n + 1, dim)?;
        let dlogits_view = ctx.arena.scratch(1, dlogits.len())?;
        ctx.device.upload(dlogits, dlogits_view)?;
        let linear = ctx.linear::<T>(self.head);
        let head_grad = HeadGrad {
            forward: saved.head,
            dlogits: dlogits_view,
            dx: gradient.rows_range(0..1),
            dnorm_weight: self.last_norm.weight.of(ctx.grads),
            dnorm_bias: self.last_norm.bias.of(ctx.grads),
            dweight: linear.dweight,
            dbias: linear.dbias,
        };
        head::backward(ctx.device, ctx.arena, &head_grad)?;
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

        let n0 = saved.bags[SOURCE].rows();
        let dtokens = saved.bags.map(|x| ctx.arena.scratch(x.rows(), dim));
        let [coarse, fine, source] = dtokens;
        let dtokens = [coarse?, fine?, source?];
        let layers: Vec<_> = self.cross.iter().collect();
        let mut grads = Vec::new();
        for scale in [COARSE, FINE] {
            grads.push(LayerGrad {
                x: saved.tokens[SOURCE],
                context: saved.tokens[scale],
                dout: dencoded[scale].rows_range(0..n0),
                dx: ctx.arena.scratch(n0, dim)?,
                dcontext: dtokens[scale],
            });
        }
        layer::backward(ctx, &layers, &saved.cross, &grads, false)?;
        ctx.arena.release_saved(saved.before_cross);
        elementwise::sum(ctx.device, &[dencoded[SOURCE].rows_range(0..n0), grads[0].dx, grads[1].dx], dtokens[SOURCE])?;
        self.project_backward(ctx, &saved.bags, &saved.projections, dtokens, inputs)?;
        ctx.arena.release_scratch(start);
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
        let weight_grad = WeightGrad { dy: dprojected, x: saved.convolved, dw: linear.dweight, db: Some(linear.dbias) };
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

    fn project_backward<T: Element>(
        &self,
        ctx: &mut Context,
        bags: &[View<T>; 3],
        saved: &SavedProjections<T>,
        dtokens: [View<T>; 3],
        inputs: Option<Bags<'_, T>>,
    ) -> Result<()> {
        let dbags = inputs.map(|d| [d.x5, d.x20, d.x10]);
        // where the ops write these: not the host's memory, if they are kernels
        let mut written = dbags;
        if let (Some(written), true) = (&mut written, ctx.device.runs_kernels()) {
            for x in written {
                *x = ctx.arena.scratch(x.rows(), x.cols())?;
            }
        }
        let (mut norms, mut weights, mut products) = (Vec::new(), Vec::new(), Vec::new());
        for (scale, x) in bags.iter().copied().enumerate() {
            let dy = dtokens[scale];
            let (Some((linear, layer_norm)), Some(saved)) = (self.projections[scale], &saved[scale]) else {
                if let Some(written) = written {
                    elementwise::sum(ctx.device, &[dy], written[scale])?;
                }
                continue;
            };
            let linear = ctx.linear::<T>(linear);
            norms.push(norm_grad(ctx, layer_norm, saved.projected, saved.stats, dy, dy));
            weights.push(WeightGrad { dy, x, dw: linear.dweight, db: Some(linear.dbias) });
            if let Some(written) = written {
                products.push(Matmul { a: dy, b: linear.weight, out: written[scale], epilogue: Epilogue::default() });
            }
        }
        layer_norm::backward(ctx.device, ctx.arena, &norms)?;
        matmul::backward_weight(ctx.device, ctx.arena, &weights)?;
        matmul::backward_input(ctx.device, &products)?;
        if let (Some(dbags), Some(written), true) = (dbags, written, ctx.device.runs_kernels()) {
            for (dbag, written) in dbags.into_iter().zip(written) {
                // SAFETY: the bags' gradients borrow host memory for writing.
                unsafe { dbag.slice_mut() }.copy_from_slice(&ctx.device.download(written)?);
            }
        }
        Ok(())
    }
}
