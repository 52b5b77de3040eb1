//! `cf-bench op`: each op alone, against what this machine can do at all.

use std::time::Instant;

use clap::{Args, ValueEnum};
use half::bf16;
use serde::{Deserialize, Serialize};

use super::{Precision, cases::Cases, ceilings, cox, parse_bags, peer};
use crate::{
    Error, Result,
    device::{Device, Element},
    model::{BagSizes, Config, Model, Scale},
    survival::Ties,
};

/// The flags of `cf-bench op`: which ops, on a slide of which sizes, and the peer to time.
#[derive(Args)]
pub struct OpArguments {
    /// Ops whose name begins so (matmul, "attention forward", ...); or cox alone, which has a
    /// cohort instead of a slide
    #[arg(required_unless_present = "all")]
    ops: Vec<String>,
    /// Every op
    #[arg(long)]
    all: bool,
    /// Where to run: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    device: String,
    /// Threads; 0 is one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    /// Patches at 5x, 10x and 20x of the slide whose ops these are
    #[arg(long, default_value = "800,3000,12000", value_parser = parse_bags)]
    bags: BagSizes,
    /// Width of the patch features
    #[arg(long, default_value_t = 2048, value_parser = super::parse_features)]
    features: usize,
    /// Storage precision
    #[arg(long, value_enum, default_value_t = Precision::F32)]
    precision: Precision,
    /// Patients of `cox`
    #[arg(long, default_value_t = 1_000_000, value_parser = patients)]
    pub(super) n: usize,
    /// Ties of `cox`
    #[arg(long, value_enum, default_value_t = TiesArgument::Efron)]
    pub(super) ties: TiesArgument,
    /// Timed runs of each, after one that warms up
    #[arg(long, default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) repeat: u32,
    /// A Python with PyTorch, to time that on the same work in the same run
    #[arg(long, value_name = "PYTHON")]
    peer: Option<String>,
    /// Print one JSON object instead of a table
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Clone, Copy, ValueEnum)]
pub(super) enum TiesArgument {
    Efron,
    Breslow,
}

impl From<TiesArgument> for Ties {
    fn from(ties: TiesArgument) -> Self {
        match ties {
            TiesArgument::Efron => Self::Efron,
            TiesArgument::Breslow => Self::Breslow,
        }
    }
}

fn patients(text: &str) -> Result<usize, String> {
    let n = text.parse().ok().filter(|n| (1..=1 << 30).contains(n));
    n.ok_or_else(|| "expected a number of patients from 1 to 2^30".into())
}

#[derive(Serialize)]
struct Report {
    device: String,
    precision: Precision,
    /// Measured on this device just before: the roofline's two lines.
    /// None on a GPU without cublasLt.
    peak_tflops: Option<f64>,
    copy_gbs: f64,
    ops: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    op: &'static str,
    shape: String,
    median_us: f64,
    /// The fastest and the slowest run.
    min_us: f64,
    max_us: f64,
    gbs: f64,
    tflops: f64,
    /// PyTorch, if asked for and if it has this op as one call.
    peer_us: Option<f64>,
    /// cublasLt on the same product without epilogue, where both are at hand.
    cublaslt_us: Option<f64>,
    /// The time of its operations at the measured peak, or of its bytes at the measured copy rate,
    /// whichever is longer, over the median.
    of_roofline: Option<f64>,
}

/// `cf-bench op`.
pub fn op(arguments: &OpArguments) -> Result<()> {
    let device = Device::from_name(&arguments.device, arguments.threads)?;
    if arguments.ops == ["cox"] && !arguments.all {
        return cox::cox(&device, arguments);
    }
    let report = match arguments.precision {
        Precision::F32 => measure::<f32>(&device, arguments)?,
        Precision::Bf16 => measure::<bf16>(&device, arguments)?,
    };
    if arguments.json {
        let json = serde_json::to_string(&report).map_err(|e| Error::Device(e.to_string()))?;
        crate::say(json);
        return Ok(());
    }
    crate::say(format!(
        "{}: {}, {:.0} GB/s measured here",
        report.device,
        report.peak_tflops.map_or("no cublasLt to measure the peak by".into(), |peak| format!("{peak:.2} TFLOP/s")),
        report.copy_gbs
    ));
    let head = ("op", "shape", "us", "min", "max", "GB/s", "TFLOP/s", "PyTorch", "cublasLt", "of roofline");
    crate::say(format!(
        "{:<30}{:<50}{:>11}{:>11}{:>11}{:>9}{:>9}{:>11}{:>11}{:>13}",
        head.0, head.1, head.2, head.3, head.4, head.5, head.6, head.7, head.8, head.9
    ));
    for row in &report.ops {
        crate::say(format!(
            "{:<30}{:<50}{:>11.1}{:>11.1}{:>11.1}{:>9.1}{:>9.2}{:>11}{:>11}{:>13}",
            row.op,
            row.shape,
            row.median_us,
            row.min_us,
            row.max_us,
            row.gbs,
            row.tflops,
            microseconds(row.peer_us),
            microseconds(row.cublaslt_us),
            row.of_roofline.map_or("-".into(), |share| format!("{:.0} %", 100.0 * share))
        ));
    }
    Ok(())
}

