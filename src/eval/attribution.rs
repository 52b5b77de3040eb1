//! What each patch of a slide contributes to its risk, at every scale.
//!
//! | | a patch's score | passes |
//! |---|---|---|
//! | [`gradient`] | sum over its features x of (x - baseline) d risk / d x | one training step |
//! | [`integrated`] | the same, of the gradient's mean from the baseline to x | a step for each point |
//! | [`attention`] | the attention that it receives | a forward pass and attention once more |
//! | [`occlusion`] | its share of what the risk loses without its region | one forward for each region |
//!
//! The first two are in the unit of the risk and have a sign: above 0 a patch raises the risk.
//! Integrated gradients (Sundararajan et al. 2017) sum up to the risk less that of the baseline,
//! which is how well they can be told: [`Integrated::error`]. Occlusion asks the model itself, and
//! so checks the others: [`rank_correlation`]. docs/heatmaps.md says what all this does not mean.
//!
//! A bag is read anew for every pass, so that no more of it is in memory than a step takes; those
//! that a memory budget streams are changed part by part on their way.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use bytesize::ByteSize;

use super::{Network, wrong_width};
use crate::{
    Error, Result,
    data::{features::FeatureFile, layout::feature_file, patches::PatchReader},
    device::{Device, Element, Real},
    loss::Prediction,
    model::{AttentionOf, Bag, BagGrads, Bags, Features, ReadPatches, Scale, Scales},
    train::step::Engine,
};

/// A value for each patch, by scale.
pub type Scores = Scales<Vec<f64>>;

/// A slide's risk, and what its patches contribute to it.
#[derive(Clone, Debug, PartialEq)]
pub struct Attribution {
    /// Higher is worse; see [`Prediction::risk`].
    pub risk: f64,
    /// Of every patch, in the order of the features.
    pub scores: Scores,
}

impl Attribution {
    /// The sum of all scores.
    pub fn total(&self) -> f64 {
        self.scores.values().flatten().sum()
    }
}

/// What a method takes that needs many passes: told when the first has been timed, and then after
/// every pass.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// Passes done, the first among them.
    pub done: usize,
    /// All passes.
    pub passes: usize,
    /// How long the rest will take, judged by the time so far and the operations of each pass.
    pub left: Duration,
}

/// What a patch is compared with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Baseline {
    /// The slide's mean patch of the scale: what makes this patch different? As occlusion asks it.
    #[default]
    Mean,
    /// Features of zero. Behind the norm of its projection a model cares little for the length of a
    /// patch's features, along which gradient times input then goes: little is left of it but what
    /// the biases make, and integrated gradients need many points near zero.
    Zero,
}

impl Baseline {
    /// A row `[features]` for each scale that the model reads.
    fn rows<T: Element>(self, engine: &Engine<T>, bags: Bags<'_, T>) -> Result<Scales<Vec<T>>> {
        let (features, scales) = (engine.model().config().features, engine.model().scales());
        match self {
            Self::Mean => means(engine, bags),
            Self::Zero => Ok(scales.iter().map(|&scale| (scale, vec![T::default(); features])).collect()),
        }
    }
}

/// Gradient times input: the gradient of the risk, without dropout, by the engine's own backward
/// pass, which also adds to the gradients of the parameters. A patch's product of `[features]` with
/// `[features]` is formed without that gradient ([`BagGrads::products`]), so this takes the time and
/// the memory of a training step.
pub fn gradient<T: Element>(engine: &mut Engine<T>, bags: Bags<'_, T>, baseline: Baseline) -> Result<Attribution> {
    let baseline = baseline.rows(engine, bags)?;
    pass(engine, bags, true, &|_, _, _| (), |engine, bags| contributions(engine, bags, &baseline))
}

