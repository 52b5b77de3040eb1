//! Trains CrossFusion on a cohort, fold by fold.

use std::{
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, Ordering},
};

use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser};
use crossfusion::{
    Error, Result,
    data::demo,
    device::Device,
    eval,
    train::{
        config::RunConfig,
        run::{self, Run},
    },
};

/// Set by Ctrl-C; a second one ends the program at once.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

#[derive(Parser)]
#[command(version, about = "Trains CrossFusion on a cohort, fold by fold")]
struct Arguments {
    /// Write a small synthetic cohort, train two folds on it and report, in about two minutes
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
    if (RunConfig { device: before.device.clone(), threads: before.threads, ..config.clone() }) != before {
        return Err(Error::Usage("--resume keeps the run's settings; only --device and --threads may change".into()));
    }
    Ok(config)
}

fn train() -> Result<()> {
    let matches = Arguments::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let settings = arguments.settings.run;
    let (folder, config) = if let Some(folder) = &arguments.resume {
        (folder.clone(), resumed(&settings, &matches, folder)?)
    } else if arguments.demo {
        let folder = arguments.out.unwrap_or_else(|| run::fresh_folder("demo"));
        let config = settings.resolve(&matches, "--demo", demo::settings(&folder.join(run::DEMO_DATA))?)?;
        (folder, config)
    } else {
        let name = arguments.config.as_ref().map_or("the flags".into(), |path| path.display().to_string());
        let table = arguments.config.as_deref().map(RunConfig::read_table).transpose()?;
        let config = settings.resolve(&matches, &name, table.unwrap_or_default())?;
        (arguments.out.unwrap_or_else(|| run::fresh_folder(&config.backbone)), config)
    };
    let device = Device::from_name(&config.device, config.threads)?;
    if arguments.demo {
        let cohort = folder.join(run::DEMO_DATA);
        println!("writing a synthetic cohort to {}", cohort.display());
        demo::write_demo(&cohort, config.seed)?;
    }
    let run = Run::open(config)?;
    if arguments.resume.is_none() {
        run.create(&folder)?;
    }
    let handler = || {
        if INTERRUPTED.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
        eprintln!("finishing the slide in hand; once more stops at once");
    };
    ctrlc::set_handler(handler).map_err(|e| Error::Device(format!("cannot listen for Ctrl-C: {e}")))?;
    run.train(&folder, &INTERRUPTED)?;
    let summary = eval::evaluate_run(&folder, device)?;
    print!("{}", summary.table());
    println!("report {}", folder.join("report.html").display());
    Ok(())
}
