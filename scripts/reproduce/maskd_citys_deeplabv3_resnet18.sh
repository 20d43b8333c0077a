#!/usr/bin/env bash
# MasKD on Cityscapes: DeepLabV3-R101 -> DeepLabV3-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 5e-4.
#
# Published: mIoU 77.00 on val (DeepLabV3-R18 alone 74.21, teacher 78.07).
# Source: segmentation/README.md of hunto/MasKD; lr and weight decay from its train_maskd.py and scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The lr ends at 1e-4. The student alone was trained with weight decay 1e-4 and down to 0, so that the gain is not the method's alone.
# The paper trains the masks first, 10k iterations, and the student then; here they learn during the first quarter of one training
# (PRETRAIN).
# On the test server: 75.59 (teacher 77.46).
# BACKBONE_WEIGHTS=none: 73.95. BACKBONE_WEIGHTS=none: 73.74 on the test server.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/maskd_citys_deeplabv3_resnet18.sh

METHOD=maskd
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
LR_FLOOR=1e-4
WEIGHT_DECAY=5e-4
METHOD_FLAGS=(--maskd-logits-weight 1 --maskd-aux-weight 0.4 --maskd-tokens 8 --maskd-pretrain "${PRETRAIN:-0.25}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
