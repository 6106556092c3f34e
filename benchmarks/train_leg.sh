#!/usr/bin/env bash
# Some minutes of training that go on from the bundled weights, or from where the last ones ended, on a machine that keeps
# nothing:
#
#   DATA=images/train benchmarks/train_leg.sh deblock [KEY=VALUE]...
#
# The first argument is denoise, deblock or sr, the others change the recipe (memnet_fast/training/recipes/*_leg.toml). What
# must be kept comes into OUT, each file below 16 MB:
#   TASK.ckpt    to go on: give it to the next leg as FROM. stages.0.minutes are those of all legs together, by default one
#                leg's 8; for three, give stages.0.minutes=24 to each (more of them afterwards: with --override)
#   TASK.result  the network; python -m memnet_fast.training.export makes a weight file of it
#
#   DATA        folder of training images
#   VALIDATION  folder of images to measure on at the end, default none
#   MINUTES     of this leg, the start included, default 9: the recipe's 8 and its start
#   FROM        TASK.ckpt of an earlier leg, default none: the bundled weights
#   OUT         default build/train_leg                 PYTHON  default python3, with torch and the extra "train"
# As step "train" of gpu_window.sh:
#   DATA=... STEPS="train" TRAIN="MINUTES=7 benchmarks/train_leg.sh deblock stages.0.minutes=6" benchmarks/gpu_window.sh
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
PYTHON=${PYTHON:-python3}
OUT=${OUT:-build/train_leg}
TASK=${1:-}
case "$TASK" in
denoise | deblock | sr) shift ;;
*)
  echo "train_leg.sh: the first argument is denoise, deblock or sr, not '$TASK'" >&2
  exit 2
  ;;
esac
if [ -z "${DATA:-}" ]; then
  echo "train_leg.sh: DATA names no folder of training images" >&2
  exit 2
fi
run=$(mktemp -d) || exit 1
trap 'rm -rf "$run"' EXIT
mkdir -p "$OUT" || exit 1
if [ -n "${FROM:-}" ]; then
  cp "$FROM" "$run/last.ckpt" || exit 2
fi

PYTHONPATH=${PYTHONPATH:+$PYTHONPATH:}$PWD "$PYTHON" -m memnet_fast.cli train "${TASK}_leg" data="$DATA" \
  validation="${VALIDATION:-}" output="$run" "$@" --resume auto --max-minutes "${MINUTES:-9}" --progress none
status=$?
# Also of a leg that was ended by a signal: its checkpoint is complete.
[ -e "$run/last.ckpt" ] && cp "$run/last.ckpt" "$OUT/$TASK.ckpt"
for result in result stopped.result; do
  if [ -e "$run/$result" ]; then
    cp "$run/$result" "$OUT/$TASK.result"
    exit $status
  fi
done
if [ $status -eq 0 ]; then
  echo "train_leg.sh: the training in FROM has had all its minutes; to go on, add stages.0.minutes=... --override" >&2
  exit 2
fi
exit $status
