#!/usr/bin/env bash
# The student of CIRKD alone on CamVid: DeepLabV3-R18, 360x360 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 66.92 on test.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Af-DCD quotes this figure; its paper states 400x400 crops: CROP="400".
# Its README says val, its evaluation scores the 233 test pictures; here the best on val is chosen and test is reported once.
#
#   DATA=/data/camvid BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_camvid_deeplabv3_resnet18.sh

DATASET=camvid
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-360}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
