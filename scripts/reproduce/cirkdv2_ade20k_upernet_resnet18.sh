#!/usr/bin/env bash
# CIRKDv2 on ADE20K: DeepLabV3-R101 -> UPerNet-R18, 512x512 crops, batch 16, 80k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 36.87 on val (UPerNet-R18 alone 34.37, teacher 43.83).
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# TEACHER is that of its release segv0.1, with a head of 512 channels; an older file has the same name.
# Which of the release's two UPerNets the figure is of is not at hand: MODEL=upernet_lite has 128 channels instead of 512.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkdv2-released-queue
# keeps pixels of the class.
# The weight of fitnet is not at hand for this pair; 10 is that of most others: FITNET_WEIGHT.
# The memory takes 6.3 GiB on every process.
#
#   DATA=/data/ade20k TEACHER=deeplabv3_resnet101_ade20k_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/cirkdv2_ade20k_upernet_resnet18.sh

METHOD=cirkdv2
DATASET=ade20k
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=${MODEL:-upernet}
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-80000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/cirkdv2_ade20k_${MODEL:-upernet}_resnet18}
METHOD_FLAGS=(--cirkdv2-kd-weight 1 --cirkdv2-minibatch-pixel-weight 1 --cirkdv2-memory-pixel-weight 0.1
              --cirkdv2-memory-region-weight 0.1 --cirkdv2-fitnet-weight "${FITNET_WEIGHT:-10}" --cirkdv2-minibatch-channel-weight 1
              --cirkdv2-channel-mse-weight 100 --cirkdv2-memory-channel-weight 0.1 --cirkdv2-released-queue)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
