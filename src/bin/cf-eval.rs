//! Evaluates a run, or one checkpoint on any cohort, compares runs, and predicts slides without
//! outcomes.

use std::path::PathBuf;

use bytesize::ByteSize;
use clap::{Args, CommandFactory, Parser, Subcommand};
use crossfusion::{
    Error, Result, cli,
    data::{
        clinical::Columns,
        dataset::{Source, Which},
    },
    device::Device,
    eval::{self, Checkpoint, Moved, compare, predict, seeds},
    folder,
    report::RESAMPLING,
    survival::Bootstrap,
};

const EXAMPLES: &str = "\
Examples:
  cf-eval runs/resnet50-1
      each fold's model on the slides that the fold was not trained on
  cf-eval runs/five
      each run of cf-train --seeds, and all of them side by side
  cf-eval runs/resnet50-1 --pt-dir /new/place/features
      the same after the features have moved
  cf-eval --checkpoint best_model.pt --clinical other.csv --pt-dir features --backbone resnet50
      one model on another cohort
  cf-eval compare runs/resnet50-1 runs/uni-1
      the difference of two runs' C-indices, with its interval
  cf-eval predict runs/resnet50-1 --pt-dir new_features --backbone resnet50
      risks and survival curves of slides whose outcome is not known";

const USAGE: &str = "\
cf-eval [OPTIONS] <RUN>
       cf-eval [OPTIONS] --checkpoint <F> --clinical <F> --pt-dir <DIR> --backbone <NAME>
       cf-eval compare [OPTIONS] <RUN_A> <RUN_B>
       cf-eval predict [OPTIONS] --pt-dir <DIR> --backbone <NAME> <MODEL>";

/// Evaluates a run's folds, or one checkpoint on any cohort: C-index, Kaplan-Meier curves,
/// predictions and a report
#[derive(Parser)]
#[command(name = "cf-eval", allow_negative_numbers = true, version = crossfusion::report::VERSION, args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, override_usage = USAGE, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,

    /// Run folder of cf-train, or of its --seeds; each fold's best model is evaluated on the fold's test slides, or
    /// else on its validation slides
    #[arg(required_unless_present_any = ["checkpoint", "completions", "man"], conflicts_with = "checkpoint")]
    run: Option<PathBuf>,
    /// A model: best.safetensors of a run, or a published best_model.pt
    #[arg(long, value_name = "F", requires_all = ["clinical", "pt_dir", "backbone"])]
    checkpoint: Option<PathBuf>,
    /// Folder for the results of --checkpoint; a run's go into its own folder [default:
    /// runs/eval-BACKBONE-NUMBER]
    #[arg(long, value_name = "DIR", conflicts_with = "run")]
    out: Option<PathBuf>,
    #[command(flatten)]
    data: Data,
    #[command(flatten)]
    resampling: Resampling,
    #[command(flatten)]
    machine: Machine,
    #[command(flatten)]
    documentation: cli::Documentation,
}

/// Where the cohort lies.
#[derive(Args)]
#[command(next_help_heading = "Cohort (of --checkpoint, or of a run whose data has moved)")]
struct Data {
    /// Clinical table: CSV, or a zip of one, with case_id, slide_id, censorship, survival_months
    #[arg(long, value_name = "F")]
    clinical: Option<PathBuf>,
    /// Columns of other names, as of cf-train
    #[arg(long, value_name = "KEY=COLUMN,...", conflicts_with = "run", default_value = "", hide_default_value = true)]
    columns: Columns,
    /// GDC manifest; slides that it does not list are left out
    #[arg(long, value_name = "F")]
    manifest: Option<PathBuf>,
    /// Folder of BACKBONE/x{5,10,20}/pt_files/SLIDE.pt, of TRIDENT's
    /// {5,10,20}x_*/features_BACKBONE, or of STAMP's x{5,10,20}/BACKBONE
    #[arg(long, value_name = "DIR")]
    pt_dir: Option<PathBuf>,
    /// Name of the feature extractor, a folder in --pt-dir
    #[arg(long, value_name = "NAME", conflicts_with = "run")]
    backbone: Option<String>,
    /// Folder of splits_0.csv, splits_1.csv, ...; of --checkpoint, only --fold's test slides are
    /// evaluated, or else its validation slides
    #[arg(long, value_name = "DIR")]
    splits: Option<PathBuf>,
    /// The fold of --splits whose slides --checkpoint is evaluated on
    #[arg(long, value_name = "K", requires = "splits", conflicts_with = "run")]
    fold: Option<usize>,
    /// Attention heads of a --checkpoint that does not say, as published ones; other sizes are read
    /// off its tensors [default: 4]
    #[arg(long, value_name = "N", conflicts_with = "run")]
    num_heads: Option<usize>,
}

