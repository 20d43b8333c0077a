#!/usr/bin/env bash
# DIST on Cityscapes: DeepLabV3-R101 -> PSPNet-R18, 512x1024 crops, batch 16, 40k iterations, lr 0.02, weight decay 5e-4.
#
# Published: mIoU 76.31 on val (PSPNet-R18 alone 72.55, teacher 78.07).
# Source: segmentation/README.md of hunto/DIST_KD; weight decay from its train_kd.py.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The lr ends at 1e-4. The student alone was trained with weight decay 1e-4 and down to 0, so that the gain is not the method's alone.
# Issue 8 of the repository: third parties got 75.53 and 75.37.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/dist_citys_pspnet_resnet18.sh

METHOD=dist
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
LR_FLOOR=1e-4
WEIGHT_DECAY=5e-4
METHOD_FLAGS=(--dist-logits-weight 1 --dist-aux-weight 0.4 --dist-beta 1 --dist-gamma 1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
