#!/usr/bin/env bash
# SKD (original) on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# Published: mIoU 74.08 on val (PSPNet-R18 alone 69.10, teacher 78.32).
# Source: README of irfanICMLL/structure_knowledge_distillation (released checkpoint of the whole method: 75.3).
# Not run by this project: the data and the ImageNet weights are not at hand.
# Its weight 10 of KD is on a sum over the 8 images of a batch, which is 80 on the mean here: scale it with BATCH.
# The weight of the adversarial term is the paper's lambda_2, 0.1; the CIRKD port has ADVERSARIAL_WEIGHT=1e-3.
# ADVERSARIAL_WEIGHT=0 CRITIC_WEIGHT=0: 71.78. PAIRWISE_WEIGHT=0 ADVERSARIAL_WEIGHT=0 CRITIC_WEIGHT=0: 70.51.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=2 bash scripts/reproduce/skd_citys_pspnet_resnet18_original.sh

METHOD=skd
DATASET=citys
TEACHER_MODEL=pspnet
TEACHER_BACKBONE=resnet101
STUDENT_MODEL=pspnet
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-8}
ITERATIONS=${ITERATIONS:-40000}
LR=0.01
WEIGHT_DECAY=5e-4
PAIRWISE_WEIGHT=${PAIRWISE_WEIGHT:-0.5}
CRITIC_WEIGHT=${CRITIC_WEIGHT:-0.1}
METHOD_FLAGS=(--skd-kd-weight 80 --skd-pairwise-weight "$PAIRWISE_WEIGHT" --skd-adversarial-weight "${ADVERSARIAL_WEIGHT:-0.1}"
              --skd-critic-weight "$CRITIC_WEIGHT")
[[ $PAIRWISE_WEIGHT == 0 ]] || METHOD_FLAGS+=(--skd-form original)
[[ $CRITIC_WEIGHT == 0 ]] || METHOD_FLAGS+=(--skd-objective wgan-gp --skd-penalty 10)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
