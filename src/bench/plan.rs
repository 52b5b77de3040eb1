//! What a step on a slide would take, without taking it.

use bytesize::ByteSize;
use clap::Args;
use half::bf16;
use serde::Serialize;

use super::{Precision, ceilings, mib, parse_bags};
use crate::{
    Error, Result,
    device::{Arg, Cpu, Device, Dry, Element, Facts, is_rounded},
    model::{BagSizes, Config, Model, ModelName, Policy},
    train::plan::{self, Parts, Plan},
};

/// The flags of `cf-bench plan`: a slide's sizes, a model, a device and a memory budget.
#[derive(Args)]
pub struct PlanArguments {
    /// Where it would run: auto, cpu, cuda, or hopper for an H100; a GPU need not be there
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
    #[arg(long, default_value_t = 2048, value_parser = super::parse_features)]
    features: usize,
    /// Storage precision
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Most memory: 8GiB, say. Without one, everything is kept
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<ByteSize>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    json: bool,
    /// Print the kernels that a step launches instead, Adam's last, one JSON object a line: name,
    /// grid, block, bytes of dynamic shared memory, arguments in hexadecimal (docs/launching.md)
    #[arg(long, conflicts_with = "json")]
    launches: bool,
}

/// The share of the peak at which a CPU does the operations of a plan, by docs/measurements.md: in f32
/// 0.65 to 0.71 on Zen 5 and 0.77 on Zen 4 (its shares count the published model's operations, 8 %
/// more); where bf16 is multiplied in pairs, at twice the peak, what is no product weighs more.
fn fraction_of_peak<T: Element>(cpu: &Cpu) -> f64 {
    if cpu.has_dots() && is_rounded::<T>() { 0.6 } else { 0.7 }
}

#[derive(Serialize)]
struct PlanReport {
    device: String,
    model: ModelName,
    /// Patches at each scale that the model reads.
    bags: Vec<usize>,
    features: usize,
    precision: Precision,
    budget_bytes: Option<u64>,
    policy: String,
    peak_bytes: usize,
    parts: Parts,
    step_flop: f64,
    /// Beyond keeping everything.
    extra_flop: f64,
    /// Kernels launched by forward and backward; 0 on a CPU.
    launches: usize,
    /// From the peak measured now; none where no step has been measured yet.
    predicted_s: Option<f64>,
}

/// `cf-bench plan`.
pub fn plan(arguments: &PlanArguments) -> Result<()> {
    let device = match arguments.device.as_str() {
        "cuda" => Device::Dry(Dry::new(Facts { runs_kernels: true, has_wgmma: false })),
        "hopper" => Device::Dry(Dry::new(Facts { runs_kernels: true, has_wgmma: true })),
        name => Device::from_name(name, arguments.threads)?,
    };
    if arguments.launches {
        return match arguments.precision {
            Precision::F32 => print_launches::<f32>(&device, arguments),
            Precision::Bf16 => print_launches::<bf16>(&device, arguments),
        };
    }
    let report = match arguments.precision {
        Precision::F32 => make::<f32>(&device, arguments)?,
        Precision::Bf16 => make::<bf16>(&device, arguments)?,
    };
    if arguments.json {
        return super::print_json(&report);
    }
    crate::say(super::headline(&report.device, report.model, &report.bags, report.features));
    crate::say(format!("policy: {}", report.policy));
    let Parts { parameters, gradients, moments, bags, stream, saved, scratch } = report.parts;
    for (name, bytes) in [
        ("parameters", parameters),
        ("gradients", gradients),
        ("moments", moments),
        ("bags", bags),
        ("stream", stream),
        ("saved", saved),
        ("scratch", scratch),
        ("peak", report.peak_bytes),
    ] {
        crate::say(format!("{name:<12}{:>12.1} MiB", mib(bytes as f64)));
    }
    let extra = 100.0 * report.extra_flop / (report.step_flop - report.extra_flop);
    crate::say(format!("{:.1} TFLOP, {extra:.1} % of them computed again", report.step_flop / 1e12));
    if report.launches > 0 {
        crate::say(format!("{} kernel launches", report.launches));
    }
    if let Some(seconds) = report.predicted_s {
        crate::say(format!("about {seconds:.1} s a step"));
    }
    Ok(())
}

#[derive(Serialize)]
struct LaunchLine {
    kernel: String,
    grid: [u32; 3],
    block: [u32; 3],
    shared_bytes: u32,
    arguments: Vec<String>,
}

fn print_launches<T: Element<Sum = f32>>(device: &Device, arguments: &PlanArguments) -> Result<()> {
    if !device.runs_kernels() {
        return Err(Error::Usage("--launches: a CPU launches no kernels; add --device cuda or hopper".into()));
    }
    let (model, sizes, _, plan) = planned::<T>(device, arguments)?;
    for launch in plan::launches::<T>(device.facts(), &model, sizes, plan.policy)? {
        let hex = |arg: &Arg| arg.bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        super::print_json(&LaunchLine {
            kernel: launch.symbol(),
            grid: launch.grid,
            block: launch.block,
            shared_bytes: launch.shared_bytes,
            arguments: launch.args.iter().map(hex).collect(),
        })?;
    }
    Ok(())
}

/// The model, what it reads of the bags, the plan that keeps everything, and the plan within the
/// budget.
fn planned<T: Element>(device: &Device, arguments: &PlanArguments) -> Result<(Model, BagSizes, Plan, Plan)> {
    let sizes = arguments.bags.only(arguments.model.scales());
    let model = Model::new(&Config { model: arguments.model, ..Config::new(arguments.features) })?;
    let keep = plan::plan::<T>(device.facts(), &model, sizes, true, Policy::KEEP)?;
    let plan = match arguments.memory_budget {
        Some(budget) => plan::fit::<T>(device.facts(), &model, sizes, true, budget.as_u64() as usize)?,
        None => keep,
    };
    Ok((model, sizes, keep, plan))
}

fn make<T: Element<Sum = f32>>(device: &Device, arguments: &PlanArguments) -> Result<PlanReport> {
    let (_, sizes, keep, plan) = planned::<T>(device, arguments)?;
    let predicted_s = match device {
        Device::Cpu(cpu) => ceilings::peak::<T>(device)?.map(|peak| plan.step_flop / peak / fraction_of_peak::<T>(cpu)),
        _ => None,
    };
    Ok(PlanReport {
        device: if let Device::Dry(_) = device { "cuda, not opened".into() } else { device.description() },
        model: arguments.model,
        bags: sizes.values().copied().collect(),
        features: arguments.features,
        precision: arguments.precision,
        budget_bytes: arguments.memory_budget.map(|budget| budget.as_u64()),
        policy: plan.policy.to_string(),
        peak_bytes: plan.peak_bytes(),
        parts: plan.parts,
        step_flop: plan.step_flop,
        extra_flop: plan.step_flop - keep.step_flop,
        launches: plan.launches,
        predicted_s,
    })
}
