#!/usr/bin/env bash
# ICKD (AICSD's form, logits) on Pascal VOC (augmented): DeepLabV3+-R101 -> DeepLabV3+-R18, 513x513 crops,
# batch 6, 29280 iterations, lr 0.007, weight decay 5e-4.
#
# Published: mIoU 69.13 on val (DeepLabV3+-R18 alone 67.50, teacher 77.85).
# Source: README of AmirMansurian/AICSD (mean of repeated runs).
# Hardware of the paper: 1 GPU. Not run by this project: the data and the ImageNet weights are not at hand.
# BACKBONE=mobilenetv2: 67.01 (63.92 alone).
# TEACHER is a published one, or what teacher_voc_deeplabv3plus_resnet101.sh trained. Student alone: student_voc_deeplabv3plus.sh.
# The released code stays at 513x513 when it validates; this project scores whole pictures.
# Iterations: the published 120 epochs of the 1464 pictures of VOC's own training set; `voc` here is the augmented one, of 10582, so that
# the figure is no target but the recipe is.
# The weight is this project's. ICKD's own tables (features, a grid of cells, which is not here; more data): 74.14 with one cell, 75.01
# with 32x32; LOGITS_WEIGHT=0 FEATURE_WEIGHT=3 compares features.
#
#   DATA=/data/voc TEACHER=runs/reproduce/teacher_voc_deeplabv3plus_resnet101/student_best.pth BACKBONE_WEIGHTS=imagenet \
#       GPUS=1 bash scripts/reproduce/ickd_voc_deeplabv3plus.sh

METHOD=ickd
DATASET=voc
TEACHER_MODEL=deeplabv3plus
TEACHER_BACKBONE=resnet101_vanilla
STUDENT_MODEL=deeplabv3plus
STUDENT_BACKBONE=${BACKBONE:-resnet18_vanilla}
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-imagenet}
NORMALIZATION=imagenet
CROP=${CROP:-513}
BATCH=${BATCH:-6}
ITERATIONS=${ITERATIONS:-29280}
LR=0.007
HEAD_LR_FACTOR=10
WEIGHT_DECAY=5e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/ickd_voc_deeplabv3plus_$STUDENT_BACKBONE}
METHOD_FLAGS=(--ickd-logits-weight "${LOGITS_WEIGHT:-3}" --ickd-feature-weight "${FEATURE_WEIGHT:-0}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
