#!/usr/bin/env bash
# The student of CIRKD alone on Pascal VOC (augmented): DeepLabV3-R18, 512x512 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 73.21 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Af-DCD and LAD quote this figure; the paper of Af-DCD states 512x1024 crops: CROP="512 1024".
# A third party has 73.7 (issue 8 of the repository).
#
#   DATA=/data/voc BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_voc_deeplabv3_resnet18.sh

DATASET=voc
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
