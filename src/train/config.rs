//! What a run is: every setting of `cf-train`, from defaults, a TOML file and flags, in this order.
//!
//! Names and defaults are those of the published script where it has the setting; its spellings of
//! the paths, and `--loss`, are aliases.

use std::{
    ops::Range,
    path::{Path, PathBuf},
};

use bytesize::ByteSize;
use clap::{ArgMatches, parser::ValueSource};
use serde::{Deserialize, Serialize};

use super::{
    cox::{BatchSize, CoxUnit},
    protocol::Protocol,
    step::Memory,
};
use crate::{
    Error, Result,
    data::{atomic::read_text, clinical::Columns, dataset::Source},
    device::{Device, Storage},
    loss::Loss,
    model::{self, Fusion, ModelName},
    ops::adam::Adam,
    survival::Ties,
};

/// Where `--help` lists a setting.
const DATA: &str = "Data";
const PROTOCOL: &str = "Folds and protocol";
const MODEL: &str = "Model";
const LOSS: &str = "Loss";
const TRAINING: &str = "Training";
const MACHINE: &str = "Machine and output";

/// A run's settings: the flags of `cf-train`, and the keys of the `config.toml` in a run's folder.
#[derive(Clone, Debug, PartialEq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RunConfig {
    /// (required) Clinical table: CSV (of commas, semicolons or tabs), or a zip of one, with
    /// case_id, slide_id, censorship, survival_months
    #[arg(help_heading = DATA, long, alias = "clinical-path", default_value = "", hide_default_value = true, value_parser = path)]
    pub clinical: PathBuf,
    /// Columns of other names: case_id=A,slide_id=B,time=C,event=D. `censorship=D` where 1 is
    /// censored; `time=C:days`, `:months` or `:years` where the name does not say. OS_MONTHS,
    /// OS_STATUS and the like are found without
    #[arg(help_heading = DATA, long, value_name = "KEY=COLUMN,...", default_value = "", hide_default_value = true)]
    #[serde(skip_serializing_if = "Columns::are_usual")]
    pub columns: Columns,
    /// GDC manifest; slides that it does not list are left out
    #[arg(help_heading = DATA, long, alias = "csv-path")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub manifest: Option<PathBuf>,
    /// (required) Folder of splits_0.csv, splits_1.csv, ... with columns train, val and perhaps
    /// test, of cases or slides
    #[arg(help_heading = DATA, long, alias = "splits-path", default_value = "", hide_default_value = true, value_parser = path)]
    pub splits: PathBuf,
    /// (required) Folder of BACKBONE/x{5,10,20}/pt_files/SLIDE.pt, of TRIDENT's
    /// {5,10,20}x_*/features_BACKBONE, or of STAMP's x{5,10,20}/BACKBONE
    #[arg(help_heading = DATA, long, default_value = "", hide_default_value = true, value_parser = path)]
    pub pt_dir: PathBuf,
    /// Ids of slides to leave out, as --skip-bad writes them
    #[arg(help_heading = DATA, long, value_name = "ID,...", value_delimiter = ',')]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub skip_slides: Vec<String>,
    /// (required) Name of the feature extractor, a folder in --pt-dir
    #[arg(help_heading = DATA, long, default_value = "", hide_default_value = true)]
    pub backbone: String,
    /// Width of the features, checked if given
    #[arg(help_heading = DATA, long)]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backbone_dim: Option<usize>,
    /// Folds to train, from the first [default: all that --splits holds]
    #[arg(help_heading = PROTOCOL, long, alias = "num-folds")]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub folds: Option<usize>,
    /// The number of the first fold, 0 or 1, which a run reads off the names of the files.
    #[arg(skip)]
    #[serde(skip_serializing_if = "is_zero")]
    pub first_fold: usize,
    /// How a fold's epoch is chosen
    #[arg(help_heading = PROTOCOL, long, value_enum, default_value_t = Protocol::Published)]
    pub protocol: Protocol,

    /// The published model, or an ablation of its repository
    #[arg(help_heading = MODEL, long, value_enum, default_value_t = ModelName::CrossFusion)]
    pub model: ModelName,
    /// Width of the model
    #[arg(help_heading = MODEL, long, default_value_t = 512)]
    pub embed_dim: usize,
    /// Attention heads, which divide the width
    #[arg(help_heading = MODEL, long, default_value_t = 4)]
    pub num_heads: usize,
    /// Self-attention layers before and after each positional encoding
    #[arg(help_heading = MODEL, long, default_value_t = 1)]
    pub num_attn_layers: usize,
    /// Time bins; with --loss-fn cox_surv 1 unless given, a model whose output is the risk
    #[arg(help_heading = MODEL, long, default_value_t = 4)]
    pub n_classes: usize,
    /// Convolve the fused tokens on their square grid, or along the sequence
    #[arg(help_heading = MODEL, long, value_enum, default_value_t = Fusion::Conv2d)]
    pub fusion: Fusion,
    /// Dropout of the feed-forward layers
    #[arg(help_heading = MODEL, long, default_value_t = 0.3)]
    pub ffn_dropout: f64,
    /// Dropout of self-attention's probabilities
    #[arg(help_heading = MODEL, long, default_value_t = 0.2)]
    pub attention_dropout: f64,
    /// Dropout of whole channels in the conv fusion
    #[arg(help_heading = MODEL, long, default_value_t = 0.3)]
    pub fusion_dropout: f64,

    /// Negative log-likelihood or cross-entropy of the survival bins, or the Cox partial likelihood
    #[arg(help_heading = LOSS, long, alias = "loss", value_enum, default_value_t = Loss::NllSurv)]
    pub loss_fn: Loss,
    /// Cox: most slides (patients, with --cox-unit patient) that are compared, for one update; a
    /// number or `all`
    #[arg(help_heading = LOSS, long, default_value_t = BatchSize::AtMost(32), value_name = "N|all")]
    pub cox_batch: BatchSize,
    /// Cox: what events at one time share
    #[arg(help_heading = LOSS, long, value_enum, default_value_t = Ties::Efron)]
    pub cox_ties: Ties,
    /// Cox: whose risks are compared
    #[arg(help_heading = LOSS, long, value_enum, default_value_t = CoxUnit::Slide)]
    pub cox_unit: CoxUnit,
    /// Weight of the uncensored part of the loss
    #[arg(help_heading = LOSS, long, default_value_t = 0.2)]
    pub alpha_surv: f64,
    /// Highest learning rate
    #[arg(help_heading = TRAINING, long, default_value_t = 1e-4)]
    pub learning_rate: f64,
    /// L2, added to the gradient
    #[arg(help_heading = TRAINING, long, default_value_t = 4e-6)]
    pub weight_decay: f64,
    /// Epochs from the highest learning rate to the lowest
    #[arg(help_heading = TRAINING, long, default_value_t = 10)]
    pub cosine_t_max: usize,
    /// Lowest learning rate
    #[arg(help_heading = TRAINING, long, default_value_t = 0.0)]
    pub eta_min: f64,
    /// Slides whose gradients are averaged into one update; Cox has --cox-batch
    #[arg(help_heading = TRAINING, long, default_value_t = 32)]
    pub grad_accum_steps: usize,
    /// Most epochs a fold
    #[arg(help_heading = TRAINING, long, default_value_t = 100)]
    pub num_epochs: usize,
    /// Epochs without a better validation C-index before a fold ends
    #[arg(help_heading = TRAINING, long, default_value_t = 20)]
    pub es_patience: usize,
    /// First epochs, which never give the best model
    #[arg(help_heading = TRAINING, long, default_value_t = 5)]
    pub warmup_epochs: usize,
    /// Of weights, sampling and dropout
    // TOML has no larger integers
    #[arg(help_heading = TRAINING, long, alias = "random-seed", default_value_t = 7, value_parser = clap::value_parser!(u64).range(..=i64::MAX as u64))]
    pub seed: u64,

    /// Most memory for a step, on a GPU of the GPU's: 8GiB, say. Slides that need more are computed
    /// in other ways, with the same result; on a CPU no bags are then read ahead
    #[arg(help_heading = MACHINE, long, value_name = "BYTES")]
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "in_bytes")]
    pub memory_budget: Option<ByteSize>,
    /// Bags read ahead
    #[arg(help_heading = MACHINE, long, default_value_t = 3)]
    pub prefetch_factor: usize,
    /// Slides between checkpoints within an epoch; there is one at its end in any case
    #[arg(help_heading = MACHINE, long, default_value_t = 100)]
    pub checkpoint_every: usize,
    /// Write TensorBoard event files into the run folder: `tensorboard --logdir RUN/tensorboard`
    #[arg(help_heading = MACHINE, long)]
    pub tensorboard: bool,
    /// How activations and weights are stored: auto is bf16 on a GPU, f32 on a CPU. Master weights
    /// and sums are f32
    #[arg(help_heading = MACHINE, long, value_enum, default_value_t = Precision::Auto)]
    pub precision: Precision,
    /// Where to run: auto, cpu or cuda
    #[arg(help_heading = MACHINE, long, default_value = "auto")]
    pub device: String,
    /// Threads; 0 is one for each core. Results do not depend on it
    #[arg(help_heading = MACHINE, long, default_value_t = 0)]
    pub threads: usize,
}

