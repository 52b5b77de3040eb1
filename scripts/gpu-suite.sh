#!/usr/bin/env bash
# The checks and measurements that need a GPU, for a machine that has one but no Rust:
#   scripts/gpu-suite.sh pack [FOLDER]  here: builds with nvcc, and packs all that the other machine
#                                       needs into FOLDER.tar.xz (default: target/gpu-suite)
#   tar xf gpu-suite.tar.xz             there
#   gpu-suite/gpu-suite.sh run [RESULTS [NAME...]]
#                                       there: runs it; results and logs into RESULTS (default:
#                                       results), and after each step into RESULTS.tar.gz. NAME: only
#                                       parts or steps that begin so; the parts:
#     checks     wrappers and ops against CPU and f64, goldens, policies, Cox against R, a training
#                that is killed and goes on
#     figures    every op, typical steps, PyTorch beside them, Cox of a million
#     profile    the hot kernels under ncu: issue slots, tensor pipe, shared memory, memory
#     giant      slides of 250,000 and a million patches, held as they fit and streamed
#     sanitizer  compute-sanitizer's four tools over the small cases of every op
# A step that has passed is not run again: run the same line until nothing is left. No step takes
# longer than eight minutes; with GPU_SUITE_MINUTES=9, none begins that nine minutes might cut off.
# GPU_SUITE_SMALL=1 takes sizes that the emulated driver manages (CI does).
set -euo pipefail
self=$(readlink -f "$0")
kernel_tests=(probes elementwise head layer_norm matmul attention conv_fusion ppeg cox) # modules of tests/emulator

pack() {
  local folder mib
  cd "$(dirname "$self")/.."
  folder=${1:-target/gpu-suite}
  scripts/cuda-toolchain.sh
  rm -rf "$folder"
  mkdir -p "$folder/benches"
  cargo build --release --all-features --bins
  cp target/release/cf-train target/release/cf-eval target/release/cf-bench "$folder/"
  cargo test --release --all-features --lib --test goldens --test policies --test survival \
    --no-run --message-format=json |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    target = message.get("target", {})
    if message.get("executable") and message["profile"]["test"] and target["kind"] in (["lib"], ["test"]):
        name = "unit" if target["kind"] == ["lib"] else target["name"]
        shutil.copy(message["executable"], sys.argv[1] + "/test-" + name)' "$folder"
  strip "$folder"/cf-* "$folder"/test-*
  cp -r tests/goldens "$folder/goldens"
  cp -r benches/peer "$folder/benches/peer"
  cp "$self" "$folder/"
  git rev-parse HEAD >"$folder/commit"
  [ -z "${GPU_SUITE_SMALL:-}" ] || return 0 # it does not travel
  # every binary holds the same compiled kernels: a window that spans them keeps one
  tar -cf - -C "$(dirname "$folder")" "$(basename "$folder")" | xz -T1 --lzma2=preset=6,dict=96MiB >"$folder.tar.xz"
  mib=$(du -sm "$folder.tar.xz" | cut -f1)
  echo "$folder.tar.xz: $mib MiB"
  [ "$mib" -le 54 ] || { echo "gpu-suite.sh: $mib MiB are more than the 54 that travel" >&2; exit 1; }
}

# A step of a part, of so many seconds at most: its log goes to a file, its verdict to the screen.
step() {
  local part=$1 name=$2 seconds=$3 wanted began
  shift 3
  for wanted in "${names[@]}"; do
    case "$part" in "$wanted"*) break ;; esac
    case "$name" in "$wanted"*) break ;; esac
    wanted=
  done
  [ -n "$wanted" ] || return 0
  if [ -e "$results/passed/$name" ]; then
    echo "passed  $name"
    return
  fi
  if [ -n "${GPU_SUITE_MINUTES:-}" ] && [ $((SECONDS + seconds)) -gt $((60 * GPU_SUITE_MINUTES)) ]; then
    echo "LATER   $name (may take $seconds s)"
    left=$((left + 1))
    return
  fi
  began=$SECONDS
  if timeout -k 10 "$seconds" "$@" >"$results/$name.log" 2>&1; then
    echo "ok      $name ($((SECONDS - began)) s)"
    touch "$results/passed/$name"
  else
    echo "FAILED  $name ($((SECONDS - began)) s, see $name.log)"
    tail -5 "$results/$name.log" | sed 's/^/        /'
    failures=$((failures + 1))
  fi
  tar czf "$results.tar.gz" --exclude run-* -C "$(dirname "$results")" "$(basename "$results")"
}

