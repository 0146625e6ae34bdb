#!/usr/bin/env bash
# The tiny world from nothing to its 4-step generator, on a CPU: two single-threaded ranks a stage. Times, on 2 cores of
# an Intel Xeon with AMX, are in bundles/tiny/TRAINING.md. Stop it and start it again: every stage goes on from its last
# checkpoint, finished ones take seconds.
#
#   bash scripts/train_tiny.sh                              # all stages
#   STAGES="teacher_motion dmd" bash scripts/train_tiny.sh     # some
#   bash scripts/train_tiny.sh train.checkpoint_every=100   # settings for every stage
set -euo pipefail

cd "$(dirname "$0")/.."
bin=$([ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/torchrun ] && echo .venv/bin/ || true)
export OMP_NUM_THREADS=1 # a rank a core; two threads in one rank would wait for each other in every operation

single="vae vae_cuts teacher ar_diffusion teacher_motion dmd"
stories="story_stills story_ar story_compressor story_dmd story_memory"
for stage in ${STAGES:-$single $stories}; do
  echo "== $stage"
  "${bin}torchrun" --nproc_per_node="${RANKS:-2}" --master_port="${MASTER_PORT:-29500}" \
    train.py --config_path "configs/tiny/$stage.yaml" "$@"
done

echo "make videos with it:"
echo "  ${bin}python inference_packforcing.py --config_path configs/tiny/demo.yaml model.bundle=runs/story_memory/bundle"
