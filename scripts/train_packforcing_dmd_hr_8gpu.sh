#!/usr/bin/env bash
# DMD with the PackForcing cache on 8 GPUs; every setting below can come from the environment.
#
#   scripts/train_packforcing_dmd_hr_8gpu.sh
#   CUDA_VISIBLE_DEVICES=0,1,2,3 CONFIG_PATH=configs/packforcing_dmd_chunkwise_hr_4gpu_gradacc2.yaml \
#       EXTRA_ARGS="--disable-wandb train.max_steps=100" scripts/train_packforcing_dmd_hr_8gpu.sh
#
# On several machines run it on each with NNODES, NODE_RANK and MASTER_ADDR (the first machine); LOGDIR must then be on a
# file system that all of them see. Started again, a run goes on from its last checkpoint.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG_PATH=${CONFIG_PATH:-configs/packforcing_dmd_chunkwise_hr_8gpu_sink3_recent2.yaml}
LOGDIR=${LOGDIR:-runs/$(basename "$CONFIG_PATH" .yaml)}
MASTER_ADDR=${MASTER_ADDR:-127.0.0.1}
MASTER_PORT=${MASTER_PORT:-29500}
NNODES=${NNODES:-1}
NODE_RANK=${NODE_RANK:-0}
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES:-0,1,2,3,4,5,6,7}
IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
read -ra extra <<<"${EXTRA_ARGS:-}"

bin=$([ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ] && echo .venv/bin/ || true)
exec "${bin}torchrun" --nnodes "$NNODES" --node_rank "$NODE_RANK" --nproc_per_node "${#gpus[@]}" \
	--master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT" \
	train.py --config_path "$CONFIG_PATH" --logdir "$LOGDIR" "${extra[@]}"
