//! Trains CrossFusion on a cohort, fold by fold.

use std::{
    collections::HashMap,
    io::Write,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicI32, Ordering},
    },
    time::Duration,
};

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, parser::ValueSource};
use crossfusion::{
    Error, Result, cli,
    data::{self, atomic, check::Checked, demo, folds},
    device::Device,
    eval, folder, report,
    train::{
        config::{Difference, RunConfig},
        ranks::Ranks,
        run::{self, Run},
    },
};
use indicatif::{ProgressBar, ProgressStyle};

const EXAMPLES: &str = "\
Examples:
  cf-train --demo
      a synthetic cohort, trained and evaluated in half a minute
  cf-train --clinical tcga_ucec_all_clean.csv.zip --splits splits/tcga_ucec --pt-dir features --backbone resnet50
      the folds that are there, by the published settings
  cf-train ... --check
      reads the whole cohort and says what is wrong with it
  cf-train ... --loss-fn cox_surv --protocol nested
      Cox's loss; epochs chosen on a part of the training patients
  cf-train ... --out runs/a --fold 2
      one fold of a run, in a job of its own beside those of the other folds
  cf-train ... --out runs/five --seeds 5
      five runs that differ in their seed alone
  mpirun -n 4 cf-train ... --threads 2
      the slides of an update shared by four processes, where it is built with --features mpi
  cf-train --resume runs/resnet50-1
      goes on with an interrupted run
  cf-train --config runs/resnet50-1/config.toml --seed 8
      repeats a run with another seed";

#[derive(Parser)]
#[command(name = "cf-train", allow_negative_numbers = true, version = crossfusion::report::VERSION, about = "Trains CrossFusion on a cohort, fold by fold", after_help = EXAMPLES)]
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
    /// Read all tables and every value of every feature file, say what is wrong with them, and
    /// train nothing
    #[arg(long, conflicts_with_all = ["demo", "resume", "out", "skip_bad"])]
    check: bool,
    /// Do the same first, and leave out the slides with something wrong; config.toml and
    /// left_out.csv name them
    #[arg(long, conflicts_with_all = ["demo", "resume"])]
    skip_bad: bool,
    /// Train this fold alone, and leave the others of the run in --out to other processes. Begins
    /// the run or joins it, and goes on where the fold was interrupted; cf-eval then reports
    #[arg(long, value_name = "K", conflicts_with_all = ["demo", "check"])]
    fold: Option<usize>,
    /// Train as many runs, of the seeds --seed, --seed + 1, ..., into the folders seed_N of --out;
    /// the same command goes on where it was interrupted
    #[arg(long, value_name = "N", conflicts_with_all = ["demo", "check", "resume"], value_parser = clap::value_parser!(u64).range(1..=1000))]
    seeds: Option<u64>,
    /// Run folder [default: runs/BACKBONE-NUMBER]
    #[arg(long, alias = "save-dir", value_name = "RUN")]
    out: Option<PathBuf>,
    #[command(flatten)]
    settings: RunConfig,
    #[command(flatten)]
    documentation: cli::Documentation,
}

fn main() {
    let ranks = Ranks::from_environment().unwrap_or_else(|error| end(None, &error));
    let result = match &ranks {
        Some(ranks) if ranks.number() > 0 => follow(ranks),
        _ => lead(ranks.as_ref()),
    };
    if let Err(error) = result.and_then(|()| crossfusion::said()) {
        end(ranks, &error);
    }
}

/// Says what went wrong, and ends this process and those that train with it.
fn end(ranks: Option<Ranks>, error: &Error) -> ! {
    let code = match (error, SIGNAL.load(Ordering::Relaxed)) {
        (Error::Interrupted(_), signal @ 1..) => 128 + signal,
        _ => error.exit_code(),
    };
    let stopped = matches!(error, Error::Interrupted(_));
    match &ranks {
        Some(ranks) if ranks.number() > 0 => {
            if !stopped {
                std::thread::sleep(Duration::from_secs(1)); // what all have found the first one says
                crossfusion::complain(&format!("cf-train, rank {} of {}", ranks.number(), ranks.count()), error);
            }
        }
        _ => crossfusion::complain("cf-train", error),
    }
    if let Some(ranks) = &ranks
        && !stopped
    {
        ranks.abort(code);
    }
    ranks.into_iter().for_each(Ranks::leave);
    std::process::exit(code);
}

