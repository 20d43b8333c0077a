#!/usr/bin/env bash
# Af-DCD on CamVid: DeepLabV3-R101 -> PSPNet-R18, 360x360 crops, batch 16, 40k iterations.
#
# Published: mIoU 69.48 on test (PSPNet-R18 alone 66.73, teacher 69.84).
# Source: README of the authors' release (OSVAI/Af-DCD at 5b086a7); settings from its training scripts.
# Hardware of the paper: 8 RTX A5000. Not run by this project: the data and the ImageNet weights are not at hand.
# Paper and release differ: the paper's text states 400x400 crops: CROP="400".
# The released trainer chooses its best checkpoint on the test pictures; here the best on val is chosen and test is reported once.
#
#   DATA=/data/camvid TEACHER=deeplabv3_resnet101_camvid_best_model.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/afdcd_camvid_pspnet_resnet18.sh

METHOD=afdcd
DATASET=camvid
TEACHER_MODEL=deeplabv3
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-360}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=0.02
WEIGHT_DECAY=1e-4
METHOD_FLAGS=(--afdcd-normalise released --afdcd-kd-weight 1 --afdcd-fd-weight "${FD_WEIGHT:-8e-6}" --afdcd-contrast-weight 1e-2
              --afdcd-mask "${MASK:-random}" --afdcd-projector "${PROJECTOR:-plain}" --afdcd-negatives "${NEGATIVES:-released}")

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
