"""Several nodes and SLURM: what the launchers start, when a job is queued again, and that a training that lost a node ends as it would have.

Stand-ins for SLURM's commands do what its manual says of them: sbatch runs a copy of the script, again where it was queued again; srun
starts one task per node and ends with the highest status.
"""

import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys

import pytest
from torch.distributed.launcher.api import LaunchConfig

from tests.faults import children, wait_for
from tests.paths import REPOSITORY
from tests.test_resume import differences
from tests.test_scripts import bash, command_of, header, options_of
from tests.workers import RUN, TIMEOUT, TINY
from utils import checkpoint

JOB = 70007
GRACE = "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"
reads_grace = pytest.mark.skipif("shutdown_timeout" not in {field.name for field in dataclasses.fields(LaunchConfig)},
                                 reason="torch before 2.12 kills after 30 s, whatever the variable says")  # fmt: skip
COMMANDS = {
    "sbatch": """
        while [[ $1 == --* ]]; do shift 2; done
        cp "$1" "$LOG/slurm_script"
        shift
        export SLURM_SUBMIT_DIR=$PWD SLURM_JOB_ID=70007 SLURM_JOB_NUM_NODES=${NODES:-2} SLURM_JOB_NODELIST='localhost[1-2]'
        for start in 0 1 2; do
            rm -f "$LOG/queued"
            export SLURM_RESTART_COUNT=$start
            bash "$LOG/slurm_script" "$@"
            status=$?
            [ -e "$LOG/queued" ] || exit $status
        done
        exit 99""",
    "scontrol": """
        echo "scontrol $*" >> "$LOG/calls"
        case "$1 $2" in
            "show hostnames") printf 'localhost\\nlocalhost2\\n' ;;
            "show job") echo "JobId=$3 JobName=segkd JobState=${STATE:-RUNNING} Reason=None" ;;
            requeue*) touch "$LOG/queued" ;;
        esac""",
    # the first start does as ENDS says; the tasks are those of real nodes
    "srun": """
        echo "srun $*" >> "$LOG/calls"
        while [[ $1 == --* ]]; do case $1 in *=*) shift ;; *) shift 2 ;; esac done
        status=0
        tasks=()
        for node in $(seq 0 $((SLURM_JOB_NUM_NODES - 1))); do
            SLURM_NODEID=$node "$@" > "$LOG/task$node.$SLURM_RESTART_COUNT" 2>&1 &
            tasks+=($!)
        done
        if [ -n "${STOP_AT:-}" ] && [ "$SLURM_RESTART_COUNT" = 0 ]; then
            until grep -qs "$STOP_AT" "$LOG"/task?.0; do sleep 0.05; done
            kill -TERM "${tasks[@]}"
        fi
        for task in "${tasks[@]}"; do wait "$task" || status=1; done
        if [ "$SLURM_RESTART_COUNT" = 0 ] && [ -n "${ENDS:-}" ]; then
            [ "$ENDS" != interrupted ] || { mkdir -p "$SAVE_DIR"; echo 'go on with: ...' > "$SAVE_DIR/INTERRUPTED"; }
            exit "${STATUS:-1}"
        fi
        exit $status""",
}


@pytest.fixture
def slurm(tmp_path):
    """(*arguments, **variables) -> the finished job; its folder `log` has what was called and what the tasks printed."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "log").mkdir()
    for name, text in COMMANDS.items():
        path = tmp_path / "bin" / name
        path.write_text("#!/usr/bin/env bash\n" + text)
        path.chmod(0o755)
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(0o755)

    def run(*arguments, command='sbatch --nodes 2 --time 1:00:00 scripts/slurm.sh "$@"', **variables):
        variables = {"PYTHON": str(stub), "GPUS": "4", "SAVE_DIR": str(tmp_path / "run"), "LOG": str(tmp_path / "log"),
                     "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", **variables}  # fmt: skip
        return bash("-c", command, "bash", *arguments, cwd=REPOSITORY, **variables)

    return run


def calls(folder) -> list[str]:
    return (folder / "log" / "calls").read_text().splitlines()


def test_every_node_gets_its_command(slurm, tmp_path):
    """The same training with the node's rank, the first host's address, a port of the job's, --resume; a requeue is not asked for."""
    done = slurm("train_baseline.sh", "--amp", "bf16", "--label", "a b", SLURM_CPUS_PER_TASK="6")
    assert done.returncode == 0, done.stderr
    for node in (0, 1):
        arguments = (tmp_path / "log" / f"task{node}.0").read_text().split("\0")[:-1]
        assert arguments[:13] == ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--master-addr", "localhost",
                                  "--master-port", str(20000 + JOB % 20000), "--nproc-per-node", "4",
                                  str(REPOSITORY / "train_baseline.py")]  # fmt: skip
        assert arguments[-5:] == ["--amp", "bf16", "--label", "a b", "--resume"] and str(tmp_path / "run") in arguments
    assert not [call for call in calls(tmp_path) if "requeue" in call]
    (srun,) = [call for call in calls(tmp_path) if call.startswith("srun")]
    assert "--nodes 2 --ntasks-per-node 1 --kill-on-bad-exit=0 --wait=" in srun


