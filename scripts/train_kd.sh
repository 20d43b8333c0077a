#!/usr/bin/env bash
# Distil a teacher into a student, one process per GPU (gloo on a CPU); flags given to this script are added and win.
#
#   TEACHER=runs/shapes/deeplabv3-resnet18/student_best.pth bash scripts/train_kd.sh
#   METHOD="kd cwd" DATASET=camvid DATA=/data/camvid TEACHER=teacher.pth bash scripts/train_kd.sh --amp bf16
#
# Several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash scripts/train_kd.sh   (and NODE_RANK=1 on the other)

METHOD=${METHOD:-afdcd}
DATASET=${DATASET:-shapes}
DATA=${DATA:-}
if [ -z "${TEACHER:-}" ]; then # what train_baseline.sh trains by default
    TEACHER=runs/$DATASET/deeplabv3-resnet18/student_best.pth
    TEACHER_FLAGS=(--teacher-model deeplabv3 --teacher-backbone resnet18)
fi
MODEL=${MODEL:-deeplabv3}
BACKBONE=${BACKBONE:-mobilenetv2}
SAVE_DIR=${SAVE_DIR:-runs/$DATASET/$MODEL-$BACKBONE-${METHOD// /+}}

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
# METHOD is unquoted: it may name several
launch train_kd.py --method $METHOD --dataset "$DATASET" ${DATA:+--data "$DATA"} --teacher-checkpoint "$TEACHER" \
    ${TEACHER_FLAGS[@]+"${TEACHER_FLAGS[@]}"} --student-model "$MODEL" --student-backbone "$BACKBONE" --save-dir "$SAVE_DIR" --resume "$@"
