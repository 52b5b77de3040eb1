//! One training step, from bags to updated weights. `slide_step` and [`Engine::update`] show the
//! whole flow:
//!
//! ```text
//! bags -> forward -> head -> loss and its gradient -> head's backward -> backward
//!      -> gradients, summed over slides -> Adam -> weights
//! ```
//!
//! An [`Engine`] owns a model's state on a device: parameters, gradients, Adam's moments, and one
//! arena for a step's activations. What a step takes is planned beforehand ([`super::plan`]).

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    sync::Arc,
};

pub use super::plan::{Memory, Parts, Plan};
use super::plan::{Planner, Plans};
use crate::{
    Error, Result,
    data::torch::{Parameter, StateDict},
    device::{Arena, Buffer, Device, Element, Fence, Real, View, is_rounded},
    model::{AttentionOf, BagGrads, BagSizes, Bags, Config, Context, Model, Network, Policy, Room, Scales, each},
    ops::{
        Draw,
        adam::{self, Adam},
        elementwise,
        head::{self, SlideLoss},
    },
};

/// A model's state on a device, stored as `T` with sums in `T::Sum`, and the memory of a step.
pub struct Engine<T: Element> {
    device: Arc<Device>,
    planner: Planner<T>,
    /// What is trained, in `T::Sum`.
    params: Buffer,
    /// What the ops read: the parameters rounded to `T`. None where that is the parameters
    /// themselves.
    weights: Option<Buffer>,
    /// Summed over the slides since the last update.
    grads: Buffer,
    /// Of the slide in hand. A slide's gradient is formed by itself and then added, so that a sum
    /// depends on the slides and their order alone, and not on which process took which.
    slide_grads: Buffer,
    moments: [Buffer; 2],
    arena: Arena,
    /// Of the slide in hand and of the one before, as are `results`.
    rooms: [Room; 2],
    /// What a slide gives the host and is given by it, in memory that both see: [`Slots`].
    results: [Buffer; 2],
    /// Passes so far.
    passes: usize,
    /// Slides fit the budget one by one, but not the largest arena beside the largest bags: memory
    /// is then as large as the slide in hand wants it, and given back behind it.
    tight: bool,
    /// The largest bags that memory was reserved for.
    largest_bags: usize,
    /// Updates so far, for Adam's bias correction.
    pub updates: u64,
    element: std::marker::PhantomData<T>,
}

/// A slide's loss and risk that the device may still work on: for [`Engine::finish`].
#[must_use]
pub struct Pending(Started);

/// A slide's logits that the device may still work on: for [`Engine::finish_logits`].
#[must_use]
pub struct PendingLogits(Started);

struct Started {
    turn: usize,
    done: Fence,
}

/// Slides that were started, in order. A GPU is given the next one before the host waits for the one
/// in hand, so that it always has work.
pub struct Queue<P> {
    ahead: usize,
    started: VecDeque<P>,
}

impl<P> Queue<P> {
    /// Adds a slide; gives the one to be waited for, if it is time.
    pub fn push(&mut self, pending: P) -> Option<P> {
        self.started.push_back(pending);
        if self.started.len() > self.ahead { self.started.pop_front() } else { None }
    }

    /// Those that are left, to be waited for in this order.
    pub fn rest(&mut self) -> impl Iterator<Item = P> {
        self.started.drain(..)
    }
}

/// The arenas that [`Engine::read_state`] names, and that a checkpoint holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Master weights.
    Params,
    /// Gradients, summed over the slides since the last update.
    Grads,
    /// Adam's first moments.
    M,
    /// Adam's second moments.
    V,
}

