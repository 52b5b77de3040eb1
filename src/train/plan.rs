//! What a step on a slide takes: found by running the model's own code on the device that only
//! counts, before there is an engine or any memory.

use std::{
    collections::{HashMap, HashSet},
    marker::PhantomData,
    ops::Range,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use bytesize::ByteSize;
use serde::Serialize;

use crate::{
    Error, Result,
    data::dataset::{Dataset, Reading},
    device::{Arena, Device, Dry, Element, Facts, Launch},
    loss::{Loss, Target},
    model::{
        Bag, BagSizes, Bags, Config, Context, MOST_PATCHES, Model, Network, Policy, ReadPatches, Room, STREAM_BUFFERS,
        Scales, each,
    },
    ops::{
        Draw,
        adam::{self, Adam},
        elementwise,
        head::{self, SlideLoss},
    },
};

/// How an engine decides what a pass keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Memory {
    /// One policy, for all slides.
    Policy(Policy),
    /// The policy of the fewest operations whose [`Plan::peak_bytes`] are at most so many, for each
    /// slide.
    Budget(usize),
}

impl Memory {
    /// Within a budget, or keeping everything.
    pub fn new(budget: Option<ByteSize>) -> Self {
        budget.map_or(Self::Policy(Policy::KEEP), |bytes| Self::Budget(bytes.as_u64() as usize))
    }
}

/// What a step on one slide takes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// What is kept and what is computed again; which bags are read part by part.
    pub policy: Policy,
    /// What the step's peak is made of.
    pub parts: Parts,
    /// Exact size of the step's arena.
    pub arena_bytes: usize,
    /// Of each of the two rooms that a GPU keeps whole bags in.
    pub room_bytes: usize,
    /// Operations of the forward pass; a multiply-add is two.
    pub forward_flop: f64,
    /// Forward and backward.
    pub step_flop: f64,
    /// Kernels launched, where the device runs kernels.
    pub launches: usize,
}

/// Bytes of a step's peak.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Parts {
    /// With the weights that the ops read.
    pub parameters: usize,
    /// Of the parameters alone, of the slide in hand and summed; those of activations are scratch.
    pub gradients: usize,
    /// Adam's.
    pub moments: usize,
    /// Bags that are held whole; on a GPU those of the next slide too.
    pub bags: usize,
    /// Parts of the bags that are streamed.
    pub stream: usize,
    /// Kept by forward for backward.
    pub saved: usize,
    /// What an op or a block takes for itself.
    pub scratch: usize,
}

impl Plan {
    /// What the step holds at most: of a GPU's memory, or of the process's. A process holds some 50
    /// MB besides (docs/giant-bags.md).
    pub fn peak_bytes(&self) -> usize {
        let Parts { parameters, gradients, moments, bags, stream, saved, scratch } = self.parts;
        parameters + gradients + moments + bags + stream + saved + scratch
    }
}

/// The plan of a policy, of the bags that the model reads; those that the policy streams are read
/// from files.
pub fn plan<T: Element>(facts: Facts, model: &Model, sizes: BagSizes, training: bool, policy: Policy) -> Result<Plan> {
    let patches = sizes.only(model.scales()).values().copied().max().unwrap_or(0);
    let Config { dim, layers, .. } = *model.config();
    if patches > MOST_PATCHES {
        return Err(Error::Usage(format!("a bag of {patches} patches: expected at most {MOST_PATCHES}")));
    }
    // beyond it, bytes added up would pass the arena's end, which is no memory's either
    if patches > (1 << 44) / dim / layers {
        let message = format!("{patches} patches in {layers} layers of width {dim}: no memory holds that");
        return Err(Error::Usage(message));
    }
    let dry = Device::Dry(Dry::new(facts));
    each!(model, network => plan_on::<_, T>(&dry, network, sizes, training, policy))
}

