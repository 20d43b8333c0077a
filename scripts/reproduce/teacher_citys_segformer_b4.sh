#!/usr/bin/env bash
# CIRKD's teacher on Cityscapes: SegFormer-B4, 1024x1024 crops, batch 8, 160k iterations, lr 2e-4, weight decay 1e-4.
#
# Published: mIoU 81.23 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22).
# Not run by this project: the data and the ImageNet weights are not at hand.
# On the test server: 80.38 (in the README at dab64db, CIRKDv2's).
# The schedule of this teacher is not at hand; this is its student's.
# The released SegFormers take BGR without a standard deviation, the ImageNet weights were trained on RGB with one: NORMALIZATION=imagenet.
# The published scores are of two 1024x1024 halves of every picture: eval.py --mode slide --window 1024 --stride 1024.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=mit_b4.pth \
#       GPUS=8 bash scripts/reproduce/teacher_citys_segformer_b4.sh

DATASET=citys
MODEL=segformer
BACKBONE=mit_b4
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mit_b4.pth}
OPTIMIZER=adamw
CROP=${CROP:-1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-160000}
LR=2e-4
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
