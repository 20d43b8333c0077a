#!/usr/bin/env bash
# SKD (CIRKD's form) on Cityscapes: DeepLabV3-R101 -> DeepLabV3-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 75.42 on val (DeepLabV3-R18 alone 74.21, teacher 78.07).
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# In the README of zju-SWJ/HWD, which does not state the weights of the terms: LR=0.01: 75.548 (73.865 alone), LR=0.01 ITERATIONS=20000:
# 73.643 (72.793 alone), CROP=512 BATCH=8 LR=0.01 ITERATIONS=80000: 74.1 (73.629 alone).
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/skd_citys_deeplabv3_resnet18.sh

METHOD=skd
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=${LR:-0.02}
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--skd-form cirkd --skd-kd-weight 1 --skd-pairwise-weight 10 --skd-adversarial-weight 1e-3 --skd-critic-weight 0.1
              --skd-objective hinge --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
