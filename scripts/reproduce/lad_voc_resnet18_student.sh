#!/usr/bin/env bash
# LAD on Pascal VOC (augmented): DeepLabV3-R18 -> DeepLabV3-R18, 512x512 crops, batch 16, 40k iterations, lr 0.001, weight decay 1e-4.
#
# Published: mIoU 75.0 on val (DeepLabV3-R18 alone 73.21, no value for the teacher).
# Source: README and training log of skyshoumeng/Label_Assisted_Distillation (best of 40 validations 75.11, last 74.74).
# Not run by this project: the data and the ImageNet weights are not at hand.
# TEACHER is what lad_voc_resnet18_teacher.sh trained. MODEL=pspnet: 75.4 (73.33 alone); say it to both.
# The published run goes on from a student that was distilled before: STUDENT, for example that of cirkd_voc_deeplabv3_resnet18.sh.
# Without STUDENT it starts from the ImageNet weights, for which LR=0.02 is the line's; what comes of that is open.
# The published student keeps its fourth input channel, always 0; here it has three, which computes the same.
#
#   DATA=/data/voc STUDENT=runs/reproduce/cirkd_voc_deeplabv3_resnet18/student_best.pth BACKBONE_WEIGHTS=resnet18-imagenet.pth \
#       GPUS=8 bash scripts/reproduce/lad_voc_resnet18_student.sh

METHOD=cwd
DATASET=voc
MODEL=${MODEL:-deeplabv3}
TEACHER=${TEACHER:-runs/reproduce/lad_voc_${MODEL}_resnet18_teacher/student_best.pth}
TEACHER_MODEL=$MODEL
TEACHER_BACKBONE=resnet18
STUDENT_MODEL=$MODEL
STUDENT_BACKBONE=resnet18
BACKBONE_WEIGHTS=${BACKBONE_WEIGHTS:-resnet18-imagenet.pth}
CROP=${CROP:-512}
BATCH=${BATCH:-16}
ITERATIONS=${ITERATIONS:-40000}
LR=${LR:-0.001}
WEIGHT_DECAY=1e-4
AUX_WEIGHT=0.02
SAVE_DIR=${SAVE_DIR:-runs/reproduce/lad_voc_${MODEL}_resnet18_student}
METHOD_FLAGS=(--student-dropout 0.01 --cwd-logits-weight 3 --cwd-logits-temperature 4)

source "$(dirname "${BASH_SOURCE[0]}")/distil.sh"
