#!/usr/bin/env bash
# The student of CIRKDv2 alone on Cityscapes: DeepLabV3-MNv3-Small, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 65.05 on the test server.
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# MODEL=pspnet: 62.78 on the test server.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=mobilenet_v3_small-47085aa1.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_mobilenetv3_small.sh

DATASET=citys
MODEL=${MODEL:-deeplabv3}
BACKBONE=mobilenetv3_small
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenet_v3_small-47085aa1.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_citys_${MODEL:-deeplabv3}_mobilenetv3_small}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
