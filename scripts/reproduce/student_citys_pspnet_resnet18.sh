#!/usr/bin/env bash
# The student of CIRKD alone on Cityscapes: PSPNet-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 72.55 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# On the test server: 72.29.
# DIST and MasKD quote this figure beside theirs, and distil with more weight decay and an lr that ends at 1e-4: WEIGHT_DECAY=5e-4
# LR_FLOOR=1e-4 is the student alone at equal settings.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_pspnet_resnet18.sh

DATASET=citys
MODEL=pspnet
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=${WEIGHT_DECAY:-1e-4}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
