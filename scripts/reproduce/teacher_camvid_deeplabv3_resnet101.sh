#!/usr/bin/env bash
# CIRKD's teacher on CamVid: DeepLabV3-R101, 360x360 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 69.84 on test.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); the schedule is that of its teachers.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The crop is not stated with the teacher; this is its students'.
# Its README says val, its evaluation scores the 233 test pictures; here the best on val is chosen and test is reported once.
#
#   DATA=/data/camvid BACKBONE_WEIGHTS=resnet101-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/teacher_camvid_deeplabv3_resnet101.sh

DATASET=camvid
MODEL=deeplabv3
BACKBONE=resnet101
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet101-imagenet.pth}
CROP=${CROP:-360}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=${LR:-0.01}
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
