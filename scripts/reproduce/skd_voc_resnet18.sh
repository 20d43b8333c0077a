#!/usr/bin/env bash
# SKD (CIRKD's form) on Pascal VOC (augmented): DeepLabV3-R101 -> DeepLabV3-R18, 512x512 crops,
# batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 73.51 on val (DeepLabV3-R18 alone 73.21, teacher 77.67).
# Source: README of OSVAI/Af-DCD at 5b086a7, which takes the figure from another paper; the settings are those of its own scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# MODEL=pspnet: 74.07 (73.33 alone).
# The weights of the terms are those of CIRKD's scripts for Cityscapes: this data set's own are not at hand.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# On some rows of VOC that README prints Cityscapes' figures of teacher and student alone, an apparent slip; those here are VOC's.
# Of DeepLabV3-R18 in the README of zju-SWJ/HWD, which does not state the weights of the terms: BATCH=8 LR=0.01: 71.277 (71.979 alone),
# BATCH=8 LR=0.01 ITERATIONS=80000: 74.021 (73.155 alone).
#
#   DATA=/data/voc TEACHER=deeplabv3_resnet101_voc_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/skd_voc_resnet18.sh

METHOD=skd
DATASET=voc
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=${MODEL:-deeplabv3}
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=${LR:-0.02}
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/skd_voc_${STUDENT_MODEL}_resnet18}
METHOD_FLAGS=(--skd-form cirkd --skd-kd-weight 1 --skd-pairwise-weight 10 --skd-adversarial-weight 1e-3 --skd-critic-weight 0.1
              --skd-objective hinge --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
