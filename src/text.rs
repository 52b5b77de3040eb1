//! Text for people and shells: lines on the terminal, and what files hold made safe to show.

use std::{
    fmt::Display,
    io::{ErrorKind, Write},
    sync::OnceLock,
};

use crate::{Error, Result};

/// Why a line that was said is lost.
static LOST: OnceLock<String> = OnceLock::new();

/// Prints lines for a person. A closed pipe or a full disk behind it must not end a run; [`said`]
/// tells of the latter when it is over.
pub fn say(lines: impl Display) {
    say_bytes(format!("{}\n", printable(&lines.to_string())).as_bytes());
}

/// Prints bytes as they are, as [`say`] does.
pub(crate) fn say_bytes(bytes: &[u8]) {
    let mut output = std::io::stdout();
    if let Err(e) = output.write_all(bytes).and_then(|()| output.flush())
        && e.kind() != ErrorKind::BrokenPipe
    {
        LOST.get_or_init(|| e.to_string());
    }
}

/// An error if something that was said could not be written. A closed pipe is its reader's choice.
pub fn said() -> Result<()> {
    LOST.get().map_or(Ok(()), |e| Err(Error::Device(format!("standard output: cannot be written: {e}"))))
}

/// Prints a program's error as one line on standard error.
pub fn complain(program: &str, error: &Error) {
    let line = printable(&error.to_string()).replace('\n', "\\n");
    let _ = writeln!(std::io::stderr(), "{program}: {line}");
}

/// Text with its control characters escaped, but for ends of lines: what a file holds must not
/// steer the terminal that it is shown on.
pub fn printable(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        // the directional ones make text read as other than it is
        if (c.is_control() && c != '\n') || matches!(c, '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}') {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// An argument as a shell takes it.
pub fn quote(argument: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "/._-+=:,@%".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.to_string();
    }
    format!("'{}'", argument.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_and_not_sent() {
        assert_eq!(printable("a\u{1b}]0;title\u{7}b\nc\r\td"), "a\\u{1b}]0;title\\u{7}b\nc\\r\\td");
        assert_eq!(printable("\u{202e}é\u{9b}"), "\\u{202e}é\\u{9b}");
    }

    #[test]
    fn arguments_survive_a_shell() {
        assert_eq!(quote("runs/blca-1"), "runs/blca-1");
        assert_eq!(quote("my runs"), "'my runs'");
        assert_eq!(quote("it's"), r"'it'\''s'");
        assert_eq!(quote(""), "''");
    }
}