impl<T: Element> Engine<T> {
    /// A fresh model, initialised from the seed.
    pub fn new(device: impl Into<Arc<Device>>, config: &Config, seed: u64) -> Result<Self> {
        let device = device.into();
        let model = Model::new(config)?;
        if device.runs_kernels() {
            config.check_for_kernels()?;
        }
        let (len, rounded) = (model.layout().len(), is_rounded::<T>());
        let slots = Slots::bytes(config.n_classes);
        let bytes = len * size_of::<T::Sum>();
        let engine = Self {
            params: device.alloc(bytes)?,
            weights: if rounded { Some(device.alloc(len * size_of::<T>())?) } else { None },
            grads: device.alloc(bytes)?,
            slide_grads: device.alloc(bytes)?,
            moments: [device.alloc(bytes)?, device.alloc(bytes)?],
            arena: Arena::new(&device, 0)?,
            rooms: [Room::new(&device, 0)?, Room::new(&device, 0)?],
            results: [device.alloc_shared(slots)?, device.alloc_shared(slots)?],
            passes: 0,
            tight: false,
            largest_bags: 0,
            planner: Planner::new(device.facts(), model, Memory::Policy(Policy::KEEP), Plans::default()),
            device,
            updates: 0,
            element: std::marker::PhantomData,
        };
        engine.model().layout().initialize::<T::Sum>(&engine.device, seed, &engine.params)?;
        engine.round_weights()?;
        Ok(engine)
    }

    /// Where the state lives and steps run.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its settings, and the layout of its parameters.
    pub fn model(&self) -> &Model {
        &self.planner.model
    }

    /// What plans its steps.
    pub fn planner(&self) -> &Planner<T> {
        &self.planner
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
        self.set_memory_planned(memory, Plans::default());
    }

    /// The same, with plans that were made before.
    pub fn set_memory_planned(&mut self, memory: Memory, plans: Plans) {
        self.planner.set_memory(memory, plans);
        (self.tight, self.largest_bags) = (false, 0);
    }

    /// Logits of a slide, without dropout.
    pub fn evaluate(&mut self, bags: Bags<'_, T>) -> Result<Vec<f64>> {
        self.forward(bags, None)
    }

    /// Logits of a slide under a dropout: the very ones that [`Engine::accumulate`] finds with the
    /// same draw.
    pub fn forward(&mut self, bags: Bags<'_, T>, draw: Option<Draw>) -> Result<Vec<f64>> {
        let pending = self.start(bags, draw)?;
        self.finish_logits(pending)
    }

    /// [`Engine::forward`], but the host goes on as after [`Engine::accumulate_loss`].
    pub fn start(&mut self, bags: Bags<'_, T>, draw: Option<Draw>) -> Result<PendingLogits> {
        let turn = self.passes % 2;
        self.pass(bags, draw, Goal::Logits, None)?;
        Ok(PendingLogits(Started { turn, done: self.device.fence()? }))
    }

    /// Logits of a slide, when the device is done with it.
    pub fn finish_logits(&self, PendingLogits(Started { turn, done }): PendingLogits) -> Result<Vec<f64>> {
        self.device.wait(&done)?;
        let logits: Vec<T::Sum> = bytemuck::pod_collect_to_vec(&self.device.peek(&self.results[turn])?);
        Ok(logits[..self.model().config().n_classes].iter().map(|x| x.f64()).collect())
    }

    /// Forward, `loss` (from logits to their gradient, scaled as it shall be summed), backward:
    /// adds one slide's gradients. `draw` is the slide's dropout; `dbags` receives the bags'
    /// gradients. Returns the logits.
    pub fn accumulate(
        &mut self,
        bags: Bags<'_, T>,
        draw: Option<Draw>,
        dbags: Option<BagGrads<'_, T>>,
        loss: impl FnOnce(&[f64]) -> Vec<f64> + Send,
    ) -> Result<Vec<f64>> {
        self.pass(bags, draw, Goal::Gradients(Box::new(loss)), dbags)
    }

    /// [`Engine::accumulate`] where the loss's gradient in the logits is known, so that nobody waits
    /// for these.
    pub fn accumulate_known(&mut self, bags: Bags<'_, T>, draw: Option<Draw>, dlogits: &[f64]) -> Result<()> {
        self.pass(bags, draw, Goal::Known(dlogits), None)?;
        Ok(())
    }

