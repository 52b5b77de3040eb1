//! Several processes under `mpirun` against one: the same bits, whatever their number, and an end
//! for all when one of them dies.
#![cfg(feature = "mpi")]

use std::{
    path::PathBuf,
    process::{Child, Command, Output, Stdio},
    time::{Duration, Instant},
};

use crossfusion::data::demo;

/// Dozens of slides of the demo's cohort, and where runs go.
struct Bench {
    folder: tempfile::TempDir,
    device: &'static str,
}

impl Bench {
    /// None where there is no `mpirun`.
    fn new(device: &'static str) -> Option<Self> {
        if Command::new("mpirun").arg("--version").output().is_err() {
            println!("SKIPPED: there is no mpirun (Debian: openmpi-bin)");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        demo::write_demo(folder.path(), 3).unwrap();
        let splits = folder.path().join("few");
        std::fs::create_dir(&splits).unwrap();
        let cohort = std::fs::read_to_string(folder.path().join("splits/splits_0.csv")).unwrap();
        let few: String = cohort.lines().take(9).map(|line| format!("{line}\n")).collect();
        std::fs::write(splits.join("splits_0.csv"), few).unwrap();
        Some(Self { folder, device })
    }

    fn run(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `cf-train`, alone or by so many ranks.
    fn program(ranks: usize) -> Command {
        let program = env!("CARGO_BIN_EXE_cf-train");
        if ranks == 0 {
            return Command::new(program);
        }
        let mut command = Command::new("mpirun");
        command.envs([("OMPI_ALLOW_RUN_AS_ROOT", "1"), ("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1")]);
        command.args(["--oversubscribe", "-n", &ranks.to_string(), program]);
        command
    }

    fn training(&self, ranks: usize, name: &str, flags: &str) -> Command {
        let mut command = Self::program(ranks);
        let at = |path: &str| self.folder.path().join(path).display().to_string();
        command.args(["--clinical", &at("demo_cohort.csv"), "--splits", &at("few"), "--pt-dir", &at("features")]);
        command.args(["--backbone", "synthetic", "--out", &at(name)]);
        command.args("--embed-dim 16 --num-heads 2 --warmup-epochs 0 --threads 1 --device".split(' '));
        command.arg(self.device).args(flags.split(' '));
        command
    }

    fn train(&self, ranks: usize, name: &str, flags: &str) {
        succeeded(name, &self.training(ranks, name, flags).output().unwrap());
    }

    fn resume(&self, ranks: usize, name: &str) {
        succeeded(name, &Self::program(ranks).arg("--resume").arg(self.run(name)).output().unwrap());
    }

    /// Everything that a run came to, but for the clock.
    fn results(&self, name: &str) -> (Vec<u8>, String, String) {
        let read = |file: &str| std::fs::read(self.run(name).join(file)).unwrap();
        let text = |file: &str| String::from_utf8(read(file)).unwrap();
        let lines = text("fold_0/metrics.jsonl");
        let metrics = lines.lines().map(|line| {
            let mut metrics: serde_json::Value = serde_json::from_str(line).unwrap();
            let fields = metrics.as_object_mut().unwrap();
            assert!(fields.remove("seconds").is_some() && fields.remove("patches_per_second").is_some());
            metrics.to_string()
        });
        (read("fold_0/best.safetensors"), metrics.collect(), text("predictions.csv"))
    }

    /// Starts a training that lasts, and waits until it has come to its second epoch.
    fn begun(&self, ranks: usize, name: &str, flags: &str) -> Child {
        let mut command = self.training(ranks, name, flags);
        let child = command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap();
        let metrics = self.run(name).join("fold_0/metrics.jsonl");
        wait_for("an epoch", || std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains('\n')));
        child
    }

    /// The processes of a run's ranks, in the order of their numbers.
    fn processes(&self, name: &str) -> Vec<i32> {
        let run = self.run(name).display().to_string();
        let of = |path: PathBuf| {
            let pid: i32 = path.file_name()?.to_str()?.parse().ok()?;
            let command = std::fs::read(path.join("cmdline")).ok()?;
            let command = String::from_utf8_lossy(&command).into_owned();
            let environment = std::fs::read(path.join("environ")).ok()?;
            let environment = String::from_utf8_lossy(&environment).into_owned();
            let rank = environment.split('\0').find_map(|entry| entry.strip_prefix("OMPI_COMM_WORLD_RANK="))?;
            (command.split('\0').next()?.ends_with("cf-train") && command.contains(&run))
                .then(|| Some((rank.parse::<usize>().ok()?, pid)))?
        };
        let mut ranks: Vec<_> =
            std::fs::read_dir("/proc").unwrap().filter_map(|entry| of(entry.ok()?.path())).collect();
        ranks.sort_unstable();
        ranks.into_iter().map(|(_, pid)| pid).collect()
    }
}

fn succeeded(name: &str, output: &Output) {
    assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
}

fn wait_for(what: &str, mut is_there: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_there() {
        assert!(start.elapsed() < Duration::from_secs(120), "waited too long for {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What is left of a run whose ranks are to end; all must be gone.
fn ended(bench: &Bench, name: &str, child: Child) -> (Option<i32>, String) {
    let output = child.wait_with_output().unwrap();
    wait_for("the ranks' end", || bench.processes(name).is_empty());
    (output.status.code(), String::from_utf8_lossy(&output.stderr).into_owned())
}

/// Updates of three slides, shared by more ranks than that, too; and the end of an epoch within an
/// update.
#[test]
fn any_number_of_ranks_gives_the_bits_of_one_process() {
    let Some(bench) = Bench::new("cpu") else { return };
    for loss in ["nll_surv --grad-accum-steps 3", "cox_surv --cox-batch 6"] {
        let flags = format!("--num-epochs 2 --loss-fn {loss}");
        bench.train(0, &format!("one {loss}"), &flags);
        let one = bench.results(&format!("one {loss}"));
        for ranks in 1..=4 {
            let name = format!("{ranks} {loss}");
            bench.train(ranks, &name, &flags);
            assert!(bench.results(&name) == one, "{ranks} ranks, {loss}: other bits than one process");
        }
    }
}

/// Each rank on a GPU of its own, where there are no GPUs: under the driver whose GPUs are the
/// emulator.
#[cfg(feature = "emulator")]
#[test]
fn ranks_on_gpus_give_the_bits_of_one_gpu() {
    let Some(bench) = Bench::new("cuda") else { return };
    if crossfusion::device::NVCC.is_none() {
        println!("SKIPPED: this build has no GPU kernels; scripts/cuda-toolchain.sh installs an nvcc");
        return;
    }
    let train = |ranks: usize, name: &str, flags: &str| {
        let mut command = bench.training(ranks, name, flags);
        command.env("LD_LIBRARY_PATH", env!("CROSSFUSION_DRIVER_BUILT")).env("CROSSFUSION_DRIVER_DEVICES", "2");
        succeeded(name, &command.output().unwrap());
        bench.results(name)
    };
    for loss in ["nll_surv --grad-accum-steps 4", "cox_surv --cox-batch 6"] {
        let flags = format!("--num-epochs 1 --loss-fn {loss}");
        let one = train(0, &format!("one {loss}"), &flags);
        assert!(train(3, &format!("three {loss}"), &flags) == one, "{loss}: other bits than one GPU");
    }
}

/// Whichever rank is killed, all end, and the run goes on by another number of ranks to the same
/// end.
#[test]
fn a_killed_rank_ends_all_and_the_run_goes_on() {
    let Some(bench) = Bench::new("cpu") else { return };
    let flags = "--num-epochs 12 --grad-accum-steps 4 --checkpoint-every 4";
    bench.train(0, "whole", flags);
    for (victim, ranks) in [(0, 2), (2, 0)] {
        let name = format!("killed {victim}");
        let child = bench.begun(3, &name, flags);
        let processes = bench.processes(&name);
        assert_eq!(processes.len(), 3);
        // SAFETY: a process of this test.
        assert_eq!(unsafe { libc::kill(processes[victim], libc::SIGKILL) }, 0);
        let (code, said) = ended(&bench, &name, child);
        assert!(code != Some(0) && said.contains("signal 9"), "{code:?}: {said}");
        assert!(!bench.run(&name).join("report.html").exists(), "it was killed too late");
        bench.resume(ranks, &name);
        assert!(bench.results(&name) == bench.results("whole"), "rank {victim} killed: another end");
    }
}

/// A batch system's SIGTERM, to one rank or to all.
#[test]
fn a_stop_of_one_rank_stops_all_with_a_checkpoint() {
    let Some(bench) = Bench::new("cpu") else { return };
    for (loss, who) in [("nll_surv", 1..2), ("cox_surv --cox-batch 6", 0..3)] {
        let flags = format!("--num-epochs 12 --grad-accum-steps 4 --loss-fn {loss}");
        bench.train(0, &format!("whole {loss}"), &flags);
        let name = format!("stopped {loss}");
        let child = bench.begun(3, &name, &flags);
        for &process in &bench.processes(&name)[who] {
            // SAFETY: a process of this test.
            assert_eq!(unsafe { libc::kill(process, libc::SIGTERM) }, 0);
        }
        let (code, said) = ended(&bench, &name, child);
        assert!(code != Some(0), "{said}");
        assert_eq!(said.matches("stopped; go on with: cf-train --resume").count(), 1, "{said}");
        bench.resume(2, &name);
        assert!(bench.results(&name) == bench.results(&format!("whole {loss}")), "{loss}: another end");
    }
}

/// A sentence, not one a rank, and the exit code of one process.
#[test]
fn trouble_is_told_once() {
    let Some(bench) = Bench::new("cpu") else { return };
    let told = |output: Output, code: i32, sentence: &str| {
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{said}");
        assert_eq!(said.matches(sentence).count(), 1, "{said}");
    };
    let output =
        bench.training(3, "wrong", "--num-epochs 1 --grad-accum-steps 4 --memory-budget 1MB").output().unwrap();
    told(output, 2, "do not fit into a memory budget");
    // found by one rank alone, in the middle
    let file = bench.folder.path().join("features/synthetic/x20/pt_files/DEMO-002-A.pt");
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let output = bench.training(3, "damaged", "--num-epochs 1 --grad-accum-steps 4").output().unwrap();
    told(output, 1, "DEMO-002-A.pt");
}
