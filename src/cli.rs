//! What the command lines of the programs share: shell completions, manual pages, signals.

use clap::{Args, Command};
use clap_complete::Shell;

use crate::{Result, data::atomic};

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
            clap_mangen::Man::new(command).render(&mut text).map_err(|e| crate::Error::Device(e.to_string()))?;
        } else {
            return Ok(false);
        }
        // a closed pipe behind it is the reader's choice
        let _ = std::io::Write::write_all(&mut std::io::stdout(), &text);
        Ok(true)
    }
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
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}
