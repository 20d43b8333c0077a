#!/usr/bin/env bash
# CIRKDv2 on Pascal VOC (augmented): DeepLabV3-R101 -> DeepLabV3-MNv3-Large, 512x512 crops,
# batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 71.90 on val (DeepLabV3-MNv3-Large alone 69.33, teacher 77.80).
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# MODEL=pspnet: 71.55 (68.77 alone).
# TEACHER is that of its release segv0.1, with a head of 512 channels; an older file has the same name.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkdv2-released-queue
# keeps pixels of the class.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# The weight of fitnet is 10 on this data set: FITNET_WEIGHT.
# The weight of the memory is not at hand; 0.01 is what CIRKD's author advises on VOC, MEMORY_WEIGHT=0.1 what the others have.
# The memory takes 0.9 GiB on every process.
#
#   DATA=/data/voc TEACHER=deeplabv3_resnet101_voc_best_model.pth BACKBONE_WEIGHTS=mobilenet_v3_large-bc2c3fd3.pth \
#       GPUS=8 bash scripts/reproduce/cirkdv2_voc_mobilenetv3_large.sh

METHOD=cirkdv2
DATASET=voc
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=${MODEL:-deeplabv3}
STUDENT_BACKBONE=mobilenetv3_large
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mobilenet_v3_large-bc2c3fd3.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/cirkdv2_voc_${MODEL:-deeplabv3}_mobilenetv3_large}
METHOD_FLAGS=(--cirkdv2-kd-weight 1 --cirkdv2-minibatch-pixel-weight 1 --cirkdv2-memory-pixel-weight "${MEMORY_WEIGHT:-0.01}"
              --cirkdv2-memory-region-weight "${MEMORY_WEIGHT:-0.01}" --cirkdv2-fitnet-weight "${FITNET_WEIGHT:-10}"
              --cirkdv2-minibatch-channel-weight 1 --cirkdv2-channel-mse-weight 100 --cirkdv2-memory-channel-weight 0.1
              --cirkdv2-released-queue --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
