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
peers="kdiffusion-jax kdiffusion diffusers diffusers-compiled"
run() { # name of the table and JSON, arguments
    python3 -m benchmarks --folder "$out/files" --dtypes bfloat16 --peers $peers --floor \
        --json "$out/$1.json" "${@:2}" >"$out/$1.md"
}
run sd15 --sizes 512 --steps 20 --measures network guided decode picture compile cold memory
run sdxl_attention --sizes 1024 --measures attention
# Convolutions and loops are no CUDA graphs by default, so the U-Net falls into pieces.
export XLA_FLAGS="--xla_gpu_enable_command_buffer=+CONVOLUTION,+WHILE"
run sd15_command_buffers --sizes 512 --steps 20 --measures guided picture
