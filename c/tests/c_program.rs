//! examples/c, built by the system's compiler against the header and the libraries, plainly and under
//! AddressSanitizer, gets a golden's logits and gradients. `CROSSFUSION_DEVICE=cuda` runs it on a GPU,
//! or on the emulated driver.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use engine::{
    device::Device,
    train::{
        checkpoint::{ModelCard, Seen, save_model},
        step::Engine,
    },
};

// what the shared module calls the library
extern crate engine as crossfusion;
#[path = "../../tests/common/mod.rs"]
mod common;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_path_buf()
}

/// The shared and the static library, of the profile that the tests run in.
fn libraries() -> PathBuf {
    let mut command = Command::new(env!("CARGO"));
    command.current_dir(root()).args(["build", "--quiet", "--package", "crossfusion-c"]);
    if !cfg!(debug_assertions) || cfg!(feature = "emulator") {
        command.arg("--release");
    }
    if cfg!(feature = "emulator") {
        command.args(["--features", "emulator"]);
    }
    assert!(command.status().unwrap().success());
    // target/release/deps/this-test
    env::current_exe().unwrap().ancestors().nth(2).unwrap().to_path_buf()
}

fn write<T: bytemuck::NoUninit>(folder: &Path, name: &str, numbers: &[T]) {
    std::fs::write(folder.join(name), bytemuck::cast_slice(numbers)).unwrap();
}

