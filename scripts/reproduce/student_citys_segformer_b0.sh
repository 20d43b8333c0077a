#!/usr/bin/env bash
# The student of CIRKD alone on Cityscapes: SegFormer-B0, 1024x1024 crops, batch 8, 160k iterations, lr 2e-4, weight decay 1e-4.
#
# Published: mIoU 75.58 on val.
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
# On the test server: 74.12 (in the README at dab64db, CIRKDv2's).
# The released SegFormers take BGR without a standard deviation, the ImageNet weights were trained on RGB with one: NORMALIZATION=imagenet.
# The published scores are of two 1024x1024 halves of every picture: eval.py --mode slide --window 1024 --stride 1024.
# mmsegmentation has 76.54 on val with a schedule of its own.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=mit_b0.pth \
#       GPUS=8 bash scripts/reproduce/student_citys_segformer_b0.sh

DATASET=citys
MODEL=segformer
BACKBONE=mit_b0
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mit_b0.pth}
OPTIMIZER=adamw
CROP=${CROP:-1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-160000}
LR=2e-4
WEIGHT_DECAY=1e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
