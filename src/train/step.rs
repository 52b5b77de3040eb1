//! One training step, from bags to updated weights. This is the place that shows the whole flow:
//!
//!   bags -> forward -> logits -> loss and its gradient -> backward -> gradients, summed over slides -> Adam -> weights
//!
//! An [`Engine`] owns a model's state on a device: parameters, gradients, Adam's moments, and one arena for a step's activations.

use std::{collections::HashMap, ops::Range};

use bytesize::ByteSize;
use serde::Serialize;

use crate::{
    Error, Result,
    data::torch::{Parameter, StateDict},
    device::{Arena, Buffer, Counts, Device, Element, Fence, Real},
    loss::{Loss, Target},
    model::{Bag, Bags, Config, Context, CrossFusion, Policy, ReadPatches, Room, STREAM_BUFFERS, Saved, Start},
    ops::{
        Draw,
        adam::{self, Adam},
        head::SlideLoss,
    },
};

pub struct Engine<T: Element> {
    pub device: Device,
    pub model: CrossFusion,
    /// What is trained, in `T::Sum`.
    params: Buffer,
    /// What the ops read: the parameters rounded to `T`. None where that is the parameters themselves.
    weights: Option<Buffer>,
    grads: Buffer,
    moments: [Buffer; 2],
    arena: Arena,
    /// Of the slide in hand and of the one before, as are `results`.
    rooms: [Room; 2],
    /// Loss and risk of a slide, f64, in memory that the host sees.
    results: [Buffer; 2],
    /// Passes so far.
    passes: usize,
    /// Slides fit the budget one by one, but not the largest arena beside the largest bags: memory is then as large as the slide in hand
    /// wants it, and given back behind it.
    tight: bool,
    /// The largest bags that memory was reserved for.
    largest_bags: usize,
    memory: Memory,
    plans: HashMap<(BagSizes, bool), Plan>,
    /// Updates so far, for Adam's bias correction.
    pub updates: u64,
    element: std::marker::PhantomData<T>,
}

/// Patches of a slide at 5x, 10x and 20x.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BagSizes {
    pub x5: usize,
    pub x10: usize,
    pub x20: usize,
}

impl BagSizes {
    pub fn total(self) -> usize {
        self.x5 + self.x10 + self.x20
    }
}

/// How an engine decides what a pass keeps.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Memory {
    Policy(Policy),
    /// The policy of the fewest operations whose [`Plan::peak_bytes`] are at most so many, for each slide.
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
    pub policy: Policy,
    pub parts: Parts,
    /// Exact size of the step's arena.
    pub arena_bytes: usize,
    /// Of each of the two rooms that a GPU keeps whole bags in.
    pub room_bytes: usize,
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
    /// What the step holds at most: of a GPU's memory, or of the process's. A process holds some 50 MB besides (docs/giant-bags.md).
    pub fn peak_bytes(&self) -> usize {
        let Parts { parameters, gradients, moments, bags, stream, saved, scratch } = self.parts;
        parameters + gradients + moments + bags + stream + saved + scratch
    }
}

/// A slide's loss and risk that the device may still work on: for [`Engine::finish`].
#[must_use]
pub struct Pending {
    turn: usize,
    done: Fence,
}

/// The arenas that [`Engine::read_state`] names, and that a checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Params,
    Grads,
    /// Adam's first and second moments.
    M,
    V,
}

