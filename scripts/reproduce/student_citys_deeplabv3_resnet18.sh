#!/usr/bin/env bash
# The student of CIRKD alone on Cityscapes: DeepLabV3-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 74.21 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# On the test server: 73.45.
# Af-DCD, DIST and MasKD quote this figure beside theirs; DIST and MasKD distil with more weight decay and an lr that ends at 1e-4:
# WEIGHT_DECAY=5e-4 LR_FLOOR=1e-4 is the student alone at equal settings.
# BATCH=8 ITERATIONS=80000: 76.21 (issue 5 of the repository, a third party). Issue 8 of hunto/DIST_KD has 76.311, a third party's, without
# the weight decay.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_deeplabv3_resnet18.sh

DATASET=citys
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=${WEIGHT_DECAY:-1e-4}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
