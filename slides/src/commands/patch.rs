//! `cf-slide patch`: tissue, and the patches of each magnification.

use std::path::PathBuf;

use clap::{Args, ValueEnum};
use crossfusion::{Error, Result, model::Scale};
use crossfusion_slides::{
    files,
    grid::ContourFn,
    patching::{self, Settings, Status, TABLE},
    slide,
    tissue::Segmentation,
};

/// Finds tissue as CLAM does, and the patches at 5x, 10x and 20x
#[derive(Args)]
pub struct Arguments {
    /// Slides, or folders of them, however deep
    #[arg(required = true)]
    slides: Vec<PathBuf>,
    /// Folder for coordinates, pictures and slides.csv; what is there already is not done again
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Magnifications to cut patches at
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "5,10,20", value_parser = magnification)]
    magnifications: Vec<Scale>,
    /// Power of these slides' objective, in place of what they say of it and of their pixels' size
    #[arg(long, value_name = "X", value_parser = power)]
    power: Option<f64>,
    /// Slides to work on at once; 0 is one for each core
    #[arg(long, default_value_t = 0)]
    threads: usize,
    #[command(flatten)]
    tissue: Tissue,
    #[command(flatten)]
    grid: Grid,
}

/// What is tissue. Flags and defaults are CLAM's, and its names with `_` are taken too.
#[derive(Args, Default, PartialEq)]
#[command(next_help_heading = "Tissue (CLAM's names; a flag is stronger than the preset)")]
pub struct Tissue {
    /// CLAM's settings for a kind of slide
    #[arg(long)]
    preset: Option<Preset>,
    /// Level to look for tissue in [default: the one nearest 64 times below level 0]
    #[arg(long, alias = "seg_level", value_name = "N")]
    seg_level: Option<usize>,
    /// Saturation above which a pixel is tissue, of 255 [default: 8]
    #[arg(long, value_name = "N")]
    sthresh: Option<u8>,
    /// Side of the median filter in pixels, odd [default: 7]
    #[arg(long, value_name = "N", value_parser = odd)]
    mthresh: Option<usize>,
    /// Side of the square that closes gaps, in pixels [default: 4]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(..=100))]
    close: Option<u8>,
    /// Let Otsu's method choose the threshold of saturation
    #[arg(long, alias = "use_otsu", conflicts_with = "sthresh")]
    use_otsu: bool,
    /// Smallest tissue, in squares of 512 pixels at level 0 [default: 100]
    #[arg(long, alias = "a_t", value_name = "N", value_parser = clap::value_parser!(u32))]
    a_t: Option<u32>,
    /// Smallest hole, in the same [default: 16]
    #[arg(long, alias = "a_h", value_name = "N", value_parser = clap::value_parser!(u32))]
    a_h: Option<u32>,
    /// Holes that an area of tissue may have [default: 8]
    #[arg(long, alias = "max_n_holes", value_name = "N")]
    max_n_holes: Option<usize>,
}

/// Where patches lie.
#[derive(Args)]
#[command(next_help_heading = "Patches (CLAM's names)")]
struct Grid {
    /// Side of a patch, in pixels of its magnification
    #[arg(long, alias = "patch_size", value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    patch_size: u16,
    /// From one patch to the next, in the same [default: the patch size]
    #[arg(long, alias = "step_size", value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    step_size: Option<u16>,
    /// Which points of a patch must be on tissue
    #[arg(long, alias = "contour_fn", value_name = "RULE", default_value = "four_pt")]
    contour_fn: ContourFn,
    /// Leave out patches that reach beyond the slide
    #[arg(long, alias = "no_padding")]
    no_padding: bool,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Preset {
    /// Of TCGA
    Tcga,
    /// Biopsies of Brigham and Women's Hospital
    BwhBiopsy,
    /// Resections of Brigham and Women's Hospital
    BwhResection,
}

fn magnification(text: &str) -> Result<Scale, String> {
    let name = format!("x{}", text.trim_matches('x'));
    Scale::ALL.into_iter().find(|scale| scale.name() == name).ok_or("expected 5, 10 or 20".into())
}

pub fn power(text: &str) -> Result<f64, String> {
    let power = text.trim_end_matches('x').parse().ok().filter(|power: &f64| (1.0..=200.0).contains(power));
    power.ok_or("expected a power such as 20 or 40".into())
}

fn odd(text: &str) -> Result<usize, String> {
    let size = text.parse().ok().filter(|size: &usize| size % 2 == 1 && *size < 256);
    size.ok_or("expected an odd number below 256".into())
}

impl Tissue {
    pub fn settings(&self) -> Segmentation {
        let base = match self.preset {
            None => Segmentation::CLAM,
            Some(Preset::Tcga) => Segmentation::TCGA,
            Some(Preset::BwhBiopsy) => Segmentation::BWH_BIOPSY,
            Some(Preset::BwhResection) => Segmentation::BWH_RESECTION,
        };
        Segmentation {
            seg_level: self.seg_level,
            sthresh: self.sthresh.unwrap_or(base.sthresh),
            mthresh: self.mthresh.unwrap_or(base.mthresh),
            close: self.close.map_or(base.close, usize::from),
            use_otsu: self.use_otsu,
            a_t: self.a_t.map_or(base.a_t, u64::from),
            a_h: self.a_h.map_or(base.a_h, u64::from),
            max_n_holes: self.max_n_holes.unwrap_or(base.max_n_holes),
        }
    }
}

impl Arguments {
    fn settings(&self) -> Settings {
        let mut magnifications = self.magnifications.clone();
        magnifications.sort();
        magnifications.dedup();
        Settings {
            patch_size: self.grid.patch_size.into(),
            step_size: self.grid.step_size.unwrap_or(self.grid.patch_size).into(),
            contour_fn: self.grid.contour_fn,
            use_padding: !self.grid.no_padding,
            magnifications,
            power: self.power,
            segmentation: self.tissue.settings(),
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    super::start_threads(arguments.threads)?;
    slide::check_library()?;
    let slides = files::slides(&arguments.slides)?;
    let rows = patching::patch_all(&slides, &arguments.settings(), &arguments.out)?;
    let with = |status: Status| rows.values().filter(move |row| row.status == status);
    for row in with(Status::Failed) {
        crossfusion::say(format!("failed: {}", row.reason));
    }
    for row in with(Status::NoTissue) {
        crossfusion::say(format!("no tissue: {}", row.path.display()));
    }
    let [patched, empty, failed] =
        [Status::Patched, Status::NoTissue, Status::Failed].map(|status| with(status).count());
    let total = |scale: Scale| rows.values().filter_map(|row| row.patches(scale)).sum::<usize>();
    let counts: Vec<_> =
        arguments.settings().magnifications.iter().map(|&scale| format!("{} at {scale}", total(scale))).collect();
    crossfusion::say(format!("{patched} slides with patches, {empty} without tissue, {failed} failed"));
    crossfusion::say(format!("patches: {}", counts.join(", ")));
    crossfusion::say(format!("table {}", arguments.out.join(TABLE).display()));
    if failed > 0 {
        let message =
            format!("{failed} of {} slides failed, for the reasons above; run again to try them again", rows.len());
        return Err(Error::Data(message));
    }
    Ok(())
}
