#!/usr/bin/env bash
# Compare distillation methods with a student alone at equal budget over several seeds: report.md and report.html in OUTPUT. Variables and
# flags as in `python -m scripts.compare --help`; flags of the trainings go behind --. The same command goes on after an interruption.
#
#   TEACHER=runs/shapes/deeplabv3-resnet18/student_best.pth bash scripts/compare.sh
#   DATASET=camvid DATA=/data/camvid TEACHER=teacher.pth BUDGET=minutes:30 bash scripts/compare.sh --jobs 2 -- --amp bf16

METHODS=${METHODS:-none kd cwd cirkd afdcd}
SEEDS=${SEEDS:-0 1 2}
BUDGET=${BUDGET:-iterations:4000}
DATASET=${DATASET:-shapes}
DATA=${DATA:-}
TEACHER=${TEACHER:-runs/$DATASET/deeplabv3-resnet18/student_best.pth} # what train_baseline.sh trains by default
OUTPUT=${OUTPUT:-runs/$DATASET/compare}

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
find_python
# METHODS and SEEDS are unquoted: they are lists
exec "$PYTHON" -m scripts.compare --dataset "$DATASET" ${DATA:+--data "$DATA"} --teacher-checkpoint "$TEACHER" --methods $METHODS \
    --seeds $SEEDS --budget "$BUDGET" --output "$OUTPUT" "$@"
