//! Measures CrossFusion on this machine.

use clap::{CommandFactory, Parser, Subcommand};
use crossfusion::{Error, Result, bench, cli};

#[derive(Parser)]
#[command(name = "cf-bench", version = crossfusion::report::VERSION, about = "Measures CrossFusion on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    documentation: cli::Documentation,
}

#[derive(Subcommand)]
enum Command {
    /// One training step on one slide: forward, backward, optimizer
    Step(bench::StepArguments),
    /// Ops alone: time, bandwidth, rate, fraction of what the device can do
    Op(bench::OpArguments),
    /// What a training step on a slide would take, within a memory budget, without taking it
    Plan(bench::PlanArguments),
    /// Writes a slide of any size
    Slide(bench::SlideArguments),
}

fn main() {
    if let Err(error) = measure(Arguments::parse()).and_then(|()| crossfusion::said()) {
        crossfusion::complain("cf-bench", &error);
        std::process::exit(error.exit_code());
    }
}

fn measure(arguments: Arguments) -> Result<()> {
    if arguments.documentation.print(Arguments::command())? {
        return Ok(());
    }
    match arguments.command {
        Some(Command::Step(arguments)) => bench::step(&arguments),
        Some(Command::Op(arguments)) => bench::op(&arguments),
        Some(Command::Plan(arguments)) => bench::plan(&arguments),
        Some(Command::Slide(arguments)) => bench::slide(&arguments),
        None => Err(Error::Usage("expected step, op, plan or slide; see --help".into())),
    }
}
