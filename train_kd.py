"""Distil a teacher into a student, with one or more methods.

    python train_kd.py --method afdcd --dataset shapes --teacher-checkpoint runs/teacher/student_best.pth \\
        --student-backbone mobilenetv2 --save-dir runs/afdcd
    torchrun --nproc-per-node 4 train_kd.py --method kd cwd --dataset camvid --data DIR ...

Every flag of a method begins with its name; flags of methods that are not selected are refused. losses/README.md describes all.
"""

from utils.options import train_options
from utils.session import run_script, train

if __name__ == "__main__":
    run_script(train, train_options(distil=True, description=__doc__))
