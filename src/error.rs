//! The one error type of the crate. Every message names the file, the row, the op or the tensor it is
//! about, what was expected and what came, in one sentence that a user can act on.

use std::path::{Path, PathBuf};

pub type Result<T, E = Error> = std::result::Result<T, E>;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The command line or the configuration asks for something impossible (exit code 2).
    #[error("{0}")]
    Usage(String),
    /// A file cannot be read, or does not hold what it should.
    #[error("{}: {message}", path.display())]
    File { path: PathBuf, message: String },
    /// One cell or row of a table is wrong. `row` counts from 1 and includes the header, as editors do.
    #[error("{}, row {row}, column `{column}`: {message}", path.display())]
    Cell { path: PathBuf, row: usize, column: String, message: String },
    /// Several files are not what they should be; each has been named.
    #[error("{0}")]
    Data(String),
    /// An op or a model was handed a tensor of the wrong shape.
    #[error("{op}: {tensor} has shape {got:?}, expected {expected:?}")]
    Shape { op: &'static str, tensor: String, got: Vec<usize>, expected: Vec<usize> },
    /// A device cannot be used, or ran out of something.
    #[error("{0}")]
    Device(String),
    /// A statistic is not defined on this cohort.
    #[error("{statistic} is undefined: {reason}")]
    Statistic { statistic: &'static str, reason: String },
    /// Training was interrupted; the message says how to go on.
    #[error("{0}")]
    Interrupted(String),
}

impl Error {
    pub fn file(path: impl AsRef<Path>, message: impl std::fmt::Display) -> Self {
        Self::File { path: path.as_ref().to_path_buf(), message: message.to_string() }
    }

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
