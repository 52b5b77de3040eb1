//! Evaluates a run, or one checkpoint on any cohort, and compares runs.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Args, Parser, Subcommand};
use crossfusion::{
    Error, Result,
    data::{clinical::Columns, dataset::Source},
    device::Device,
    eval::{self, Checkpoint, compare},
    report::RESAMPLING,
    survival::Bootstrap,
    train::run,
};

/// Evaluates a run's folds, or one checkpoint on any cohort: C-index, Kaplan-Meier curves, predictions and a report
#[derive(Parser)]
#[command(version, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Run folder of cf-train; each fold's best model is evaluated on the fold's test slides, or else on its validation slides
    #[arg(required_unless_present = "checkpoint", conflicts_with = "checkpoint")]
    run: Option<PathBuf>,
    /// A model: best.safetensors of a run, or a published best_model.pt
    #[arg(long, value_name = "F", requires_all = ["clinical", "pt_dir", "backbone"])]
    checkpoint: Option<PathBuf>,
    /// Clinical table: CSV, or a zip of one, with case_id, slide_id, censorship, survival_months
    #[arg(long, value_name = "F", requires = "checkpoint")]
    clinical: Option<PathBuf>,
    /// Columns of other names, as of cf-train
    #[arg(long, value_name = "KEY=COLUMN,...", requires = "checkpoint", default_value = "", hide_default_value = true)]
    columns: Columns,
    /// GDC manifest; slides that it does not list are left out
    #[arg(long, value_name = "F", requires = "checkpoint")]
    manifest: Option<PathBuf>,
    /// Folder of BACKBONE/x{5,10,20}/pt_files/SLIDE.pt
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    pt_dir: Option<PathBuf>,
    /// Name of the feature extractor, a folder in --pt-dir
    #[arg(long, value_name = "NAME", requires = "checkpoint")]
    backbone: Option<String>,
    /// Folder of splits_0.csv, splits_1.csv, ...; with --fold, only that fold's test slides are evaluated, or else its validation slides
    #[arg(long, value_name = "DIR", requires_all = ["checkpoint", "fold"])]
    splits: Option<PathBuf>,
    #[arg(long, value_name = "K", requires = "splits")]
    fold: Option<usize>,
    /// Attention heads of a checkpoint that does not say; its other sizes are read off its tensors
    #[arg(long, default_value_t = 4, value_name = "N")]
    num_heads: usize,
    /// Folder for the results of --checkpoint; a run's go into its own folder [default: runs/eval-BACKBONE-NUMBER]
    #[arg(long, value_name = "DIR", requires = "checkpoint")]
    out: Option<PathBuf>,
    #[command(flatten)]
    resampling: Resampling,
    /// Where to run: auto, cpu or cuda
    #[arg(long, default_value = "auto")]
    device: String,
    /// Most memory for a slide, on a GPU of the GPU's: 8GiB, say [default: the run's own]
    #[arg(long, value_name = "BYTES")]
    memory_budget: Option<ByteSize>,
    /// Threads; 0 is one for each core. Results do not depend on it
    #[arg(long, default_value_t = 0)]
    threads: usize,
}

#[derive(Subcommand)]
enum Command {
    /// Compares two evaluated runs, pair by pair, on the patients that both predicted out of fold
    Compare {
        run_a: PathBuf,
        run_b: PathBuf,
        /// Folder for the comparison [default: runs/compare-NUMBER]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        #[command(flatten)]
        resampling: Resampling,
    },
}

/// How intervals are drawn.
#[derive(Args)]
struct Resampling {
    /// Bootstrap cohorts, and permutations, behind intervals and p-values
    #[arg(long, value_name = "N", default_value_t = RESAMPLING.replicates as u64, value_parser = clap::value_parser!(u64).range(2..=1_000_000))]
    bootstrap: u64,
    /// Seed of the bootstrap and of the permutations
    #[arg(long, default_value_t = RESAMPLING.seed)]
    seed: u64,
}

impl Resampling {
    fn plan(&self) -> Bootstrap {
        Bootstrap { replicates: self.bootstrap as usize, seed: self.seed, ..RESAMPLING }
    }
}

fn main() {
    if let Err(error) = evaluate(&Arguments::parse()) {
        eprintln!("cf-eval: {error}");
        std::process::exit(error.exit_code());
    }
}

fn evaluate(arguments: &Arguments) -> Result<()> {
    if let Some(Command::Compare { run_a, run_b, out, resampling }) = &arguments.command {
        let out = out.clone().unwrap_or_else(|| run::fresh_folder("compare"));
        let comparison = compare::compare_runs(run_a, run_b, &out, resampling.plan())?;
        crossfusion::say(comparison.table().trim_end());
        crossfusion::say(format!("comparison {}", out.join(compare::FILE).display()));
        return Ok(());
    }
    let device = Device::from_name(&arguments.device, arguments.threads)?;
    let plan = arguments.resampling.plan();
    let (summary, folder) = match arguments {
        Arguments { run: Some(run), .. } => {
            (eval::evaluate_run(run, device, arguments.memory_budget, plan)?, run.clone())
        }
        Arguments {
            checkpoint: Some(path),
            clinical: Some(clinical),
            pt_dir: Some(pt_dir),
            backbone: Some(backbone),
            columns,
            manifest,
            splits,
            fold,
            num_heads,
            out,
            ..
        } => {
            let source = Source { clinical, columns, manifest: manifest.as_deref(), pt_dir, backbone };
            let split = splits.as_deref().zip(*fold);
            let out = out.clone().unwrap_or_else(|| run::fresh_folder(&format!("eval-{backbone}")));
            let checkpoint = Checkpoint { path, source, split, heads: *num_heads };
            (eval::evaluate_checkpoint(&checkpoint, &out, device, arguments.memory_budget, plan)?, out)
        }
        _ => return Err(Error::Usage("expected a run folder, or --checkpoint; see --help".into())),
    };
    crossfusion::say(summary.table().trim_end());
    crossfusion::say(format!("report {}", folder.join("report.html").display()));
    Ok(())
}
