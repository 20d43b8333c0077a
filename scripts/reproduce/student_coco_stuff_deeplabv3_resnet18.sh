#!/usr/bin/env bash
# The student of CIRKD alone on COCO-Stuff-164K with the 182-way head: DeepLabV3-R18, 512x512 crops,
# batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 32.60 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# Af-DCD quotes this figure; its paper states 512x1024 crops: CROP="512 1024".
# The published mIoU divides by 182 classes, 11 of which never occur; compare it with `all classes` of the report.
#
#   DATA=/data/coco_stuff_182 BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/student_coco_stuff_deeplabv3_resnet18.sh

DATASET=coco_stuff_182
MODEL=deeplabv3
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
