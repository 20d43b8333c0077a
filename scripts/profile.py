"""What networks cost to run, side by side: parameters, arithmetic, latency, memory, size of the file.

    python -m scripts.profile --models deeplabv3:resnet101 deeplabv3:mobilenetv2 --sizes 360x480 512x1024
    python -m scripts.profile --checkpoints teacher.pth runs/kd/student_best.pth --sizes 512x1024 --output profile
    OMP_NUM_THREADS=1 python -m scripts.profile ...                    # one thread of a CPU

Networks as they are shipped (`models/deploy.py`): without auxiliary heads, BatchNorms folded. Latency is from the uint8 pictures on the
device to their labels, or with --until logits to the scores at the model's stride; the networks take turns, so that what else the machine
does meets all of them. GMACs are of one picture (`models/cost.py`), time and memory of one batch. Memory is the largest sum of bytes of the
tensors that a pass makes and that live at once, without weights and without scratch memory inside an operation; on a GPU, of its allocator.
A file is the state dict in float32.

The path for GPUs, which times with CUDA events, has not been run: no GPU was at hand.
"""

import io
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from models import Segmentor, build_model, count_macs, count_parameters
from models.deploy import deployable
from models.weights import model_from_checkpoint
from scripts.benchmark import cpu_name
from scripts.watch import watched
from utils import distributed
from utils.engine import AMP, memory_format
from utils.log import logger, progress_bar
from utils.metrics import Inference
from utils.options import profile_options
from utils.run import command, environment, write_text, writing
from utils.session import run_script

PERCENTILES = (50, 90, 99)


def main(options, device) -> None:
    if distributed.world() > 1:
        raise ValueError(f"networks are profiled by one process, {distributed.world()} were started; start it without torchrun")
    output = Path(options.output) if options.output else None
    if output is not None:
        if output.exists() and not output.is_dir():
            raise ValueError(f"--output {output}: is a file; give a folder")
        with writing(output):
            output.mkdir(parents=True, exist_ok=True)
    networks = {name: prepared(model, options, device) for name, model in named_models(options).items()}
    rows = [row for size in options.sizes for row in profile(networks, size, options, device)]
    if device.type == "cuda":
        machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    else:
        machine = {"device": f"{cpu_name()}, {torch.get_num_threads()} threads", "torch": torch.__version__}
    text = f"{heading(machine, options)}\n\n{markdown(rows)}\n"
    logger.info("%s", text.rstrip())
    if output is not None:
        plain = {"machine": machine, "rows": rows, "options": options.plain(), "command": command(), "environment": environment()}
        write_text(output / "profile.json", json.dumps(plain, indent=1) + "\n")
        write_text(output / "profile.md", text)


def named_models(options) -> dict[str, Segmentor]:
    """The networks by the names of the table's rows: what was typed."""
    models = {}
    for model, backbone, width in options.models:
        name = ":".join(map(str, filter(None, (model, backbone, width))))
        torch.manual_seed(0)
        models[name] = build_model(model, backbone, options.num_classes, head_width=width)
    return models | {path: model_from_checkpoint(path)[0] for path in options.checkpoints}


def prepared(model: Segmentor, options, device) -> Segmentor:
    model, _ = deployable(model, fold=options.fold)
    return model.to(device=device, memory_format=memory_format(options, device))


def file_bytes(model: Segmentor) -> int:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    return len(file.getvalue())


@torch.no_grad()
def profile(networks: dict[str, Segmentor], size: tuple[int, int], options, device) -> list[dict]:
    """One row per network at one size: times in ms, memory in MiB."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randint(0, 256, (options.batch_size, 3, *size), generator=generator, dtype=torch.uint8).to(device)
    image = image.contiguous(memory_format=memory_format(options, device))
    infer, amp = Inference(), AMP[options.amp]

    def run(model):
        with torch.autocast(device.type, dtype=amp) if amp else nullcontext():
            return infer(model, image) if options.until == "labels" else model(image).logits

    passes = {name: lambda model=model: run(model) for name, model in networks.items()}
    times = interleaved(passes, options.repeats, options.warmup, lambda function: milliseconds(function, device))
    rows = []
    for name, model in networks.items():
        latency = dict(zip(PERCENTILES, np.percentile(times[name], PERCENTILES).tolist(), strict=True))
        rows.append({
            "network": name, "height": size[0], "width": size[1], "batch_size": options.batch_size, "parameters": count_parameters(model),
            "macs": count_macs(model, *size), **{f"p{percentile}_ms": value for percentile, value in latency.items()},
            "peak_mib": watched(passes[name], device).peak / 2**20, "file_bytes": file_bytes(model),
        })  # fmt: skip
    return rows


def interleaved(passes: dict[str, Callable], repeats: int, warmup: int, clock: Callable) -> dict[str, list[float]]:
    """{name: what the clock says of each of its timed passes}. The networks take turns, every other round in reverse, so that none
    always follows the same one."""
    times = {name: [] for name in passes}
    with progress_bar((repeats + warmup) * len(passes), unit="pass", description="profile") as bar:
        for number in range(-warmup, repeats):
            for name in [*passes][:: -1 if number % 2 else 1]:
                elapsed = clock(passes[name])
                if number >= 0:
                    times[name].append(elapsed)
                bar.update()
    return times


def milliseconds(function: Callable, device: torch.device) -> float:
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - start)


def heading(machine: dict, options) -> str:
    pictures = "one picture" if options.batch_size == 1 else f"{options.batch_size} pictures"
    folded = "BatchNorms folded" if options.fold else "BatchNorms as trained"
    return f"{machine['device']}, torch {machine['torch']}; {pictures} to {options.until}, autocast {options.amp}, {folded}, {options.repeats} passes"


def markdown(rows: list[dict]) -> str:
    """The table, aligned: reads as text too."""
    head = ["network", "size", "M parameters", "GMAC", *(f"p{percentile} ms" for percentile in PERCENTILES), "peak MiB", "file MB"]
    cells = [
        [row["network"], f"{row['height']}x{row['width']}", f"{row['parameters'] / 1e6:.2f}", f"{row['macs'] / 1e9:.2f}",
         *(f"{row[f'p{percentile}_ms']:.1f}" for percentile in PERCENTILES), f"{row['peak_mib']:.1f}", f"{row['file_bytes'] / 1e6:.2f}"]
        for row in rows
    ]  # fmt: skip
    widths = [max(map(len, column)) for column in zip(head, *cells, strict=True)]
    rule = ["-" * width if number < 2 else "-" * (width - 1) + ":" for number, width in enumerate(widths)]

    def line(row):
        return "| " + " | ".join(f"{cell:{'<' if n < 2 else '>'}{width}}" for n, (cell, width) in enumerate(zip(row, widths, strict=True))) + " |"

    return "\n".join([line(head), line(rule), *map(line, cells)])


if __name__ == "__main__":
    run_script(main, profile_options(description=__doc__))
