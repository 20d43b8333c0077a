# Sourced by every script of this folder: paths, the python environment, and `launch`.
#
#   PYTHON   the interpreter; default: the active environment's, else .venv beside the code, which is made on demand
#   GPUS     processes per node for `launch`; default: one per visible GPU, one on a CPU
#   several nodes: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, with torchrun's meaning; NODE_RANK is SLURM's where srun started the script
#   RESTARTS how often `launch` starts the processes again when one of them ends with an error; default 0
#   TORCH_ELASTIC_SHUTDOWN_TIMEOUT   whole seconds that torchrun, told to stop, gives a save before it kills; default 600

set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." >/dev/null && pwd)"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}"
# torchrun hands restarted ranks the dead attempt's addresses without it (pytorch issues 135712, 167288)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
# 30 without it, and a save that takes longer is lost; the same in utils/distributed.py
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

# Make PYTHON point to an environment that has the packages of the files given, installing what is missing.
prepare_environment() {
    if [ -z "${PYTHON:-}" ]; then
        if [ -n "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
            PYTHON="$(command -v python)"
        else
            if ! "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
                echo "creating an environment in $ROOT/.venv"
                python3 -m venv --clear "$ROOT/.venv"
            fi
            PYTHON="$ROOT/.venv/bin/python"
        fi
    fi
    local file
    for file in "$@"; do
        echo "checking the packages of $file (a first installation of torch takes some minutes)"
        "$PYTHON" -m pip install --quiet --disable-pip-version-check -r "$ROOT/$file"
    done
}

# Make PYTHON the interpreter described above.
find_python() {
    if [ -z "${PYTHON:-}" ]; then
        if [ -x "$ROOT/.venv/bin/python" ] && [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
            PYTHON="$ROOT/.venv/bin/python"
        else
            PYTHON="$(command -v python || command -v python3)"
        fi
    fi
}

# launch SCRIPT ARGUMENTS...: one process per GPU under torchrun, a plain process where one is enough.
launch() {
    local script="$1"
    shift
    find_python
    local processes="${GPUS:-}"
    if [ -z "$processes" ]; then
        processes="$("$PYTHON" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
    fi
    local restarts="${RESTARTS:-0}" rendezvous=(--standalone)
    if [ "$processes" = 1 ] && [ "${NNODES:-1}" = 1 ] && [ "$restarts" = 0 ]; then
        exec "$PYTHON" "$ROOT/$script" "$@"
    fi
    if [ "${NNODES:-1}" != 1 ]; then
        local rank="${NODE_RANK:-${SLURM_NODEID:?set NODE_RANK}}" address="${MASTER_ADDR:?set MASTER_ADDR}" port="${MASTER_PORT:-29500}"
        if [ "$restarts" = 0 ]; then
            rendezvous=(--nnodes "$NNODES" --node-rank "$rank" --master-addr "$address" --master-port "$port")
        else # the one rendezvous that a node which was started again can join; node 0 holds it
            rendezvous=(--nnodes "$NNODES" --rdzv-backend c10d --rdzv-endpoint "$address:$port" --rdzv-id segkd
                        --rdzv-conf "is_host=$([ "$rank" = 0 ] && echo 1 || echo 0)")
        fi
    fi
    if [ "$restarts" != 0 ]; then
        rendezvous+=(--max-restarts "$restarts")
    fi
    export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
    exec "$PYTHON" -m torch.distributed.run "${rendezvous[@]}" --nproc-per-node "$processes" "$ROOT/$script" "$@"
}
