#!/usr/bin/env bash
# DSD (CIRKD's form) on Cityscapes: DeepLabV3-R101 -> DeepLabV3-MBV2, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 74.11 on val (DeepLabV3-MBV2 alone 73.12, teacher 78.07).
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=mobilenetv2-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/dsd_citys_deeplabv3_mobilenetv2.sh

METHOD=dsd
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=mobilenetv2
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenetv2-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--dsd-psd-weight 1000 --dsd-csd-weight 10 --dsd-level "${LEVEL:-c3}" --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
