#!/usr/bin/env bash
# CIRKD on Pascal VOC (augmented): DeepLabV3-R101 -> DeepLabV3-R18, 512x512 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 74.50 on val (DeepLabV3-R18 alone 73.21, teacher 77.67).
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkd-released-queue
# keeps pixels of the class.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# The memory weighs 0.01 on VOC as its author advises; MEMORY_WEIGHT=0.1: 72.6 (73.7 alone), a third party's, in issue 8 of the repository.
# In the README of zju-SWJ/HWD, which does not state the weights of the terms: BATCH=8 LR=0.01: 71.275 (71.979 alone), BATCH=8 LR=0.01
# ITERATIONS=80000: 74.772 (73.155 alone).
#
#   DATA=/data/voc TEACHER=deeplabv3_resnet101_voc_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/cirkd_voc_deeplabv3_resnet18.sh

METHOD=cirkd
DATASET=voc
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=${LR:-0.02}
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--cirkd-kd-weight 1 --cirkd-minibatch-pixel-weight 1 --cirkd-memory-pixel-weight "${MEMORY_WEIGHT:-0.01}"
              --cirkd-memory-region-weight "${MEMORY_WEIGHT:-0.01}" --cirkd-pixel-queue 20000 --cirkd-region-queue 2000
              --cirkd-released-queue --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
