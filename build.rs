//! Compiles the CUDA sources in kernels/, each for both storage types, and only what changed.
//!
//! Where there is an nvcc: into GPU code, which src/device/fatbins.rs embeds; without one, the
//! crate is built without. Feature `emulator`: as C++ for the host, into the two libraries that
//! src/device/emulator.rs loads; needs a C++20 compiler (g++ 12, or what CXX names) and nothing of
//! NVIDIA's.

use std::{
    collections::BTreeMap,
    env, fs,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::SystemTime,
};

/// Storage types; a kernel `foo` becomes `foo_f32` and `foo_bf16`.
const STORAGE: [&str; 2] = ["f32", "bf16"];

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    println!("cargo:rerun-if-changed=kernels");
    println!("cargo:rustc-env=CROSSFUSION_VERSION={}", version());
    constants();
    fatbins();
    if env::var_os("CARGO_FEATURE_EMULATOR").is_some() {
        emulator();
    }
}

/// "0.1.0 (a1b2c3d)"; without the commit where this is no git checkout, as from a tarball.
fn version() -> String {
    let version = env::var("CARGO_PKG_VERSION").unwrap();
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let git = |arguments: &[&str]| -> Option<String> {
        let output = Command::new("git").arg("-C").arg(&root).args(arguments).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).trim().to_string())
    };
    // a tarball unpacked within somebody's repository is not of that repository's commit
    let here = git(&["rev-parse", "--show-toplevel"]).and_then(|top| fs::canonicalize(top).ok());
    let commit = here.filter(|top| fs::canonicalize(&root).is_ok_and(|root| root == *top));
    let Some(commit) = commit.and_then(|_| git(&["rev-parse", "--short", "HEAD"])) else { return version };
    // HEAD names a branch, and its log grows with every commit; a file that is not there would
    // rerun this at each build
    for file in ["HEAD", "logs/HEAD"] {
        let path = git(&["rev-parse", "--git-path", file]).map(|path| root.join(path));
        if let Some(path) = path.filter(|path| path.is_file()) {
            println!("cargo:rerun-if-changed={}", path.display());
        }
    }
    format!("{version} ({commit})")
}

/// OUT_DIR/constants.rs, which src/ops/mod.rs includes, so that kernels and their launches cannot
/// disagree: a module for each source file, with what it says in lines `constexpr int kName = ...`
/// that is a number, or a product of numbers and names of the same file.
fn constants() {
    let mut modules = BTreeMap::<String, Vec<(String, usize)>>::new();
    for source in files("kernels", "cu").into_iter().chain(files("kernels", "cuh")) {
        let known = modules.entry(source.file_stem().unwrap().to_string_lossy().into_owned()).or_default();
        let text = fs::read_to_string(&source).unwrap();
        for line in text.lines().filter_map(|line| line.strip_prefix("constexpr int ")) {
            for (name, value) in line.split(';').next().unwrap().split(", ").filter_map(|one| one.split_once(" = ")) {
                let number = |name: &str| known.iter().find(|(known, _)| known == name).map(|(_, value)| *value);
                let factors = value.split(" * ").map(|factor| factor.parse().ok().or_else(|| number(factor)));
                if let Some(value) = factors.product::<Option<usize>>() {
                    known.push((name.into(), value));
                }
            }
        }
    }
    let mut rust = String::new();
    for (module, constants) in modules {
        rust += &format!("pub(crate) mod {module} {{\n");
        for (name, value) in constants {
            rust += &format!("    pub(crate) const {}: usize = {value};\n", screaming(&name));
        }
        rust += "}\n";
    }
    fs::write(PathBuf::from(env::var("OUT_DIR").unwrap()).join("constants.rs"), rust).unwrap();
}

/// `kRowsPerBlock` as Rust spells it: `ROWS_PER_BLOCK`.
fn screaming(name: &str) -> String {
    let mut out = String::new();
    for letter in name.chars().skip(1) {
        if letter.is_uppercase() && !out.is_empty() {
            out.push('_');
        }
        out.push(letter.to_ascii_uppercase());
    }
    out
}