fn contributions<T: Element>(
    engine: &mut Engine<T>,
    bags: Bags<'_, T>,
    baseline: &Scales<Vec<T>>,
) -> Result<Attribution> {
    let mut scores = bags.sizes().map(|_, patches| vec![0.0; patches]);
    let of_scale = |((scale, out), baseline)| (scale, (baseline, out));
    let products =
        scores.iter_mut().map(|(scale, out)| (scale, &mut out[..])).zip(baseline.values().map(|row| &row[..]));
    let products = BagGrads::products(products.map(of_scale).collect::<Scales<_>>());
    let gradient = |logits: &[f64]| Prediction::from_logits(logits).risk_gradient();
    let logits = engine.accumulate(bags, None, Some(products), gradient)?;
    Ok(Attribution { risk: risk(&logits)?, scores })
}

/// Integrated gradients.
#[derive(Clone, Debug, PartialEq)]
pub struct Integrated {
    /// Its scores sum up to `risk - baseline`, but for [`Self::error`].
    pub attribution: Attribution,
    /// The risk of a slide all of whose patches are the baseline.
    pub baseline: f64,
}

impl Integrated {
    /// By how much the scores miss what they should sum up to, `risk - baseline`.
    pub fn error(&self) -> f64 {
        self.attribution.total() - (self.attribution.risk - self.baseline)
    }
}

/// Integrated gradients along the straight line from the baseline, by the Gauss-Legendre rule of so
/// many points.
pub fn integrated<T: Element>(
    engine: &mut Engine<T>,
    bags: Bags<'_, T>,
    baseline: Baseline,
    points: usize,
    tell: &mut dyn FnMut(Progress),
) -> Result<Integrated> {
    if points == 0 {
        return Err(Error::Usage("integrated gradients by 0 points: expected at least 1".into()));
    }
    // The line is walked at t^power, t from 0 to 1, which is the same integral: from zero features
    // most of the change is at the very beginning.
    let power = if baseline == Baseline::Zero { 4 } else { 1 };
    let rows = baseline.rows(engine, bags)?;
    // x at a share of the way
    let at = |share: f64| {
        let rows = &rows;
        move |scale: Scale, _: Range<usize>, x: &mut [T]| {
            let Some(row) = rows.get(scale) else { return };
            let number = |x: T| x.to_sum().f64();
            for (x, &from) in x.iter_mut().zip(row.iter().cycle()) {
                *x = T::from_sum(T::Sum::of(number(from) + share * (number(*x) - number(from))));
            }
        }
    };
    let mut clock = Clock::start(2 + points);
    let whole = evaluate(engine, bags, &|_, _, _| ())?;
    clock.cost(engine, bags, points)?;
    clock.passed(tell);
    let baseline = evaluate(engine, bags, &at(0.0))?;
    clock.passed(tell);
    let mut scores = bags.sizes().only(engine.model().scales()).map(|_, patches| vec![0.0; patches]);
    for (t, weight) in gauss_legendre(points) {
        // (x - r) dt^power / dt = power / t times the way from r that there is at t
        let weight = weight * f64::from(power) / t;
        let found = pass(engine, bags, true, &at(t.powi(power)), |engine, bags| contributions(engine, bags, &rows))?;
        for ((_, sums), found) in scores.iter_mut().zip(found.scores.values()) {
            sums.iter_mut().zip(found).for_each(|(sum, found)| *sum += weight * found);
        }
        clock.passed(tell);
    }
    Ok(Integrated { attribution: Attribution { risk: whole, scores }, baseline })
}

/// The attention that each patch receives, averaged over the heads, at the scales that are attended
/// to. It has no sign, and says nothing of the risk.
pub fn attention<T: Element>(engine: &mut Engine<T>, bags: Bags<'_, T>, of: AttentionOf) -> Result<Attribution> {
    pass(engine, bags, true, &|_, _, _| (), |engine, bags| {
        let (logits, scores) = engine.attention(bags, of)?;
        Ok(Attribution { risk: risk(&logits)?, scores })
    })
}

/// Patches that are taken out together, by scale.
pub type Region = Scales<Vec<usize>>;