impl<T: Element> Engine<T> {
    /// A fresh model, initialised from the seed.
    pub fn new(device: Device, config: &Config, seed: u64) -> Result<Self> {
        let model = CrossFusion::new(config)?;
        if device.runs_kernels() {
            config.check_for_kernels()?;
        }
        let (len, rounded) = (model.layout.len(), size_of::<T>() != size_of::<T::Sum>());
        let bytes = len * size_of::<T::Sum>();
        let engine = Self {
            params: device.alloc(bytes)?,
            weights: if rounded { Some(device.alloc(len * size_of::<T>())?) } else { None },
            grads: device.alloc(bytes)?,
            moments: [device.alloc(bytes)?, device.alloc(bytes)?],
            arena: Arena::new(&device, 0)?,
            rooms: [Room::new(&device, 0)?, Room::new(&device, 0)?],
            results: [device.alloc_shared(2 * size_of::<f64>())?, device.alloc_shared(2 * size_of::<f64>())?],
            passes: 0,
            tight: false,
            largest_bags: 0,
            memory: Memory::Policy(Policy::KEEP),
            plans: HashMap::new(),
            device,
            model,
            updates: 0,
            element: std::marker::PhantomData,
        };
        engine.model.layout.initialize::<T::Sum>(&engine.device, seed, &engine.params)?;
        engine.round_weights()?;
        Ok(engine)
    }

    fn weights(&self) -> &Buffer {
        self.weights.as_ref().unwrap_or(&self.params)
    }

    /// Brings the weights that the ops read up to date with parameters that the host has written.
    pub(super) fn round_weights(&self) -> Result<()> {
        let Some(weights) = &self.weights else { return Ok(()) };
        let params = self.device.download(self.params.flat::<T::Sum>())?;
        let rounded: Vec<T> = params.into_iter().map(T::from_sum).collect();
        self.device.upload(&rounded, weights.flat())
    }

    /// From now on.
    pub fn set_memory(&mut self, memory: Memory) {
        self.memory = memory;
        (self.tight, self.largest_bags) = (false, 0);
        self.plans.clear();
    }

    /// Logits of a slide, without dropout.
    pub fn evaluate(&mut self, bags: Bags<'_, T>) -> Result<Vec<f64>> {
        self.forward(bags, None)
    }

    /// Logits of a slide under a dropout: the very ones that [`Engine::accumulate`] finds with the same draw.
    pub fn forward(&mut self, bags: Bags<'_, T>, draw: Option<Draw>) -> Result<Vec<f64>> {
        self.pass(bags, draw, (false, false), |model, ctx, _, bags| {
            let saved = model.forward(ctx, bags)?;
            logits(model, ctx, &saved)
        })
    }

    /// Forward, `loss` (from logits to their gradient, scaled as it shall be summed), backward: adds one slide's gradients.
    /// `draw` is the slide's dropout; `inputs` receives the bags' gradients. Returns the logits.
    pub fn accumulate(
        &mut self,
        bags: Bags<'_, T>,
        draw: Option<Draw>,
        inputs: Option<Bags<'_, T>>,
        loss: impl FnOnce(&[f64]) -> Vec<f64> + Send,
    ) -> Result<Vec<f64>> {
        self.pass(bags, draw, (true, inputs.is_some()), |model, ctx, _, bags| {
            let saved = model.forward(ctx, bags)?;
            let logits = logits(model, ctx, &saved)?;
            let dlogits: Vec<T::Sum> = loss(&logits).into_iter().map(T::Sum::of).collect();
            ctx.device.upload(&dlogits, saved.dlogits)?;
            model.backward(ctx, saved, Start::Dlogits, inputs)?;
            Ok(logits)
        })
    }

    /// [`Engine::accumulate`] with a loss of the slide alone. On a GPU the host goes on while the device works: the next slide may be started
    /// before this one's loss is asked for; the one after that overwrites it.
    pub fn accumulate_loss(&mut self, bags: Bags<'_, T>, draw: Option<Draw>, loss: &SlideLoss) -> Result<Pending> {
        let turn = self.passes % 2;
        self.pass(bags, draw, (true, false), |model, ctx, result, bags| {
            let saved = model.forward(ctx, bags)?;
            model.backward(ctx, saved, Start::Loss(loss, result), None)
        })?;
        Ok(Pending { turn, done: self.device.fence()? })
    }

    /// Loss and risk of a slide, when the device is done with it.
    pub fn finish(&self, pending: Pending) -> Result<(f64, f64)> {
        self.device.wait(&pending.done)?;
        let values: Vec<f64> = bytemuck::pod_collect_to_vec(&self.device.peek(&self.results[pending.turn])?);
        Ok((values[0], values[1]))
    }

