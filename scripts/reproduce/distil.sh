# Sourced by the scripts of this folder after they have set their variables: launches train_kd.py with the settings of the CIRKD line.
#
#   DATA      folder of the data set                      TEACHER     the published teacher, or your own (any checkpoint eval.py takes)
#   BACKBONE_WEIGHTS  ImageNet weights of the student's deep stem (resnet18-imagenet.pth, mobilenetv2-imagenet.pth of the CIRKD
#             release; "imagenet" takes torchvision's, for mobilenetv2 and the *_vanilla backbones; "none" starts from scratch)
#   LOSS_NORM local averages the cross-entropy per process as the released code does, global over all processes (exact)
#   GPUS      processes; the published runs used 8 (batch 16 in all). With fewer GPUs pass --accumulate to keep the batch.
#
# Flags given to the script are added and win, --dry-run among them: it prints every setting with its source and reads no file.

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
launch train_kd.py --method $METHOD --dataset "$DATASET" ${DATA:+--data "$DATA"} \
    --teacher-model "$TEACHER_MODEL" --teacher-backbone "$TEACHER_BACKBONE" ${TEACHER:+--teacher-checkpoint "$TEACHER"} \
    --student-model "$STUDENT_MODEL" --student-backbone "$STUDENT_BACKBONE" --student-pretrained-base "$BACKBONE_WEIGHTS" \
    --student-normalization caffe-bgr --crop-size $CROP --batch-size "$BATCH" --max-iterations "$ITERATIONS" --lr "$LR" \
    --weight-decay "$WEIGHT_DECAY" --loss-norm "${LOSS_NORM:-local}" --seed "${SEED:-0}" --resume \
    --save-dir "${SAVE_DIR:-runs/reproduce/$(basename "$0" .sh)}" "${METHOD_FLAGS[@]}" "$@"
