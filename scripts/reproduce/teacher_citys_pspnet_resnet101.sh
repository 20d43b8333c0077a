#!/usr/bin/env bash
# MGD's teacher on Cityscapes: PSPNet-R101, 512x1024 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 78.34 on val.
# Source: seg/README.md of yzd-v/MGD and the model zoo of mmsegmentation.
# Not run by this project: the data and the ImageNet weights are not at hand.
# ITERATIONS=80000: 79.76, mmrazor's teacher, whose schedule is taken to be its student's. Others of this network: 79.74 (BPKD), 78.56
# (CWD), 78.32 (SKD).
# Batch, lr, its floor of 1e-4 and weight decay are not stated: mmsegmentation's defaults. Its ResNets have another stem and take RGB with
# mean and standard deviation; this project's are the CIRKD line's.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet101-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/teacher_citys_pspnet_resnet101.sh

DATASET=citys
MODEL=pspnet
BACKBONE=resnet101
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet101-imagenet.pth}
LR_FLOOR=1e-4
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=5e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
