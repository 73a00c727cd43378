#!/usr/bin/env bash
# The benchmark on a GPU, unattended: gpu.sh FOLDER [WHEELHOUSE]. Tables and JSON go to FOLDER. What is
# missing of Keras and its needs is installed from WHEELHOUSE, without a network; a peer that is missing
# is named in the table.
set -euo pipefail
out=$1 wheels=${2:-}
cd "$(dirname "$0")/.."
python3 -c "import keras" 2>/dev/null || python3 -m pip install --no-index --find-links "$wheels" keras ml_dtypes ftfy
export XLA_PYTHON_CLIENT_PREALLOCATE=false TF_FORCE_GPU_ALLOW_GROWTH=true KERAS_BACKEND=jax
mkdir -p "$out"
python3 -m benchmarks --folder "$out/files" --json "$out/gpu.json" --dtypes bfloat16 --sizes 512 --steps 20 \
    --measures network guided decode picture compile cold memory \
    --peers kdiffusion-jax kdiffusion diffusers diffusers-compiled >"$out/gpu.md"
