#!/usr/bin/env bash
# CIRKD's teacher on Cityscapes: DeepLabV3-R101, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 78.07 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); the schedule is that of its teachers.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The crop is not stated with the teacher; this is its students'.
# HEAD_WIDTH=512: 78.30 on the test server, CIRKDv2's; its schedule is not at hand.
# On the test server: 77.46.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet101-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/teacher_citys_deeplabv3_resnet101.sh

DATASET=citys
MODEL=deeplabv3
BACKBONE=resnet101
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet101-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=${LR:-0.01}
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
