#!/usr/bin/env bash
# BPKD on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 77.57 on val (PSPNet-R18 alone 74.23, teacher 79.74).
# Source: README of AkideLiu/BPKD (checkpoints released, training code not).
# Not run by this project: the data and the ImageNet weights are not at hand.
# The student alone is of another ResNet-18 (R18b); that of the distilled one, R18-v1c, has 74.87.
# Batch, lr, its floor of 1e-4 and weight decay are not stated: mmsegmentation's defaults. Its ResNets have another stem and take RGB with
# mean and standard deviation; this project's are the CIRKD line's.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/bpkd_citys_pspnet_resnet18.sh

METHOD=bpkd
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
METHOD_FLAGS=(--bpkd-body-weight 20 --bpkd-edge-weight 50 --bpkd-temperature 1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
