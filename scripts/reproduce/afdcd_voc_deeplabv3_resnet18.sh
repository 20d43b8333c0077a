#!/usr/bin/env bash
# Af-DCD on Pascal VOC (augmented): DeepLabV3-R101 -> DeepLabV3-R18, 512x512 crops, batch 16, 40k iterations.
#
# Published: mIoU 76.25 on val (DeepLabV3-R18 alone 73.21, teacher 77.67).
# Source: README of the authors' release (OSVAI/Af-DCD at 5b086a7); settings from its training scripts.
# Hardware of the paper: 8 RTX A5000. Not run by this project: the data and the ImageNet weights are not at hand.
# Paper and release differ: the paper's text states 512x1024 crops: CROP="512 1024".
#
#   DATA=/data/voc TEACHER=deeplabv3_resnet101_voc_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/afdcd_voc_deeplabv3_resnet18.sh

METHOD=afdcd
DATASET=voc
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--afdcd-normalise released --afdcd-kd-weight 1 --afdcd-fd-weight "${FD_WEIGHT:-1e-6}" --afdcd-contrast-weight 5e-3
              --afdcd-mask "${MASK:-random}" --afdcd-projector "${PROJECTOR:-plain}" --afdcd-negatives "${NEGATIVES:-released}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
