#!/usr/bin/env bash
# A training as a SLURM job: one torchrun agent per node. Two minutes before the time limit, and where the site preempts with a signal, the
# training saves and stops; the job then puts itself into the queue again and goes on where it stopped. A training that fails is not queued.
#
#   SAVE_DIR=runs/kd METHOD=kd DATASET=citys DATA=/data/citys TEACHER=teacher.pth \
#       sbatch --nodes 2 --gpus-per-node 4 --cpus-per-task 16 --time 12:00:00 scripts/slurm.sh train_kd.sh --amp bf16
#   SAVE_DIR=runs/teacher DATASET=citys DATA=/data/citys BACKBONE=resnet101 sbatch --gpus-per-node 4 scripts/slurm.sh train_baseline.sh
#
# The first argument is a launcher of this folder (train_baseline.sh, train_kd.sh, reproduce/NAME.sh), which reads its variables; the rest
# are flags for it. Start it in the repository's folder. SAVE_DIR, DATA and the checkpoints must be on a disk that all nodes share.

#SBATCH --job-name=segkd
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt

set -euo pipefail
# SLURM runs a copy of this file
scripts="${SLURM_SUBMIT_DIR:?is set by sbatch: start this script with it}/scripts"
launcher="$scripts/${1:?name a launcher: train_baseline.sh, train_kd.sh or reproduce/NAME.sh}"
shift
if [ ! -f "$launcher" ]; then
    echo "slurm.sh: there is no $launcher; run sbatch in the repository's folder, with a launcher of its folder scripts" >&2
    exit 2
fi
export SAVE_DIR="${SAVE_DIR:?set SAVE_DIR to the folder of the run}"
export NNODES="$SLURM_JOB_NUM_NODES"
hosts="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
export MASTER_ADDR="${hosts%%$'\n'*}" # the first line; `| head` would end scontrol by SIGPIPE and this script with it
export MASTER_PORT="${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 20000))}" # of two jobs on one node each needs its own
if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then
    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # srun does not inherit it since SLURM 22.05
fi

# it tells below how this start ended, not an earlier one
rm -f "$SAVE_DIR/INTERRUPTED"
# SLURM signals the steps itself; this shell outlives them where a site signals it too
trap ':' TERM
status=0
# the first rank to end waits for the others' save
srun --nodes "$NNODES" --ntasks-per-node 1 --kill-on-bad-exit=0 --wait=120 bash "$launcher" "$@" --resume || status=$?

if [ ! -e "$SAVE_DIR/INTERRUPTED" ] && [ "$status" != 143 ]; then
    # done, or failed: a second start would fail in the same way. A save that was killed looks like that, too, and is not queued either.
    # 143 is a SIGTERM before there was anything to save
    exit "$status"
fi
# a job that was cancelled, or that SLURM queues again itself, does not run any more
if [[ "$(scontrol show job "$SLURM_JOB_ID")" == *JobState=RUNNING* ]]; then
    echo "slurm.sh: the training was interrupted and saved; job $SLURM_JOB_ID is queued again"
    exec scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
