#!/usr/bin/env bash
# CIRKD's teacher on COCO-Stuff-164K with the 182-way head: DeepLabV3-R101, 512x512 crops,
# batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 38.71 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); the schedule is that of its teachers.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The crop is not stated with the teacher; this is its students'.
# HEAD_WIDTH=512: 38.48, CIRKDv2's; its schedule is not at hand, that of its students is BATCH=16 LR=0.02.
# The published mIoU divides by 182 classes, 11 of which never occur; compare it with `all classes` of the report.
#
#   DATA=/data/coco_stuff_182 BACKBONE_WEIGHTS=resnet101-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/teacher_coco_stuff_deeplabv3_resnet101.sh

DATASET=coco_stuff_182
MODEL=deeplabv3
BACKBONE=resnet101
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet101-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=${LR:-0.01}
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