/// What a fatbin holds: machine code for A100, RTX 30, RTX 40, H100, B200 and RTX 50, and PTX,
/// which drivers of GPUs to come compile themselves. All but H100's comes from one PTX: twice as
/// fast to build, and no source asks for more than sm_80.
const GPU_CODE: [&str; 2] = [
    "arch=compute_80,code=[sm_80,sm_86,sm_89,sm_100,sm_120,compute_80]",
    "arch=compute_90a,code=sm_90a", // 90a: with wgmma and setmaxnreg
];

/// OUT_DIR/fatbins.rs, which src/device/fatbins.rs includes: a slice of (name, fatbin), empty
/// without nvcc.
///
/// The fatbins lie in target/kernels, each with what ptxas said of its registers (.ptxas, for
/// scripts/kernel-report.py): shared by all profiles and features, which do not change them.
fn fatbins() {
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let table = out.join("fatbins.rs");
    let Some((nvcc, version)) = nvcc() else { return fs::write(table, "&[]").unwrap() };
    println!("cargo:rerun-if-changed={}", nvcc.display());
    println!("cargo:rustc-env=CROSSFUSION_NVCC={version}");

    let folder = shared_folder(&out);
    fs::create_dir_all(&folder).unwrap();
    let version_file = folder.join("nvcc.txt");
    if fs::read_to_string(&version_file).unwrap_or_default() != version {
        fs::write(&version_file, version).unwrap();
    }

    let (mut jobs, mut rows) = (Vec::new(), String::new());
    for source in files("kernels", "cu") {
        for storage in STORAGE {
            let name = format!("{}_{storage}", source.file_stem().unwrap().to_string_lossy());
            let mut command = Command::new(&nvcc);
            command.args(["-std=c++20", "-O3", "--fatbin", "-Xfatbin", "-compress-all", "-Xptxas", "-v"]);
            command.args(GPU_CODE.iter().flat_map(|code| ["-gencode", code])).arg(format!("-DREAL={storage}"));
            command.arg(&source);
            let mut inputs = vec![source.clone(), "build.rs".into(), version_file.clone()];
            inputs.extend(files("kernels", "cuh"));
            let output = folder.join(format!("{name}.fatbin"));
            rows += &format!("    ({name:?}, include_bytes!({output:?})),\n");
            jobs.push(Job { command, report: Some(output.with_extension("ptxas")), output, inputs });
        }
    }
    run_stale(jobs);
    fs::write(table, format!("&[\n{rows}]")).unwrap();
}

/// target/kernels, the same for all profiles and features. OUT_DIR is target/<profile>/build/...,
/// or target/<triple>/<profile>/build/...
fn shared_folder(out: &Path) -> PathBuf {
    let build = out.ancestors().find(|a| a.file_name().is_some_and(|n| n == "build"));
    build.and_then(|b| b.ancestors().nth(2)).unwrap_or(out).join("kernels")
}

/// The first nvcc that knows all of [`GPU_CODE`], and its version, from $CROSSFUSION_CUDA,
/// $CUDA_HOME, $CUDA_PATH, $PATH, and target/cuda, where scripts/cuda-toolchain.sh puts one.
fn nvcc() -> Option<(PathBuf, String)> {
    let folders = ["CROSSFUSION_CUDA", "CUDA_HOME", "CUDA_PATH"].into_iter().filter_map(|variable| {
        println!("cargo:rerun-if-env-changed={variable}");
        env::var_os(variable).map(|folder| Path::new(&folder).join("bin"))
    });
    let path = env::var_os("PATH").unwrap_or_default();
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR").unwrap());
    let folders = folders.chain(env::split_paths(&path)).chain([root.join("target/cuda/bin")]);
    let mut too_old = String::new();
    for nvcc in folders.map(|f| f.join("nvcc")).filter(|f| f.is_file()) {
        let ask =
            |what| Command::new(&nvcc).arg(what).output().map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
        if !ask("--list-gpu-code").is_ok_and(|codes| codes.contains("sm_120")) {
            too_old = format!(" ({} is older than CUDA 12.8)", nvcc.display());
            continue;
        }
        let version = ask("--version").unwrap_or_default();
        let version = version.rsplit_once(", V").and_then(|(_, v)| v.split_whitespace().next()).unwrap_or("unknown");
        return Some((nvcc, version.to_string()));
    }
    println!("cargo:rerun-if-env-changed=PATH"); // only now: shells and editors differ in it
    println!("cargo:warning=no nvcc{too_old}: built without GPU kernels; scripts/cuda-toolchain.sh installs one");
    None
}