/// The published settings, without paths.
impl Default for RunConfig {
    fn default() -> Self {
        #[derive(clap::Parser)]
        struct NoFlags {
            #[command(flatten)]
            config: RunConfig,
        }
        <NoFlags as clap::Parser>::parse_from(["cf-train"]).config
    }
}

/// A size as a number, since its name in units is rounded.
fn in_bytes<S: serde::Serializer>(size: &Option<ByteSize>, to: S) -> std::result::Result<S::Ok, S::Error> {
    size.map(|size| size.as_u64()).serialize(to)
}

fn is_zero(n: &usize) -> bool {
    *n == 0
}

/// A path that may still be empty: the file of settings may give it.
fn path(text: &str) -> std::result::Result<PathBuf, std::convert::Infallible> {
    Ok(text.into())
}

/// How a run stores activations and weights. Master weights and sums are f32 in any case.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// bf16 on a GPU, f32 on a CPU.
    #[default]
    Auto,
    /// 4 bytes a number, of 24 significant bits.
    F32,
    /// 2 bytes a number, of 8 significant bits.
    Bf16,
}

impl Precision {
    /// What that means on a device.
    pub fn storage(self, device: &Device) -> Storage {
        match self {
            Self::F32 => Storage::F32,
            Self::Bf16 => Storage::Bf16,
            Self::Auto if device.runs_kernels() => Storage::Bf16,
            Self::Auto => Storage::F32,
        }
    }
}

