#!/usr/bin/env bash
# The student of APD alone on Cityscapes: PSPNet-R18, 713x713 crops, batch 8, 74375 iterations, lr 0.005, weight decay 1e-4.
#
# Published: mIoU 74.15 on val.
# Source: README and config of dvlab-research/APD.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Iterations: the published 200 epochs of 2975 pictures.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_pspnet_resnet18_apd.sh

DATASET=citys
MODEL=pspnet
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-713}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-74375}
LR=0.005
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
