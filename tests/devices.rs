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
