#!/usr/bin/env bash
# CWD (original) on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 74.87 on val (PSPNet-R18 alone 69.10, teacher 78.56).
# Source: Table 2 of the paper as in irfanICMLL/TorchDistiller (mean of three runs); its README: 74.6 to 75.0, checkpoint 75.02.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Weight decay is not stated with the figure; 5e-4 is that of the code base it is built on (SKD).
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=2 bash scripts/reproduce/cwd_citys_pspnet_resnet18_original.sh

METHOD=cwd
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=${WEIGHT_DECAY:-5e-4}
METHOD_FLAGS=(--cwd-logits-weight 3 --cwd-logits-temperature 4)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
