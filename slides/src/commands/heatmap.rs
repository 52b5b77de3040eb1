//! `cf-slide heatmap`: what each patch contributes to the risk, drawn over the slide.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, ValueEnum};
use crossfusion::{
    Error, Result,
    data::features::FeatureFile,
    device::Device,
    eval::attribution::{self, Baseline, Explainer, Explanation, Progress, Region, by_region, rank_correlation},
    folder,
    model::{AttentionOf, Scale, Scales},
};
use crossfusion_slides::{
    coordinates::Coordinates,
    heatmap::{self, Ground, Layer},
    patching::coordinates_path,
    slide::Slide,
    viewer,
};
use ndarray::Array2;

use super::input::{Machine, Source, slide_id};

/// Shows which patches raise a slide's risk and which lower it: pictures, a page, QuPath's objects
/// and a table
#[derive(Args)]
pub struct Arguments {
    /// Run folder, whose folds' models are averaged, or one model: best.safetensors, a published
    /// best_model.pt
    model: PathBuf,
    /// The slide; of features that are there, its name or a file of them will do, and pictures are
    /// then on white
    slide: PathBuf,
    /// How patches are scored
    #[arg(long, default_value = "gradient")]
    method: Method,
    /// What gradients compare a patch with
    #[arg(long, default_value = "mean")]
    baseline: From,
    /// Points on the way from the baseline, of integrated
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1000))]
    points: u16,
    /// Most squares that are taken out in turn, of occlusion
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u16).range(2..=10000))]
    squares: u16,
    /// Folder that `cf-slide patch` wrote, for coordinates that the features' files do not hold
    #[arg(long, value_name = "DIR")]
    patches: Option<PathBuf>,
    /// Folder for what is written [default: runs/heatmap-SLIDE-NUMBER]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    source: Source,
    #[command(flatten)]
    machine: Machine,
}

#[derive(Clone, Copy, PartialEq, ValueEnum)]
enum Method {
    /// Gradient of the risk times what the patch has beyond the baseline: the time of a training
    /// step
    Gradient,
    /// That gradient's mean on the way from the baseline, which sums up to the change of risk
    Integrated,
    /// What a patch of x5 or x20 receives in the cross-attention
    Attention,
    /// What a patch receives of the class token
    ClassToken,
    /// What the risk loses without the square that the patch is in
    Occlusion,
}

#[derive(Clone, Copy, ValueEnum)]
enum From {
    /// The slide's mean patch
    Mean,
    /// Features of zero, of which models of this kind make little: see docs/heatmaps.md
    Zero,
}

