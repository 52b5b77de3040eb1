//! Times what `cf-slide embed` does before the network: `reading PATCHES RECIPE.toml THREADS`
//! prints patches and seconds. scripts/slide-speed.py runs it beside a plain Python loop.

use std::{path::Path, time::Instant};

use crossfusion::{Error, Result, data::atomic};
use crossfusion_slides::{
    embedding, patching,
    reading::{self, Event, Recipe},
};

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, patches, recipe, threads] = &arguments[..] else {
        return Err(Error::Usage("usage: reading PATCHES RECIPE.toml THREADS".into()));
    };
    let patches = Path::new(patches);
    let recipe: Recipe =
        toml::from_str(&atomic::read_text(Path::new(recipe), 1 << 20)?).map_err(|e| Error::file(recipe, e))?;
    let threads = threads.parse().map_err(|e| Error::Usage(format!("THREADS: {e}")))?;
    let table = patching::read_table(patches)?;
    let patched = table.iter().filter(|(_, row)| row.status == patching::Status::Patched);
    let jobs = patched.map(|(name, row)| embedding::job(patches, None, name, row)).collect::<Result<Vec<_>>>()?;
    let (start, mut read) = (Instant::now(), 0u64);
    reading::read(&jobs, &recipe, threads, 64, |event| match event {
        Event::Patch { .. } => {
            read += 1;
            Ok(())
        }
        Event::Failed { error, .. } => Err(error),
    })?;
    println!("{read} {:.3}", start.elapsed().as_secs_f64());
    Ok(())
}
