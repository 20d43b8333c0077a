#!/usr/bin/env bash
# CIRKDv2 on Cityscapes: SegFormer-B4 -> SegFormer-B0, 1024x1024 crops, batch 8, 160k iterations, lr 2e-4, weight decay 1e-4.
#
# Published: mIoU 75.52 on the test server (SegFormer-B0 alone 74.12, teacher 80.38).
# Source: README of winycg/CIRKD at dab64db (2025-08-30); settings from its scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# TEACHER is the published one, or what teacher_citys_segformer_b4.sh trained. Student alone: student_citys_segformer_b0.sh.
# Its memory holds 2000 pixels per class, as CIRKD's for SegFormer.
# The weight of fitnet is not at hand for this pair; 10 is that of most others: FITNET_WEIGHT.
# Paper and release differ: the released memory keeps the first positions of an image as the pixels of a class; --no-cirkdv2-released-queue
# keeps pixels of the class.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# The grid of the pooled channels is that of stride 8, 32x32: the release's for SegFormer, of stride 4, is not at hand.
# The released SegFormers take BGR without a standard deviation, the ImageNet weights were trained on RGB with one: NORMALIZATION=imagenet.
# The published scores are of two 1024x1024 halves of every picture: eval.py --mode slide --window 1024 --stride 1024.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_segformer_b4/student_best.pth BACKBONE_WEIGHTS=mit_b0.pth \
#       GPUS=8 bash scripts/reproduce/cirkdv2_citys_segformer_b0.sh

METHOD=cirkdv2
DATASET=citys
TEACHER_MODEL=segformer
TEACHER_BACKBONE=mit_b4
STUDENT_MODEL=segformer
STUDENT_BACKBONE=mit_b0
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-mit_b0.pth}
OPTIMIZER=adamw
CROP=${CROP:-1024}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-160000}
LR=2e-4
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--cirkdv2-kd-weight 1 --cirkdv2-minibatch-pixel-weight 1 --cirkdv2-memory-pixel-weight 0.1
              --cirkdv2-memory-region-weight 0.1 --cirkdv2-fitnet-weight "${FITNET_WEIGHT:-10}" --cirkdv2-minibatch-channel-weight 1
              --cirkdv2-pixel-queue 2000 --cirkdv2-region-queue 2000
              --cirkdv2-channel-mse-weight 100 --cirkdv2-memory-channel-weight 0.1 --cirkdv2-released-queue
              --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