    /// Runs `work` on an empty arena that is large enough for it, also for the bags' gradients if they are wanted.
    fn pass<'a, R: Send>(
        &mut self,
        bags: Bags<'a, T>,
        draw: Option<Draw>,
        (training, inputs): (bool, bool),
        work: impl FnOnce(&CrossFusion, &mut Context<'_>, &Buffer, Bags<'a, T>) -> Result<R> + Send,
    ) -> Result<R> {
        let sizes = BagSizes { x5: bags.x5.patches(), x10: bags.x10.rows(), x20: bags.x20.patches() };
        let plan = self.plan(sizes, training || draw.is_some())?;
        let mut bytes = plan.arena_bytes;
        if inputs && self.device.runs_kernels() {
            for patches in [sizes.x5, sizes.x10, sizes.x20] {
                bytes += Arena::matrix_bytes::<T>(patches, self.model.config.features)?;
            }
        }
        if plan.policy.stream.is_none() && (bags.x5.view().is_none() || bags.x20.view().is_none()) {
            let message = "bags that are read part by part need a policy that streams them, or a memory budget";
            return Err(Error::Usage(message.into()));
        }
        self.grow(bytes, plan.room_bytes)?;
        self.arena.reset();
        let turn = self.passes % 2;
        self.passes += 1;
        let Self { device, model, arena, rooms, results, params, weights, grads, .. } = self;
        let (device, room) = (&*device, &mut rooms[turn]);
        room.clear();
        let (params, policy, config) = (weights.as_ref().unwrap_or(params), plan.policy, &model.config);
        let mut ctx = Context { device, arena, room, params, grads, draw, training, policy, config };
        let result = device.install(|| work(model, &mut ctx, &results[turn], bags));
        room.release(device)?;
        if self.tight {
            self.give_back()?;
        }
        result
    }

    /// One Adam update from the summed gradients, which are zero afterwards.
    pub fn update(&mut self, adam: &Adam) -> Result<()> {
        self.updates += 1;
        let [m, v] = &self.moments;
        let arenas = adam::Arenas {
            params: self.params.flat(),
            weights: self.weights().flat(),
            grads: self.grads.flat(),
            m: m.flat(),
            v: v.flat(),
        };
        adam::step::<T>(&self.device, adam, arenas, self.updates)
    }

    pub fn has_budget(&self) -> bool {
        matches!(self.memory, Memory::Budget(_))
    }

    /// What a slide of these sizes takes, by running the same code on the device that only counts. An error if it takes more than the
    /// budget by any policy.
    pub fn plan(&mut self, sizes: BagSizes, training: bool) -> Result<Plan> {
        if let Some(plan) = self.plans.get(&(sizes, training)) {
            return Ok(*plan);
        }
        let (device, model) = (&self.device, &self.model);
        let plan = match self.memory {
            Memory::Policy(policy) => plan::<T>(device, model, sizes, training, policy)?,
            Memory::Budget(bytes) => fit::<T>(device, model, sizes, training, bytes)?,
        };
        self.plans.insert((sizes, training), plan);
        Ok(plan)
    }

    /// The smallest budget that a slide of these sizes fits.
    pub fn least_budget(&self, sizes: BagSizes, training: bool) -> Result<usize> {
        let plans = Policy::all().map(|policy| plan::<T>(&self.device, &self.model, sizes, training, policy));
        let peaks = plans.map(|plan| Ok(plan?.peak_bytes())).collect::<Result<Vec<_>>>()?;
        Ok(peaks.into_iter().min().unwrap_or(0))
    }

    /// Makes memory large enough for slides of these sizes, so that a step need not grow it; under a budget only where that holds the largest
    /// arena and the largest bags together.
    pub fn reserve(&mut self, sizes: impl IntoIterator<Item = BagSizes>, training: bool) -> Result<()> {
        let (mut arena, mut room, mut state) = (self.arena.bytes(), self.rooms[0].bytes(), 0);
        for sizes in sizes {
            let plan = self.plan(sizes, training)?;
            (arena, room) = (arena.max(plan.arena_bytes), room.max(plan.room_bytes));
            self.largest_bags = self.largest_bags.max(plan.parts.bags);
            state = plan.parts.parameters + plan.parts.gradients + plan.parts.moments;
        }
        if let Memory::Budget(budget) = self.memory
            && state + arena + self.largest_bags > budget
        {
            self.tight = true;
        }
        if self.tight { self.give_back() } else { self.grow(arena, room) }
    }

    /// A GPU frees it when the work so far has ended.
    fn give_back(&mut self) -> Result<()> {
        self.arena = Arena::new(&self.device, 0)?;
        self.rooms = [Room::new(&self.device, 0)?, Room::new(&self.device, 0)?];
        Ok(())
    }

    fn grow(&mut self, arena: usize, room: usize) -> Result<()> {
        if arena > self.arena.bytes() {
            self.arena = Arena::new(&self.device, 0)?; // give the old one back first
            self.arena = Arena::new(&self.device, arena)?;
        }
        for old in &mut self.rooms {
            if room > old.bytes() {
                *old = Room::new(&self.device, 0)?;
                *old = Room::new(&self.device, room)?;
            }
        }
        Ok(())
    }

    pub fn arena_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The most that the arena held since it was made; equals what the plan of the largest slide says.
    pub fn arena_peak(&self) -> usize {
        self.arena.peak()
    }

    fn state(&self, which: State) -> &Buffer {
        match which {
            State::Params => &self.params,
            State::Grads => &self.grads,
            State::M => &self.moments[0],
            State::V => &self.moments[1],
        }
    }

    /// A whole arena, padding included.
    pub fn read_state(&self, which: State) -> Result<Vec<T::Sum>> {
        self.device.download(self.state(which).flat())
    }

    /// Part of an arena.
    pub(super) fn read_part(&self, which: State, range: Range<usize>) -> Result<Vec<T::Sum>> {
        self.device.download(self.state(which).view(range.start, 1, range.len()))
    }

    /// Replaces part of an arena; [`Engine::round_weights`] follows when all is there.
    pub(super) fn write_part(&mut self, which: State, start: usize, values: &[T::Sum]) -> Result<()> {
        self.device.upload(values, self.state(which).view(start, 1, values.len()))
    }

    pub fn write_state(&mut self, which: State, values: &[T::Sum]) -> Result<()> {
        self.device.upload(values, self.state(which).flat())?;
        self.round_weights()
    }

    /// A named tensor of an arena.
    pub fn read(&self, which: State, name: &str) -> Result<Vec<T::Sum>> {
        let entry = self.model.layout.entries().iter().find(|entry| entry.name == name);
        let entry = entry.ok_or_else(|| Error::Usage(format!("the model has no tensor `{name}`")))?;
        self.device.download(self.state(which).view(entry.offset, 1, entry.len()))
    }

    /// Replaces all parameters; every tensor of the model must be there with its shape, and no other. On an error nothing has changed.
    pub fn load(&mut self, tensors: &StateDict) -> Result<()> {
        let entries = self.model.layout.entries();
        for entry in entries {
            let Some(Parameter { shape, values }) = tensors.get(&entry.name) else {
                return Err(Error::Usage(format!("the checkpoint lacks tensor `{}` {:?}", entry.name, entry.shape)));
            };
            if *shape != entry.shape || values.len() != entry.len() {
                let (tensor, got, expected) = (entry.name.clone(), shape.clone(), entry.shape.clone());
                return Err(Error::Shape { op: "checkpoint", tensor, got, expected });
            }
        }
        if let Some(name) = tensors.keys().find(|name| entries.iter().all(|entry| &entry.name != *name)) {
            return Err(Error::Usage(format!("the checkpoint holds tensor `{name}`, which this model does not have")));
        }
        for entry in entries {
            let values: Vec<_> = tensors[&entry.name].values.iter().map(|&x| T::Sum::of(f64::from(x))).collect();
            self.device.upload(&values, self.params.view(entry.offset, 1, entry.len()))?;
        }
        self.round_weights()
    }
}

