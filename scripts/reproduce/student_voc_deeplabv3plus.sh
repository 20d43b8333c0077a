#!/usr/bin/env bash
# The student of AICSD alone on Pascal VOC (augmented): DeepLabV3+-R18, 513x513 crops,
# batch 6, 29280 iterations, lr 0.007, weight decay 5e-4.
#
# Published: mIoU 67.50 on val.
# Source: README of AmirMansurian/AICSD (mean of repeated runs).
# Hardware of the paper: 1 GPU. Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# BACKBONE=mobilenetv2: 63.92. AttnFD quotes the figure of R18.
# The released code stays at 513x513 when it validates; this project scores whole pictures.
# Iterations: the published 120 epochs of the 1464 pictures of VOC's own training set; `voc` here is the augmented one, of 10582, so that
# the figure is no target but the recipe is.
#
#   DATA=/data/voc BACKBONE_WEIGHTS=imagenet \
#       GPUS=1 bash scripts/reproduce/student_voc_deeplabv3plus.sh

DATASET=voc
MODEL=deeplabv3plus
BACKBONE=${BACKBONE:-resnet18_vanilla}
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-imagenet}
NORMALIZATION=imagenet
CROP=${CROP:-513}
BATCH=${BATCH:-6}
ITERATIONS=${ITERATIONS:-29280}
LR=0.007
HEAD_LR_FACTOR=10
WEIGHT_DECAY=5e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_voc_deeplabv3plus_$BACKBONE}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
