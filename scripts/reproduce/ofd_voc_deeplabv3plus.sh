#!/usr/bin/env bash
# OFD on Pascal VOC (augmented): DeepLabV3+-R101 -> DeepLabV3+-R18, 513x513 crops, batch 12, 44092 iterations, lr 0.007, weight decay 5e-4.
#
# Published: mIoU 73.98 on val (DeepLabV3+-R18 alone 72.07, teacher 77.89).
# Source: README of clovaai/overhaul-distillation (runs of its code; the paper reports the test server).
# Hardware of the paper: 2 GPUs, 6 images on each. Not run by this project: the data and the ImageNet weights are not at hand.
# BACKBONE=mobilenetv2: 71.19 (68.46 alone).
# TEACHER is a published one, or what teacher_voc_deeplabv3plus_resnet101.sh trained. Student alone: student_voc_deeplabv3plus_ofd.sh.
# The released code stays at 513x513 when it validates; this project scores whole pictures.
# Iterations: the published 50 epochs of the 10582 pictures of the augmented set. Weight decay is not stated; 5e-4 is that of its forks.
#
#   DATA=/data/voc TEACHER=runs/reproduce/teacher_voc_deeplabv3plus_resnet101/student_best.pth BACKBONE_WEIGHTS=imagenet \
#       GPUS=2 bash scripts/reproduce/ofd_voc_deeplabv3plus.sh

METHOD=ofd
DATASET=voc
TEACHER_MODEL=deeplabv3plus
TEACHER_BACKBONE=resnet101_vanilla
STUDENT_MODEL=deeplabv3plus
STUDENT_BACKBONE=${BACKBONE:-resnet18_vanilla}
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-imagenet}
NORMALIZATION=imagenet
CROP=${CROP:-513}
BATCH=${BATCH:-12}
ITERATIONS=${ITERATIONS:-44092}
LR=0.007
HEAD_LR_FACTOR=10
WEIGHT_DECAY=5e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/ofd_voc_deeplabv3plus_$STUDENT_BACKBONE}
METHOD_FLAGS=(--ofd-weight 1e-5)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