/// What occlusion found.
#[derive(Clone, Debug, PartialEq)]
pub struct Occlusion {
    /// A region's effect is shared out evenly among its patches. A patch that is in no region has
    /// 0.
    pub attribution: Attribution,
    /// Of each region: the risk less the risk without it.
    pub effects: Vec<f64>,
}

/// Takes each region's patches out and evaluates the slide again. A patch is taken out by giving it
/// the slide's mean features of its scale: the number of patches stays, and so the place of all
/// others in the square of tokens.
pub fn occlusion<T: Element>(
    engine: &mut Engine<T>,
    bags: Bags<'_, T>,
    regions: &[Region],
    tell: &mut dyn FnMut(Progress),
) -> Result<Occlusion> {
    let means = means(engine, bags)?;
    let mut clock = Clock::start(1 + regions.len());
    let whole = evaluate(engine, bags, &|_, _, _| ())?;
    clock.passed(tell);
    let mut scores = bags.sizes().only(engine.model().scales()).map(|_, patches| vec![0.0; patches]);
    let mut effects = Vec::new();
    for region in regions {
        let features = engine.model().config().features;
        let replace = |scale: Scale, rows: Range<usize>, x: &mut [T]| {
            let (Some(patches), Some(mean)) = (region.get(scale), means.get(scale)) else { return };
            for patch in patches.iter().filter(|patch| rows.contains(patch)) {
                x[(patch - rows.start) * features..][..features].copy_from_slice(mean);
            }
        };
        let effect = whole - evaluate(engine, bags, &replace)?;
        let of_model = |&(scale, _): &(Scale, &Vec<usize>)| means.get(scale).is_some();
        let patches: usize = region.iter().filter(of_model).map(|(_, patches)| patches.len()).sum();
        for (scale, sums) in scores.iter_mut() {
            for &patch in region.get(scale).into_iter().flatten() {
                sums[patch] += effect / patches as f64;
            }
        }
        effects.push(effect);
        clock.passed(tell);
    }
    Ok(Occlusion { attribution: Attribution { risk: whole, scores }, effects })
}

/// How patches are scored.
#[derive(Clone, Copy, Debug)]
pub enum Method<'a> {
    /// [`gradient`]
    Gradient(Baseline),
    /// [`integrated`], by so many points.
    Integrated(Baseline, usize),
    /// [`attention`]
    Attention(AttentionOf),
    /// [`occlusion`]
    Occlusion(&'a [Region]),
}

/// A slide, and the models that it is explained by: one, or the folds of a run together.
pub struct Explainer {
    models: Vec<PathBuf>,
    heads: Option<usize>,
    engine: Engine<f32>,
    readers: Scales<PatchReader>,
}

/// What the models say on the mean. That is exact: a run's risk is the mean of its models' risks.
#[derive(Clone, Debug, PartialEq)]
pub struct Explanation {
    /// The mean risk, and the means of the scores.
    pub attribution: Attribution,
    /// Of integrated gradients: by how much their sum misses the risk less the baseline's, and that
    /// difference itself.
    pub completeness: Option<[f64; 2]>,
    /// Of occlusion: the effect of each region.
    pub effects: Vec<f64>,
}

impl Explainer {
    /// Finds the slide's features, in one of the layouts of [`crate::data::layout`], and the models
    /// as [`super::predict::Request`] names them.
    pub fn open(
        (model, heads): (&Path, Option<usize>),
        (pt_dir, backbone): (&Path, &str),
        slide_id: &str,
        device: Device,
        budget: Option<ByteSize>,
    ) -> Result<Self> {
        let models = super::predict::models(model)?;
        let Some(path) = models.first() else { return Err(Error::file(model, "has no model")) };
        let network = Network::read(path, heads)?;
        let mut readers = Scales::default();
        for &scale in network.config.model.scales() {
            let Some(file) = feature_file(pt_dir, backbone, scale, slide_id)? else {
                let message = format!("has no features of slide `{slide_id}` by `{backbone}` at {scale}");
                return Err(Error::file(pt_dir, message));
            };
            let opened = FeatureFile::open(&file)?;
            if opened.features() != network.config.features {
                return Err(wrong_width(path, network.config.features, backbone, opened.features()));
            }
            let (patches, features) = (opened.patches(), opened.features());
            readers.insert(scale, PatchReader { path: file, patches, features });
        }
        let engine = network.engine(path, device, budget)?;
        Ok(Self { models, heads, engine, readers })
    }

