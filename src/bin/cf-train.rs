//! Trains CrossFusion on a cohort, fold by fold.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser};
use crossfusion::{
    Error, Result,
    data::demo,
    device::Device,
    eval, report,
    train::{
        config::RunConfig,
        run::{self, Run},
    },
};

#[derive(Parser)]
#[command(version, about = "Trains CrossFusion on a cohort, fold by fold")]
struct Arguments {
    /// Write a small synthetic cohort, train two folds on it and report, in about half a minute
    #[arg(long, conflicts_with_all = ["resume", "config"])]
    demo: bool,
    /// Go on with an interrupted run, bit by bit as if it had not been interrupted
    #[arg(long, value_name = "RUN", conflicts_with_all = ["config", "out"])]
    resume: Option<PathBuf>,
    /// Settings as TOML; flags override it
    #[arg(long, value_name = "F.toml")]
    config: Option<PathBuf>,
    /// Run folder [default: runs/BACKBONE-NUMBER]
    #[arg(long, alias = "save-dir", value_name = "RUN")]
    out: Option<PathBuf>,
    #[command(flatten)]
    settings: Settings,
}

#[derive(Args)]
#[command(next_help_heading = "Settings")]
struct Settings {
    #[command(flatten)]
    run: RunConfig,
}

fn main() {
    if let Err(error) = train() {
        eprintln!("cf-train: {error}");
        std::process::exit(error.exit_code());
    }
}

/// The settings of an interrupted run.
fn resumed(settings: &RunConfig, matches: &ArgMatches, folder: &Path) -> Result<RunConfig> {
    let path = run::config_path(folder);
    if !path.is_file() {
        return Err(Error::Usage(format!("--resume {}: is not a run folder, it has no config.toml", folder.display())));
    }
    let before = RunConfig::read(&path)?;
    let config = settings.resolve(matches, &path.display().to_string(), RunConfig::read_table(&path)?)?;
    if config.without_machine() != before.without_machine() {
        let free = "--device, --threads, --memory-budget, --prefetch-factor and --checkpoint-every";
        return Err(Error::Usage(format!("--resume keeps the run's settings; only {free} may change")));
    }
    Ok(config)
}

fn train() -> Result<()> {
    let matches = Arguments::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let settings = arguments.settings.run;
    // Nothing is written before all input is checked.
    let (folder, run, device) = if let Some(folder) = arguments.resume {
        let config = resumed(&settings, &matches, &folder)?;
        if run::is_finished(&folder, config.fold_numbers())? {
            crossfusion::say(format!(
                "{} is finished; its report is {}",
                folder.display(),
                folder.join("report.html").display()
            ));
            return Ok(());
        }
        let device = Device::from_name(&config.device, config.threads)?;
        (folder, Run::open(config)?, device)
    } else if arguments.demo {
        let resolve = |run: &Path| settings.resolve(&matches, "--demo", demo::settings(&run.join(run::DEMO_DATA))?);
        let config = resolve(Path::new("."))?;
        let device = Device::from_name(&config.device, config.threads)?;
        config.precision.storage(&device)?;
        let folder = run::make_folder(arguments.out, "demo")?;
        let cohort = folder.join(run::DEMO_DATA);
        crossfusion::say(format!("writing a synthetic cohort to {}", cohort.display()));
        demo::write_demo(&cohort, config.seed)?;
        let run = resolve(&folder).and_then(Run::open).inspect_err(|_| {
            // a budget that the cohort does not fit: take back what was written for it
            let _ = std::fs::remove_dir_all(&cohort).and_then(|()| std::fs::remove_dir(&folder));
        })?;
        run.save_config(&folder)?;
        (folder, run, device)
    } else {
        let name = arguments.config.as_ref().map_or("the flags".into(), |path| path.display().to_string());
        let table = arguments.config.as_deref().map(RunConfig::read_table).transpose()?;
        let config = settings.resolve(&matches, &name, table.unwrap_or_default())?;
        let device = Device::from_name(&config.device, config.threads)?;
        let backbone = config.backbone.clone();
        let run = Run::open(config)?;
        let folder = run::make_folder(arguments.out, &backbone)?;
        run.save_config(&folder)?;
        (folder, run, device)
    };
    if let Some(sentence) = run.memory() {
        crossfusion::say(sentence);
    }
    let interrupted = Arc::default();
    listen(&interrupted).map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))?;
    run.train(&folder, &interrupted)?;
    interrupted.store(true, Ordering::Relaxed); // what is left is quickly done again: a signal ends it at once
    let summary = eval::evaluate_run(&folder, device, None, report::RESAMPLING)?;
    crossfusion::say(summary.table().trim_end());
    crossfusion::say(format!("report {}", folder.join("report.html").display()));
    Ok(())
}

/// Ctrl-C, or a batch system's SIGTERM, sets `interrupted`; the next one ends the program at once.
fn listen(interrupted: &Arc<AtomicBool>) -> std::result::Result<(), Box<dyn std::error::Error>> {
    use signal_hook::{consts::SIGTERM, flag};
    flag::register_conditional_shutdown(SIGTERM, 143, interrupted.clone())?;
    flag::register(SIGTERM, interrupted.clone())?;
    let interrupted = interrupted.clone();
    ctrlc::set_handler(move || {
        if interrupted.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the slide in hand; once more stops at once");
    })?;
    Ok(())
}