    /// The logits of a slide, without dropout, and the attention that each of its patches receives.
    /// Takes the memory of a training step.
    pub fn attention(&mut self, bags: Bags<'_, T>, of: AttentionOf) -> Result<(Vec<f64>, Scales<Vec<f64>>)> {
        let mut received = Scales::default();
        let logits = self.pass(bags, None, Goal::Attention(of, &mut received), None)?;
        Ok((logits, received))
    }

    /// [`Engine::accumulate`] with a loss of the slide alone. On a GPU the host goes on while the
    /// device works: the next slide may be started before this one's loss is asked for; the one
    /// after that overwrites it.
    pub fn accumulate_loss(&mut self, bags: Bags<'_, T>, draw: Option<Draw>, loss: &SlideLoss) -> Result<Pending> {
        let turn = self.passes % 2;
        self.pass(bags, draw, Goal::Loss(loss), None)?;
        Ok(Pending(Started { turn, done: self.device.fence()? }))
    }

    /// Loss and risk of a slide, when the device is done with it.
    pub fn finish(&self, Pending(Started { turn, done }): Pending) -> Result<(f64, f64)> {
        self.device.wait(&done)?;
        let values: Vec<f64> = bytemuck::pod_collect_to_vec(&self.device.peek(&self.results[turn])?);
        Ok((values[0], values[1]))
    }

    /// For slides of this engine.
    pub fn queue<P>(&self) -> Queue<P> {
        Queue { ahead: usize::from(self.device.runs_kernels()), started: VecDeque::new() }
    }

