#!/usr/bin/env bash
# The student of CIRKDv2 alone on Cityscapes: DeepLabV3-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 73.56 on the test server.
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# The network is this generation's, with a head of 512 channels.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_deeplabv3_resnet18_cirkdv2.sh

DATASET=citys
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
HEAD_WIDTH=512
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
