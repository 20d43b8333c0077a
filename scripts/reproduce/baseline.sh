# Sourced by the scripts of this folder that train a network alone (student_*.sh, teacher_*.sh) after they have set their variables:
# launches train_baseline.py with them. The defaults are those of distil.sh, which trains with a teacher: those of the CIRKD line.
#
#   DATA      folder of the data set                      SAVE_DIR    folder of the run, default runs/reproduce/<name of the script>
#   BACKBONE_WEIGHTS  ImageNet weights of the backbone, as in distil.sh
#   HEAD_WIDTH  channels of the head, default the published ones of CIRKD and Af-DCD; CIRKDv2 has 512 for DeepLabV3 on every ResNet
#   LOSS_NORM local averages the cross-entropy per process as the released code does, global over all processes (exact)
#   GPUS      processes; the batch is that of all of them together; where memory is short pass --accumulate
#
# What a recipe may set besides: OPTIMIZER (sgd), LR_FLOOR (0), HEAD_LR_FACTOR (1), AUX_WEIGHT (0.4), NORMALIZATION (caffe-bgr).
# Flags given to the script are added and win, --dry-run among them: it prints every setting with its source and reads no file.

source "$(dirname "${BASH_SOURCE[0]}")/../environment.sh"
# CROP is unquoted: it may be two words
launch train_baseline.py --dataset "$DATASET" ${DATA:+--data "$DATA"} --model "$MODEL" --backbone "$BACKBONE" \
    ${HEAD_WIDTH:+--head-width "$HEAD_WIDTH"} --pretrained-base "$BACKBONE_WEIGHTS" --normalization "${NORMALIZATION:-caffe-bgr}" \
    --crop-size $CROP --batch-size "$BATCH" --max-iterations "$ITERATIONS" --optimizer "${OPTIMIZER:-sgd}" --lr "$LR" \
    --lr-floor "${LR_FLOOR:-0}" ${HEAD_LR_FACTOR:+--head-lr-factor "$HEAD_LR_FACTOR"} --weight-decay "$WEIGHT_DECAY" \
    ${AUX_WEIGHT:+--aux-weight "$AUX_WEIGHT"} --loss-norm "${LOSS_NORM:-local}" \
    --seed "${SEED:-0}" --resume --save-dir "${SAVE_DIR:-runs/reproduce/$(basename "$0" .sh)}" "$@"
