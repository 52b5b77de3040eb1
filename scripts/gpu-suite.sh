#!/usr/bin/env bash
# The checks and measurements that need a GPU, for a machine that has one but no Rust:
#   scripts/gpu-suite.sh pack [FOLDER]   here: builds with nvcc, and packs all that the other machine needs into FOLDER.tar.xz
#                                        (default: target/gpu-suite)
#   tar xf gpu-suite.tar.xz              there
#   gpu-suite/gpu-suite.sh run [RESULTS] there: runs it; results and logs into RESULTS (default: results)
# Correctness first: wrappers and ops against CPU and f64, goldens, Cox against R, a short training, sanitizer; then figures.
set -euo pipefail

pack() {
  cd "$(dirname "$0")/.."
  local folder=${1:-target/gpu-suite}
  scripts/cuda-toolchain.sh
  rm -rf "$folder"
  mkdir -p "$folder"
  cargo build --release --features emulator --bins
  cp target/release/cf-train target/release/cf-eval target/release/cf-bench "$folder/"
  cargo test --release --features emulator --test emulator --test goldens --test policies --test survival --no-run --message-format=json |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message.get("target", {}).get("kind") == ["test"]:
        shutil.copy(message["executable"], sys.argv[1] + "/test-" + message["target"]["name"])' "$folder"
  strip "$folder"/cf-* "$folder"/test-*
  cp -r tests/goldens "$folder/goldens"
  mkdir -p "$folder/benches" "$folder/tests/survival"
  cp -r benches/peer "$folder/benches/peer"
  cp "$0" "$folder/"
  git rev-parse HEAD >"$folder/commit"
  # every binary holds the same compiled kernels: a window that spans them keeps one
  tar -cf - -C "$(dirname "$folder")" "$(basename "$folder")" | xz -T1 --lzma2=preset=6,dict=96MiB >"$folder.tar.xz"
  local mib
  mib=$(du -sm "$folder.tar.xz" | cut -f1)
  echo "$folder.tar.xz: $mib MiB"
  [ "$mib" -le 60 ] || { echo "gpu-suite.sh: $mib MiB are more than the 60 that travel" >&2; exit 1; }
}

# One step: its log goes to a file, its verdict to the screen.
step() {
  local name=$1
  shift
  if "$@" >"$results/$name.log" 2>&1; then
    echo "ok      $name"
  else
    echo "FAILED  $name (see $name.log)"
    tail -5 "$results/$name.log" | sed 's/^/        /'
    failures=$((failures + 1))
  fi
}

run() {
  results=$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)
  cd "$(dirname "$0")"
  failures=0
  export CROSSFUSION_DEVICE=cuda CROSSFUSION_GOLDENS=$PWD/goldens RUST_BACKTRACE=0
  { cat commit; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; } | tee "$results/machine.txt"
  step kernels ./test-emulator --test-threads=1
  step goldens ./test-goldens --test-threads=1
  step policies ./test-policies --test-threads=1
  step cox ./test-survival cox --test-threads=1
  step train ./cf-train --demo --device cuda --out "$results/demo"
  step eval ./cf-eval "$results/demo" --device cuda
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck synccheck initcheck; do
      step "$tool" timeout 120 compute-sanitizer --tool "$tool" --error-exitcode 1 ./test-emulator --test-threads=1
    done
  else
    echo "SKIPPED compute-sanitizer is not installed"
  fi
  local python
  python=$(command -v python3 || true)
  for precision in bf16 f32; do
    step "op-$precision" sh -c "./cf-bench op --all --device cuda --precision $precision ${python:+--peer $python} --json >'$results/op-$precision.json'"
    for dropout in on off; do
      step "step-$precision-$dropout" sh -c "./cf-bench step --device cuda --precision $precision --dropout $dropout --repeat 20 --json >'$results/step-$precision-$dropout.json'"
      for compile in "" --compile; do
        [ -z "$python" ] || step "peer-$precision-$dropout$compile" \
          sh -c "$python benches/peer/peer.py step --precision $precision --dropout $dropout $compile --repeat 20 >'$results/peer-$precision-$dropout$compile.json'"
      done
    done
  done
  # slides of 250,000 and a million patches, held as they fit and streamed
  for slide in 15625,62500,250000 62500,250000,1000000; do
    for budget in 70GiB 30GiB 20GiB; do
      step "giant-${slide##*,}-$budget" sh -c "./cf-bench step --device cuda --precision bf16 --bags $slide --features 1024 --memory-budget $budget --repeat 3 --json >'$results/giant-${slide##*,}-$budget.json'"
    done
  done
  step cox-million sh -c "./cf-bench op cox --n 1000000 --ties efron --device cuda --json >'$results/cox.json'"
  echo "$failures failed; results in $results"
  [ "$failures" -eq 0 ]
}

case ${1:-} in
  pack) pack "${@:2}" ;;
  run) run "${@:2}" ;;
  *) sed -n '2,6s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
