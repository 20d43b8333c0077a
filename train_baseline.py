"""Train a network alone: a student's baseline, or a teacher.

    python train_baseline.py --dataset shapes --model deeplabv3 --backbone mobilenetv2 --save-dir runs/student
    torchrun --nproc-per-node 4 train_baseline.py --dataset camvid --data DIR --backbone resnet101 --save-dir runs/teacher

Runs on one process or under torchrun, on GPUs or a CPU. --resume goes on with an interrupted run, bit for bit.
"""

from utils.options import train_options
from utils.session import run_script, train

if __name__ == "__main__":
    run_script(train, train_options(distil=False, description=__doc__))
