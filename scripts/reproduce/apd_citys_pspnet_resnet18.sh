#!/usr/bin/env bash
# APD on Cityscapes: PSPNet-R101 -> PSPNet-R18, 713x713 crops, batch 8, 74375 iterations, lr 0.005, weight decay 1e-4.
#
# Published: mIoU 75.68 on val (PSPNet-R18 alone 74.15, no value for the teacher).
# Source: README and config of dvlab-research/APD.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Iterations: the published 200 epochs of 2975 pictures. The released weight 10 of KD is on a mean over classes too, 10 / 19 on the mean
# over pixels here.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/apd_citys_pspnet_resnet18.sh

METHOD=apd
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-713}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-74375}
LR=0.005
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--apd-kd-weight 0.526 --apd-similarity-weight 10 --apd-centroid-weight 10 --apd-adaptor-weight 1 --apd-adaptor-lr 1e-5)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