    /// The files of the features, at the scales that the model reads.
    pub fn readers(&self) -> &Scales<PatchReader> {
        &self.readers
    }

    /// How many models are averaged.
    pub fn models(&self) -> usize {
        self.models.len()
    }

    /// Scores the patches. Integrated gradients and occlusion tell what they will take.
    pub fn explain(&mut self, method: Method<'_>, tell: &mut dyn FnMut(Progress)) -> Result<Explanation> {
        let Self { models, heads, engine, readers } = self;
        let (n, features) = (models.len(), engine.model().config().features);
        let mut mean: Option<Explanation> = None;
        for (i, path) in models.iter().enumerate() {
            let network = Network::read(path, *heads)?;
            if network.config != *engine.model().config() {
                return Err(Error::file(path, format!("is of other settings than {}", models[0].display())));
            }
            super::load(engine, path, &network.tensors)?;
            let started = Instant::now();
            let mut tell = |p: Progress| {
                let later = (started.elapsed() + p.left) * (n - 1 - i) as u32;
                tell(Progress { done: i * p.passes + p.done, passes: n * p.passes, left: p.left + later });
            };
            let bags = Bags::of(
                readers.as_ref().map(|_, reader| Features::Reader(reader as &dyn ReadPatches<f32>)),
                features,
            )?;
            let found = explain_by_one(engine, bags, method, &mut tell)?;
            match &mut mean {
                None => mean = Some(found),
                Some(sums) => sums.add(&found),
            }
        }
        let mut mean = mean.ok_or_else(|| Error::Usage("there is no model".into()))?;
        mean.numbers().for_each(|x| *x /= n as f64);
        Ok(mean)
    }
}

fn explain_by_one(
    engine: &mut Engine<f32>,
    bags: Bags<'_, f32>,
    method: Method<'_>,
    tell: &mut dyn FnMut(Progress),
) -> Result<Explanation> {
    let of = |attribution| Explanation { attribution, completeness: None, effects: Vec::new() };
    Ok(match method {
        Method::Gradient(baseline) => of(gradient(engine, bags, baseline)?),
        Method::Integrated(baseline, points) => {
            let found = integrated(engine, bags, baseline, points, tell)?;
            let completeness = Some([found.error(), found.attribution.risk - found.baseline]);
            Explanation { completeness, ..of(found.attribution) }
        }
        Method::Attention(whose) => of(attention(engine, bags, whose)?),
        Method::Occlusion(regions) => {
            let Occlusion { attribution, effects } = occlusion(engine, bags, regions, tell)?;
            Explanation { effects, ..of(attribution) }
        }
    })
}

impl Explanation {
    /// All numbers, in one order.
    fn numbers(&mut self) -> impl Iterator<Item = &mut f64> {
        let Self { attribution: Attribution { risk, scores }, completeness, effects } = self;
        let scores = scores.iter_mut().flat_map(|(_, scores)| scores);
        std::iter::once(risk).chain(scores).chain(completeness.iter_mut().flatten()).chain(effects)
    }

    fn add(&mut self, other: &Self) {
        let mut other = other.clone();
        self.numbers().zip(other.numbers()).for_each(|(sum, x)| *sum += *x);
    }
}

/// Each region's sum of scores: what another method says that the region contributes.
pub fn by_region(scores: &Scores, regions: &[Region]) -> Vec<f64> {
    let of_scale = |(scale, patches): (Scale, &Vec<usize>)| -> f64 {
        scores.get(scale).map_or(0.0, |scores| patches.iter().map(|&patch| scores[patch]).sum())
    };
    regions.iter().map(|region| region.iter().map(of_scale).sum()).collect()
}

