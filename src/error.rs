//! The one error type of the crate. Every message names the file, the row, the op or the tensor it
//! is about, what was expected and what came, in one sentence that a user can act on.

use std::{
    fmt,
    path::{Path, PathBuf},
};

/// A result whose error is ours.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What can go wrong.
#[derive(Debug)]
pub enum Error {
    /// The command line or the configuration asks for something impossible (exit code 2).
    Usage(String),
    /// A file cannot be read, or does not hold what it should.
    File {
        /// Which.
        path: PathBuf,
        /// The rest of the sentence.
        message: String,
    },
    /// One cell or row of a table is wrong. `row` counts from 1 and includes the header, as editors
    /// do.
    Cell {
        /// The table.
        path: PathBuf,
        /// From 1, with the header.
        row: usize,
        /// As the header names it.
        column: String,
        /// The rest of the sentence.
        message: String,
    },
    /// Several files are not what they should be; each has been named.
    Data(String),
    /// An op or a model was handed a tensor of the wrong shape.
    Shape {
        /// Which op, or what else wanted the tensor.
        op: &'static str,
        /// Which of its operands.
        tensor: String,
        /// The shape that came.
        got: Vec<usize>,
        /// The shape that was wanted.
        expected: Vec<usize>,
    },
    /// A device cannot be used, or ran out of something.
    Device(String),
    /// A statistic is not defined on this cohort.
    Statistic {
        /// Which.
        statistic: &'static str,
        /// Why.
        reason: String,
    },
    /// Training was interrupted; the message says how to go on.
    Interrupted(String),
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Usage(message) | Self::Data(message) | Self::Device(message) | Self::Interrupted(message) => {
                f.write_str(message)
            }
            Self::File { path, message } => write!(f, "{}: {message}", path.display()),
            Self::Cell { path, row, column, message } => {
                write!(f, "{}, row {row}, column `{column}`: {message}", path.display())
            }
            Self::Shape { op, tensor, got, expected } => {
                write!(f, "{op}: {tensor} has shape {got:?}, expected {expected:?}")
            }
            Self::Statistic { statistic, reason } => write!(f, "{statistic} is undefined: {reason}"),
        }
    }
}

impl std::error::Error for Error {}

impl Error {
    /// [`Error::File`] of this path.
    pub fn file(path: impl AsRef<Path>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

    /// [`Error::Cell`] of this place.
    pub fn cell(path: impl AsRef<Path>, row: usize, column: &str, message: impl std::fmt::Display) -> Self {
        Self::Cell { path: path.as_ref().to_path_buf(), row, column: column.into(), message: message.to_string() }
    }

    /// 2 for a usage error, 130 after Ctrl-C or SIGTERM, 1 for everything else.
    pub fn exit_code(&self) -> i32 {
        match self {
            Self::Usage(_) => 2,
            Self::Interrupted(_) => 130,
            _ => 1,
        }
    }
}
