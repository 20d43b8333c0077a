#!/usr/bin/env bash
# MGD on Cityscapes: PSPNet-R101 -> DeepLabV3-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 76.31 on val (DeepLabV3-R18 alone 73.20, teacher 78.34).
# Source: seg/README.md of yzd-v/MGD; the combination with CWD on the logits is read from its code.
# Not run by this project: the data and the ImageNet weights are not at hand.
# Paper and release differ: the paper's value is 76.02.
# Batch, lr, its floor of 1e-4 and weight decay are not stated: mmsegmentation's defaults. Its ResNets have another stem and take RGB with
# mean and standard deviation; this project's are the CIRKD line's.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/mgd_citys_deeplabv3_resnet18.sh

METHOD="mgd cwd"
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
LR_FLOOR=1e-4
WEIGHT_DECAY=5e-4
METHOD_FLAGS=(--mgd-weight 2e-5 --mgd-mask-ratio 0.75 --cwd-logits-weight 3 --cwd-logits-temperature 4)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