/// What it runs on.
#[derive(Args)]
#[command(next_help_heading = "Machine")]
struct Machine {
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
        /// Run folder, or the folder of an evaluation: A of the difference A - B
        run_a: PathBuf,
        /// The same: B of the difference A - B
        run_b: PathBuf,
        /// Folder for the comparison [default: runs/compare-NUMBER]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        #[command(flatten)]
        resampling: Resampling,
    },
    /// Predicts slides whose outcome is not known: hazards, survival curve, median survival and
    /// risk
    Predict {
        /// Run folder, whose folds' models are averaged, or one model: best.safetensors, a
        /// published best_model.pt
        model: PathBuf,
        /// Folder of BACKBONE/x{5,10,20}/pt_files/SLIDE.pt, of TRIDENT's
        /// {5,10,20}x_*/features_BACKBONE, or of STAMP's x{5,10,20}/BACKBONE
        #[arg(long, value_name = "DIR")]
        pt_dir: PathBuf,
        /// Name of the feature extractor, a folder in --pt-dir
        #[arg(long, value_name = "NAME")]
        backbone: String,
        /// Table with a column slide_id: the slides to predict [default: all that have features, by
        /// the names of their files without extension]
        #[arg(long, value_name = "F")]
        slides: Option<PathBuf>,
        /// Attention heads of a model that does not say, as published ones [default: 4]
        #[arg(long, value_name = "N")]
        num_heads: Option<usize>,
        /// Folder for predictions.csv and predictions.json [default: runs/predict-BACKBONE-NUMBER]
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
        #[command(flatten)]
        machine: Machine,
    },
}

/// How intervals are drawn.
#[derive(Args)]
#[command(next_help_heading = "Intervals")]
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
    if let Err(error) = evaluate(Arguments::parse()).and_then(|()| crossfusion::said()) {
        crossfusion::complain("cf-eval", &error);
        std::process::exit(error.exit_code());
    }
}

fn evaluate(arguments: Arguments) -> Result<()> {
    if arguments.documentation.print(Arguments::command())? {
        return Ok(());
    }
    cli::end_at_signals()?;
    match arguments.command {
        Some(Command::Compare { run_a, run_b, out, resampling }) => {
            let out = out.unwrap_or_else(|| folder::fresh_folder("compare"));
            eval::check_out(&out)?;
            let comparison = compare::compare_runs(&run_a, &run_b, &out, resampling.plan())?;
            crossfusion::say(comparison.table().trim_end());
            crossfusion::say(format!("comparison {}", out.join(compare::FILE).display()));
            Ok(())
        }
        Some(Command::Predict { model, pt_dir, backbone, slides, num_heads, out, machine }) => {
            let device = Device::from_name(&machine.device, machine.threads)?;
            let out = out.unwrap_or_else(|| folder::fresh_folder(&format!("predict-{backbone}")));
            eval::check_out(&out)?;
            let request = predict::Request {
                model: &model,
                heads: num_heads,
                pt_dir: &pt_dir,
                backbone: &backbone,
                slides: slides.as_deref().map_or(Which::All, Which::Table),
            };
            let predictions = predict::predict(&request, device, machine.memory_budget)?;
            predictions.write(&out)?;
            crossfusion::say(predictions.sentences());
            crossfusion::say(format!("predictions {}", out.join(predict::CSV).display()));
            Ok(())
        }
        None => evaluate_models(&arguments),
    }
}

fn evaluate_models(arguments: &Arguments) -> Result<()> {
    let Arguments { run, checkpoint, out, data, resampling, machine, .. } = arguments;
    let device = Device::from_name(&machine.device, machine.threads)?;
    let (plan, budget) = (resampling.plan(), machine.memory_budget);
    let (summary, folder) = match (run, checkpoint, data) {
        (Some(run), ..) => {
            let of_seeds = !folder::config_path(run).exists() && !seeds::runs(run).is_empty();
            let Data { clinical, manifest, splits, pt_dir, .. } = data;
            let moved = Moved {
                clinical: clinical.clone(),
                manifest: manifest.clone(),
                splits: splits.clone(),
                pt_dir: pt_dir.clone(),
            };
            if of_seeds {
                let device = || Device::from_name(&machine.device, machine.threads);
                let seeds = seeds::evaluate(run, &moved, &device, budget, plan)?;
                crossfusion::say(seeds.table().trim_end());
                crossfusion::say(format!("report {}", run.join("report.html").display()));
                return Ok(());
            }
            (eval::evaluate_run(run, &moved, device, budget, plan)?, run.clone())
        }
        (
            None,
            Some(path),
            Data {
                clinical: Some(clinical),
                pt_dir: Some(pt_dir),
                backbone: Some(backbone),
                columns,
                manifest,
                splits,
                fold,
                num_heads,
            },
        ) => {
            let split = match (splits, fold) {
                (Some(splits), Some(fold)) => Some((splits.as_path(), *fold)),
                (Some(_), None) => {
                    return Err(Error::Usage("--splits with --checkpoint: expected --fold as well".into()));
                }
                (None, _) => None,
            };
            let source =
                Source { clinical, columns, manifest: manifest.as_deref(), pt_dir, backbone, scales: &[], skip: &[] };
            let out = out.clone().unwrap_or_else(|| folder::fresh_folder(&format!("eval-{backbone}")));
            eval::check_out(&out)?;
            let checkpoint = Checkpoint { path, source, split, heads: *num_heads };
            (eval::evaluate_checkpoint(&checkpoint, &out, device, budget, plan)?, out)
        }
        _ => return Err(Error::Usage("expected a run folder, or --checkpoint; see --help".into())),
    };
    crossfusion::say(summary.table().trim_end());
    crossfusion::say(format!("report {}", folder.join("report.html").display()));
    Ok(())
}