/// The plan of a policy; bags that it streams are read from files.
pub fn plan<T: Element>(
    device: &Device,
    model: &CrossFusion,
    sizes: BagSizes,
    training: bool,
    policy: Policy,
) -> Result<Plan> {
    let device = device.dry();
    let (len, features) = (model.layout.len(), model.config.features);
    let (params, grads) = (device.alloc(len * size_of::<T>())?, device.alloc(len * size_of::<T::Sum>())?);
    let mut arena = Arena::unlimited();
    let bag_bytes = |patches: usize| patches * features * size_of::<T>();
    let bag = |patches: usize| Ok::<_, Error>(device.alloc(bag_bytes(patches))?.view::<T>(0, patches, features));
    let (x5, x20) = (Unread(sizes.x5), Unread(sizes.x20));
    let mut bags = Bags::of_views(bag(sizes.x5)?, bag(sizes.x10)?, bag(sizes.x20)?);
    let mut parts = Parts {
        parameters: len * if size_of::<T>() == size_of::<T::Sum>() { 0 } else { size_of::<T>() },
        gradients: len * size_of::<T::Sum>(),
        moments: 2 * len * size_of::<T::Sum>(),
        bags: bag_bytes(sizes.x10),
        stream: 0,
        saved: 0,
        scratch: 0,
    };
    parts.parameters += parts.gradients;
    match policy.stream {
        None => parts.bags = bag_bytes(sizes.total()),
        Some(patches) => {
            (bags.x5, bags.x20) = (Bag::Reader(&x5), Bag::Reader(&x20));
            let buffers = if device.runs_kernels() { STREAM_BUFFERS } else { 1 };
            parts.stream = buffers * (bag_bytes(sizes.x5.min(patches)) + bag_bytes(sizes.x20.min(patches)));
        }
    }
    let mut room = Room::unlimited();
    let mut ctx = Context {
        device: &device,
        arena: &mut arena,
        room: &mut room,
        params: &params,
        grads: &grads,
        draw: training.then_some(Draw { seed: 0, step: 0 }),
        training,
        policy,
        config: &model.config,
    };
    let saved = model.forward(&mut ctx, bags)?;
    if !training {
        model.logits(&ctx, &saved)?;
    }
    let counts = || if let Device::Dry(dry) = &device { dry.counts() } else { Counts::default() };
    let forward = counts();
    if training {
        let loss =
            SlideLoss { loss: Loss::NllSurv, target: Target { label: 0, censored: false }, alpha: 0.0, share: 1.0 };
        model.backward(&mut ctx, saved, Start::Loss(&loss, &device.alloc(0)?), None)?;
    }
    let step = counts();
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
pub fn fit<T: Element>(
    device: &Device,
    model: &CrossFusion,
    sizes: BagSizes,
    training: bool,
    budget: usize,
) -> Result<Plan> {
    let (mut best, mut least): (Option<Plan>, usize) = (None, usize::MAX);
    for policy in Policy::all() {
        let plan = plan::<T>(device, model, sizes, training, policy)?;
        least = least.min(plan.peak_bytes());
        if plan.peak_bytes() <= budget && best.is_none_or(|best| plan.step_flop < best.step_flop) {
            best = Some(plan);
        }
        if policy == Policy::KEEP && best.is_some() {
            break; // nothing takes fewer
        }
    }
    best.ok_or_else(|| {
        Error::Usage(format!(
            "{}, {} and {} patches of {} features do not fit into a memory budget of {}: the least is {}MiB",
            sizes.x5,
            sizes.x10,
            sizes.x20,
            model.config.features,
            ByteSize(budget as u64),
            least.div_ceil(1 << 20)
        ))
    })
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

fn logits<T: Element>(model: &CrossFusion, ctx: &Context, saved: &Saved<'_, T>) -> Result<Vec<f64>> {
    Ok(ctx.device.download(model.logits(ctx, saved)?)?.into_iter().map(Real::f64).collect())
}