/// Bytes of settings that nobody writes.
const MOST_SETTINGS: u64 = 1 << 20;

/// What is wrong with a TOML text, and where.
fn in_line(text: &str, e: &toml::de::Error) -> String {
    let start = e.span().map_or(0, |span| span.start).min(text.len());
    let before = text.get(..start).unwrap_or_default();
    let line = before.bytes().filter(|&b| b == b'\n').count();
    format!("line {}, `{}`: {}", line + 1, text.lines().nth(line).unwrap_or_default().trim(), e.message())
}

/// A setting of two runs that is not the same.
#[derive(Clone, Debug, PartialEq)]
pub struct Difference {
    /// The setting, as `config.toml` calls it.
    pub key: String,
    /// Its value in the one run, as TOML; "absent" where it has none.
    pub one: String,
    /// Its value in the other.
    pub other: String,
}

impl RunConfig {
    /// Settings from a table (a file's, say, called `name` in messages), overridden by the flags
    /// that were given; `self` is what clap made of the command line, with defaults where nothing
    /// was given.
    pub fn resolve(&self, matches: &ArgMatches, name: &str, table: toml::Table) -> Result<Self> {
        let mut settings = toml::Table::try_from(self).map_err(|e| Error::Usage(format!("{name}: {e}")))?;
        let given = |key: &str| {
            matches.try_contains_id(key).is_ok() && matches.value_source(key) == Some(ValueSource::CommandLine)
        };
        let n_classes_given = given("n_classes") || table.contains_key("n_classes");
        for (key, value) in table {
            if !given(&key) {
                settings.insert(key, value);
            }
        }
        let mut config: Self =
            settings.try_into().map_err(|e: toml::de::Error| Error::Usage(format!("{name}: {}", e.message())))?;
        if config.loss_fn == Loss::CoxSurv && !n_classes_given {
            config.n_classes = 1;
        }
        config.check()?;
        // so that a run can be resumed and evaluated from anywhere
        let paths = [&mut config.clinical, &mut config.splits, &mut config.pt_dir];
        for path in paths.into_iter().chain(&mut config.manifest) {
            *path = std::path::absolute(&*path).map_err(|e| Error::Usage(format!("{}: {e}", path.display())))?;
        }
        Ok(config)
    }

    /// The table in a TOML file.
    pub fn read_table(path: &Path) -> Result<toml::Table> {
        let text = read_text(path, MOST_SETTINGS).map_err(|e| Error::Usage(e.to_string()))?;
        // read as settings too, for the line of one that is unknown or of another type
        let table = toml::from_str::<Self>(&text).and_then(|_| toml::from_str(&text));
        table.map_err(|e| Error::Usage(format!("{}: {}", path.display(), in_line(&text, &e))))
    }