/// Spearman's rank correlation, ties by their mean rank; None where one of the two has no spread.
pub fn rank_correlation(a: &[f64], b: &[f64]) -> Option<f64> {
    let (a, b) = (ranks(a), ranks(b));
    let middle = (a.len() as f64 - 1.0) / 2.0;
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - middle) * (b - middle)).sum::<f64>();
    let spread = (product(&a, &a) * product(&b, &b)).sqrt();
    (spread > 0.0).then(|| product(&a, &b) / spread)
}

fn ranks(values: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&i, &j| values[i].total_cmp(&values[j]));
    let mut ranks = vec![0.0; values.len()];
    let mut first = 0;
    for tied in order.chunk_by(|&i, &j| values[i] == values[j]) {
        tied.iter().for_each(|&i| ranks[i] = first as f64 + (tied.len() - 1) as f64 / 2.0);
        first += tied.len();
    }
    ranks
}

/// Of each scale that the model reads, the mean of its patches `[features]`.
fn means<T: Element>(engine: &Engine<T>, bags: Bags<'_, T>) -> Result<Scales<Vec<T>>> {
    const ROWS: usize = 1024;
    let features = engine.model().config().features;
    let mean = |scale: Scale| {
        let bag = bags.get(scale, features)?;
        let (mut sums, mut part) = (vec![0.0; features], vec![T::default(); ROWS.min(bag.patches()) * features]);
        for start in (0..bag.patches()).step_by(ROWS) {
            let rows = start..bag.patches().min(start + ROWS);
            let part = &mut part[..rows.len() * features];
            bag.read(rows, part)?;
            for row in part.chunks_exact(features) {
                sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x.to_sum().f64());
            }
        }
        let mean = sums.iter().map(|sum| T::from_sum(T::Sum::of(sum / bag.patches() as f64)));
        Ok::<_, Error>((scale, mean.collect()))
    };
    engine.model().scales().iter().map(|&scale| mean(scale)).collect()
}

/// An error unless it is a number, since no patch can be held to account for another.
fn risk(logits: &[f64]) -> Result<f64> {
    let risk = Prediction::from_logits(logits).risk;
    match risk.is_finite() {
        true => Ok(risk),
        false => {
            Err(Error::Usage(format!("the slide's risk is {risk}: the model's weights or the features are broken")))
        }
    }
}

fn evaluate<T: Element>(engine: &mut Engine<T>, bags: Bags<'_, T>, alter: &Alter<T>) -> Result<f64> {
    pass(engine, bags, false, alter, |engine, bags| risk(&engine.evaluate(bags)?))
}

/// Changes these patches of a scale's bag, row-major.
type Alter<'a, T> = dyn Fn(Scale, Range<usize>, &mut [T]) + Sync + 'a;

/// A bag whose patches are changed as they are read.
struct Altered<'a, T: Element> {
    bag: Bag<'a, T>,
    scale: Scale,
    alter: &'a Alter<'a, T>,
}

impl<T: Element> ReadPatches<T> for Altered<'_, T> {
    fn patches(&self) -> usize {
        self.bag.patches()
    }

    fn read(&self, patches: Range<usize>, out: &mut [T]) -> Result<()> {
        self.bag.read(patches.clone(), out)?;
        (self.alter)(self.scale, patches, out);
        Ok(())
    }
}

