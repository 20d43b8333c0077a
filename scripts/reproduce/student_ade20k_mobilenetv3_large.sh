#!/usr/bin/env bash
# The student of CIRKDv2 alone on ADE20K: DeepLabV3-MNv3-Large, 512x512 crops, batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 32.83 on val.
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# MODEL=pspnet: 33.63.
#
#   DATA=/data/ade20k BACKBONE_WEIGHTS=mobilenet_v3_large-bc2c3fd3.pth \
#       GPUS=8 bash scripts/reproduce/student_ade20k_mobilenetv3_large.sh

DATASET=ade20k
MODEL=${MODEL:-deeplabv3}
BACKBONE=mobilenetv3_large
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenet_v3_large-bc2c3fd3.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_ade20k_${MODEL:-deeplabv3}_mobilenetv3_large}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
