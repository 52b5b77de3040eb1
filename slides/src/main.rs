//! `cf-slide`: arguments, and the order of things. Each subcommand is a file of `commands`.

mod commands;

use clap::{CommandFactory, Parser, Subcommand};
use crossfusion::{Error, Result, cli};

use commands::{embed, heatmap, patch, predict};

const EXAMPLES: &str = "\
Examples:
  cf-slide patch slides/ --out patches --preset tcga
      tissue, and the patches at 5x, 10x and 20x of every slide in a folder
  cf-slide embed patches --backbone resnet50.onnx --out features
      features of these patches, for cf-train --pt-dir features --backbone resnet50
  cf-slide predict runs/resnet50-1 slide.svs --onnx resnet50.onnx
      hazards, survival curve, median survival, risk and its percentile
  cf-slide heatmap runs/resnet50-1 slide.svs --onnx resnet50.onnx
      which patches raise the risk: a page to zoom into, pictures, QuPath's objects, a table";

/// From whole-slide images to the feature bags that cf-train reads, and from a model back to the slide
#[derive(Parser)]
#[command(name = "cf-slide", version = crossfusion::report::VERSION, arg_required_else_help = true, after_help = EXAMPLES)]
struct Arguments {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    documentation: cli::Documentation,
}

#[derive(Subcommand)]
enum Command {
    Patch(patch::Arguments),
    Embed(embed::Arguments),
    Predict(predict::Arguments),
    Heatmap(heatmap::Arguments),
}

fn main() {
    if let Err(error) = run(Arguments::parse()).and_then(|()| crossfusion::said()) {
        crossfusion::complain("cf-slide", &error);
        std::process::exit(error.exit_code());
    }
}

fn run(arguments: Arguments) -> Result<()> {
    if arguments.documentation.print(Arguments::command())? {
        return Ok(());
    }
    cli::end_at_signals()?;
    match arguments.command {
        Some(Command::Patch(arguments)) => patch::run(&arguments),
        Some(Command::Embed(arguments)) => embed::run(&arguments),
        Some(Command::Predict(arguments)) => predict::run(&arguments),
        Some(Command::Heatmap(arguments)) => heatmap::run(&arguments),
        None => Err(Error::Usage("expected a subcommand; see --help".into())),
    }
}