/// Works on the bags that the model reads, changed, each in memory or to be read part by part, as
/// the plan of such a pass has it.
fn pass<T: Element, R>(
    engine: &mut Engine<T>,
    bags: Bags<'_, T>,
    training: bool,
    alter: &Alter<T>,
    work: impl FnOnce(&mut Engine<T>, Bags<'_, T>) -> Result<R>,
) -> Result<R> {
    let (features, scales) = (engine.model().config().features, engine.model().scales());
    let plan = engine.plan(bags.sizes().only(scales), training)?;
    let streamed = if plan.policy.stream.is_some() { engine.model().streamed() } else { &[] };
    let mut altered = Scales::default();
    for &scale in scales {
        let bag = Altered { bag: bags.get(scale, features)?, scale, alter };
        let mut held = Vec::new();
        if !streamed.contains(&scale) {
            held = vec![T::default(); bag.patches() * features];
            bag.read(0..bag.patches(), &mut held)?;
        }
        altered.insert(scale, (bag, held));
    }
    let of_scale = |scale, (bag, held)| match streamed.contains(&scale) {
        true => Features::Reader(bag as &dyn ReadPatches<T>),
        false => Features::Memory(held),
    };
    let bags = altered.as_ref().map(|scale, (bag, held): &(Altered<T>, Vec<T>)| of_scale(scale, (bag, held)));
    work(engine, Bags::of(bags, features)?)
}

/// Tells how long the passes will still take.
struct Clock {
    started: Instant,
    /// How long each pass takes, in forward passes.
    weights: Vec<f64>,
    done: usize,
}

impl Clock {
    fn start(passes: usize) -> Self {
        Self { started: Instant::now(), weights: vec![1.0; passes], done: 0 }
    }

    /// The last so many passes are training steps.
    fn cost<T: Element>(&mut self, engine: &Engine<T>, bags: Bags<'_, T>, steps: usize) -> Result<()> {
        let plan = engine.plan(bags.sizes().only(engine.model().scales()), true)?;
        let first = self.weights.len() - steps;
        self.weights[first..].fill(plan.step_flop / plan.forward_flop);
        Ok(())
    }

    fn passed(&mut self, tell: &mut dyn FnMut(Progress)) {
        self.done += 1;
        let (done, left) = self.weights.split_at(self.done);
        let rest = left.iter().sum::<f64>() / done.iter().sum::<f64>();
        tell(Progress { done: self.done, passes: self.weights.len(), left: self.started.elapsed().mul_f64(rest) });
    }
}

/// Points and weights on (0, 1) that integrate every polynomial of degree 2 n - 1 exactly: the
/// roots of the Legendre polynomial P_n by Newton's method from the usual first guess (Press et
/// al., Numerical Recipes, section 4.6).
fn gauss_legendre(n: usize) -> Vec<(f64, f64)> {
    let degree = n as f64;
    let point = |i: usize| {
        let mut x = (std::f64::consts::PI * (i as f64 + 0.75) / (degree + 0.5)).cos();
        let mut slope = 1.0;
        for _ in 0..100 {
            let (mut before, mut value) = (0.0, 1.0);
            for k in 0..n {
                let k = k as f64;
                (before, value) = (value, ((2.0 * k + 1.0) * x * value - k * before) / (k + 1.0));
            }
            slope = degree * (x * value - before) / (x * x - 1.0);
            let step = value / slope;
            x -= step;
            if step.abs() < 1e-15 {
                break;
            }
        }
        ((1.0 - x) / 2.0, 1.0 / ((1.0 - x * x) * slope * slope))
    };
    (0..n).map(point).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_points_integrate_polynomials_exactly() {
        for n in [1, 2, 5, 32, 64] {
            let points = gauss_legendre(n);
            for degree in [0, 1, 2 * n - 1] {
                let sum: f64 = points.iter().map(|(t, weight)| weight * t.powi(degree as i32)).sum();
                approx::assert_abs_diff_eq!(sum, 1.0 / (degree as f64 + 1.0), epsilon = 1e-14);
            }
        }
    }

    /// As scipy.stats.spearmanr has it.
    #[test]
    fn ranks_correlate_as_scipy_says() {
        let (a, b) = ([1.0, 2.0, 2.0, 4.0, 7.0, 5.0], [0.1, 0.4, 0.3, 0.3, 0.9, 2.0]);
        approx::assert_abs_diff_eq!(rank_correlation(&a, &b).unwrap(), SCIPY, epsilon = 1e-12);
        assert_eq!(rank_correlation(&a, &[3.0; 6]), None);
        assert_eq!(rank_correlation(&[1.0, 2.0], &[5.0, -5.0]), Some(-1.0));
    }
    const SCIPY: f64 = 0.8088235294117647;
}
