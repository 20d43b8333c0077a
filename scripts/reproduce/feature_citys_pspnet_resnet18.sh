#!/usr/bin/env bash
# Canonical feature KD on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x1024 crops, batch 16, 160k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 79.0 on val (no value for the student alone, teacher 79.8).
# Source: abstract of arXiv 2604.25530 (an extended schedule; its body is not at hand).
# Not run by this project: the data and the ImageNet weights are not at hand.
# Loss, weight, crop, batch, lr and the length of the schedule are this project's guesses.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/feature_citys_pspnet_resnet18.sh

METHOD=feature
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-160000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--feature-weight "${FEATURE_WEIGHT:-1}" --feature-feature "${FEATURE:-c4}" --feature-distance "${DISTANCE:-mse}"
              --feature-projector "${PROJECTOR:-linear}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
