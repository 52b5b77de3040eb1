#!/usr/bin/env bash
# The checks and measurements that need a GPU, for a machine that has one but no Rust:
#   scripts/gpu-suite.sh pack [FOLDER]   here: builds with nvcc, and packs all that the other machine needs into FOLDER.tar.xz
#                                        (default: target/gpu-suite)
#   tar xf gpu-suite.tar.xz              there
#   gpu-suite/gpu-suite.sh run [RESULTS [PART...]]
#                                        there: runs it; results and logs into RESULTS (default: results). PART: only these, of
#     checks      wrappers and ops against CPU and f64, goldens, policies, Cox against R, a training stopped and gone on with
#     sanitizer   compute-sanitizer's four tools over the small cases of every op
#     figures     every op, typical steps, PyTorch beside them, Cox of a million
#     giant       slides of 250,000 and a million patches, held as they fit and streamed
set -euo pipefail

pack() {
  cd "$(dirname "$0")/.."
  local folder=${1:-target/gpu-suite}
  scripts/cuda-toolchain.sh
  rm -rf "$folder"
  mkdir -p "$folder"
  cargo build --release --features emulator --bins
  cp target/release/cf-train target/release/cf-eval target/release/cf-bench "$folder/"
  cargo test --release --features emulator --lib --test goldens --test policies --test survival --no-run --message-format=json |
    python3 -c '
import json, shutil, sys
for line in sys.stdin:
    message = json.loads(line)
    target = message.get("target", {})
    if message.get("executable") and message["profile"]["test"]:
        name = "unit" if target["kind"] == ["lib"] else target["name"]
        shutil.copy(message["executable"], sys.argv[1] + "/test-" + name)' "$folder"
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
  SECONDS=0
  if "$@" >"$results/$name.log" 2>&1; then
    echo "ok      $name ($SECONDS s)"
  else
    echo "FAILED  $name ($SECONDS s, see $name.log)"
    tail -5 "$results/$name.log" | sed 's/^/        /'
    failures=$((failures + 1))
  fi
}

checks() {
  step kernels ./test-unit emulator_tests:: --test-threads=1
  step goldens ./test-goldens --test-threads=1
  step policies ./test-policies --test-threads=1
  step cox ./test-survival cox --test-threads=1
  # killed in mid-training and resumed: the same model as one that was left alone
  step train ./cf-train --demo --device cuda --out "$results/demo"
  step train-killed sh -c "timeout -s KILL 10 ./cf-train --demo --device cuda --out '$results/killed'; ./cf-train --resume '$results/killed'"
  step resume cmp "$results/demo/fold_0/best.safetensors" "$results/killed/fold_0/best.safetensors"
  step eval ./cf-eval "$results/demo" --device cuda
}

sanitizer() {
  if ! command -v compute-sanitizer >/dev/null; then
    echo "SKIPPED compute-sanitizer is not installed"
    return
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    step "$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 ./test-unit no_races --test-threads=1
  done
}

figures() {
  local python
  python=$(command -v python3 || true)
  # cublasLt, by which the peak is measured: PyTorch brings one that is on no path
  [ -z "$python" ] || LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$($python -c '
import glob, site
found = [f for s in site.getsitepackages() for f in glob.glob(s + "/nvidia/*/lib/libcublasLt.so.*")]
print(":".join(sorted({f.rpartition("/")[0] for f in found})))') && export LD_LIBRARY_PATH
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
  step cox-million sh -c "./cf-bench op cox --n 1000000 --ties efron --device cuda --json >'$results/cox.json'"
}

giant() {
  for slide in 15625,62500,250000 62500,250000,1000000; do
    for budget in 70GiB 30GiB 20GiB; do
      step "giant-${slide##*,}-$budget" sh -c "./cf-bench step --device cuda --precision bf16 --bags $slide --features 1024 --memory-budget $budget --repeat 3 --json >'$results/giant-${slide##*,}-$budget.json'"
    done
  done
}

run() {
  results=$(mkdir -p "${1:-results}" && cd "${1:-results}" && pwd)
  local parts=(checks sanitizer figures giant)
  [ $# -le 1 ] || parts=("${@:2}")
  cd "$(dirname "$0")"
  failures=0
  export CROSSFUSION_DEVICE=cuda CROSSFUSION_GOLDENS=$PWD/goldens RUST_BACKTRACE=0
  { cat commit; nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader; } | tee "$results/machine.txt"
  for part in "${parts[@]}"; do
    case $part in
      checks | sanitizer | figures | giant) "$part" ;;
      *) echo "gpu-suite.sh: there is no part $part: checks, sanitizer, figures, giant" >&2; exit 2 ;;
    esac
  done
  echo "$failures failed; results in $results"
  [ "$failures" -eq 0 ]
}

case ${1:-} in
  pack) pack "${@:2}" ;;
  run) run "${@:2}" ;;
  *) sed -n '2,11s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac
