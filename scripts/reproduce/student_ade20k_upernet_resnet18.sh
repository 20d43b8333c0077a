#!/usr/bin/env bash
# The student of CIRKDv2 alone on ADE20K: UPerNet-R18, 512x512 crops, batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 34.37 on val.
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Which of the release's two UPerNets the figure is of is not at hand: MODEL=upernet_lite has 128 channels instead of 512.
#
#   DATA=/data/ade20k BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_ade20k_upernet_resnet18.sh

DATASET=ade20k
MODEL=${MODEL:-upernet}
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_ade20k_${MODEL:-upernet}_resnet18}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