    /// The settings of a run's `config.toml`. An error if one is unknown or cannot be read, or if
    /// one is lacking that every run needs.
    pub fn read(path: &Path) -> Result<Self> {
        let text = read_text(path, MOST_SETTINGS)?;
        let config: Self = toml::from_str(&text).map_err(|e| Error::file(path, in_line(&text, &e)))?;
        match config.missing().first() {
            Some(flag) => {
                Err(Error::file(path, format!("lacks `{}`", flag.trim_start_matches("--").replace('-', "_"))))
            }
            None => Ok(config),
        }
    }

    /// The settings as [`Self::read`] takes them; an error if TOML cannot hold one of them.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|e| Error::Usage(format!("the settings cannot be written as TOML: {e}")))
    }

    /// What [`RunConfig::to_toml`] gave.
    pub fn from_toml(text: &str) -> Result<Self> {
        toml::from_str(text).map_err(|e| Error::Usage(format!("the settings cannot be read: {}", in_line(text, &e))))
    }

    /// The flags of the paths that every run needs and this one lacks.
    fn missing(&self) -> Vec<&'static str> {
        let given = [
            ("--clinical", self.clinical.as_os_str().is_empty()),
            ("--splits", self.splits.as_os_str().is_empty()),
            ("--pt-dir", self.pt_dir.as_os_str().is_empty()),
            ("--backbone", self.backbone.is_empty()),
        ];
        given.into_iter().filter(|(_, empty)| *empty).map(|(flag, _)| flag).collect()
    }

    fn check(&self) -> Result<()> {
        let usage = |message: String| Err(Error::Usage(message));
        let missing = self.missing();
        if !missing.is_empty() {
            return usage(format!("missing {}; see --help, or try --demo", missing.join(", ")));
        }
        let counts = [
            ("--folds", self.folds.unwrap_or(1)),
            ("--grad-accum-steps", self.grad_accum_steps),
            ("--num-epochs", self.num_epochs),
            ("--cosine-t-max", self.cosine_t_max),
            ("--es-patience", self.es_patience),
            ("--prefetch-factor", self.prefetch_factor),
            ("--checkpoint-every", self.checkpoint_every),
        ];
        if let Some((flag, _)) = counts.iter().find(|(_, value)| *value == 0) {
            return usage(format!("{flag} 0: expected at least 1"));
        }
        let most = [
            ("--num-attn-layers", self.num_attn_layers, 64),
            ("--embed-dim", self.embed_dim, 16384),
            ("--n-classes", self.n_classes, 1024),
        ];
        if let Some((flag, value, most)) = most.iter().find(|(_, value, most)| value > most) {
            return usage(format!("{flag} {value}: expected at most {most}"));
        }
        let fewest = if self.loss_fn == Loss::CoxSurv { 1 } else { 2 };
        if self.n_classes < fewest {
            return usage(format!("--n-classes {}: expected at least {fewest}", self.n_classes));
        }
        if let BatchSize::AtMost(n @ 0..2) = self.cox_batch {
            return usage(format!(
                "--cox-batch {n}: expected at least 2, for one slide has no other to be compared with"
            ));
        }
        let rates = [
            ("--learning-rate", self.learning_rate),
            ("--weight-decay", self.weight_decay),
            ("--eta-min", self.eta_min),
        ];
        if let Some((flag, value)) = rates.iter().find(|(_, value)| !(0.0..=1.0).contains(value)) {
            return usage(format!("{flag} {value}: expected a number from 0 to 1"));
        }
        if !(0.0..=1.0).contains(&self.alpha_surv) {
            return usage(format!("--alpha-surv {}: expected a number from 0 to 1", self.alpha_surv));
        }
        if self.eta_min > self.learning_rate {
            let (lowest, highest) = (self.eta_min, self.learning_rate);
            return usage(format!("--eta-min {lowest}: expected at most --learning-rate {highest}"));
        }
        if self.warmup_epochs >= self.num_epochs {
            let (warmup, epochs) = (self.warmup_epochs, self.num_epochs);
            return usage(format!(
                "--num-epochs {epochs}: the first {warmup} epochs (--warmup-epochs) never give the best model, so none \
                 could; expected more than {warmup}"
            ));
        }
        self.check_model()
    }

    /// What [`model::Config::check`] asks for, in the names of the flags.
    fn check_model(&self) -> Result<()> {
        let usage = |message: String| Err(Error::Usage(message));
        let (dim, heads) = (self.embed_dim, self.num_heads);
        for (flag, value) in [("--embed-dim", dim), ("--num-heads", heads), ("--num-attn-layers", self.num_attn_layers)]
        {
            if value == 0 {
                return usage(format!("{flag} 0: expected at least 1"));
            }
        }
        if !dim.is_multiple_of(heads) || !dim.is_multiple_of(2) {
            return usage(format!(
                "--embed-dim {dim} with --num-heads {heads}: expected an even width that the heads divide"
            ));
        }
        if dim / heads > model::MOST_HEAD_COLUMNS {
            return usage(format!(
                "--embed-dim {dim} with --num-heads {heads}: expected heads of at most {} columns",
                model::MOST_HEAD_COLUMNS
            ));
        }
        let rates = [
            ("--ffn-dropout", self.ffn_dropout),
            ("--attention-dropout", self.attention_dropout),
            ("--fusion-dropout", self.fusion_dropout),
        ];
        if let Some((flag, rate)) = rates.iter().find(|(_, rate)| !(0.0..=model::MOST_DROPOUT).contains(rate)) {
            return usage(format!("{flag} {rate}: expected a rate from 0 to {}", model::MOST_DROPOUT));
        }
        self.model_config(1).check()
    }

    /// How its engines use memory.
    pub fn memory(&self) -> Memory {
        Memory::new(self.memory_budget)
    }

    /// The model for features of this width.
    pub fn model_config(&self, features: usize) -> model::Config {
        model::Config {
            model: self.model,
            features,
            dim: self.embed_dim,
            heads: self.num_heads,
            layers: self.num_attn_layers,
            n_classes: self.n_classes,
            fusion: self.fusion,
            ffn_dropout: self.ffn_dropout,
            attention_dropout: self.attention_dropout,
            fusion_dropout: self.fusion_dropout,
        }
    }

    /// The settings but for those of the machine, which do not touch the result: a resumed run may
    /// change these.
    pub fn without_machine(&self) -> Self {
        let Self { device, threads, memory_budget, prefetch_factor, checkpoint_every, tensorboard, .. } =
            Self::default();
        Self { device, threads, memory_budget, prefetch_factor, checkpoint_every, tensorboard, ..self.clone() }
    }

    /// The settings but for where the data lies.
    pub fn without_paths(&self) -> Self {
        let Self { clinical, manifest, splits, pt_dir, .. } = Self::default();
        Self { clinical, manifest, splits, pt_dir, ..self.clone() }
    }

    /// The first setting in which `other` differs, but for those of the machine and of the data's
    /// place.
    pub fn difference(&self, other: &Self) -> Option<Difference> {
        let keys = |settings: &Self| toml::Table::try_from(settings.without_machine().without_paths());
        let (one, other) = (keys(self).unwrap_or_default(), keys(other).unwrap_or_default());
        let key = one.keys().chain(other.keys()).find(|key| one.get(*key) != other.get(*key))?;
        let value = |table: &toml::Table| table.get(key).map_or("absent".into(), toml::Value::to_string);
        Some(Difference { one: value(&one), other: value(&other), key: key.clone() })
    }

    /// The folds' numbers; none where they have not been counted yet.
    pub fn fold_numbers(&self) -> Range<usize> {
        self.first_fold..self.first_fold.saturating_add(self.folds.unwrap_or(0))
    }

    /// Where the cohort lies, and the scales that the model reads of it.
    pub fn source(&self) -> Source<'_> {
        Source {
            clinical: &self.clinical,
            columns: &self.columns,
            manifest: self.manifest.as_deref(),
            pt_dir: &self.pt_dir,
            backbone: &self.backbone,
            scales: self.model.scales(),
            skip: &self.skip_slides,
        }
    }

    /// The optimizer in an epoch: cosine annealing (Loshchilov & Hutter 2017, eq. 5), stepped once
    /// an epoch, that goes on past its period.
    pub fn adam(&self, epoch: usize) -> Adam {
        let phase = std::f64::consts::PI * epoch as f64 / self.cosine_t_max as f64;
        let learning_rate = self.eta_min + (self.learning_rate - self.eta_min) * 0.5 * (1.0 + phase.cos());
        Adam { learning_rate, weight_decay: self.weight_decay, beta1: 0.9, beta2: 0.999, epsilon: 1e-8 }
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        run: RunConfig,
    }

    #[test]
    fn published_spellings_are_understood() {
        let line =
            "x --clinical-path a.csv --csv-path m.tsv --splits-path s --num-folds 3 --random-seed 9 --loss cox_surv";
        let run = Line::parse_from(line.split(' ')).run;
        assert_eq!((run.clinical, run.splits), (PathBuf::from("a.csv"), PathBuf::from("s")));
        assert_eq!((run.folds, run.seed, run.loss_fn), (Some(3), 9, Loss::CoxSurv));
    }
}
