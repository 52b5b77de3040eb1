//! What the command lines of the programs share: shell completions, manual pages, signals.

use std::io::Write;

use clap::{Args, Command, ValueEnum, builder::PossibleValue};
use clap_complete::Shell;

use crate::{
    Result,
    data::atomic,
    loss::Loss,
    model::{Fusion, ModelName},
    survival::Ties,
    train::{config::Precision, cox::CoxUnit, protocol::Protocol},
};

/// The names that command lines give to values, and what --help says of each.
macro_rules! names {
    ($type:ty { $($variant:ident = $name:literal: $help:literal,)+ }) => {
        impl ValueEnum for $type {
            fn value_variants<'a>() -> &'a [Self] {
                &[$(Self::$variant),+]
            }

            fn to_possible_value(&self) -> Option<PossibleValue> {
                Some(match self {
                    $(Self::$variant => PossibleValue::new($name).help($help),)+
                })
            }
        }
    };
}

names!(Loss {
    NllSurv = "nll_surv": "Negative log-likelihood of discrete hazards",
    CeSurv = "ce_surv": "Cross-entropy of the survival curve at the label's bin",
    CoxSurv = "cox_surv": "Cox partial likelihood of a batch of slides; needs no time bins",
});
names!(Ties {
    Breslow = "breslow": "Each is compared with the whole risk set",
    Efron = "efron": "The l-th of d with the risk set less l/d of the tied events, as R does",
});
names!(Fusion {
    Conv2d = "conv2d": "On the square grid of tokens, as published",
    Conv1d = "conv1d": "Along the token sequence",
});
names!(ModelName {
    CrossFusion = "crossfusion": "As published: x5, x10 and x20, fused by convolution",
    CrossFusionConcat = "crossfusion-concat": "Ablation: the streams are put side by side and projected instead of convolved",
    CrossFusionSingle = "crossfusion-single": "Ablation: x20 alone",
});

names!(Precision {
    Auto = "auto": "bf16 on a GPU, f32 on a CPU",
    F32 = "f32": "4 bytes a number, of 24 significant bits",
    Bf16 = "bf16": "2 bytes a number, of 8 significant bits",
});
names!(CoxUnit {
    Slide = "slide": "Every slide counts as one",
    Patient = "patient": "A patient's risk is the mean of the slides' risks",
});
names!(Protocol {
    Published = "published": "The epoch that is best on the fold's validation slides, on which it is then reported, or \
                              on its test slides where it has some; bins of all slides but those",
    Nested = "nested": "The epoch that is best on a fifth of the training patients, which no weight is trained on; bins \
                        of the training slides; the fold's validation slides are used once, at the end. Where a fold \
                        has test slides, the validation slides choose the epoch",
});

/// Flags that print something about the program and do nothing else.
#[derive(Args, Clone, Debug)]
#[command(next_help_heading = "Documentation")]
pub struct Documentation {
    /// Print completions for a shell: bash, zsh, fish, elvish or powershell
    #[arg(long, exclusive = true, value_name = "SHELL")]
    completions: Option<Shell>,
    /// Print the manual page: `--man | man -l -` shows it
    #[arg(long, exclusive = true)]
    man: bool,
}

impl Documentation {
    /// Prints what was asked for; false if nothing was.
    pub fn print(&self, mut command: Command) -> Result<bool> {
        let mut text = Vec::new();
        if let Some(shell) = self.completions {
            let name = command.get_name().to_string();
            clap_complete::generate(shell, &mut command, name, &mut text);
        } else if self.man {
            manual(command, &mut text).map_err(|e| crate::Error::Device(e.to_string()))?;
        } else {
            return Ok(false);
        }
        crate::text::say_bytes(&text);
        Ok(true)
    }
}

/// A manual page: clap_mangen's, but for the synopsis, where that has flags without their values.
fn manual(mut command: Command, page: &mut Vec<u8>) -> std::io::Result<()> {
    let usage = command.render_usage().to_string();
    let usage = usage.trim_start_matches("Usage: ").replace("       ", "").replace('-', r"\-");
    let with_subcommands = command.has_subcommands();
    let man = clap_mangen::Man::new(command);
    man.render_title(page)?;
    man.render_name_section(page)?;
    writeln!(page, ".SH SYNOPSIS\n.nf\n{usage}\n.fi")?;
    man.render_description_section(page)?;
    man.render_options_section(page)?;
    if with_subcommands {
        man.render_subcommands_section(page)?;
    }
    man.render_extra_section(page)?;
    man.render_version_section(page)
}

/// Ends the program at Ctrl-C, SIGTERM or SIGHUP, with the shell's exit code for it and without the
/// temporary files that it is writing.
pub fn end_at_signals() -> Result<()> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    let mut signals = signal_hook::iterator::Signals::new([SIGHUP, SIGINT, SIGTERM])
        .map_err(|e| crate::Error::Device(format!("cannot listen for signals: {e}")))?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            atomic::remove_temporaries();
            // no destructors of libraries whose threads are at work: ONNX Runtime would complain
            signal_hook::low_level::exit(128 + signal);
        }
    });
    Ok(())
}