/// The signal that interrupted training; 0 until there is one.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The settings of an interrupted run.
fn resumed(settings: &RunConfig, matches: &ArgMatches, folder: &Path) -> Result<RunConfig> {
    let path = folder::config_path(folder);
    if !path.is_file() {
        return Err(Error::Usage(format!("--resume {}: is not a run folder, it has no config.toml", folder.display())));
    }
    let before = RunConfig::read(&path)?;
    let config = settings.resolve(matches, &path.display().to_string(), RunConfig::read_table(&path)?)?;
    if let Some(Difference { key, one, other }) = before.difference(&config) {
        let free = "--device, --threads, --memory-budget, --prefetch-factor, --checkpoint-every, --tensorboard and, where the data has \
                    moved, its paths";
        return Err(Error::Usage(format!(
            "--resume keeps the run's settings, and {key} is {one} there, not {other}; only {free} may change"
        )));
    }
    Ok(config)
}

/// Reads the whole cohort, with a bar on a terminal.
fn check(config: &RunConfig) -> Result<Checked> {
    let style = ProgressStyle::with_template("checking {wide_bar:.cyan/blue} {bytes} in {elapsed}, {bytes_per_sec}");
    let bar = ProgressBar::new_spinner().with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let checked = data::check::check(&config.source(), |bytes| bar.inc(bytes))?;
    bar.finish_and_clear();
    Ok(checked)
}

/// Folds and seeds go to a folder that is named.
fn check_out(arguments: &Arguments) -> Result<()> {
    let message = match (&arguments.out, arguments.fold, arguments.seeds) {
        (None, Some(fold), _) => format!("--fold {fold}: expected --out as well, the run folder that folds share"),
        (None, _, Some(seeds)) => format!("--seeds {seeds}: expected --out as well, the folder of the runs"),
        (Some(out), _, Some(_)) if folder::config_path(out).exists() => {
            format!("--out {}: is the run of one seed; choose another", out.display())
        }
        _ => return Ok(()),
    };
    Err(Error::Usage(message))
}

/// What there is left to do when a process has trained its one fold.
fn trained(run: &Path, fold: usize) -> Result<String> {
    let config = RunConfig::read(&folder::config_path(run))?;
    let unfinished = run::unfinished(run, config.fold_numbers())?;
    let run = crossfusion::quote(&run.display().to_string());
    Ok(match unfinished[..] {
        [] => format!("fold {fold} of {run} is trained, and so are all others; cf-eval {run} reports"),
        _ => format!("fold {fold} of {run} is trained, but not yet {}", folds::named(&unfinished)),
    })
}

/// The demo brings its own cohort.
fn refuse_data(matches: &ArgMatches) -> Result<()> {
    let given = |id: &str| matches.value_source(id) == Some(ValueSource::CommandLine);
    match ["clinical", "manifest", "splits", "pt_dir", "backbone", "backbone_dim", "folds"]
        .into_iter()
        .find(|id| given(id))
    {
        None => Ok(()),
        Some(id) => Err(Error::Usage(format!(
            "--demo and --{}: the demo writes a cohort of its own; leave one of them out",
            id.replace('_', "-")
        ))),
    }
}

