#!/usr/bin/env bash
# CIRKDv2 on Cityscapes: DeepLabV3-R101 -> UPerNet-R18, 512x1024 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# Published: mIoU 72.11 on the test server (UPerNet-R18 alone 68.90, teacher 78.30).
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# TEACHER is that of its release segv0.1, with a head of 512 channels; an older file has the same name.
# Which of the release's two UPerNets the figure is of is not at hand: MODEL=upernet_lite has 128 channels instead of 512.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkdv2-released-queue
# keeps pixels of the class.
# The weight of fitnet is not at hand for this pair; 10 is that of most others: FITNET_WEIGHT.
# The memory takes 0.8 GiB on every process.
#
#   DATA=/data/citys TEACHER=deeplabv3_resnet101_citys_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/cirkdv2_citys_upernet_resnet18.sh

METHOD=cirkdv2
DATASET=citys
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=${MODEL:-upernet}
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512 1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=0.01
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/cirkdv2_citys_${MODEL:-upernet}_resnet18}
METHOD_FLAGS=(--cirkdv2-kd-weight 1 --cirkdv2-minibatch-pixel-weight 1 --cirkdv2-memory-pixel-weight 0.1
              --cirkdv2-memory-region-weight 0.1 --cirkdv2-fitnet-weight "${FITNET_WEIGHT:-10}" --cirkdv2-minibatch-channel-weight 1
              --cirkdv2-channel-mse-weight 100 --cirkdv2-memory-channel-weight 0.1 --cirkdv2-released-queue)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