/// OUT_DIR/emulator-plain.so and emulator-race.so: every kernel and the emulator, built for speed
/// and for checking; and target/kernels/driver/libcuda.so, a driver whose GPU is the emulator.
///
/// Two libraries loaded at run time, and not two halves of one archive: the same symbols can then
/// live in one process twice, cargo does not strip the line numbers that race reports need, and a
/// mutated kernel is tried without relinking.
fn emulator() {
    let out = PathBuf::from(env::var("OUT_DIR").unwrap());
    let root = env::var("CARGO_MANIFEST_DIR").unwrap();
    println!("cargo:rerun-if-env-changed=CXX");
    println!("cargo:rustc-env=CROSSFUSION_EMULATOR_BUILT={}", out.display());
    let driver_folder = shared_folder(&out).join("driver");
    fs::create_dir_all(&driver_folder).unwrap();
    println!("cargo:rustc-env=CROSSFUSION_DRIVER_BUILT={}", driver_folder.display());

    let compiler = env::var_os("CXX").unwrap_or("c++".into());
    let compile = |source: &Path, flags: &[&str]| {
        let mut command = Command::new(&compiler);
        command.args([
            "-std=c++20",
            "-fPIC",
            "-fvisibility=hidden",
            "-ftls-model=initial-exec",
            "-fno-strict-aliasing",
        ]);
        command.args(["-Wall", "-Wextra", "-Wno-unknown-pragmas"]).arg(format!("-ffile-prefix-map={root}/="));
        command.args(flags).args(["-x", "c++", "-c"]).arg(Path::new(&root).join(source));
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
            let command = compile(&source, flags);
            objects.push(Job { command, output: object.clone(), inputs: with_headers(&source), report: None });
            object
        };
        let driver = Path::new("kernels/emulator/driver.cpp");
        for source in files("kernels/emulator", "cpp").into_iter().filter(|source| source != driver) {
            parts.push(add(source, "", runtime_flags));
        }
        for source in files("kernels", "cu") {
            for storage in STORAGE {
                let real = format!("-DREAL={storage}");
                parts.push(add(source.clone(), &format!("{storage}-"), &[kernel_flags, &[real.as_str()]].concat()));
            }
        }
        let mut link = |output: PathBuf, parts: &[PathBuf]| {
            let mut command = Command::new(&compiler);
            command.args(["-shared", "-pthread", "-Wl,-z,defs"]).args(parts).arg("-ldl");
            libraries.push(Job { command, output, inputs: parts.to_vec(), report: None });
        };
        link(out.join(format!("emulator-{mode}.so")), &parts);
        if mode == "plain" {
            parts.push(add(driver.to_path_buf(), "", runtime_flags));
            link(driver_folder.join("libcuda.so"), &parts);
        }
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
    /// Without "-o".
    command: Command,
    output: PathBuf,
    inputs: Vec<PathBuf>,
    /// Where to keep what the compiler says.
    report: Option<PathBuf>,
}

impl Job {
    /// Whether the output is missing or older than an input.
    fn is_stale(&self) -> bool {
        let time = |p: &Path| fs::metadata(p).and_then(|m| m.modified());
        let Ok(built) = time(&self.output) else { return true };
        self.inputs.iter().any(|i| time(i).unwrap_or(SystemTime::now()) > built)
    }

    /// Runs the compiler; its warnings become cargo's, its errors end the build. The output appears
    /// when it is complete, as builds are interrupted and run side by side.
    fn run(&mut self) {
        let partial = PathBuf::from(format!("{}.{}.part", self.output.display(), process::id()));
        let result = self.command.arg("-o").arg(&partial).output();
        let result = result.unwrap_or_else(|e| panic!("cannot run {:?}: {e}", self.command.get_program()));
        let text = String::from_utf8_lossy(&result.stderr);
        if !result.status.success() {
            let _ = fs::remove_file(&partial);
            panic!("{:?}\n{text}", self.command);
        }
        let is_warning = |line: &&str| self.report.is_none() || line.contains("warning") && !line.starts_with("Remark");
        text.lines().filter(is_warning).for_each(|line| println!("cargo:warning={line}"));
        if let Some(report) = &self.report {
            fs::write(report, text.as_bytes()).unwrap();
        }
        fs::rename(&partial, &self.output).unwrap();
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
