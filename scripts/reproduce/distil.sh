# Sourced by the scripts of this folder after they have set their variables: launches train_kd.py with them. The defaults are those of the
# CIRKD line.
#
#   DATA      folder of the data set                      TEACHER     the published teacher, or your own (any checkpoint eval.py takes)
#   BACKBONE_WEIGHTS  ImageNet weights of the student's backbone (resnet18-imagenet.pth, mobilenetv2-imagenet.pth and others of the CIRKD
#             release; "imagenet" takes torchvision's, for MobileNets and the *_vanilla backbones; "none" starts from scratch)
#   STUDENT   a whole student to start from               SAVE_DIR    folder of the run, default runs/reproduce/<name of the script>
#   LOSS_NORM local averages the cross-entropy per process as the released code does, global over all processes (exact)
#   GPUS      processes; the published runs of the CIRKD line used 8 (batch 16 in all). The batch is that of all processes together, however
#             many; where memory is short pass --accumulate.
#
# The student alone whose figure a recipe quotes is trained by student_*.sh, the teacher by teacher_*.sh, where their settings are known.
# What a recipe may set besides: OPTIMIZER (sgd), LR_FLOOR (0), HEAD_LR_FACTOR (1), AUX_WEIGHT (0.4), NORMALIZATION (caffe-bgr), HEAD_WIDTH
# (the published one).
# Flags given to the script are added and win, --dry-run among them: it prints every setting with its source and reads no file.

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
# METHOD and CROP are unquoted: they may be several words
launch train_kd.py --method $METHOD --dataset "$DATASET" ${DATA:+--data "$DATA"} \
    --teacher-model "$TEACHER_MODEL" --teacher-backbone "$TEACHER_BACKBONE" ${TEACHER:+--teacher-checkpoint "$TEACHER"} \
    --student-model "$STUDENT_MODEL" --student-backbone "$STUDENT_BACKBONE" ${HEAD_WIDTH:+--student-head-width "$HEAD_WIDTH"} \
    --student-pretrained-base "$BACKBONE_WEIGHTS" ${STUDENT:+--student-pretrained "$STUDENT"} \
    --student-normalization "${NORMALIZATION:-caffe-bgr}" --crop-size $CROP --batch-size "$BATCH" --max-iterations "$ITERATIONS" \
    --optimizer "${OPTIMIZER:-sgd}" --lr "$LR" --lr-floor "${LR_FLOOR:-0}" --weight-decay "$WEIGHT_DECAY" \
    ${HEAD_LR_FACTOR:+--head-lr-factor "$HEAD_LR_FACTOR"} ${AUX_WEIGHT:+--aux-weight "$AUX_WEIGHT"} \
    --loss-norm "${LOSS_NORM:-local}" --seed "${SEED:-0}" --resume \
    --save-dir "${SAVE_DIR:-runs/reproduce/$(basename "$0" .sh)}" "${METHOD_FLAGS[@]}" "$@"