/// Every kernel launch of a training step by a policy, in order: forward, backward, and Adam, which
/// a run has once an update. Addresses are a plan's, where nothing lies.
pub(crate) fn launches<T: Element>(
    facts: Facts,
    model: &Model,
    sizes: BagSizes,
    policy: Policy,
) -> Result<Vec<Launch>> {
    let dry = Device::Dry(Dry::keeping_launches(facts));
    each!(model, network => plan_on::<_, T>(&dry, network, sizes, true, policy))?;
    let adam = Adam { learning_rate: 0.0, weight_decay: 0.0, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
    let len = model.layout().len();
    let arena = || Ok::<_, Error>(dry.alloc(len * size_of::<T::Sum>())?.view(0, 1, len));
    let (params, grads, m, v) = (arena()?, arena()?, arena()?, arena()?);
    let weights = dry.alloc(len * size_of::<T>())?.view(0, 1, len);
    adam::step::<T>(&dry, &adam, adam::Arenas { params, weights, grads, m, v }, 1)?;
    Ok(dry_of(&dry)?.launches())
}

fn dry_of(device: &Device) -> Result<&Dry> {
    let not_dry = || Error::Device("a plan is made on the device that only counts".into());
    if let Device::Dry(dry) = device { Ok(dry) } else { Err(not_dry()) }
}

fn plan_on<M: Network, T: Element>(
    device: &Device,
    model: &M,
    sizes: BagSizes,
    training: bool,
    policy: Policy,
) -> Result<Plan> {
    let (dry, sizes) = (dry_of(device)?, sizes.only(M::SCALES));
    let (len, features) = (model.layout().len(), model.config().features);
    let (params, grads) = (device.alloc(len * size_of::<T>())?, device.alloc(len * size_of::<T::Sum>())?);
    let mut arena = Arena::unlimited();
    let bag_bytes = |patches: usize| patches * features * size_of::<T>();
    let rounded = if size_of::<T>() == size_of::<T::Sum>() { 0 } else { len * size_of::<T>() };
    let mut parts = Parts {
        parameters: len * size_of::<T::Sum>() + rounded,
        gradients: 2 * len * size_of::<T::Sum>(),
        moments: 2 * len * size_of::<T::Sum>(),
        bags: 0,
        stream: 0,
        saved: 0,
        scratch: 0,
    };
    let unread = sizes.map(|_, patches| Unread(patches));
    let buffers = if device.runs_kernels() { STREAM_BUFFERS } else { 1 };
    let mut bags = Scales::default();
    for (scale, unread) in unread.iter() {
        let patches = unread.0;
        bags.insert(
            scale,
            match policy.stream.filter(|_| M::STREAMED.contains(&scale)) {
                Some(most) => {
                    parts.stream += buffers * bag_bytes(patches.min(most));
                    Bag::Reader(unread)
                }
                None => {
                    parts.bags += bag_bytes(patches);
                    Bag::Memory(device.alloc(bag_bytes(patches))?.view::<T>(0, patches, features))
                }
            },
        );
    }
    let mut room = Room::unlimited();
    let mut ctx = Context {
        device,
        arena: &mut arena,
        room: &mut room,
        params: &params,
        grads: &grads,
        draw: training.then_some(Draw { seed: 0, step: 0 }),
        training,
        policy,
        config: model.config(),
    };
    let saved = model.forward(&mut ctx, Bags::of_bags(bags))?;
    let head = model.head(&saved);
    if !training {
        head::forward(ctx.device, &head.forward)?;
    }
    let forward = dry.counts();
    if training {
        let grads = model.layout().rows::<T::Sum>(&grads);
        elementwise::zero(device, grads)?;
        let loss =
            SlideLoss { loss: Loss::NllSurv, target: Target { label: 0, censored: false }, alpha: 0.0, share: 1.0 };
        head::train(ctx.device, &head, &loss, device.alloc(16)?.view(0, 1, 2))?;
        model.backward(&mut ctx, saved, None)?;
        elementwise::accumulate(device, grads, grads)?;
    }
    let step = dry.counts();
    if device.runs_kernels() {
        parts.bags = 2 * room.used();
    }
    parts.saved = arena.saved_at_peak().saturating_sub(parts.stream); // the buffers lie on the saved stack
    parts.scratch = arena.peak() - arena.saved_at_peak();
    Ok(Plan {
        policy,
        parts,
        arena_bytes: arena.peak(),
        room_bytes: room.used(),
        forward_flop: forward.flop,
        step_flop: step.flop,
        launches: step.launches,
    })
}

/// The plan of the fewest operations that fits; of several, the one that reads the largest parts.
pub fn fit<T: Element>(facts: Facts, model: &Model, sizes: BagSizes, training: bool, budget: usize) -> Result<Plan> {
    let (mut best, mut least): (Option<Plan>, usize) = (None, usize::MAX);
    for policy in Policy::all() {
        let plan = plan::<T>(facts, model, sizes, training, policy)?;
        least = least.min(plan.peak_bytes());
        if plan.peak_bytes() <= budget && best.is_none_or(|best| plan.step_flop < best.step_flop) {
            best = Some(plan);
        }
        if policy == Policy::KEEP && best.is_some() {
            break; // nothing takes fewer
        }
    }
    best.ok_or_else(|| {
        let counts: Vec<String> = sizes.only(model.scales()).values().map(usize::to_string).collect();
        let counts = match &counts[..] {
            [first @ .., last] if !first.is_empty() => format!("{} and {last}", first.join(", ")),
            all => all.concat(),
        };
        Error::Usage(format!(
            "{counts} patches of {} features do not fit into a memory budget of {}: the least is {}MiB",
            model.config().features,
            ByteSize(budget as u64),
            least.div_ceil(1 << 20)
        ))
    })
}

/// The smallest budget that a slide of these sizes fits.
pub fn least<T: Element>(facts: Facts, model: &Model, sizes: BagSizes, training: bool) -> Result<usize> {
    let plans = Policy::all().map(|policy| plan::<T>(facts, model, sizes, training, policy));
    let peaks = plans.map(|plan| Ok(plan?.peak_bytes())).collect::<Result<Vec<_>>>()?;
    Ok(peaks.into_iter().min().unwrap_or(0))
}

/// Plans of one model, storage type, device and budget, each made once: a run's folds share them.
#[derive(Clone, Debug, Default)]
pub struct Plans(Arc<Mutex<HashMap<(BagSizes, bool), Plan>>>);

impl Plans {
    /// The plan of these sizes, made by `make` if there is none yet.
    pub(super) fn get(&self, sizes: BagSizes, training: bool, make: impl FnOnce() -> Result<Plan>) -> Result<Plan> {
        if let Some(plan) = self.lock().get(&(sizes, training)) {
            return Ok(*plan);
        }
        let plan = make()?;
        self.lock().insert((sizes, training), plan);
        Ok(plan)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<(BagSizes, bool), Plan>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All that decides what a step takes, without an engine or its memory.
pub struct Planner<T> {
    facts: Facts,
    pub(super) model: Model,
    pub(super) memory: Memory,
    plans: Plans,
    element: PhantomData<T>,
}

impl<T: Element> Planner<T> {
    /// `plans` are those that were made before of the same.
    pub fn new(facts: Facts, model: Model, memory: Memory, plans: Plans) -> Self {
        Self { facts, model, memory, plans, element: PhantomData }
    }

    /// From now on plans follow another rule.
    pub(super) fn set_memory(&mut self, memory: Memory, plans: Plans) {
        (self.memory, self.plans) = (memory, plans);
    }

    /// Whether plans keep to a budget.
    pub fn has_budget(&self) -> bool {
        matches!(self.memory, Memory::Budget(_))
    }

    /// What a slide of these sizes takes. An error if it takes more than the budget by any policy.
    pub fn plan(&self, sizes: BagSizes, training: bool) -> Result<Plan> {
        let Self { facts, model, memory, .. } = self;
        self.plans.get(sizes, training, || match *memory {
            Memory::Policy(policy) => plan::<T>(*facts, model, sizes, training, policy),
            Memory::Budget(bytes) => fit::<T>(*facts, model, sizes, training, bytes),
        })
    }

    /// The smallest budget that a slide of these sizes fits.
    pub fn least_budget(&self, sizes: BagSizes, training: bool) -> Result<usize> {
        least::<T>(self.facts, &self.model, sizes, training)
    }

    /// How slides are read, each for training or for evaluation. Where bags lie in the memory that
    /// a budget is for, none is read ahead.
    pub fn reading(&self, dataset: &Dataset, slides: &[(usize, bool)], ahead: usize) -> Result<Reading> {
        let mut reading = Reading { ahead, streamed: HashSet::new(), scales: self.model.streamed() };
        for &(slide, training) in slides {
            let Ok(plan) = self.plan(dataset.sizes[slide], training) else {
                return Err(self.refusal(dataset, slides));
            };
            if plan.policy.stream.is_some() {
                reading.streamed.insert(slide);
            }
        }
        if self.has_budget() && !self.facts.runs_kernels {
            reading.ahead = 0;
        }
        Ok(reading)
    }

    /// Names the slide that needs the largest budget, which then is enough for all.
    fn refusal(&self, dataset: &Dataset, slides: &[(usize, bool)]) -> Error {
        let least =
            |&&(slide, training): &&(usize, bool)| self.least_budget(dataset.sizes[slide], training).unwrap_or(0);
        let Some(&(slide, training)) = slides.iter().max_by_key(least) else {
            return Error::Usage("no slides".into());
        };
        let e = self.plan(dataset.sizes[slide], training).err().map_or(String::new(), |e| e.to_string());
        Error::Usage(format!("--memory-budget: slide {}: {e}", dataset.slides[slide].slide_id))
    }
}

/// A bag that plans speak of.
struct Unread(usize);

impl<T> ReadPatches<T> for Unread {
    fn patches(&self) -> usize {
        self.0
    }

    fn read(&self, _: Range<usize>, _: &mut [T]) -> Result<()> {
        Ok(())
    }
}