fn microseconds(time: Option<f64>) -> String {
    time.map_or("-".into(), |us| format!("{us:.1}"))
}

fn measure<T: Element>(device: &Device, arguments: &OpArguments) -> Result<Report> {
    let (peak, copy) = (ceilings::peak::<T>(device)?, ceilings::copy_rate(device)?);
    let parameters = Model::new(&Config::new(arguments.features))?.layout().len();
    let mut cases = Cases::new::<T>(device, arguments.bags, arguments.features, parameters)?;
    let wanted = |op: &str| arguments.all || arguments.ops.iter().any(|start| op.starts_with(start.as_str()));
    let wanted: Vec<usize> = (0..cases.cases().len()).filter(|&i| wanted(cases.cases()[i].op)).collect();
    if wanted.is_empty() {
        return Err(Error::Usage(format!(
            "there is no op {:?}: cox, or see the names that --all shows",
            arguments.ops
        )));
    }
    let peer = match &arguments.peer {
        Some(python) => peer_rows(python, arguments)?,
        None => Vec::new(),
    };
    let row = |i: usize| {
        let times = times(device, &mut cases, i, arguments.repeat)?;
        let case = &cases.cases()[i];
        let (median, min, max) = (times[times.len() / 2], times[0], times[times.len() - 1]);
        Ok(Row {
            op: case.op,
            shape: case.shape.clone(),
            median_us: 1e6 * median,
            min_us: 1e6 * min,
            max_us: 1e6 * max,
            gbs: case.bytes / median / 1e9,
            tflops: case.flop / median / 1e12,
            peer_us: peer.iter().find(|row| row.op == case.op && row.shape == case.shape).map(|row| row.median_us),
            cublaslt_us: ceilings::cublaslt(device, case, arguments.repeat)?.map(|seconds| 1e6 * seconds),
            of_roofline: peak.map(|peak| (case.flop / peak).max(case.bytes / copy) / median),
        })
    };
    let ops = wanted.into_iter().map(row).collect::<Result<_>>()?;
    Ok(Report {
        device: device.description(),
        precision: arguments.precision,
        peak_tflops: peak.map(|peak| peak / 1e12),
        copy_gbs: copy / 1e9,
        ops,
    })
}

/// A line of peer.py's.
#[derive(Deserialize)]
struct PeerRow {
    op: String,
    shape: String,
    median_us: f64,
}

fn peer_rows(python: &str, arguments: &OpArguments) -> Result<Vec<PeerRow>> {
    #[derive(Deserialize)]
    struct Peer {
        ops: Vec<PeerRow>,
    }
    let [x5, x10, x20] = Scale::ALL.map(|scale| arguments.bags.get(scale).copied().unwrap_or(0));
    let precision = arguments.precision.to_possible_value().map_or(String::new(), |value| value.get_name().into());
    let (features, repeat) = (arguments.features.to_string(), arguments.repeat.to_string());
    let bags = format!("{x5},{x10},{x20}");
    let flags = ["op", "--bags", &bags, "--features", &features, "--precision", &precision, "--repeat", &repeat];
    peer::run::<Peer>(python, &flags.map(String::from)).map(|peer| peer.ops)
}

/// Seconds of each run, ascending. On a GPU by its own clock, each after the L2 cache has been
/// filled with something else.
fn times(device: &Device, cases: &mut Cases, i: usize, repeat: u32) -> Result<Vec<f64>> {
    cases.run(i)?;
    let mut times = Vec::new();
    for _ in 0..repeat {
        times.push(match device {
            Device::Cuda(cuda) => {
                ceilings::flush_l2(cuda)?;
                cuda.time(|| cases.run(i))?
            }
            _ => {
                let start = Instant::now();
                device.install(|| cases.run(i))?;
                start.elapsed().as_secs_f64()
            }
        });
    }
    times.sort_by(f64::total_cmp);
    Ok(times)
}
