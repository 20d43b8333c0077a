#!/usr/bin/env bash
# FreeKD on Cityscapes: DeepLabV3-R101 -> DeepLabV3-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# There is no published figure at hand; networks and schedule are those of the CIRKD line (DeepLabV3-R18 alone 74.21, teacher 78.07).
# Not run by this project: the data and the ImageNet weights are not at hand.
# The paper tunes its prompts inside the teacher first; here they learn during the first quarter of the training (PRETRAIN).
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/freekd_citys_deeplabv3_resnet18.sh

METHOD=freekd
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--freekd-bands-weight 1 --freekd-levels 3 --freekd-pretrain "${PRETRAIN:-0.25}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
