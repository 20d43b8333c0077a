#!/usr/bin/env bash
# Evaluate a checkpoint, one process per GPU (gloo on a CPU); flags given to this script are added.
#
#   CHECKPOINT=runs/shapes/deeplabv3-mobilenetv2-afdcd/student_best.pth bash scripts/eval.sh
#   CHECKPOINT=student_best.pth DATA=/data/camvid bash scripts/eval.sh --scales 0.75 1 1.25 --flip --save-overlays 20

CHECKPOINT=${CHECKPOINT:?set CHECKPOINT to a .pth file}
DATA=${DATA:-}

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
launch eval.py --checkpoint "$CHECKPOINT" ${DATA:+--data "$DATA"} "$@"
