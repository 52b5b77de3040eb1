//! The programs on `--device cuda` where there is no GPU: under a driver whose GPU is the emulator
//! (kernels/emulator/driver.cpp). All of src/device/cuda.rs runs: streams, events, page-locked
//! memory, launches by name, what it says of trouble.
#![cfg(feature = "programs")]
#![cfg(feature = "emulator")]

use std::{
    path::Path,
    process::{Command, Output},
};

use crossfusion::{data::demo, device::NVCC};

fn program(path: &str) -> Command {
    let mut command = Command::new(path);
    command.env("LD_LIBRARY_PATH", env!("CROSSFUSION_DRIVER_BUILT"));
    command
}

/// The kernels that a driver is given must be in the program.
fn built_without_nvcc() -> bool {
    if NVCC.is_none() {
        println!("SKIPPED: this build has no GPU kernels; scripts/cuda-toolchain.sh installs an nvcc");
    }
    NVCC.is_none()
}

fn step(driver: &[(&str, &str)]) -> Output {
    let arguments = "step --device cuda --bags 1,2,3 --features 16 --repeat 1 --json";
    let mut command = program(env!("CARGO_BIN_EXE_cf-bench"));
    command.args(arguments.split(' ')).envs(driver.iter().copied()).output().unwrap()
}

#[test]
fn trouble_is_told_in_a_sentence() {
    if built_without_nvcc() {
        return;
    }
    let cases: [(&str, &str, &[&str]); 4] = [
        ("CROSSFUSION_DRIVER_DEVICES", "0", &["--device cuda: the NVIDIA driver shows no GPU; use --device cpu"]),
        (
            "CROSSFUSION_DRIVER_CAPABILITY",
            "75",
            &["--device cuda: emulated GPU has compute capability 7.5, the kernels need 8.0 (Ampere) or newer"],
        ),
        (
            "CROSSFUSION_DRIVER_MEMORY",
            "200000000",
            &[
                "emulated GPU: 0.0",
                "GiB are needed, 0.0",
                "of 0.19 GiB are free; a smaller --memory-budget, or --device cpu, may do",
            ],
        ),
        (
            "CROSSFUSION_DRIVER_FAIL",
            "20",
            &["CUDA_ERROR_LAUNCH_FAILED (unspecified launch failure)", "the last kernel started was kernel ", "(grid "],
        ),
    ];
    for (variable, value, expected) in cases {
        let output = step(&[(variable, value)]);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{text}");
        assert_eq!(text.trim_end().lines().count(), 1, "{text}");
        assert!(output.stdout.is_empty() && expected.iter().all(|part| text.contains(part)), "{text}");
    }
}

/// Copies as late as they may be and as early as they may be give the same bits, as kernels do that
/// are started one by one and not in graphs, and the CPU's loss.
#[test]
fn training_on_streams_is_training() {
    if built_without_nvcc() {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    demo::write_demo(folder.path(), 3).unwrap();
    let splits = folder.path().join("few");
    std::fs::create_dir(&splits).unwrap();
    let cohort = std::fs::read_to_string(folder.path().join("splits/splits_0.csv")).unwrap();
    let few: String = cohort.lines().take(6).map(|line| format!("{line}\n")).collect();
    std::fs::write(splits.join("splits_0.csv"), few).unwrap();

    let train = |name: &str, driver: &[(&str, &str)], flags: &str| {
        let run = folder.path().join(name);
        let at = |path: &Path| path.display().to_string();
        let mut command = program(env!("CARGO_BIN_EXE_cf-train"));
        command.envs(driver.iter().copied()).args(flags.split(' '));
        command.args(["--clinical", &at(&folder.path().join("demo_cohort.csv")), "--splits", &at(&splits)]);
        command.args(["--pt-dir", &at(&folder.path().join("features")), "--backbone", "synthetic", "--out", &at(&run)]);
        command.args(
            "--folds 1 --embed-dim 16 --num-heads 2 --num-epochs 1 --warmup-epochs 0 --grad-accum-steps 3".split(' '),
        );
        let output = command.output().unwrap();
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let metrics = std::fs::read_to_string(run.join("fold_0/metrics.jsonl")).unwrap();
        let metrics: serde_json::Value = serde_json::from_str(metrics.lines().next().unwrap()).unwrap();
        let losses = ["train_loss", "val_loss"].map(|key| metrics[key].as_f64().unwrap());
        (losses, std::fs::read(run.join("fold_0/best.safetensors")).unwrap())
    };
    let counts = folder.path().join("counts");
    let counted = ("CROSSFUSION_DRIVER_COUNTS", counts.to_str().unwrap());
    let counts = || {
        let text = std::fs::read_to_string(&counts).unwrap();
        let numbers: Vec<usize> = text.split_whitespace().map(|number| number.parse().unwrap()).collect();
        <[usize; 4]>::try_from(numbers).unwrap()
    };
    let late = train("late", &[("CROSSFUSION_DRIVER", "lazy"), counted], "--device cuda --precision f32");
    let [alone, graphs, inside, made] = counts();
    // a graph for each slide trained on, validated and reported; by themselves two updates
    assert_eq!((alone, graphs), (2, 18));
    assert!(inside > 60 * graphs && made <= graphs / 3, "{inside} kernels in {made} graphs");
    let early = train("early", &[("CROSSFUSION_DRIVER", "eager")], "--device cuda --precision f32");
    assert!(late == early, "the order of copies shows");
    let alone = train("alone", &[("CUDA_LAUNCH_BLOCKING", "1"), counted], "--device cuda --precision f32");
    assert_eq!(counts()[1..], [0; 3], "graphs where each kernel is to be waited for");
    assert!(late == alone, "the graphs show");
    let (cpu, _) = train("cpu", &[], "--device cpu");
    let near = |got: [f64; 2], part: f64| got.iter().zip(&cpu).all(|(got, cpu)| (got - cpu).abs() <= part * cpu);
    assert!(near(late.0, 1e-4), "{:?}, not {cpu:?}", late.0);
    let (bf16, _) = train("bf16", &[], "--device cuda --precision bf16");
    assert!(near(bf16, 0.05), "{bf16:?}, not near {cpu:?}");
}
