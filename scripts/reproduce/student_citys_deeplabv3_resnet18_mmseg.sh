#!/usr/bin/env bash
# mmsegmentation's student alone on Cityscapes: DeepLabV3-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 76.70 on val.
# Source: model zoo of mmsegmentation.
# Not run by this project: the data and the ImageNet weights are not at hand.
# CROP=769: 76.60.
# CROP=512 ITERATIONS=40000: 73.20, the student alone in MGD's table, whose batch and schedule are not stated: mmsegmentation's.
# lr, its floor of 1e-4 and weight decay are mmsegmentation's defaults. Its ResNets have another stem and take RGB with mean and standard
# deviation; this project's are the CIRKD line's.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_deeplabv3_resnet18_mmseg.sh

DATASET=citys
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
LR_FLOOR=1e-4
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
WEIGHT_DECAY=5e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
