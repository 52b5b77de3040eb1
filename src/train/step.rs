//! One training step, from bags to updated weights. This is the place that shows the whole flow:
//!
//!   bags -> forward -> logits -> loss and its gradient -> backward -> gradients, summed over slides -> Adam -> weights
//!
//! An [`Engine`] owns a model's state on a device: parameters, gradients, Adam's moments, and one arena for a step's activations.

use crate::{
    Error, Result,
    data::torch::{Parameter, StateDict},
    device::{Arena, Buffer, Counts, Device, Element, Real},
    model::{Bags, Config, Context, CrossFusion, Saved},
    ops::{
        Draw,
        adam::{self, Adam},
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

/// What a step on one slide takes.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Exact size of the step's arena.
    pub arena_bytes: usize,
    pub forward_flop: f64,
    /// Forward and backward.
    pub step_flop: f64,
    /// Kernels launched, where the device runs kernels.
    pub launches: usize,
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
    fn round_weights(&self) -> Result<()> {
        let Some(weights) = &self.weights else { return Ok(()) };
        let params = self.device.download(self.params.flat::<T::Sum>())?;
        let rounded: Vec<T> = params.into_iter().map(T::from_sum).collect();
        self.device.upload(&rounded, weights.flat())
    }

    /// Logits of a slide, without dropout.
    pub fn evaluate(&mut self, bags: Bags<'_, T>) -> Result<Vec<f64>> {
        self.forward(bags, None)
    }

    /// Logits of a slide under a dropout: the very ones that [`Engine::accumulate`] finds with the same draw.
    pub fn forward(&mut self, bags: Bags<'_, T>, draw: Option<Draw>) -> Result<Vec<f64>> {
        self.reserve(sizes(&bags), draw.is_some())?;
        let (model, mut ctx) = self.pass(draw);
        ctx.device.install(|| logits(ctx.device, &model.forward(&mut ctx, bags)?))
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
        self.reserve(sizes(&bags), true)?;
        let (model, mut ctx) = self.pass(draw);
        ctx.device.install(|| {
            let saved = model.forward(&mut ctx, bags)?;
            let logits = logits(ctx.device, &saved)?;
            let dlogits: Vec<T::Sum> = loss(&logits).into_iter().map(T::Sum::of).collect();
            model.backward(&mut ctx, saved, &dlogits, inputs)?;
            Ok(logits)
        })
    }

    /// What a pass works with; the arena is empty.
    fn pass(&mut self, draw: Option<Draw>) -> (&CrossFusion, Context<'_>) {
        self.arena.reset();
        let Self { device, model, arena, params, weights, grads, .. } = self;
        let params = weights.as_ref().unwrap_or(params);
        (model, Context { device, arena, params, grads, draw, config: &model.config })
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

    /// What a slide of these sizes takes, by running the same code on the device that only counts.
    pub fn plan(&self, sizes: BagSizes, training: bool) -> Result<Plan> {
        plan::<T>(&self.device, &self.model, sizes, training)
    }

    /// Makes the arena large enough for slides up to these sizes, so that training need not grow it slide by slide.
    pub fn reserve(&mut self, sizes: BagSizes, training: bool) -> Result<()> {
        let needed = self.plan(sizes, training)?.arena_bytes;
        if needed > self.arena.bytes() {
            self.arena = Arena::new(&self.device, 0)?; // give the old one back first
            self.arena = Arena::new(&self.device, needed)?;
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

/// [`Engine::plan`] without an engine.
pub fn plan<T: Element>(device: &Device, model: &CrossFusion, sizes: BagSizes, training: bool) -> Result<Plan> {
    let device = device.dry();
    let len = model.layout.len();
    let (params, grads) = (device.alloc(len * size_of::<T>())?, device.alloc(len * size_of::<T::Sum>())?);
    let mut arena = Arena::unlimited();
    let features = model.config.features;
    let bag =
        |rows: usize| Ok::<_, Error>(device.alloc(rows * features * size_of::<T>())?.view::<T>(0, rows, features));
    let bags = Bags::of_views(bag(sizes.x5)?, bag(sizes.x10)?, bag(sizes.x20)?);
    let draw = training.then_some(Draw { seed: 0, step: 0 });
    let mut ctx =
        Context { device: &device, arena: &mut arena, params: &params, grads: &grads, draw, config: &model.config };
    let saved = model.forward(&mut ctx, bags)?;
    let counts = || if let Device::Dry(dry) = &device { dry.counts() } else { Counts::default() };
    let forward = counts();
    if training {
        model.backward(&mut ctx, saved, &vec![Default::default(); model.config.n_classes], None)?;
    }
    let step = counts();
    Ok(Plan { arena_bytes: arena.peak(), forward_flop: forward.flop, step_flop: step.flop, launches: step.launches })
}

fn sizes<T: Element>(bags: &Bags<'_, T>) -> BagSizes {
    BagSizes { x5: bags.x5.rows(), x10: bags.x10.rows(), x20: bags.x20.rows() }
}

fn logits<T: Element>(device: &Device, saved: &Saved<T>) -> Result<Vec<f64>> {
    Ok(device.download(saved.logits)?.into_iter().map(Real::f64).collect())
}
