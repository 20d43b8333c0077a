#!/usr/bin/env bash
# HWD on ADE20K: DeepLabV3-R101 -> DeepLabV3-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 33.846 on val (DeepLabV3-R18 alone 29.862, no value for the teacher).
# Source: README of zju-SWJ/HWD ("More Results"); lr is the default of its code.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Weight decay is not stated; 1e-4 is that of the code base it is built on (CIRKD).
# ITERATIONS=80000: 37.243 (34.276 alone).
#
#   DATA=/data/ade20k TEACHER=deeplabv3_resnet101_ade20k_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/hwd_ade20k_deeplabv3_resnet18.sh

METHOD=hwd
DATASET=ade20k
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--hwd-weight 3 --hwd-temperature 4 --hwd-base 0.1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