@pytest.mark.parametrize("variables, starts, status", [
    ({"ENDS": "interrupted"}, 2, 0),
    ({"ENDS": "interrupted", "STATE": "CANCELLED", "STATUS": "7"}, 1, 7),  # by its user, or SLURM queues it again itself
    ({"ENDS": "failed", "STATUS": "7"}, 1, 7),
    ({"ENDS": "failed", "STATUS": "143", "NODES": "1", "GPUS": "1"}, 2, 0),  # stopped before its first step: nothing to save
    ({}, 1, 0),
])  # fmt: skip
def test_only_what_was_interrupted_is_queued_again(variables, starts, status, slurm, tmp_path):
    done = slurm("train_baseline.sh", **variables)
    assert done.returncode == status, done.stdout + done.stderr
    assert sum(call.startswith("srun") for call in calls(tmp_path)) == starts
    assert calls(tmp_path).count(f"scontrol requeue {JOB}") == starts - 1


def test_an_interruption_of_an_earlier_job_is_none_of_this_one(slurm, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "INTERRUPTED").write_text("stopped after step 5; go on with: ...")
    assert slurm("train_baseline.sh", ENDS="failed", STATUS="2").returncode == 2
    assert sum(call.startswith("srun") for call in calls(tmp_path)) == 1


@pytest.mark.parametrize("arguments, variables, words", [
    ((), {}, "name a launcher: train_baseline.sh"),
    (("train.sh",), {}, "train.sh; run sbatch in the repository's folder, with a launcher of its folder scripts"),
    (("train_kd.sh",), {"SAVE_DIR": ""}, "set SAVE_DIR to the folder of the run"),
])  # fmt: skip
def test_what_a_job_lacks_is_said_before_it_starts_anything(arguments, variables, words, slurm, tmp_path):
    done = slurm(*arguments, **variables)
    assert done.returncode and words in done.stderr and not (tmp_path / "log" / "calls").exists()


def test_without_sbatch_the_script_says_so(tmp_path):
    done = bash(REPOSITORY / "scripts/slurm.sh", "train_kd.sh", cwd=tmp_path, SAVE_DIR="run")
    assert done.returncode and "start this script with it" in done.stderr


def test_a_header_of_sbatch(tmp_path):
    """What the promise of a save rests on: the signal goes to the steps, not to the shell, and the job may be queued again."""
    lines = (REPOSITORY / "scripts/slurm.sh").read_text().splitlines()
    head = lines[: lines.index("set -euo pipefail")]
    assert {"#SBATCH --signal=TERM@120", "#SBATCH --requeue", "#SBATCH --open-mode=append", "#SBATCH --ntasks-per-node=1"} <= set(head)
    assert all(not line or line.startswith("#") for line in head), "sbatch reads no option behind the first command"


def test_commands_in_the_header_are_legal(slurm, tmp_path):
    text = header(REPOSITORY / "scripts/slurm.sh").replace("\\\n", " ")
    commands = [line for line in text.splitlines() if "sbatch --" in line and line.startswith("  ")]
    assert len(commands) == 2
    for command in commands:
        assert slurm(command=command).returncode == 0
        options = options_of((tmp_path / "log" / "task1.0").read_text().split("\0")[:-1])
        assert options.save_dir in command and options.dataset == "citys" and options.resume


