//! What `cf-bench` measures.

pub mod cases;
mod ceilings;
mod cox;
mod cublaslt;
mod op;
mod peer;
mod plan;
mod slide;

use std::time::Instant;

use bytesize::ByteSize;
use clap::{Args, ValueEnum};
use half::bf16;
pub use op::{OpArguments, op};
pub use plan::{PlanArguments, plan};
use serde::Serialize;
pub use slide::{SlideArguments, slide};
use tempfile::TempDir;

use crate::{
    Error, Result,
    data::dataset::SlideFeatures,
    device::{Device, Element},
    loss::{Loss, Target},
    model::{BagSizes, Bags, Config, MOST_FEATURES, MOST_PATCHES, ModelName, Scale, Scales},
    ops::{Draw, adam::Adam, head::SlideLoss},
    train::step::{Engine, Memory},
};

/// The flags of `cf-bench step`: a slide's sizes, a model, and where and how often to run it.
#[derive(Args)]
pub struct StepArguments {
    /// Where to run: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads; 0 is one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Which model
    #[arg(long, value_enum, default_value_t = ModelName::CrossFusion)]
    model: ModelName,
    /// Patches at 5x, 10x and 20x
    #[arg(long, default_value = "800,3000,12000", value_parser = parse_bags)]
    bags: BagSizes,
    /// Width of the patch features
    #[arg(long, default_value_t = 2048, value_parser = parse_features)]
    features: usize,
    /// Dropout as published, or none
    #[arg(long, value_enum, default_value_t = Switch::On)]
    dropout: Switch,
    /// Storage precision
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Most memory for the step: 8GiB, say. The bags are then files in the folder for temporary
    /// files
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<ByteSize>,
    /// Timed steps, after one that warms up
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Switch {
    On,
    Off,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "lowercase")]
enum Precision {
    F32,
    Bf16,
}

fn parse_features(text: &str) -> Result<usize, String> {
    let features = text.parse().ok().filter(|features| (1..=MOST_FEATURES).contains(features));
    features.ok_or_else(|| "expected a width from 1 to 65536".into())
}

fn parse_bags(text: &str) -> Result<BagSizes, String> {
    let counts: Result<Vec<usize>, _> = text.split(',').map(|n| n.trim().parse()).collect();
    match counts.as_deref() {
        Ok(&[x5, x10, x20]) if [x5, x10, x20].iter().all(|n| (1..=MOST_PATCHES).contains(n)) => {
            Ok([x5, x10, x20].into())
        }
        _ => Err("expected three patch counts M5,N,M20 from 1 to 2^26".into()),
    }
}

/// Seconds of repeated runs.
#[derive(Serialize)]
struct Seconds {
    min: f64,
    median: f64,
}

impl Seconds {
    fn of(mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        Self { min: runs[0], median: 0.5 * (runs[(runs.len() - 1) / 2] + runs[runs.len() / 2]) }
    }
}

#[derive(Serialize)]
struct StepReport {
    device: String,
    model: ModelName,
    /// Patches at each scale that the model reads.
    bags: Vec<usize>,
    features: usize,
    dropout: Switch,
    precision: Precision,
    forward_s: Seconds,
    backward_s: Seconds,
    optimizer_s: Seconds,
    /// On a GPU as training takes it: the next step is started while one runs, its bags arrive
    /// meanwhile, and nothing waits between forward and backward. So it may be less than the sum of
    /// the parts.
    step_s: Seconds,
    /// The host's own work on such a step.
    host_s: Option<Seconds>,
    policy: String,
    /// What the plan says that the step holds, bags included.
    planned_bytes: usize,
    arena_bytes: usize,
    peak_rss_bytes: u64,
    /// Measured on this device just before and just after the steps, the better of the two; none on
    /// a GPU without cublasLt.
    fma_peak_gflops: Option<f64>,
    /// Kernels launched by forward and backward; 0 on a CPU.
    launches: usize,
    /// Operations of the published model as it was published, the convention of model FLOP
    /// utilisation; of another those of its plan.
    step_gflop: f64,
    /// Operations that were done: the last layer computes the class token's row alone.
    executed_gflop: f64,
    /// step_gflop / step_s.min / fma_peak_gflops
    fraction_of_peak: Option<f64>,
}

/// `cf-bench step`.
pub fn step(arguments: &StepArguments) -> Result<()> {
    let device = Device::from_name(&arguments.device, arguments.threads)?;
    let report = match arguments.precision {
        Precision::F32 => measure::<f32>(device, arguments)?,
        Precision::Bf16 => measure::<bf16>(device, arguments)?,
    };
    if arguments.json {
        return print_json(&report);
    }
    print(&report);
    Ok(())
}

fn print_json(report: &impl Serialize) -> Result<()> {
    crate::say(serde_json::to_string(report).map_err(|e| Error::Device(e.to_string()))?);
    Ok(())
}

