#!/usr/bin/env bash
# The first five minutes: on drawn scenes (no files, no downloads but packages) train a teacher, a student alone, with plain KD and with
# Af-DCD; evaluate all four, print a table and write a picture sheet. Two CPU cores are enough. A second run resumes, or says that it
# is done.
#
#   bash scripts/quickstart.sh

OUTPUT=${OUTPUT:-runs/quickstart}
TEACHER_STEPS=${TEACHER_STEPS:-400}
STUDENT_STEPS=${STUDENT_STEPS:-200}

source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
prepare_environment requirements.txt
cd "$ROOT"
common=(--dataset shapes --batch-size 8 --optimizer adamw --lr 0.002 --val-interval 100 --workers 0 --log-interval 50 --resume)
if grep -qE 'avx512_bf16|amx_bf16' /proc/cpuinfo 2>/dev/null; then
    common+=(--amp bf16) # 1.5 times as fast; several times slower than float32 on a CPU without these instructions
fi
student=("${common[@]}" --student-backbone mobilenetv2 --max-iterations "$STUDENT_STEPS"
         --teacher-checkpoint "$OUTPUT/teacher/student_best.pth")

echo "== 1/4 teacher: DeepLabV3-ResNet18, $TEACHER_STEPS steps"
"$PYTHON" train_baseline.py "${common[@]}" --backbone resnet18 --max-iterations "$TEACHER_STEPS" --save-dir "$OUTPUT/teacher"
echo "== 2/4 student alone: DeepLabV3-MobileNetV2, $STUDENT_STEPS steps"
"$PYTHON" train_baseline.py "${common[@]}" --backbone mobilenetv2 --max-iterations "$STUDENT_STEPS" --save-dir "$OUTPUT/student"
echo "== 3/4 student with plain KD"
"$PYTHON" train_kd.py --method kd "${student[@]}" --save-dir "$OUTPUT/kd"
echo "== 4/4 student with Af-DCD"
"$PYTHON" train_kd.py --method afdcd "${student[@]}" --save-dir "$OUTPUT/afdcd"
echo
"$PYTHON" -m scripts.summary teacher="$OUTPUT/teacher" student="$OUTPUT/student" \
    "student + KD=$OUTPUT/kd" "student + Af-DCD=$OUTPUT/afdcd" --output "$OUTPUT"
