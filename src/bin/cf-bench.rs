//! Measures CrossFusion on this machine.

use clap::{Parser, Subcommand};
use crossfusion::bench;

#[derive(Parser)]
#[command(version, about = "Measures CrossFusion on this machine")]
struct Arguments {
    #[command(subcommand)]
    command: Command,
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
    let result = match Arguments::parse().command {
        Command::Step(arguments) => bench::step(&arguments),
        Command::Op(arguments) => bench::op(&arguments),
        Command::Plan(arguments) => bench::plan(&arguments),
        Command::Slide(arguments) => bench::slide(&arguments),
    };
    if let Err(error) = result {
        eprintln!("cf-bench: {error}");
        std::process::exit(error.exit_code());
    }
}