def test_restarts(tmp_path):
    """A rendezvous that a node can join again, held by node 0; on one node torchrun's own."""
    stub = tmp_path / "python"
    stub.write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    stub.chmod(0o755)
    path = REPOSITORY / "scripts/train_baseline.sh"
    for rank, host in (("0", "is_host=1"), ("1", "is_host=0")):
        nodes = {"NNODES": "2", "NODE_RANK": rank, "MASTER_ADDR": "first", "RESTARTS": "3"}
        arguments = command_of(stub, path, cwd=tmp_path, **nodes)
        assert arguments[:16] == ["-m", "torch.distributed.run", "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "first:29500",
                                  "--rdzv-id", "segkd", "--rdzv-conf", host, "--max-restarts", "3", "--nproc-per-node", "1"]  # fmt: skip
        assert options_of(arguments).resume
    one = command_of(stub, path, cwd=tmp_path, RESTARTS="2")
    assert one[2:7] == ["--standalone", "--max-restarts", "2", "--nproc-per-node", "1"]


@pytest.mark.parametrize("own", [None, "", "45"])
def test_launchers_give_a_save_ten_minutes(own, slurm, tmp_path):
    """torchrun kills 30 s after it was told to stop, unless a variable says otherwise; the user's own is kept."""
    stub = tmp_path / "grace"
    stub.write_text(f"#!/bin/sh\nprintf '%s' \"${GRACE}\"\n")
    stub.chmod(0o755)
    variables = {"PYTHON": str(stub), "GPUS": "2", "CHECKPOINT": "FILE"} | ({} if own is None else {GRACE: own})
    for name in ("train_baseline.sh", "train_kd.sh", "eval.sh", "compare.sh", "reproduce/kd_citys_deeplabv3_resnet18.sh"):
        done = bash(REPOSITORY / "scripts" / name, cwd=tmp_path, **variables)
        assert (done.returncode, done.stdout) == (0, own or "600"), name + done.stderr
    assert slurm("train_kd.sh", **variables).returncode == 0
    assert [(tmp_path / "log" / f"task{node}.0").read_text() for node in (0, 1)] == [own or "600"] * 2


@reads_grace
def test_torch_reads_the_variable(monkeypatch):
    """Under this name, in seconds, where its command line says nothing; else the promise of the launchers is empty."""
    monkeypatch.delenv(GRACE, raising=False)
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 30
    monkeypatch.setenv(GRACE, "600")
    assert LaunchConfig(1, 1, 1).shutdown_timeout == 600


# ------------------------------------------------------------------------------------------------------------------- for real

LENGTH = (*TINY, *RUN, "--workers", "0", "--max-iterations", "12", "--val-interval", "6", "--save-interval", "2")


class Node:
    """One node's agent with its rank, in a process group of its own: scripts/train_baseline.sh as a user starts it on that node."""

    def __init__(self, folder, rank: int, port: int, **variables):
        self.console = folder / f"node {rank} {port} {len(list(folder.glob('node*')))}.txt"
        environment = os.environ | {
            "PYTHON": sys.executable, "GPUS": "1", "OMP_NUM_THREADS": "1", "SAVE_DIR": str(folder / "run"),
            "NNODES": "2", "NODE_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), **variables,
        }  # fmt: skip
        with open(self.console, "w") as file:
            command = ["bash", str(REPOSITORY / "scripts/train_baseline.sh"), *LENGTH]
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        return self.console.read_text()

    def kill(self) -> None:
        """As when the node loses its power: the agent and its rank are gone at once."""
        for process in [self.process.pid, *children(self.process.pid)]:
            os.kill(process, signal.SIGKILL)
        self.process.wait()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def both(folder, **variables) -> list[Node]:
    port = free_port()
    return [Node(folder, rank, port, **variables) for rank in (0, 1)]


def finish(nodes) -> None:
    codes = [node.process.wait(TIMEOUT) for node in nodes]
    assert codes == [0, 0], "\n".join(node.text for node in nodes)


def reached(nodes, words: str) -> None:
    assert wait_for(lambda: any(words in node.text for node in nodes), TIMEOUT), "\n".join(node.text for node in nodes)