    /// [`slide_step`] on an empty arena that is large enough for it, also for the bags' gradients
    /// if they are wanted.
    fn pass(
        &mut self,
        bags: Bags<'_, T>,
        draw: Option<Draw>,
        goal: Goal<'_>,
        dbags: Option<BagGrads<'_, T>>,
    ) -> Result<Vec<f64>> {
        let training = !matches!(goal, Goal::Logits);
        let sizes = bags.sizes().only(self.model().scales());
        let plan = self.plan(sizes, training || draw.is_some())?;
        let mut bytes = plan.arena_bytes;
        if let Some(dbags) = dbags.as_ref().filter(|_| self.device.runs_kernels()) {
            bytes += dbags.device_bytes()?;
        }
        let streamed = if plan.policy.stream.is_some() { self.model().streamed() } else { &[] };
        if self.model().scales().iter().any(|scale| !streamed.contains(scale) && !bags.is_held(*scale)) {
            let message = "bags that are read part by part need a policy that streams them, or a memory budget";
            return Err(Error::Usage(message.into()));
        }
        self.grow(bytes, plan.room_bytes)?;
        self.arena.reset();
        let turn = self.passes % 2;
        self.passes += 1;
        let Self { device, planner, arena, rooms, results, params, weights, grads, slide_grads, .. } = self;
        let (device, model, room, slots) = (&**device, &planner.model, &mut rooms[turn], Slots(&results[turn]));
        if let Goal::Known(dlogits) = goal {
            // the slide before the last read them there
            room.wait(device)?;
            let dlogits: Vec<_> = dlogits.iter().copied().map(T::Sum::of).collect();
            device.poke(&dlogits, slots.0, slots.dlogits(model.config().n_classes))?;
        }
        room.clear();
        let (params, policy, config) = (weights.as_ref().unwrap_or(params), plan.policy, model.config());
        let mut ctx = Context { device, arena, room, params, grads: slide_grads, draw, training, policy, config };
        let (ctx, dbags, sums) = (&mut ctx, dbags.as_ref(), model.layout().rows(grads));
        let step = || each!(model, network => slide_step(network, ctx, bags, goal, slots, sums, dbags));
        // parts of a bag that is streamed are waited for on the way
        let whole = policy.stream.is_none();
        let logits = device.install(|| if whole { device.together(step) } else { step() });
        room.release(device)?;
        if self.tight {
            self.give_back()?;
        }
        logits
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

    /// What a slide of these sizes takes ([`Planner::plan`]).
    pub fn plan(&self, sizes: BagSizes, training: bool) -> Result<Plan> {
        self.planner.plan(sizes, training)
    }

    /// Makes memory large enough for slides of these sizes, so that a step need not grow it; under
    /// a budget only where that holds the largest arena and the largest bags together.
    pub fn reserve(&mut self, sizes: impl IntoIterator<Item = BagSizes>, training: bool) -> Result<()> {
        let (mut arena, mut room, mut state) = (self.arena.bytes(), self.rooms[0].bytes(), 0);
        for sizes in sizes {
            let plan = self.plan(sizes, training)?;
            (arena, room) = (arena.max(plan.arena_bytes), room.max(plan.room_bytes));
            self.largest_bags = self.largest_bags.max(plan.parts.bags);
            state = plan.parts.parameters + plan.parts.gradients + plan.parts.moments;
        }
        if let Memory::Budget(budget) = self.planner.memory
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

    /// What the arena can hold now; under a tight budget 0 between slides.
    pub fn arena_bytes(&self) -> usize {
        self.arena.bytes()
    }

    /// The most that the arena held since it was made; equals what the plan of the largest slide
    /// says.
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

    /// The gradients summed so far, which are zero afterwards.
    pub(super) fn take_grads(&mut self) -> Result<Vec<T::Sum>> {
        let grads = self.read_state(State::Grads)?;
        self.device.install(|| elementwise::zero(&self.device, self.model().layout().rows::<T::Sum>(&self.grads)))?;
        Ok(grads)
    }

    /// Part of an arena.
    pub(super) fn read_part(&self, which: State, range: Range<usize>) -> Result<Vec<T::Sum>> {
        self.device.download(self.state(which).view(range.start, 1, range.len()))
    }

    /// Replaces part of an arena; [`Engine::round_weights`] follows when all is there.
    pub(super) fn write_part(&mut self, which: State, start: usize, values: &[T::Sum]) -> Result<()> {
        self.device.upload(values, self.state(which).view(start, 1, values.len()))
    }

    /// Replaces a whole arena, padding included; an error unless `values` are as many.
    pub fn write_state(&mut self, which: State, values: &[T::Sum]) -> Result<()> {
        self.device.upload(values, self.state(which).flat())?;
        self.round_weights()
    }

    /// A named tensor of an arena.
    pub fn read(&self, which: State, name: &str) -> Result<Vec<T::Sum>> {
        let entry = self.model().layout().entries().iter().find(|entry| entry.name == name);
        let entry = entry.ok_or_else(|| Error::Usage(format!("the model has no tensor `{name}`")))?;
        self.device.download(self.state(which).view(entry.offset, 1, entry.len()))
    }

    /// Replaces all parameters; every tensor of the model must be there with its shape, and no
    /// other. On an error nothing has changed.
    pub fn load(&mut self, tensors: &StateDict) -> Result<()> {
        check_tensors(self.model(), tensors)?;
        for entry in self.model().layout().entries() {
            let values: Vec<_> = tensors[&entry.name].values.iter().map(|&x| T::Sum::of(f64::from(x))).collect();
            self.device.upload(&values, self.params.view(entry.offset, 1, entry.len()))?;
        }
        self.round_weights()
    }
}

/// An error unless these are the model's tensors, each with its shape, and no others.
pub fn check_tensors(model: &Model, tensors: &StateDict) -> Result<()> {
    let entries = model.layout().entries();
    for entry in entries {
        let Some(Parameter { shape, values }) = tensors.get(&entry.name) else {
            return Err(Error::Usage(format!("the checkpoint lacks tensor `{}` {:?}", entry.name, entry.shape)));
        };
        if *shape != entry.shape || values.len() != entry.len() {
            let (tensor, got, expected) = (entry.name.clone(), shape.clone(), entry.shape.clone());
            return Err(Error::Shape { op: "checkpoint", tensor, got, expected });
        }
    }
    let known: HashSet<&str> = entries.iter().map(|entry| entry.name.as_str()).collect();
    match tensors.keys().find(|name| !known.contains(name.as_str())) {
        Some(name) => {
            Err(Error::Usage(format!("the checkpoint holds tensor `{name}`, which this model does not have")))
        }
        None => Ok(()),
    }
}

/// From a slide's logits to the loss's gradient in them.
type LogitLoss<'a> = Box<dyn FnOnce(&[f64]) -> Vec<f64> + Send + 'a>;

/// What a pass is for.
enum Goal<'a> {
    /// The logits alone.
    Logits,
    /// Gradients of the caller's loss, a function from logits to their gradient.
    Gradients(LogitLoss<'a>),
    /// Gradients of a loss of the slide alone, which the device finds itself, so that nobody waits
    /// for the logits.
    Loss(&'a SlideLoss),
    /// Gradients of a loss whose gradient in the logits is this.
    Known(&'a [f64]),
    /// The logits, and the attention that the patches receive.
    Attention(AttentionOf, &'a mut Scales<Vec<f64>>),
}

/// Memory that host and device see, of as many f64 as there are logits, but at least two, twice:
/// what a pass gives, and the gradient in the logits that it is given.
#[derive(Clone, Copy)]
struct Slots<'a>(&'a Buffer);

impl Slots<'_> {
    fn bytes(classes: usize) -> usize {
        2 * classes.max(2) * size_of::<f64>()
    }

    /// `[1, 2]`
    fn loss_and_risk(self) -> View<f64> {
        self.0.view(0, 1, 2)
    }

    /// `[1, classes]`
    fn logits<S: Element>(self, classes: usize) -> View<S> {
        self.0.view(0, 1, classes)
    }

    /// `[1, classes]`
    fn dlogits<S: Element>(self, classes: usize) -> View<S> {
        self.0.view(self.0.bytes() / 2 / size_of::<S>(), 1, classes)
    }
}

/// A slide's way through the model and, for gradients, back: its own are added to `sums`. Gives the
/// logits, where they are waited for; of [`Goal::Logits`] and [`Goal::Loss`], what they ask for is
/// in the slots.
fn slide_step<M: Network, T: Element>(
    model: &M,
    ctx: &mut Context,
    bags: Bags<'_, T>,
    goal: Goal<'_>,
    slots: Slots<'_>,
    sums: View<T::Sum>,
    dbags: Option<&BagGrads<'_, T>>,
) -> Result<Vec<f64>> {
    let saved = model.forward(ctx, bags)?;
    let mut head = model.head(&saved);
    let (classes, grads) = (ctx.config.n_classes, model.layout().rows::<T::Sum>(ctx.grads));
    if !matches!(goal, Goal::Logits | Goal::Attention(..)) {
        elementwise::zero(ctx.device, grads)?;
    }
    let logits = match goal {
        Goal::Logits => {
            head.forward.logits = slots.logits(classes);
            head::forward(ctx.device, &head.forward)?;
            return Ok(Vec::new());
        }
        Goal::Gradients(loss) => {
            let logits = logits(ctx.device, &head.forward)?;
            let dlogits: Vec<T::Sum> = loss(&logits).into_iter().map(T::Sum::of).collect();
            ctx.device.upload(&dlogits, head.dlogits)?;
            head::backward(ctx.device, &head)?;
            logits
        }
        Goal::Loss(loss) => {
            head::train(ctx.device, &head, loss, slots.loss_and_risk())?;
            Vec::new()
        }
        Goal::Known(_) => {
            head.dlogits = slots.dlogits(classes);
            head::forward(ctx.device, &head.forward)?;
            head::backward(ctx.device, &head)?;
            Vec::new()
        }
        Goal::Attention(of, received) => {
            let logits = logits(ctx.device, &head.forward)?;
            *received = model.attention(ctx, saved, of)?;
            return Ok(logits);
        }
    };
    model.backward(ctx, saved, dbags)?;
    elementwise::accumulate(ctx.device, grads, sums)?;
    Ok(logits)
}

fn logits<T: Element>(device: &Device, head: &head::Head<T>) -> Result<Vec<f64>> {
    head::forward(device, head)?;
    Ok(device.download(head.logits)?.into_iter().map(Real::f64).collect())
}