/// A golden as the program takes it: the model, the bags, PyTorch's logits and gradients.
fn write_golden(name: &str, folder: &Path) {
    let bytes = std::fs::read(root().join(format!("tests/goldens/{name}.safetensors"))).unwrap();
    let (_, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    let golden: Golden = serde_json::from_str(&metadata.metadata().clone().unwrap()["golden"]).unwrap();
    let config = golden.config.build();
    let mut engine = Engine::<f32>::new(Device::from_name("cpu", 1).unwrap(), &config, 0).unwrap();
    engine.load(&common::parameters(&golden.fill_tag, &golden.parameters)).unwrap();
    let (trained_on, chosen_on) = (Seen::default(), Seen::default());
    let card =
        ModelCard { model: config.clone(), fold: 0, epoch: 0, c_index: None, bin_edges: vec![], trained_on, chosen_on };
    save_model(&folder.join("model.safetensors"), &engine, &card).unwrap();
    for (scale, &patches) in &golden.bags {
        let bag = common::bag(&golden.fill_tag, scale, patches, config.features, golden.input_law);
        write(folder, &format!("{scale}.f32"), &bag);
    }
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let numbers = |name: &str| -> Vec<f32> {
        let data = tensors.tensor(name).unwrap().data().to_vec();
        data.chunks_exact(4).map(|bytes| f32::from_le_bytes(bytes.try_into().unwrap())).collect()
    };
    write(folder, "logits.f64", &numbers("logits").into_iter().map(f64::from).collect::<Vec<_>>());
    assert_eq!(golden.loss.name, "nll");
    write(folder, "loss.f64", &[golden.loss.label as f64, golden.loss.censorship, golden.loss.alpha]);
    for name in golden.parameters.keys() {
        write(folder, &format!("grad.{name}.f32"), &numbers(&format!("grad.{name}")));
    }
}

#[derive(serde::Deserialize)]
struct Golden {
    config: common::ModelConfig,
    bags: std::collections::BTreeMap<String, usize>,
    fill_tag: String,
    input_law: common::Law,
    parameters: std::collections::BTreeMap<String, common::Parameter>,
    loss: LossSpec,
}

#[derive(serde::Deserialize)]
struct LossSpec {
    name: String,
    label: usize,
    censorship: f64,
    alpha: f64,
}

const SANITIZERS: &[&str] = &["-fsanitize=address,undefined", "-fno-omit-frame-pointer"];

/// Whether the compiler comes with its sanitizers' libraries.
fn has_sanitizers(folder: &Path) -> bool {
    let source = folder.join("probe.c");
    std::fs::write(&source, "int main(void) { return 0; }").unwrap();
    let cc = env::var_os("CC").unwrap_or_else(|| "cc".into());
    let built = Command::new(cc).args(SANITIZERS).arg(&source).arg("-o").arg(folder.join("probe")).output();
    let has = built.is_ok_and(|output| output.status.success());
    if !has {
        println!("SKIPPED under AddressSanitizer: the C compiler comes without it");
    }
    has
}

/// Builds a program of examples/c in `folder`.
fn build(program: &str, folder: &Path, libraries: &Path, more: &[&str]) -> PathBuf {
    compile(&root().join(format!("examples/c/{program}.c")), folder, libraries, more)
}

fn compile(source: &Path, folder: &Path, libraries: &Path, more: &[&str]) -> PathBuf {
    let out = folder.join(format!("{}{}", source.file_stem().unwrap().display(), more.len()));
    let mut command = Command::new(env::var_os("CC").unwrap_or_else(|| "cc".into()));
    command.args(["-std=c11", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O1", "-g"]).args(more);
    command.arg(format!("-I{}", root().join("include").display())).arg(source);
    command.arg("-o").arg(&out);
    if more.contains(&"-DSTATIC") {
        command.arg(libraries.join("libcrossfusion.a")).args(["-lpthread", "-ldl", "-lm"]);
    } else {
        command.arg(format!("-L{}", libraries.display())).args(["-lcrossfusion", "-lm"]);
    }
    assert!(command.status().expect("a C compiler").success(), "{} does not compile", source.display());
    out
}

fn run(program: &Path, arguments: &[&Path], libraries: &Path) -> String {
    let mut paths = vec![libraries.to_path_buf()];
    paths.extend(env::split_paths(&env::var_os("LD_LIBRARY_PATH").unwrap_or_default()));
    let device = env::var_os("CROSSFUSION_DEVICE").filter(|name| name == "cuda");
    let output = Command::new(program)
        .args(arguments)
        .args(device)
        .env("LD_LIBRARY_PATH", env::join_paths(paths).unwrap())
        .env("ASAN_OPTIONS", "detect_leaks=1")
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

#[test]
fn a_c_program_gets_a_goldens_gradients() {
    let (folder, libraries) = (tempfile::tempdir().unwrap(), libraries());
    write_golden("crossfusion_tiny", folder.path());
    for more in [&[][..], &["-DSTATIC"], SANITIZERS] {
        if more == SANITIZERS && !has_sanitizers(folder.path()) {
            continue;
        }
        let program = build("golden", folder.path(), &libraries, more);
        let said = run(&program, &[folder.path()], &libraries);
        assert!(said.contains("gradients agree"), "{said}");
        println!("{more:?}: {said}");
    }
}

/// The README's C runs as it stands.
#[test]
fn the_readme_in_c() {
    let (folder, libraries) = (tempfile::tempdir().unwrap(), libraries());
    let readme = std::fs::read_to_string(root().join("README.md")).unwrap();
    let (_, rest) = readme.split_once("```c\n").unwrap();
    let source = folder.path().join("readme.c");
    std::fs::write(&source, rest.split_once("```").unwrap().0).unwrap();
    let program = compile(&source, folder.path(), &libraries, &[]);
    assert!(run(&program, &[], &libraries).trim().parse::<f64>().is_ok());
}

/// An op on the caller's own memory: ragged groups, strides, empty contexts, scores of hundreds,
/// dropout, and what is refused.
#[test]
fn attention_in_c_is_attention() {
    if env::var_os("CROSSFUSION_DEVICE").is_some_and(|name| name == "cuda") {
        println!("SKIPPED attention.c: its memory is the host's; tests/emulator has the kernels");
        return;
    }
    let (folder, libraries) = (tempfile::tempdir().unwrap(), libraries());
    for more in [&[][..], SANITIZERS] {
        if more == SANITIZERS && !has_sanitizers(folder.path()) {
            continue;
        }
        let program = build("attention", folder.path(), &libraries, more);
        let said = run(&program, &[], &libraries);
        assert!(said.contains("attention agrees"), "{said}");
    }
}
