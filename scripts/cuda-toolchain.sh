#!/usr/bin/env bash
# Installs NVIDIA's compiler (nvcc 13.0, cuobjdump, nvdisasm; no driver, no libraries) from Python wheels, about 0.3 GB:
#   scripts/cuda-toolchain.sh [FOLDER]     # default: $CROSSFUSION_CUDA, else target/cuda; FOLDER/bin/nvcc is then there
# build.rs looks into the default folder by itself. A folder that is complete is left alone.
set -euo pipefail

# The versions that docs/kernels.md was made with: another ptxas allocates other registers.
packages=(
  nvidia-cuda-nvcc==13.0.88 nvidia-cuda-crt==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-runtime==13.0.96
  nvidia-cuda-cccl==13.0.85 nvidia-cuda-cuobjdump==13.2.86 nvidia-cuda-nvdisasm==13.2.86
)
root=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-${CROSSFUSION_CUDA:-$root/target/cuda}}
stamp=$folder/packages.txt

if [ -x "$folder/bin/nvcc" ] && [ "$(cat "$stamp" 2>/dev/null)" = "${packages[*]}" ]; then
  exit 0
fi
fail() { echo "cuda-toolchain.sh: $1" >&2; exit 1; }
[ "$(uname -s)" = Linux ] || fail "NVIDIA publishes these wheels for Linux only"
command -v python3 >/dev/null || fail "python3 with pip is needed"
if [ -e "$folder" ] && [ ! -e "$stamp" ] && [ -n "$(ls -A "$folder")" ]; then
  fail "$folder is not empty and was not made by this script; name another folder"
fi

mkdir -p "$(dirname "$folder")"
work=$(mktemp -d "$(dirname "$folder")/cuda.XXXXXX") # beside the target: a rename, not a copy
trap 'rm -rf "$work"' EXIT
pip=(python3 -m pip)
if ! "${pip[@]}" --version >/dev/null 2>&1; then
  python3 -m venv "$work/venv" >/dev/null 2>&1 || fail "python3 has neither pip nor venv; install one (Debian: python3-pip)"
  pip=("$work/venv/bin/python" -m pip)
fi
"${pip[@]}" --disable-pip-version-check install --quiet --root-user-action ignore --no-deps --no-compile \
  --target "$work/site" "${packages[@]}" || fail "pip could not install ${packages[*]}"

# The wheels share nvidia/cu13; nvcc finds its parts relative to bin.
[ -x "$work/site/nvidia/cu13/bin/nvcc" ] || fail "no nvidia/cu13/bin/nvcc in the wheels"
echo "${packages[*]}" >"$work/site/nvidia/cu13/packages.txt"
rm -rf "$folder"
mv "$work/site/nvidia/cu13" "$folder"
touch "$root/kernels" # so that cargo runs build.rs, which looks for nvcc
"$folder/bin/nvcc" --version | tail -2 | head -1