# train_baseline.py with a disk that is slow: the save at the end, not the one before the first step
SLOW_SAVE = f"""
import runpy, sys, time
from utils import checkpoint

save, seconds = checkpoint.save, float(sys.argv.pop(1))

def slow(path, content, *others):
    time.sleep(seconds if content["step"] else 0)
    save(path, content, *others)

checkpoint.save = slow
sys.argv[0] = {str(REPOSITORY / "train_baseline.py")!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@reads_grace
@pytest.mark.slow
@pytest.mark.parametrize("grace, seconds", [(None, 33), ("2", 5)])
def test_a_save_longer_than_torchrun_waits(grace, seconds, tmp_path):
    """Under a launcher one of more than torchrun's own 30 s is kept; the negative control takes longer than the user asked for, and is lost."""
    (tmp_path / "slow.py").write_text(SLOW_SAVE)
    length = ("--workers", "0", "--max-iterations", "1000", "--val-interval", "1000", "--save-interval", "1000", "--dist-timeout", "120")
    script = [os.path.relpath(tmp_path / "slow.py", REPOSITORY), str(seconds)]
    command = ["bash", "-c", 'source "$0"; launch "$@"', str(REPOSITORY / "scripts/environment.sh"), *script, *TINY, *RUN, *length,
               "--save-dir", "run"]  # fmt: skip
    environment = {name: value for name, value in os.environ.items() if name != GRACE} | ({GRACE: grace} if grace else {})
    with open(tmp_path / "console.txt", "w") as console:
        torchrun = subprocess.Popen(command, cwd=tmp_path, env=environment | {"PYTHON": sys.executable, "GPUS": "2"}, stdout=console, stderr=console)
    assert wait_for(lambda: "step 2/1000" in (tmp_path / "console.txt").read_text() or torchrun.poll() is not None, TIMEOUT)
    torchrun.terminate()
    assert torchrun.wait(TIMEOUT)
    text = (tmp_path / "console.txt").read_text()
    step = checkpoint.load(tmp_path / "run" / "last.pth")["step"]
    if grace:
        assert step == 0 and not (tmp_path / "run" / "INTERRUPTED").exists(), text
        assert re.search("Unable to shutdown process .* forcefully exiting", text), text
    else:
        said, again = (tmp_path / "run" / "INTERRUPTED").read_text().splitlines()
        assert step >= 2 and said == f"stopped after step {step}; go on with:", text
        assert again.startswith(f"{GRACE}=600 torchrun --nproc-per-node=2 "), again


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(both(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("restarts", ["0", "2"])
def test_a_killed_node_is_started_again(restarts, undisturbed, tmp_path):
    """Without restarts the other node ends by itself, and both are started again; with them it waits for the new one."""
    first = both(tmp_path, RESTARTS=restarts)
    reached(first, "step 5/12")
    first[1].kill()
    if restarts == "0":
        assert first[0].process.wait(60) != 0
        again = both(tmp_path)
        nodes = again
    else:
        again = [Node(tmp_path, 1, int(first[1].console.stem.split()[2]), RESTARTS=restarts)]
        nodes = [first[0], *again]
    finish(nodes)
    assert any("going on from step" in node.text for node in nodes)
    assert (tmp_path / "run" / "DONE").read_text() == (undisturbed / "run" / "DONE").read_text()
    assert differences(undisturbed, tmp_path) == []


@pytest.mark.slow
def test_a_job_that_is_preempted_goes_on_as_if_never_stopped(undisturbed, slurm, tmp_path):
    variables = {"PYTHON": sys.executable, "GPUS": "1", "OMP_NUM_THREADS": "1", "STOP_AT": "step 5/12", "MASTER_PORT": str(free_port())}
    done = slurm("train_baseline.sh", *LENGTH, **variables)
    text = done.stdout + "".join(path.read_text() for path in sorted((tmp_path / "log").glob("task*")))
    assert done.returncode == 0, text
    assert calls(tmp_path).count(f"scontrol requeue {JOB}") == 1 and "and --resume; the training's part:" in text and "going on from step" in text
    assert differences(undisturbed, tmp_path) == []
