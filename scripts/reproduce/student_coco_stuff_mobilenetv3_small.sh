#!/usr/bin/env bash
# The student of CIRKDv2 alone on COCO-Stuff-164K with the 182-way head: DeepLabV3-MNv3-Small, 512x512 crops,
# batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 26.04 on val.
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# MODEL=pspnet: 26.48.
# The published mIoU divides by 182 classes, 11 of which never occur; compare it with `all classes` of the report.
#
#   DATA=/data/coco_stuff_182 BACKBONE_WEIGHTS=mobilenet_v3_small-47085aa1.pth \
#       GPUS=8 bash scripts/reproduce/student_coco_stuff_mobilenetv3_small.sh

DATASET=coco_stuff_182
MODEL=${MODEL:-deeplabv3}
BACKBONE=mobilenetv3_small
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenet_v3_small-47085aa1.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_coco_stuff_${MODEL:-deeplabv3}_mobilenetv3_small}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
