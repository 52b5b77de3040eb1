//! Compiles the CUDA sources in kernels/. Feature `emulator`: as C++ for the host, into the two libraries that
//! src/device/emulator.rs loads; needs a C++20 compiler (g++ 12, or what CXX names) and nothing of NVIDIA's.

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::SystemTime,
};

/// Storage types; a kernel `foo` becomes `foo_f32` and `foo_bf16`.
const STORAGE: [&str; 2] = ["f32", "bf16"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    if env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        emulator();
    }
}

/// OUT_DIR/emulator-plain.so and emulator-race.so: every kernel and the emulator, built for speed and for checking.
///
/// Two libraries loaded at run time, and not two halves of one archive: the same symbols can then live in one process
/// twice, cargo does not strip the line numbers that race reports need, and a mutated kernel is tried without relinking.
fn emulator() {
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let root = env::var("CARGO_MANIFEST_DIR").unwrap();
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rustc-env=CROSSFUSION_EMULATOR_BUILT={}", out.display());

    let compiler = env::var_os("CXX").unwrap_or("c++".into());
    let compile = |source: &Path, object: &Path, flags: &[&str]| {
        let mut command = Command::new(&compiler);
        command.args([
            "-std=c++20",
            "-fPIC",
            "-fvisibility=hidden",
            "-ftls-model=initial-exec",
            "-fno-strict-aliasing",
        ]);
        command.args(["-Wall", "-Wextra", "-Wno-unknown-pragmas"]).arg(format!("-ffile-prefix-map={root}/="));
        command.args(flags).args(["-x", "c++", "-c"]).arg(Path::new(&root).join(source)).arg("-o").arg(object);
        command
    };
    let headers: Vec<_> = files("kernels", "cuh").into_iter().chain(files("kernels/emulator", "hpp")).collect();
    let with_headers = |source: &Path| {
        let own = [source.to_path_buf(), "build.rs".into()];
        own.into_iter().chain(headers.iter().cloned()).collect::<Vec<_>>()
    };

    const RACE: [&str; 6] = [
        "-O1",
        "-g",
        "-DSIMT_RACE",
        "-fsanitize=thread,undefined", // for the calls that the compiler inserts; emulator/check.cpp answers them
        "-fno-sanitize=vptr",
        "-fno-sanitize-recover=undefined",
    ];
    let modes = [("plain", &["-O2"][..], &["-O3"][..]), ("race", &RACE[..], &["-O2", "-g", "-DSIMT_RACE"][..])];
    let (mut objects, mut libraries) = (Vec::new(), Vec::new());
    for (mode, kernel_flags, runtime_flags) in modes {
        let mut parts = Vec::new();
        let mut add = |source: PathBuf, suffix: &str, flags: &[&str]| {
            let name = format!("{}-{suffix}{mode}.o", source.file_stem().unwrap().to_string_lossy());
            let object = out.join(name);
            let command = compile(&source, &object, flags);
            objects.push(Job { command, output: object.clone(), inputs: with_headers(&source) });
            parts.push(object);
        };
        for source in files("kernels/emulator", "cpp") {
            add(source, "", runtime_flags);
        }
        for source in files("kernels", "cu") {
            for storage in STORAGE {
                let real = format!("-DREAL={storage}");
                add(source.clone(), &format!("{storage}-"), &[kernel_flags, &[real.as_str()]].concat());
            }
        }
        let output = out.join(format!("emulator-{mode}.so"));
        let mut command = Command::new(&compiler);
        command.args(["-shared", "-pthread", "-Wl,-z,defs", "-o"]).arg(&output).args(&parts).arg("-ldl");
        libraries.push(Job { command, output, inputs: parts });
    }
    run_stale(objects);
    run_stale(libraries);
}

/// The files of a folder with this extension, sorted.
fn files(folder: &str, extension: &str) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap_or_else(|e| panic!("{folder}: {e}"));
    let mut found: Vec<_> = entries.map(|e| e.unwrap().path()).collect();
    found.retain(|p| p.extension().is_some_and(|e| e == extension));
    found.sort();
    found
}

/// One call of a compiler.
struct Job {
    command: Command,
    output: PathBuf,
    inputs: Vec<PathBuf>,
}

impl Job {
    /// Whether the output is missing or older than an input.
    fn is_stale(&self) -> bool {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified());
        let Ok(built) = time(&self.output) else { return true };
        self.inputs.iter().any(|i| time(i).unwrap_or(SystemTime::now()) > built)
    }

    /// Runs the compiler; its warnings become cargo's, its errors end the build.
    fn run(&mut self) {
        let output =
            self.command.output().unwrap_or_else(|e| panic!("cannot run {:?}: {e}", self.command.get_program()));
        let text = String::from_utf8_lossy(&output.stderr);
        if !output.status.success() {
            let _ = fs::remove_file(&self.output);
            panic!("{:?}\n{text}", self.command);
        }
        text.lines().for_each(|line| println!("cargo:warning={line}"));
    }
}

/// Runs the stale jobs, as many at once as cargo allows.
fn run_stale(mut jobs: Vec<Job>) {
    jobs.retain(Job::is_stale);
    let width = env::var("NUM_JOBS").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let slots: Vec<_> = jobs.into_iter().map(std::sync::Mutex::new).collect();
    let next = AtomicUsize::new(0);
    thread::scope(|scope| {
        for _ in 0..slots.len().min(width) {
            scope.spawn(|| {
                while let Some(job) = slots.get(next.fetch_add(1, Ordering::Relaxed)) {
                    job.lock().unwrap().run();
                }
            });
        }
    });
}
