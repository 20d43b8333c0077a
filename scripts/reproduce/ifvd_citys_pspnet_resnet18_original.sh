#!/usr/bin/env bash
# IFVD (original) on Cityscapes: PSPNet-R101 -> PSPNet-R18, 512x512 crops, batch 8, 40k iterations, lr 0.01, weight decay 5e-4.
#
# There is no published figure of the whole recipe at hand. Table 2 of CWD has the term ifvd alone, same networks and schedule: 71.35 on
# val (PSPNet-R18 alone 69.10, teacher 78.56).
# Not run by this project: the data and the ImageNet weights are not at hand.
# Its weight 10 of KD is on a mean over classes too, 10 / 19 on the mean over pixels here. The adversarial term is SKD's original, with its
# weights (ADVERSARIAL_WEIGHT), hence --method ifvd skd; schedule and weight decay are those of that code base.
# The paper's teacher is stored under another code base's names; teacher_citys_pspnet_resnet101.sh trains one.
#
#   DATA=/data/citys TEACHER=runs/reproduce/teacher_citys_pspnet_resnet101/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=2 bash scripts/reproduce/ifvd_citys_pspnet_resnet18_original.sh

METHOD="ifvd skd"
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
METHOD_FLAGS=(--ifvd-kd-weight 0.526 --ifvd-weight 200 --ifvd-adversarial-weight 0 --ifvd-critic-weight 0 --skd-kd-weight 0
              --skd-pairwise-weight 0 --skd-adversarial-weight "${ADVERSARIAL_WEIGHT:-0.1}" --skd-critic-weight 0.1
              --skd-objective wgan-gp)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
