#!/usr/bin/env bash
# CWD (mmrazor's form) on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 75.54 on val (PSPNet-R18 alone 74.87, teacher 79.76).
# Source: configs/distill/mmseg/cwd in open-mmlab/mmrazor, whose schedule is mmsegmentation's for 80k.
# Hardware of the paper: 4 GPUs, 2 images on each. Not run by this project: the data and the ImageNet weights are not at hand.
# lr, its floor of 1e-4 and weight decay are mmsegmentation's defaults. Its ResNets have another stem and take RGB with mean and standard
# deviation; this project's are the CIRKD line's.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=4 bash scripts/reproduce/cwd_citys_pspnet_resnet18_mmrazor.sh

METHOD=cwd
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
LR_FLOOR=1e-4
WEIGHT_DECAY=5e-4
METHOD_FLAGS=(--cwd-logits-weight 5 --cwd-logits-temperature 1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