/// What a step is measured on: random numbers in memory, or under a budget files, as in training.
enum Slide<T> {
    Memory(Scales<Vec<T>>, usize),
    Files(SlideFeatures<T>, TempDir),
}

impl<T: Element<Sum = f32>> Slide<T> {
    fn new(arguments: &StepArguments, sizes: BagSizes, streamed: &[Scale]) -> Result<Self> {
        if arguments.memory_budget.is_none() {
            let bag = |_, patches: usize| random(patches * arguments.features).into_iter().map(T::from_sum).collect();
            return Ok(Self::Memory(sizes.map(bag), arguments.features));
        }
        let folder = tempfile::tempdir().map_err(|e| Error::Device(format!("no folder for temporary files: {e}")))?;
        let files = slide::write(folder.path(), sizes, arguments.features, slide::Format::Safetensors)?;
        Ok(Self::Files(SlideFeatures::read(&files, streamed)?, folder))
    }

    fn bags(&self) -> Result<Bags<'_, T>> {
        match self {
            Self::Memory(bags, features) => Bags::new(bags.as_ref().map(|_, bag| &bag[..]), *features),
            Self::Files(features, _folder) => features.bags(),
        }
    }
}

fn measure<T: Element<Sum = f32>>(device: Device, arguments: &StepArguments) -> Result<StepReport> {
    let name = device.description();
    let peak_before = ceilings::peak::<T>(&device)?;
    let config = Config { model: arguments.model, ..Config::new(arguments.features) };
    let mut engine = Engine::<T>::new(device, &config, 1)?;
    engine.set_memory(Memory::new(arguments.memory_budget));
    let sizes = arguments.bags.only(arguments.model.scales());
    engine.reserve([sizes], true)?;
    let plan = engine.plan(sizes, true)?;
    let streamed = if plan.policy.stream.is_some() { arguments.model.streamed() } else { &[] };
    let slide = Slide::new(arguments, sizes, streamed)?;
    let bags = slide.bags()?;
    // the published optimizer
    let adam = Adam { learning_rate: 1e-4, weight_decay: 4e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };

    let draw = |step: u32| (arguments.dropout == Switch::On).then_some(Draw { seed: 1, step });
    let mut times = [const { Vec::new() }; 4];
    for run in 0..=arguments.repeat {
        let start = Instant::now();
        let mut forward = start;
        engine.accumulate(bags, draw(run), None, |logits| {
            forward = Instant::now();
            Loss::NllSurv.evaluate(logits, TARGET, ALPHA).1
        })?;
        engine.device().synchronize()?;
        let backward = Instant::now();
        engine.update(&adam)?;
        engine.device().synchronize()?;
        let end = Instant::now();
        let parts = [forward - start, backward - forward, end - backward, end - start];
        if run > 0 {
            times.iter_mut().zip(parts).for_each(|(times, part)| times.push(part.as_secs_f64()));
        }
    }
    let mut host_s = None;
    if engine.device().runs_kernels() {
        let (steps, host) = in_flight(&mut engine, bags, draw, &adam, arguments.repeat)?;
        (times[3], host_s) = (steps, Some(Seconds::of(host)));
    }
    let peak = peak_before.zip(ceilings::peak::<T>(engine.device())?).map(|(before, after)| before.max(after) / 1e9);
    let [forward_s, backward_s, optimizer_s, step_s] = times.map(Seconds::of);
    let step_gflop = match arguments.model {
        ModelName::CrossFusion => published_step_flop(sizes, arguments.features) / 1e9,
        _ => plan.step_flop / 1e9,
    };
    Ok(StepReport {
        device: name,
        model: arguments.model,
        bags: sizes.values().copied().collect(),
        features: arguments.features,
        dropout: arguments.dropout,
        precision: arguments.precision,
        policy: plan.policy.to_string(),
        planned_bytes: plan.peak_bytes(),
        arena_bytes: engine.arena_bytes(),
        peak_rss_bytes: peak_rss_bytes(),
        fma_peak_gflops: peak,
        launches: plan.launches,
        step_gflop,
        executed_gflop: plan.step_flop / 1e9,
        fraction_of_peak: peak.map(|peak| step_gflop / step_s.min / peak),
        forward_s,
        backward_s,
        optimizer_s,
        step_s,
        host_s,
    })
}

const TARGET: Target = Target { label: 1, censored: false };
const ALPHA: f64 = 0.2;

