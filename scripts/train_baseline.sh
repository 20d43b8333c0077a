#!/usr/bin/env bash
# Train a network alone, one process per GPU (gloo on a CPU); flags given to this script are added and win.
#
#   bash scripts/train_baseline.sh
#   DATASET=camvid DATA=/data/camvid BACKBONE=resnet101 SAVE_DIR=runs/teacher bash scripts/train_baseline.sh --amp bf16
#
# Several nodes: NNODES=2 NODE_RANK=0 MASTER_ADDR=host bash scripts/train_baseline.sh   (and NODE_RANK=1 on the other)

DATASET=${DATASET:-shapes}
DATA=${DATA:-}
MODEL=${MODEL:-deeplabv3}
BACKBONE=${BACKBONE:-resnet18}
SAVE_DIR=${SAVE_DIR:-runs/$DATASET/$MODEL-$BACKBONE}

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
launch train_baseline.py --dataset "$DATASET" ${DATA:+--data "$DATA"} --model "$MODEL" --backbone "$BACKBONE" \
    --save-dir "$SAVE_DIR" --resume "$@"
