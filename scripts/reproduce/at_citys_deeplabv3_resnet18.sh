#!/usr/bin/env bash
# AT on Cityscapes: DeepLabV3-R101 -> DeepLabV3-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# There is no published figure at hand for this setting; networks and schedule are those of the CIRKD line (DeepLabV3-R18 alone 74.21,
# teacher 78.07). CWD's Table 2 has AT on features for PSPNet-R18, 512x512, batch 8, lr 0.01: 72.37 (69.10 alone, teacher 78.56).
# Not run by this project: the data and the ImageNet weights are not at hand.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/at_citys_deeplabv3_resnet18.sh

METHOD="at" # in quotes: at is a command, too
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--at-kd-weight 1 --at-weight 1e4 --at-feature head --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