/// Steps as training takes them on a GPU, each started before the one before has ended: seconds
/// from the end of one to the next, and of the host's work on each.
fn in_flight<T: Element<Sum = f32>>(
    engine: &mut Engine<T>,
    bags: Bags<'_, T>,
    draw: impl Fn(u32) -> Option<Draw>,
    adam: &Adam,
    repeat: u32,
) -> Result<(Vec<f64>, Vec<f64>)> {
    let loss = SlideLoss { loss: Loss::NllSurv, target: TARGET, alpha: ALPHA, share: 1.0 };
    let (mut before, mut ends, mut host) = (None, Vec::new(), Vec::new());
    // one warms up, and one is not waited for
    for run in 0..repeat + 2 {
        let start = Instant::now();
        let pending = engine.accumulate_loss(bags, draw(run), &loss)?;
        engine.update(adam)?;
        host.push(start.elapsed().as_secs_f64());
        if let Some(before) = before.replace(pending) {
            engine.finish(before)?;
            ends.push(Instant::now());
        }
    }
    engine.device().synchronize()?;
    Ok((ends.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64()).collect(), host.split_off(2)))
}

fn print(report: &StepReport) {
    crate::say(headline(&report.device, report.model, &report.bags, report.features));
    crate::say(format!("{:<12}{:>10}{:>10}", "", "min", "median"));
    let rows = [
        ("forward", &report.forward_s),
        ("backward", &report.backward_s),
        ("optimizer", &report.optimizer_s),
        ("step", &report.step_s),
    ];
    for (name, seconds) in rows {
        crate::say(format!("{name:<12}{:>8.3} s{:>8.3} s", seconds.min, seconds.median));
    }
    if let Some(host) = &report.host_s {
        crate::say(format!("{:<12}{:>7.3} ms{:>7.3} ms", "host", 1e3 * host.min, 1e3 * host.median));
    }
    let of_peak = report.fraction_of_peak.zip(report.fma_peak_gflops).map_or(String::new(), |(fraction, peak)| {
        format!(", {:.0} % of the measured peak of {peak:.0} GFLOP/s", 100.0 * fraction)
    });
    crate::say(format!("{:.0} GFLOP a step{of_peak}", report.step_gflop));
    crate::say(format!(
        "policy: {}; planned {:.0} MiB, arena {:.0} MiB, peak resident {:.0} MiB",
        report.policy,
        mib(report.planned_bytes as f64),
        mib(report.arena_bytes as f64),
        mib(report.peak_rss_bytes as f64)
    ));
}

/// "cpu, AVX-512, 2 threads; bags 800, 3000, 12000 of 2048 features"
fn headline(device: &str, model: ModelName, bags: &[usize], features: usize) -> String {
    let model = if model == ModelName::CrossFusion { String::new() } else { format!("; {model}") };
    let bags: Vec<String> = bags.iter().map(usize::to_string).collect();
    format!("{device}{model}; bags {} of {features} features", bags.join(", "))
}

fn mib(bytes: f64) -> f64 {
    bytes / 1048576.0
}

/// Operations of one step of the published model (d = 512, one layer), products and convolutions
/// only: twice the forward for the input projection (its input needs no gradient), three times for
/// the rest, 3.5 times for attention, which recomputes its scores.
fn published_step_flop(bags: BagSizes, features: usize) -> f64 {
    let [x5, x10, x20] = Scale::ALL.map(|scale| bags.get(scale).copied().unwrap_or(0) as f64);
    let (f, d) = (features as f64, 512.0);
    let side = x10.sqrt().ceil();
    let n = side * side;
    let input = if features == 512 { 0.0 } else { 2.0 * f * d * (x5 + x10 + x20) };
    let attention = 4.0 * d * x10 * (x5 + x20) + 32.0 * d * n * n;
    let cross = 2.0 * 4.0 * d * d * x10 + 4.0 * d * d * (x5 + x20) + 16.0 * d * d * x10;
    let rest = cross + 128.0 * d * d * n + 98.0 * d * 5.0 * n + d * d * n;
    2.0 * input + 3.5 * attention + 3.0 * rest
}

/// The most memory that this process has held, from the system; 0 where it does not tell.
pub fn peak_rss_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok()).map_or(0, |kib| kib * 1024)
}

/// Uniform on [-1, 1), fixed.
fn random(len: usize) -> Vec<f32> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 40) as f32 * (2.0f32).powi(-23) - 1.0
    };
    (0..len).map(|_| next()).collect()
}

#[cfg(all(test, feature = "emulator"))]
mod tests {
    use super::*;

    #[test]
    fn steps_in_flight_are_counted() {
        let config = Config { dim: 32, ..Config::new(16) };
        let mut engine = Engine::<f32>::new(Device::from_name("emulator", 1).unwrap(), &config, 1).unwrap();
        let bags = [3, 5, 7].map(|patches| random(patches * 16));
        let bags = Bags::new(bags.each_ref().map(Vec::as_slice), 16).unwrap();
        let adam = Adam { learning_rate: 1e-4, weight_decay: 4e-6, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 };
        let (steps, host) = in_flight(&mut engine, bags, |_| None, &adam, 3).unwrap();
        assert_eq!((steps.len(), host.len()), (3, 3));
        assert_eq!(engine.updates, 5);
    }
}
