#!/usr/bin/env bash
# Everything to know of a GPU in ten minutes, into one JSON and one table (scripts/gpu_check.py says what):
#
#   scripts/gpu_check.sh [--minutes 10] [--output runs/gpu_check]
#
# Without a GPU it runs on the CPU, at small shapes, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$([ -z "${VIRTUAL_ENV:-}" ] && [ -x .venv/bin/python ] && echo .venv/bin/python || echo python)
exec "$python" -m scripts.gpu_check "$@"
