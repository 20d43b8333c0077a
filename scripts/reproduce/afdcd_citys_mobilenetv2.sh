#!/usr/bin/env bash
# Af-DCD on Cityscapes: DeepLabV3-R101 -> DeepLabV3-MBV2, 512x1024 crops, batch 16, 40k iterations.
#
# Published: mIoU 76.43 (76.38 in the paper's abstract) on val (DeepLabV3-MBV2 alone 73.12, teacher 78.07).
# Source: README of the authors' release (OSVAI/Af-DCD at 5b086a7); settings from its training scripts.
# Hardware of the paper: 8 RTX A5000. Not run by this project: the data and the ImageNet weights are not at hand.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=mobilenetv2-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/afdcd_citys_mobilenetv2.sh

METHOD=afdcd
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
METHOD_FLAGS=(--afdcd-normalise released --afdcd-kd-weight 1 --afdcd-fd-weight "${FD_WEIGHT:-2e-6}" --afdcd-contrast-weight 5e-3
              --afdcd-mask "${MASK:-random}" --afdcd-projector "${PROJECTOR:-plain}" --afdcd-negatives "${NEGATIVES:-released}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