impl From {
    fn baseline(self) -> Baseline {
        match self {
            Self::Mean => Baseline::Mean,
            Self::Zero => Baseline::Zero,
        }
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let Arguments { model, slide, method, source, machine, .. } = arguments;
    let device = Device::from_name(&machine.device, machine.threads)?;
    let id = slide_id(slide);
    let out = arguments.out.clone().unwrap_or_else(|| folder::fresh_folder(&format!("heatmap-{id}")));
    let path = |name: &str| out.join(format!("heatmap{name}"));
    if path(".csv").exists() {
        let message = format!("--out {}: holds {} already; choose another", out.display(), path(".csv").display());
        return Err(Error::Usage(message));
    }
    if slide.is_dir() {
        return Err(Error::Usage(format!("{}: is a folder, expected a slide", slide.display())));
    }
    let is_of_features =
        slide.extension().is_some_and(|of| ["pt", "safetensors", "h5"].iter().any(|known| of == *known));
    let opened = if slide.is_file() && !is_of_features { Some(Slide::open(slide)?) } else { None };
    let features = source.features(std::slice::from_ref(slide), model, &out, machine)?;
    if opened.is_none() {
        crossfusion::say(format!("{}: is no slide; pictures are on white", slide.display()));
    }
    let of = (&*features.pt_dir, &*features.backbone);
    let mut explainer = Explainer::open((model, source.num_heads), of, &id, device, machine.memory_budget)?;
    let patches = arguments.patches.as_ref().or(features.patches.as_ref());
    let mut layers = layers(&explainer, patches.map(PathBuf::as_path), &id, opened.as_ref())?;
    // what takes an hour is not to find out then that it cannot be written
    std::fs::create_dir_all(&out).map_err(|e| Error::file(&out, format!("cannot be made: {e}")))?;
    // a folder that has something in it stays
    let found = explain(arguments, &mut explainer, &layers).inspect_err(|_| drop(std::fs::remove_dir(&out)))?;
    layers.retain_mut(|layer| match found.attribution.scores.get(layer.scale) {
        Some(scores) => {
            layer.scores.clone_from(scores);
            true
        }
        None => false,
    });

    let (name, signed) = match method {
        Method::Gradient => ("gradient", true),
        Method::Integrated => ("integrated gradients", true),
        Method::Attention => ("cross-attention", false),
        Method::ClassToken => ("class-token attention", false),
        Method::Occlusion => ("occlusion", true),
    };
    let ground = Ground::new(opened.as_ref(), &layers);
    heatmap::write_png(&path(".png"), &ground, &layers.iter().collect::<Vec<_>>())?;
    for layer in &layers {
        heatmap::write_png(&path(&format!("_{}.png", layer.scale)), &ground, &[layer])?;
    }
    heatmap::write_geojson(&path(".geojson"), &layers, name)?;
    let about = format!("{name}; risk {:.3}", found.attribution.risk);
    viewer::write(&path(".html"), &ground, &layers, [&id, &about], signed)?;
    heatmap::write_csv(&path(".csv"), &layers)?;

    crossfusion::say(format!("{id}: risk {:.4}, {name}", found.attribution.risk));
    for layer in &layers {
        let sum = layer.scores.iter().sum::<f64>();
        crossfusion::say(format!("{}: {} patches, scores sum up to {sum:+.2e}", layer.scale, layer.scores.len()));
    }
    crossfusion::say(format!("page {}", path(".html").display()));
    Ok(())
}

/// Where the patches lie, at every scale that the model reads.
fn layers(explainer: &Explainer, patches: Option<&Path>, id: &str, slide: Option<&Slide>) -> Result<Vec<Layer>> {
    let layer = |scale: Scale, file: &Path, expected: usize| {
        let (from, corners, side) = match patches {
            Some(folder) => {
                let from = coordinates_path(folder, scale, id);
                let coordinates = Coordinates::read(&from)?;
                slide.map_or(Ok(()), |slide| coordinates.check(slide))?;
                let Coordinates { corners, level, size, .. } = coordinates;
                let downsample = match (level, slide.and_then(|slide| slide.levels().get(level))) {
                    (0, _) => 1.0,
                    (_, Some(level)) => level.downsample,
                    _ => {
                        let message = format!("is of level {level}, whose size the slide says; give its file");
                        return Err(Error::file(from, message));
                    }
                };
                (from, corners, Some((size as f64 * downsample).round() as i64))
            }
            None => {
                let Some(table) = coordinates_beside(file)? else {
                    let message = "holds no coordinates, and no .h5 of features beside it does; give the folder of \
                                   `cf-slide patch` as --patches";
                    return Err(Error::file(file, message));
                };
                let corners: Vec<[i64; 2]> = table.rows().into_iter().map(|row| [row[0], row[1]]).collect();
                let side = heatmap::side_of_grid(&corners);
                (file.to_path_buf(), corners, side)
            }
        };
        if corners.len() != expected {
            let message = format!("has {} patches, but {} has features of {expected}", corners.len(), file.display());
            return Err(Error::file(from, message));
        }
        let Some(side) = side.filter(|side| *side > 0) else {
            return Err(Error::file(from, "does not say how large its patches are; give --patches"));
        };
        Ok(Layer { scale, side, corners, scores: Vec::new() })
    };
    explainer.readers().iter().map(|(scale, reader)| layer(scale, &reader.path, reader.patches)).collect()
}

/// The coordinates in a file of features; of one that has none, those of the .h5 that CLAM wrote
/// with it.
fn coordinates_beside(file: &Path) -> Result<Option<Array2<i64>>> {
    if let Some(table) = FeatureFile::open(file)?.coordinates()? {
        return Ok(Some(table));
    }
    let folder = file.parent().and_then(Path::parent).map(|folder| folder.join("h5_files"));
    let beside = folder.zip(file.file_name()).map(|(folder, name)| folder.join(name).with_extension("h5"));
    beside.filter(|path| path.is_file()).map_or(Ok(None), |path| FeatureFile::open(&path)?.coordinates())
}

fn explain(arguments: &Arguments, explainer: &mut Explainer, layers: &[Layer]) -> Result<Explanation> {
    let baseline = arguments.baseline.baseline();
    let integrated = attribution::Method::Integrated(baseline, arguments.points.into());
    match arguments.method {
        Method::Gradient => explainer.explain(attribution::Method::Gradient(baseline), &mut |_| ()),
        Method::Attention => explainer.explain(attribution::Method::Attention(AttentionOf::Patches), &mut |_| ()),
        Method::ClassToken => explainer.explain(attribution::Method::Attention(AttentionOf::ClassToken), &mut |_| ()),
        Method::Integrated => {
            let found = explainer.explain(integrated, &mut teller("integrated gradients"))?;
            if let Some([error, change]) = found.completeness {
                crossfusion::say(format!(
                    "completeness: the scores sum up to {:.4}, the risk less the baseline's is {change:.4}: off by {error:.1e}",
                    change + error
                ));
            }
            Ok(found)
        }
        Method::Occlusion => {
            let of_square = |square: &Vec<Vec<usize>>| -> Region {
                layers.iter().zip(square).map(|(layer, patches)| (layer.scale, patches.clone())).collect::<Scales<_>>()
            };
            let squares = heatmap::squares(layers, arguments.squares.into());
            let regions: Vec<Region> = squares.iter().map(of_square).collect();
            let found = explainer.explain(attribution::Method::Occlusion(&regions), &mut teller("occlusion"))?;
            let checked = [("gradient", attribution::Method::Gradient(baseline)), ("integrated gradients", integrated)];
            for (name, method) in checked {
                let other = explainer.explain(method, &mut teller(name))?.attribution.scores;
                let correlation = rank_correlation(&found.effects, &by_region(&other, &regions));
                let correlation = correlation.map_or("not defined".into(), |r| format!("{r:.3}"));
                crossfusion::say(format!(
                    "{name} and occlusion rank {} squares alike by {correlation} (Spearman's rank correlation)",
                    regions.len()
                ));
            }
            Ok(found)
        }
    }
}

/// Says what a method will take as soon as that is known, and how far it is now and then.
fn teller(what: &'static str) -> impl FnMut(Progress) {
    /// Less is not worth a word.
    const SHORT: Duration = Duration::from_secs(2);
    const OFTEN: Duration = Duration::from_secs(10);
    let mut said: Option<std::time::Instant> = None;
    move |Progress { done, passes, left }| {
        let seconds = left.as_secs_f64();
        match said {
            None if left > SHORT => {
                crossfusion::say(format!("{what}: {passes} passes over the slide, about {seconds:.0} s"));
            }
            Some(before) if before.elapsed() > OFTEN => {
                crossfusion::say(format!("{what}: {done} of {passes} passes, {seconds:.0} s left"));
            }
            _ if said.is_some() => return,
            _ => {}
        }
        said = Some(std::time::Instant::now());
    }
}
