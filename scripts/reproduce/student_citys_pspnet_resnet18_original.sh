#!/usr/bin/env bash
# The student of SKD and CWD alone on Cityscapes: PSPNet-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 69.10 on val.
# Source: README of irfanICMLL/structure_knowledge_distillation; Table 2 of CWD as in irfanICMLL/TorchDistiller has the same figure.
# Not run by this project: the data and the ImageNet weights are not at hand.
# The settings are stated with the distilled students of that table; the student alone is taken to have them too.
#
#   DATA=/data/citys BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=2 bash scripts/reproduce/student_citys_pspnet_resnet18_original.sh

DATASET=citys
MODEL=pspnet
BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=5e-4

source "$(dirname "${BASH_SOURCE[0]}")/baseline.sh"
