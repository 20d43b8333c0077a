#!/usr/bin/env bash
# Plain KD on COCO-Stuff-164K with the 182-way head: DeepLabV3-R101 -> DeepLabV3-R18, 512x512 crops,
# batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 32.88 on val (DeepLabV3-R18 alone 32.60, teacher 38.71).
# Source: README of OSVAI/Af-DCD at 5b086a7; settings from its training scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The weight of KD is not stated beside the figure; 1 is the CIRKD line's, and KD_WEIGHT=0.5 what the release gives KD beside Af-DCD's
# terms.
# The published mIoU divides by 182 classes, 11 of which never occur; compare it with `all classes` of the report.
#
#   DATA=/data/coco_stuff_182 TEACHER=deeplabv3_resnet101_coco_stuff_164k_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/kd_coco_stuff_deeplabv3_resnet18.sh

METHOD=kd
DATASET=coco_stuff_182
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--kd-weight "${KD_WEIGHT:-1}" --kd-temperature 1)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
