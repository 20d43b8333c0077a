#!/usr/bin/env bash
# The student of OFD alone on Pascal VOC (augmented): DeepLabV3+-R18, 513x513 crops,
# batch 12, 44092 iterations, lr 0.007, weight decay 5e-4.
#
# Published: mIoU 72.07 on val.
# Source: README of clovaai/overhaul-distillation (runs of its code; the paper reports the test server).
# Hardware of the paper: 2 GPUs, 6 images on each. Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# BACKBONE=mobilenetv2: 68.46.
# The released code stays at 513x513 when it validates; this project scores whole pictures.
# Iterations: the published 50 epochs of the 10582 pictures of the augmented set. Weight decay is not stated; 5e-4 is that of its forks.
#
#   DATA=/data/voc BACKBONE_WEIGHTS=imagenet \
#       GPUS=2 bash scripts/reproduce/student_voc_deeplabv3plus_ofd.sh

DATASET=voc
MODEL=deeplabv3plus
BACKBONE=${BACKBONE:-resnet18_vanilla}
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-imagenet}
NORMALIZATION=imagenet
CROP=${CROP:-513}
BATCH=${BATCH:-12}
ITERATIONS=${ITERATIONS:-44092}
LR=0.007
HEAD_LR_FACTOR=10
WEIGHT_DECAY=5e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/student_voc_deeplabv3plus_ofd_$BACKBONE}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
