#!/usr/bin/env bash
# CWD (CIRKD's form) on CamVid: DeepLabV3-R101 -> DeepLabV3-R18, 360x360 crops, batch 16, 40k iterations, lr 0.02, weight decay 1e-4.
#
# Published: mIoU 67.71 on test (DeepLabV3-R18 alone 66.92, teacher 69.84).
# Source: README of OSVAI/Af-DCD at 5b086a7, which takes the figure from another paper; the settings are those of its own scripts.
# Not run by this project: the data and the ImageNet weights are not at hand.
# MODEL=pspnet: 67.92 (66.73 alone).
# CIRKD's row "CWD" is CWD on features with plain KD and the adversarial term of SKD, hence --method cwd skd.
# The weights of the terms are those of CIRKD's scripts for Cityscapes: this data set's own are not at hand.
# The released code takes the features after dropout: --no-student-head-after-dropout takes them before it.
# Tables call the split val, the released evaluation scores the 233 test pictures; here the best on val is chosen and test is reported
# once.
#
#   DATA=/data/camvid TEACHER=deeplabv3_resnet101_camvid_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/cwd_camvid_resnet18.sh

METHOD="cwd skd"
DATASET=camvid
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=${MODEL:-deeplabv3}
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-360}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/cwd_camvid_${STUDENT_MODEL}_resnet18}
METHOD_FLAGS=(--cwd-logits-weight 0 --cwd-head-weight 50 --cwd-head-temperature 4 --skd-kd-weight 1 --skd-pairwise-weight 0
              --skd-adversarial-weight 1e-3 --skd-critic-weight 0.1 --student-head-after-dropout)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
