#!/usr/bin/env bash
# LAD's teacher on Pascal VOC (augmented): DeepLabV3-R18, 512x512 crops, batch 8, 80k iterations, lr 0.01, weight decay 1e-4.
#
# It sees the noised labels. There is no published figure at hand of it; its student's is in lad_voc_resnet18_student.sh, which comes next.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The schedule of the teacher is not at hand; this is that of CIRKD's teachers. MODEL=pspnet: the teacher of PSPNet-R18.
#
#   DATA=/data/voc BACKBONE_WEIGHTS=resnet18-imagenet.pth GPUS=8 bash scripts/reproduce/lad_voc_resnet18_teacher.sh

DATASET=voc
MODEL=${MODEL:-deeplabv3}
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-80000}
LR=${LR:-0.01}
WEIGHT_DECAY=1e-4
SAVE_DIR=${SAVE_DIR:-runs/reproduce/lad_voc_${MODEL}_resnet18_teacher}

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh" --label-assisted "$@"