skipped() { echo "SKIPPED $*"; }

# Prints what a command prints into a file of the results, there only once the command has succeeded.
save() {
  local file=$1
  shift
  "$@" >"$file.part" && mv "$file.part" "$file"
}

# The tests of a program whose names match, under a tool if one is given; there must be some.
tests() {
  local program=$1 pattern=$2 names
  shift 2
  mapfile -t names < <("$program" --list | sed -n 's/: test$//p' | grep -E "$pattern")
  [ ${#names[@]} -gt 0 ] || { echo "$program has no test like $pattern"; return 1; }
  "$@" "$program" --exact "${names[@]}" --test-threads=1
}

# A training of the demo's cohort: cf-train's run folder and further flags.
train() {
  local out=$1 cohort=$results/run-demo/cohort splits=$results/run-demo/cohort/splits flags=()
  shift
  if [ -n "$small" ]; then
    splits=$results/run-splits
    mkdir -p "$splits"
    head -6 "$cohort/splits/splits_0.csv" >"$splits/splits_0.csv"
    flags=(--folds 1 --embed-dim 16 --num-heads 2)
  else
    flags=(--folds 2 --embed-dim 64 --num-heads 2)
  fi
  rm -rf "$out"
  ./cf-train --device cuda --clinical "$cohort/demo_cohort.csv" --splits "$splits" --pt-dir "$cohort/features" \
    --backbone synthetic --num-epochs 3 --warmup-epochs 0 --grad-accum-steps 3 --checkpoint-every 2 \
    "${flags[@]}" "$@" --out "$out"
}

# Killed as soon as there is a checkpoint, and gone on with: the model of a run that was left alone.
killed() {
  local out=$results/run-killed
  rm -rf "$out"
  # in a group of its own, so that the kill reaches the program and nothing else
  setsid "$self" call train "$out" &
  local group=$!
  until [ -e "$out/fold_0/checkpoint.safetensors" ]; do
    kill -0 "$group" || { echo "the training has ended before its first checkpoint"; return 1; }
    sleep 0.05
  done
  kill -KILL -- -"$group"
  wait "$group" || true
  [ ! -e "$out/c_index.csv" ] || { echo "killed too late to prove anything"; return 1; }
  ./cf-train --resume "$out"
  cmp "$results/run-whole/fold_0/best.safetensors" "$out/fold_0/best.safetensors"
}

checks() {
  local module modules=("${kernel_tests[@]}")
  [ -z "$small" ] || modules=(head cox)
  for module in "${modules[@]}"; do
    step checks "kernels-$module" 480 "$self" call tests ./test-unit "^emulator_tests::$module::"
  done
  step checks goldens 480 "$self" call tests ./test-goldens "${small:+losses}"
  [ -n "$small" ] || step checks policies 480 "$self" call tests ./test-policies ''
  step checks cox-against-r 240 "$self" call tests ./test-survival cox
  # writes the cohort
  step checks train-demo 240 ./cf-train --demo --device cpu --num-epochs 1 --warmup-epochs 0 --out "$results/run-demo"
  step checks train 240 "$self" call train "$results/run-whole"
  step checks train-killed 240 "$self" call killed
  step checks eval 120 ./cf-eval "$results/run-whole" --device cuda
}

figures() {
  local peer=() precisions=(bf16 f32) dropouts=(on off) step_flags=(--repeat 20) op_flags=() million=1000000
  local precision dropout compile
  if [ -n "$small" ]; then
    precisions=(bf16) dropouts=(on)
    step_flags=(--bags 2,3,4 --features 16 --repeat 1)
    op_flags=(adam --bags 2,3,4 --features 16 --repeat 1)
    million=1000
  else
    op_flags=(--all)
    if python3 -c 'import torch' 2>/dev/null; then peer=(--peer "$(command -v python3)"); fi
  fi
  for precision in "${precisions[@]}"; do
    step figures "op-$precision" 480 \
      "$self" call save "$results/op-$precision.json" ./cf-bench op "${op_flags[@]}" --device cuda --precision $precision "${peer[@]}" --json
    for dropout in "${dropouts[@]}"; do
      step figures "step-$precision-$dropout" 240 \
        "$self" call save "$results/step-$precision-$dropout.json" ./cf-bench step --device cuda --precision $precision \
        --dropout $dropout "${step_flags[@]}" --json
      [ ${#peer[@]} -gt 0 ] || continue
      for compile in "" --compile; do
        step figures "peer-$precision-$dropout$compile" 480 \
          "$self" call save "$results/peer-$precision-$dropout$compile.json" python3 benches/peer/peer.py step \
          --precision $precision --dropout $dropout $compile --repeat 20
      done
    done
  done
  [ ${#peer[@]} -gt 0 ] || skipped "figures of PyTorch: python3 has no torch"
  step figures cox-million 240 \
    "$self" call save "$results/cox.json" ./cf-bench op cox --n $million --ties efron --device cuda --json
}

# docs/kernels.md predicts these; ncu's words for what it predicts.
profile() {
  local metrics kernel
  if ! command -v ncu >/dev/null; then
    skipped "profile: ncu is not installed"
    return
  fi
  metrics=gpu__time_duration.sum,sm__inst_issued.avg.pct_of_peak_sustained_active
  metrics+=,sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active
  metrics+=,sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active
  metrics+=,l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed
  metrics+=,dram__bytes.sum.per_second,lts__t_bytes.sum.per_second,smsp__warp_issue_stalled_barrier.avg
  for kernel in attention_dkv attention_dq_product attention_forward matmul_forward matmul_backward_input \
    matmul_backward_weight layer_norm_backward ppeg_backward; do
    step profile "ncu-$kernel" 240 ncu --csv --metrics $metrics --kernel-name "regex:^${kernel}_(wgmma|128|bf16)" \
      --launch-count 6 ./cf-bench step --device cuda --precision bf16 --repeat 1
  done
}

giant() {
  local slide budget
  if [ -n "$small" ]; then
    step giant giant-small 240 "$self" call save "$results/giant-small.json" ./cf-bench step --device cuda \
      --precision bf16 --bags 3,4,5 --features 16 --memory-budget 4GiB --repeat 1 --json
    return
  fi
  for slide in 15625,62500,250000 62500,250000,1000000; do
    for budget in 70GiB 30GiB 20GiB; do
      step giant "giant-${slide##*,}-$budget" 480 "$self" call save "$results/giant-${slide##*,}-$budget.json" ./cf-bench step \
        --device cuda --precision bf16 --bags $slide --features 1024 --memory-budget $budget --repeat 3 --json
    done
  done
}

sanitizer() {
  local tool module
  if ! command -v compute-sanitizer >/dev/null; then
    skipped "sanitizer: compute-sanitizer is not installed"
    return
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    for module in "${kernel_tests[@]:1}"; do
      step sanitizer "$tool-$module" 480 "$self" call tests ./test-unit "^emulator_tests::$module::.*no_races" \
        compute-sanitizer --tool $tool --error-exitcode 1
    done
  done
}

run() {
  results=$(mkdir -p "${1:-results}/passed" && cd "${1:-results}" && pwd)
  names=("${@:2}")
  [ ${#names[@]} -gt 0 ] || names=(checks figures profile giant sanitizer)
  small=${GPU_SUITE_SMALL:-}
  cd "$(dirname "$self")"
  failures=0 left=0 SECONDS=0
  export CROSSFUSION_DEVICE=cuda CROSSFUSION_GOLDENS=$PWD/goldens RUST_BACKTRACE=0 results small
  {
    cat commit
    if command -v nvidia-smi >/dev/null; then
      nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
    else
      echo "no nvidia-smi here"
    fi
  } | tee "$results/machine.txt"
  # cublasLt, by which the peak is measured: PyTorch brings one that is on no path
  if python3 -c 'import torch' 2>/dev/null; then
    LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$(python3 -c '
import glob, site
found = [f for s in site.getsitepackages() for f in glob.glob(s + "/nvidia/*/lib/libcublasLt.so.*")]
print(":".join(sorted({f.rpartition("/")[0] for f in found})))')
    export LD_LIBRARY_PATH
  fi
  checks
  figures
  profile
  giant
  sanitizer
  echo "$failures failed, $left left for another run; results in $results"
  [ $((failures + left)) -eq 0 ]
}

case ${1:-} in
  pack) pack "${@:2}" ;;
  run) run "${@:2}" ;;
  call) "${@:2}" ;; # a step's function, in a process of its own that can be stopped
  *) sed -n '2,21s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
