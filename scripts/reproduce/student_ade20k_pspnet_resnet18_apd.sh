#!/usr/bin/env bash
# The student of APD alone on ADE20K: PSPNet-R18, 473x473 crops, batch 8, 252625 iterations, lr 0.005, weight decay 1e-4.
#
# Published: mIoU 37.19 on val.
# Source: README and config of dvlab-research/APD.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Iterations: the published 100 epochs of 20210 pictures.
#
#   DATA=/data/ade20k BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_ade20k_pspnet_resnet18_apd.sh

DATASET=ade20k
MODEL=pspnet
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-473}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-252625}
LR=0.005
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
