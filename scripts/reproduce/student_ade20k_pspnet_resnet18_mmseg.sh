#!/usr/bin/env bash
# The student of BPKD alone on ADE20K: PSPNet-R18, 512x512 crops, batch 16, 80k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 33.30 on val.
# Source: README of AkideLiu/BPKD (checkpoints released, training code not).
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Batch, lr, its floor of 1e-4 and weight decay are not stated: mmsegmentation's defaults. Its ResNets have another stem and take RGB with
# mean and standard deviation; this project's are the CIRKD line's.
#
#   DATA=/data/ade20k BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_ade20k_pspnet_resnet18_mmseg.sh

DATASET=ade20k
MODEL=pspnet
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
LR_FLOOR=1e-4
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
WEIGHT_DECAY=5e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
