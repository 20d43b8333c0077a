"""The only file that imports torch.distributed. On one process every function is the identity (or does nothing)."""

import os
import warnings
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

PATIENCE = timedelta(days=2)  # for work of one rank that the others wait for
_device = torch.device("cpu")  # of this process, see `init`
GRACE = ("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")  # seconds that torchrun, told to stop, gives a save before it kills; 30 without it


def launched() -> bool:
    """Whether torchrun (or a scheduler that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def several_nodes() -> bool:
    """Whether processes on other nodes were started along with this one."""
    return launched() and os.environ["WORLD_SIZE"] != os.environ.get("LOCAL_WORLD_SIZE", "1")


def init(device: str = "auto", timeout: float = 1800.0) -> torch.device:
    """Join the process group when launched by torchrun, and return this process's device.

    Args:
        device: "auto" (a GPU when there is one), "cpu" or "cuda".
        timeout: seconds after which a rank that waits for another gives up.

    Raises:
        ValueError: no such device; variables of torchrun's that are no numbers, or a part of them.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: no GPU is visible to torch; pass --device cpu, or check the driver and CUDA_VISIBLE_DEVICES")
    use_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    check_variables()
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    if use_cuda and local_rank >= torch.cuda.device_count():
        raise ValueError(f"local rank {local_rank} has no GPU: {torch.cuda.device_count()} visible; start at most that many processes per node")
    global _device
    _device = result = torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")
    if use_cuda:
        torch.cuda.set_device(result)
    if launched() and not dist.is_initialized():
        # gloo beside nccl: flags of the host are agreed on without touching the GPU
        dist.init_process_group("cpu:gloo,cuda:nccl" if use_cuda else "gloo", timeout=timedelta(seconds=timeout))
    return result


def device_name() -> str:
    """What this process computes on: the GPU's name, or "cpu"."""
    return torch.cuda.get_device_name(_device) if _device.type == "cuda" else "cpu"


def check_variables() -> None:
    """ValueError where torchrun's variables are not as torchrun sets them: left over from something else, or a scheduler's."""
    remedy = "start with torchrun, or unset RANK, WORLD_SIZE and LOCAL_RANK"
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        value = os.environ.get(name, "0")
        if not (value.isascii() and value.isdigit()):
            raise ValueError(f"the environment has {name}={value!r}, which is no number; {remedy}")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if launched() and missing:
        raise ValueError(f"the environment has RANK and WORLD_SIZE, and no {' and no '.join(missing)}; {remedy}")


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def lost_peer(error: Exception) -> bool:
    """Whether an error of this rank only says that another one is gone or hangs (gloo and NCCL raise plain RuntimeErrors)."""
    text = str(error).lower()
    return world() > 1 and isinstance(error, RuntimeError) and any(
        phrase in text for phrase in ("connection closed by peer", "connection reset by peer", "timed out", "broken pipe", "socket")
    )


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def leader() -> int:
    """The first rank of this rank's node (torchrun numbers the ranks of a node one after the other)."""
    return rank() - int(os.environ.get("LOCAL_RANK", 0)) if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main() -> bool:
    return rank() == 0


def barrier() -> None:
    if world() > 1:
        dist.all_reduce(torch.zeros(1))  # on gloo: NCCL's barrier guesses a device


def total(value: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, on every rank. Carries no gradient."""
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value)
    return value


def minimum(value: Tensor) -> Tensor:
    """Element-wise minimum over all ranks, on every rank."""
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value, dist.ReduceOp.MIN)
    return value


def any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; a small all-reduce on the host."""
    if world() == 1:
        return flag
    value = torch.tensor([int(flag)])
    dist.all_reduce(value, dist.ReduceOp.MAX)
    return bool(value.item())


def from_main(value):
    """Rank 0's value (a float, int or bool) on every rank."""
    if world() == 1:
        return value
    tensor = torch.tensor([float(value)], dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return type(value)(tensor.item())


def gather_text(text: str, limit: int = 2000, group=None) -> list[str]:
    """One string per rank, on every rank; cut to `limit` bytes."""
    if world() == 1:
        return [text]
    data = text.encode(errors="backslashreplace")[:limit]  # names of files may be no text
    row = torch.zeros(limit, dtype=torch.uint8)
    row[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else row[:0]
    return [bytes(r.tolist()).rstrip(b"\0").decode(errors="replace") for r in gather(row[None], group)]


def patient_gather():
    """`gather_text` of ranks that wait for each other for PATIENCE instead of --dist-timeout, while one of them works for hours; one that
    ends is noticed at once all the same, by its closed connection. To be called on every rank."""
    return partial(gather_text, group=dist.new_group(timeout=PATIENCE, backend="gloo") if world() > 1 else None)


def check_equal(what: str, value: str, remedy: str) -> None:
    """ValueError on every rank where the ranks' values differ: nodes may have other files under one path."""
    found = gather_text(value)
    if len(set(found)) > 1:
        listed = ", ".join(f"rank {number}: {text}" for number, text in enumerate(found) if text not in found[:number])
        raise ValueError(f"ranks differ in {what} ({listed}); {remedy}")


def gather(tensor: Tensor, group=None) -> Tensor:
    """Tensors of all ranks, equal in shape, concatenated along the first dimension in rank order. Carries no gradient."""
    if world() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts)


def gather_with_gradient(tensor: Tensor) -> Tensor:
    """As `gather`, with this rank's rows connected to its graph, times the number of ranks in the backward pass: DDP averages
    the gradients of the ranks, and every rank computes the whole loss, in which each row's gradient belongs to its own rank."""
    if world() == 1:
        return tensor
    rows = gather(tensor)
    start = rank() * len(tensor)
    return torch.cat([rows[:start], scale_gradient(tensor, world()), rows[start + len(tensor) :]])


def scale_gradient(tensor: Tensor, factor: float) -> Tensor:
    """The tensor's very value, with `factor` times its gradient."""
    return tensor.detach() + (tensor - tensor.detach()) * factor


def wrap(module: nn.Module, device: torch.device) -> nn.Module:
    """The module under DDP with SyncBatchNorm; on one process the module itself.

    SyncBatchNorm exists on GPUs only; on CPUs plain BatchNorm normalises with the rank's own images, and `average_buffers` keeps
    the running statistics equal. Buffers are not broadcast: SyncBatchNorm's are equal already, and class queues of several
    gigabytes would be sent each step.
    """
    if world() == 1:
        return module
    if device.type == "cuda":
        module = nn.SyncBatchNorm.convert_sync_batchnorm(module)
    with warnings.catch_warnings():
        # torch 2.15 wants the new name `forward_sync_buffers`, which torch 2.10 does not know
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
        return nn.parallel.DistributedDataParallel(module, broadcast_buffers=False, gradient_as_bucket_view=True)


def accumulating(module: nn.Module, more: bool):
    """Context of one micro-batch: while there are `more` to come in the step, gradients are not averaged over the ranks."""
    return module.no_sync() if more and world() > 1 else nullcontext()


def average_buffers(module: nn.Module) -> None:
    """Replace the running statistics of plain BatchNorm layers by their mean over the ranks, in one all-reduce."""
    if world() == 1:
        return
    layers = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and not isinstance(m, nn.SyncBatchNorm)]
    buffers = [b for m in layers for b in (m.running_mean, m.running_var) if b is not None]
    if buffers:
        flat = total(torch.cat([b.flatten() for b in buffers])) / world()
        for buffer, value in zip(buffers, flat.split([b.numel() for b in buffers]), strict=True):
            buffer.copy_(value.view_as(buffer))
