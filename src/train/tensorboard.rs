//! TensorBoard's event files: a folder a fold in `RUN/tensorboard`, a step an epoch (counted from
//! 1).
//!
//! The format is TensorFlow's: records (`tensorflow/core/lib/io/record_writer.h`) of protocol
//! buffers (`tensorflow/core/util/event.proto`, `summary.proto`), of which a few fields are needed.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    Error, Result,
    folder::{Best, EpochMetrics},
};

/// Where a fold's event files lie in a run's folder.
pub fn folder(run: &Path, fold: usize) -> PathBuf {
    run.join("tensorboard").join(format!("fold_{fold}"))
}

/// A fold's event file, of this process: TensorBoard reads all files of a folder as one.
pub struct Events {
    path: PathBuf,
    file: File,
}

impl Events {
    /// Begins a file whose first step is `epoch`, from 0. What an earlier file may say of this and
    /// later epochs no longer counts.
    pub fn begin(run: &Path, fold: usize, epoch: usize) -> Result<Self> {
        let folder = folder(run, fold);
        std::fs::create_dir_all(&folder).map_err(|e| Error::file(&folder, format!("cannot be made: {e}")))?;
        let now = now();
        // TensorBoard takes files by this name, and orders them by the seconds in it
        let name = format!("events.out.tfevents.{:010}.{}.crossfusion", now as u64, std::process::id());
        let path = folder.join(name);
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let file = file.map_err(|e| Error::file(&path, format!("cannot be made: {e}")))?;
        let mut events = Self { path, file };
        events.write(&event(now, 0, Content::FileVersion))?;
        events.write(&event(now, epoch as u64 + 1, Content::SessionStart))?;
        Ok(events)
    }

    /// An epoch's scalars.
    pub fn epoch(&mut self, metrics: &EpochMetrics, best: Option<Best>) -> Result<()> {
        let scalars = [
            ("loss/train", Some(metrics.train_loss)),
            ("loss/validation", Some(metrics.val_loss)),
            ("c_index/train", metrics.train_c_index),
            ("c_index/validation", metrics.val_c_index),
            ("c_index/best", best.map(|best| best.c_index)),
            ("learning_rate", Some(metrics.learning_rate)),
            ("patches_per_second", Some(metrics.patches_per_second)),
        ];
        let defined: Vec<(&str, f64)> = scalars.into_iter().filter_map(|(tag, value)| Some((tag, value?))).collect();
        self.write(&event(now(), metrics.epoch as u64 + 1, Content::Scalars(&defined)))
    }

    /// A record: the length, its checksum, the event, its checksum.
    fn write(&mut self, event: &[u8]) -> Result<()> {
        let length = (event.len() as u64).to_le_bytes();
        let record = [&length[..], &masked_checksum(&length), event, &masked_checksum(event)].concat();
        let written = self.file.write_all(&record).and_then(|()| self.file.flush());
        written.map_err(|e| Error::file(&self.path, format!("cannot be written: {e}")))
    }
}

/// Seconds since 1970.
fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
}

/// CRC-32C, rotated and shifted so that a checksum of data that holds checksums is sound.
fn masked_checksum(bytes: &[u8]) -> [u8; 4] {
    crc32c::crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8).to_le_bytes()
}

enum Content<'a> {
    FileVersion,
    SessionStart,
    Scalars(&'a [(&'a str, f64)]),
}

/// The message `Event`: 1 wall_time, 2 step, and one of 3 file_version, 5 summary, 7 session_log.
fn event(wall_time: f64, step: u64, content: Content) -> Vec<u8> {
    const START: u64 = 1;
    let mut out = Vec::new();
    key(&mut out, 1, FIXED_64);
    out.extend(wall_time.to_le_bytes());
    key(&mut out, 2, VARINT);
    varint(&mut out, step);
    match content {
        Content::FileVersion => bytes(&mut out, 3, b"brain.Event:2"),
        Content::SessionStart => {
            let mut log = Vec::new();
            key(&mut log, 1, VARINT);
            varint(&mut log, START);
            bytes(&mut out, 7, &log);
        }
        Content::Scalars(scalars) => {
            let mut summary = Vec::new();
            for (tag, scalar) in scalars {
                let mut value = Vec::new();
                bytes(&mut value, 1, tag.as_bytes());
                key(&mut value, 2, FIXED_32);
                value.extend((*scalar as f32).to_le_bytes());
                bytes(&mut summary, 1, &value);
            }
            bytes(&mut out, 5, &summary);
        }
    }
    out
}

/// Wire types of protocol buffers.
const VARINT: u64 = 0;
const FIXED_64: u64 = 1;
const BYTES: u64 = 2;
const FIXED_32: u64 = 5;

fn key(out: &mut Vec<u8>, field: u64, wire_type: u64) {
    varint(out, field << 3 | wire_type);
}

fn bytes(out: &mut Vec<u8>, field: u64, content: &[u8]) {
    key(out, field, BYTES);
    varint(out, content.len() as u64);
    out.extend(content);
}

/// Seven bits a byte, the lowest first; the highest bit says that more follow.
fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}
