#!/usr/bin/env bash
# SKD (CIRKD's form) on Cityscapes: SegFormer-B4 -> SegFormer-B0, 1024x1024 crops, batch 8, 160k iterations, lr 2e-4, weight decay 1e-4.
#
# Published: mIoU 76.43 on val (SegFormer-B0 alone 75.58, teacher 81.23).
# Source: README of winycg/CIRKD at 2d8ad0f (2024-06-22); settings from its training scripts and defaults.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The weights of the terms are those of the other networks: SegFormer's own are not at hand.
# TEACHER is the published one, or what teacher_citys_segformer_b4.sh trained. Student alone: student_citys_segformer_b0.sh.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# The released SegFormers take BGR without a standard deviation, the ImageNet weights were trained on RGB with one: NORMALIZATION=imagenet.
# The published scores are of two 1024x1024 halves of every picture: eval.py --mode slide --window 1024 --stride 1024.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_segformer_b4/student_best.pth BACKBONE_WEIGHTS=mit_b0.pth \
#       GPUS=8 bash scripts/reproduce/skd_citys_segformer_b0.sh

METHOD=skd
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
METHOD_FLAGS=(--skd-form cirkd --skd-kd-weight 1 --skd-pairwise-weight 10 --skd-adversarial-weight 1e-3 --skd-critic-weight 0.1
              --skd-objective hinge --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