/// Trains as the only process, or as the first of several.
fn lead(ranks: Option<&Ranks>) -> Result<()> {
    let matches = Arguments::command().get_matches();
    let arguments = Arguments::from_arg_matches(&matches).unwrap_or_else(|e| e.exit());
    let runs = match arguments.documentation.print(Arguments::command())? {
        true => Vec::new(),
        false => prepare(&arguments, &matches)?,
    };
    let interrupted = Arc::default();
    listen(&interrupted).map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))?;
    for (folder, run) in &runs {
        run.memory().into_iter().for_each(crossfusion::say);
        if let Some(ranks) = ranks {
            ranks.tell(&folder.display().to_string())?;
            ranks.tell(&run.config().to_toml()?)?;
            ranks.tell(&arguments.fold.map_or(String::new(), |fold| fold.to_string()))?;
        }
        run.train(folder, &interrupted, ranks).map_err(|error| match error {
            Error::Interrupted(_) if arguments.seeds.is_some() => {
                Error::Interrupted("stopped; the same command goes on".into())
            }
            other => other,
        })?;
        if let Some(fold) = arguments.fold {
            crossfusion::say(trained(folder, fold)?);
        }
    }
    if let Some(ranks) = ranks {
        ranks.tell("")?;
    }
    if runs.is_empty() || arguments.fold.is_some() {
        return Ok(());
    }
    interrupted.store(true, Ordering::Relaxed); // what is left is soon done again: a signal ends it at once
    evaluate(&runs, arguments.out.as_deref().filter(|_| arguments.seeds.is_some()))
}

/// Trains as one of several processes that is not the first, what this tells: a run's folder, its
/// settings and its only fold, if there is one; no folder at the end.
fn follow(ranks: &Ranks) -> Result<()> {
    let interrupted = Arc::default();
    listen(&interrupted).map_err(|e| Error::Device(format!("cannot listen for signals: {e}")))?;
    loop {
        let folder = ranks.tell("")?;
        if folder.is_empty() {
            return Ok(());
        }
        let mut run = Run::open(RunConfig::from_toml(&ranks.tell("")?)?)?;
        if let Ok(fold) = ranks.tell("")?.parse() {
            run.keep_fold(fold)?;
        }
        run.follow(Path::new(&folder), &interrupted, ranks)?;
    }
}

