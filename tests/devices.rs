//! `--device` on a machine whose GPU, driver or kernels are missing: one clear sentence, never a
//! panic.
#![cfg(feature = "programs")]

use std::process::{Command, Output};

fn bench(arguments: &[&str]) -> Output {
    let small = ["--bags", "2,3,4", "--features", "16", "--repeat", "1", "--threads", "1", "--json"];
    // a machine that has a GPU shows none
    let mut command = Command::new(env!("CARGO_BIN_EXE_cf-bench"));
    command.env("CUDA_VISIBLE_DEVICES", "").args(arguments).args(small).output().unwrap()
}

fn refusal(output: &Output, code: i32) -> String {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(text.trim_end().lines().count(), 1, "{text}");
    assert!(!text.contains("panicked"), "{text}");
    text
}

#[test]
fn cuda_without_a_gpu_says_what_is_missing() {
    let text = refusal(&bench(&["step", "--device", "cuda"]), 1);
    assert!(text.contains("--device cuda: ") && text.contains("use --device cpu"), "{text}");
    let reason = match crossfusion::device::NVCC {
        None => "scripts/cuda-toolchain.sh",
        Some(_) => "GPU",
    };
    assert!(text.contains(reason) || text.contains("driver"), "{text}");
}

#[test]
fn auto_falls_back_to_the_cpu() {
    let output = bench(&["step", "--device", "auto"]);
    assert!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("\"device\":\"cpu, "), "{output:?}");
}

#[test]
fn other_devices_are_usage_errors() {
    let text = refusal(&bench(&["step", "--device", "gpu"]), 2);
    assert!(text.contains("--device gpu: expected auto, cpu or cuda"), "{text}");
}

#[test]
fn a_plan_shows_its_launches() {
    let run = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cf-bench"));
        command.args(["plan", "--bags", "20,30,40", "--features", "16", "--device"]).args(arguments).output().unwrap()
    };
    let lines = |output: Output| -> Vec<serde_json::Value> {
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    };
    let plan = lines(run(&["cuda", "--json"]));
    let launches = lines(run(&["cuda", "--launches"]));
    assert_eq!(launches.len() as u64, plan[0]["launches"].as_u64().unwrap() + 1);
    let first = &launches[0];
    assert_eq!(first["kernel"], "matmul_forward_small_f32");
    // `Problems` of docs/launching.md: 1480 bytes, two digits each
    assert_eq!(first["arguments"][0].as_str().unwrap().len(), 2 * 1480);
    assert_eq!(launches.last().unwrap()["kernel"], "adam_step_f32");
    let text = refusal(&run(&["cpu", "--launches"]), 2);
    assert!(text.contains("--launches: a CPU launches no kernels"), "{text}");
}
