#!/usr/bin/env bash
# The student of HWD alone on Pascal VOC (augmented): DeepLabV3-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 71.979 on val.
# Source: README of zju-SWJ/HWD ("More Results"); lr is the default of its code.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Weight decay is not stated; 1e-4 is that of the code base it is built on (CIRKD).
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# ITERATIONS=80000: 73.155.
#
#   DATA=/data/voc BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_voc_deeplabv3_resnet18_hwd.sh

DATASET=voc
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