/// Checks all input and begins the runs' folders, or finds the one to resume; none where there is
/// nothing to train.
fn prepare(arguments: &Arguments, matches: &ArgMatches) -> Result<Vec<(PathBuf, Run)>> {
    let settings = &arguments.settings;
    // Nothing is written before all input is checked.
    if let Some(folder) = arguments.resume.clone() {
        let config = resumed(settings, matches, &folder)?;
        if arguments.fold.is_none() && run::is_finished(&folder, config.fold_numbers())? {
            crossfusion::say(format!(
                "{} is finished; its report is {}",
                folder.display(),
                folder.join("report.html").display()
            ));
            return Ok(Vec::new());
        }
        let mut run = Run::open(config)?;
        arguments.fold.map_or(Ok(()), |fold| run.keep_fold(fold))?;
        run.moved(&folder)?;
        Ok(vec![(folder, run)])
    } else if arguments.demo {
        refuse_data(matches)?;
        let resolve = |run: &Path| settings.resolve(matches, "--demo", demo::settings(&run.join(run::DEMO_DATA))?);
        let config = resolve(Path::new("."))?;
        Device::from_name(&config.device, config.threads)?;
        let folder = folder::make_folder(arguments.out.clone(), "demo")?;
        let cohort = folder.join(run::DEMO_DATA);
        crossfusion::say(format!("writing a synthetic cohort to {}", cohort.display()));
        demo::write_demo(&cohort, config.seed)?;
        let run = resolve(&folder).and_then(Run::open).inspect_err(|_| {
            // a budget that the cohort does not fit: take back what was written for it
            let _ = std::fs::remove_dir_all(&cohort).and_then(|()| std::fs::remove_dir(&folder));
        })?;
        run.save_config(&folder)?;
        Ok(vec![(folder, run)])
    } else {
        let name = arguments.config.as_ref().map_or("the flags".into(), |path| path.display().to_string());
        let table = arguments.config.as_deref().map(RunConfig::read_table).transpose()?;
        let mut config = settings.resolve(matches, &name, table.unwrap_or_default())?;
        Device::from_name(&config.device, config.threads)?;
        check_out(arguments)?;
        let mut reasons = HashMap::new();
        let mut nothing_wrong = None;
        if arguments.check || arguments.skip_bad {
            let checked = check(&config)?;
            let table = checked.table(&config.pt_dir);
            // good news waits until folds and bins are known to be right, too
            if checked.problems.is_empty() {
                nothing_wrong = Some(table)
            } else {
                crossfusion::say(table)
            }
            reasons = checked.bad_slides();
            config.skip_slides.extend(reasons.keys().cloned());
            config.skip_slides.sort();
        }
        let (seed, seeds) = (config.seed, arguments.seeds.unwrap_or(1));
        if seed + (seeds - 1) > i64::MAX as u64 {
            let message = format!("--seeds {seeds}: from --seed {seed} on, expected none beyond {}", i64::MAX);
            return Err(Error::Usage(message));
        }
        let mut runs = Vec::new();
        for seed in seed..seed + seeds {
            let mut run = Run::open(RunConfig { seed, ..config.clone() })?;
            run.explain(&reasons);
            arguments.fold.map_or(Ok(()), |fold| run.keep_fold(fold))?;
            runs.push((seed, run));
        }
        if arguments.check {
            // what is bad has been listed, and nobody asked to leave it out
            let notes = runs[0].1.notes().into_iter().filter(|note| !note.contains("skip_slides"));
            notes.for_each(|note| crossfusion::say(format!("note: {note}")));
        }
        nothing_wrong.into_iter().for_each(crossfusion::say);
        if arguments.check {
            return match reasons.len() {
                0 => Ok(Vec::new()),
                n => Err(Error::Data(format!("--check: {n} slides cannot be trained on; --skip-bad leaves them out"))),
            };
        }
        // other processes may train other folds, and the same command goes on
        let shared = arguments.fold.is_some() || arguments.seeds.is_some();
        let begin = |(seed, run): (u64, Run)| {
            let of_seed = |out: &PathBuf| match arguments.seeds {
                Some(_) => out.join(format!("seed_{seed}")),
                None => out.clone(),
            };
            match arguments.out.as_ref().map(of_seed) {
                Some(folder) if shared => {
                    folder::make_shared_folder(&folder)?;
                    run.share(&folder)?;
                    Ok((folder, run))
                }
                out => {
                    let folder = folder::make_folder(out, &config.backbone)?;
                    run.save_config(&folder)?;
                    Ok((folder, run))
                }
            }
        };
        runs.into_iter().map(begin).collect()
    }
}

/// Reports the run, or the runs of several seeds in their folder.
fn evaluate(runs: &[(PathBuf, Run)], of_seeds: Option<&Path>) -> Result<()> {
    let [(folder, run), ..] = runs else { return Ok(()) };
    let moved = eval::Moved::default();
    let (table, folder) = match of_seeds {
        Some(folder) => {
            let seeds = eval::seeds::evaluate(folder, &moved, &|| run.device(), None, report::RESAMPLING)?;
            (seeds.table(), folder)
        }
        None => {
            let summary = eval::evaluate_run(folder, &moved, run.device()?, None, report::RESAMPLING)?;
            (summary.table(), folder.as_path())
        }
    };
    crossfusion::say(table.trim_end());
    crossfusion::say(format!("report {}", folder.join("report.html").display()));
    Ok(())
}

/// Ctrl-C, a batch system's SIGTERM, or the SIGHUP of a terminal that goes away sets `interrupted`;
/// the next one ends the program at once, with the shell's exit code for it.
fn listen(interrupted: &Arc<AtomicBool>) -> std::io::Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])?;
    let interrupted = interrupted.clone();
    std::thread::spawn(move || {
        for signal in signals.forever() {
            SIGNAL.store(signal, Ordering::Relaxed);
            if interrupted.swap(true, Ordering::Relaxed) {
                atomic::remove_temporaries();
                std::process::exit(128 + signal);
            }
            // not eprintln!, which panics where the terminal is gone
            let _ = writeln!(std::io::stderr(), "finishing the slide in hand; once more stops at once");
        }
    });
    Ok(())
}
