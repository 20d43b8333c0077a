#!/usr/bin/env bash
# CIRKDv2 on COCO-Stuff-164K with the 182-way head: DeepLabV3-R101 -> DeepLabV3-MNv3-Large, 512x512 crops,
# batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 32.14 on val (DeepLabV3-MNv3-Large alone 30.31, teacher 38.48).
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# TEACHER is that of its release segv0.1, with a head of 512 channels; an older file has the same name.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkdv2-released-queue
# keeps pixels of the class.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# The weight of fitnet is 10 for most pairs of this data set: FITNET_WEIGHT.
# The published mIoU divides by 182 classes, 11 of which never occur; compare it with `all classes` of the report.
# The memory takes 7.6 GiB on every process.
#
#   DATA=/data/coco_stuff_182 TEACHER=deeplabv3_resnet101_coco_stuff_164k_best_model.pth BACKBONE_WEIGHTS=mobilenet_v3_large-bc2c3fd3.pth \
#       GPUS=8 bash scripts/reproduce/cirkdv2_coco_stuff_deeplabv3_mobilenetv3_large.sh

METHOD=cirkdv2
DATASET=coco_stuff_182
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=deeplabv3
STUDENT_BACKBONE=mobilenetv3_large
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenet_v3_large-bc2c3fd3.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--cirkdv2-kd-weight 1 --cirkdv2-minibatch-pixel-weight 1 --cirkdv2-memory-pixel-weight 0.1
              --cirkdv2-memory-region-weight 0.1 --cirkdv2-fitnet-weight "${FITNET_WEIGHT:-10}" --cirkdv2-minibatch-channel-weight 1
              --cirkdv2-channel-mse-weight 100 --cirkdv2-memory-channel-weight 0.1 --cirkdv2-released-queue
              --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
