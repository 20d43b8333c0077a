#!/usr/bin/env bash
# Plain KD on Cityscapes: DeepLabV3-R101 -> DeepLabV3-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 76.61 on val (DeepLabV3-R18 alone 76.21, teacher 78.07).
# Source: github.com/winycg/CIRKD/issues/5, a third party's runs of the CIRKD code; lr is the default of its script.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The student alone is well above the 74.21 that papers quote for 40k iterations of batch 16.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/kd_citys_deeplabv3_resnet18.sh

METHOD=kd
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--kd-weight "${KD_WEIGHT:-1}" --kd-temperature 1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
