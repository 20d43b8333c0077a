"""What torch is asked to do: operations, waits of the host for the device, memory. Shared by the benchmark and the tests."""

import gc
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

REPOSITORY = Path(__file__).parent.parent
# operations whose value or size the host has to know: on a GPU each waits until everything before it is done
BLOCKING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "_assert_async", "item", "equal", "allclose")


class Watch(TorchDispatchMode):
    """Inside, counts what torch's dispatcher sees, forward and backward.

    operations: those that compute; views do not. On a GPU each is one launch or few.
    blocks: where in this project a wait of the host comes from, "file:function", for each one. `bincount` and copies to the host count
        on a GPU alone.
    peak: largest sum of bytes of the tensors that were made inside and alive at once. Scratch memory within an operation, and what
        compiled code allocates, is not seen.
    flops: of products and convolutions, two per multiply-add, by the type that they are computed in.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.blocks, self.peak, self.live, self.flops = 0, [], 0, 0, Counter()
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        name = function.name().partition("::")[2].partition(".")[0]
        if name in BLOCKING or self.picks_by_mask(name, arguments) or self.leaves_device(name, arguments, keywords or {}):
            self.blocks.append(caller())
        given = {storage_key(leaf) for leaf in tree_leaves((arguments, keywords)) if isinstance(leaf, Tensor)}
        result = function(*arguments, **(keywords or {}))
        if name == "_linear_pointwise":  # oneDNN's product, which torch does not count
            self.flops[arguments[0].dtype] += 2 * arguments[0].numel() * len(arguments[1])
        elif (count := flop_registry.get(function._overloadpacket)) is not None:
            computed_in = next(leaf.dtype for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor))
            self.flops[computed_in] += count(*arguments, **(keywords or {}), out_val=result)
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        writes = any(argument.alias_info is not None and argument.alias_info.is_write for argument in function._schema.arguments)
        self.operations += writes or any(storage_key(tensor) not in given for tensor in made)
        for tensor in made:
            self.keep(tensor, given)
        return result

    def keep(self, tensor: Tensor, given: set[int]) -> None:
        """Count a new tensor's memory until nothing uses it."""
        storage = tensor.untyped_storage()
        if storage_key(tensor) in given or storage in self.known:
            return
        size = storage.nbytes()
        self.known.add(storage)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.forget, size)

    def forget(self, size: int) -> None:
        self.live -= size

    @staticmethod
    def picks_by_mask(name: str, arguments) -> bool:
        return name == "index" and any(isinstance(index, Tensor) and index.dtype == torch.bool for index in arguments[1])

    @staticmethod
    def leaves_device(name: str, arguments, keywords) -> bool:
        """A copy from a GPU to the host, and a count of a GPU's numbers, which reads the largest one."""
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        if name == "copy_":
            return len(tensors) == 2 and tensors[1].is_cuda and not tensors[0].is_cuda
        target = keywords.get("device")
        on_gpu = bool(tensors) and tensors[0].is_cuda
        return on_gpu and (name == "bincount" or (name == "_to_copy" and target is not None and torch.device(target).type == "cpu"))


def watched(function: Callable, device: torch.device) -> Watch:
    """What it does, in a run of its own; on a GPU `peak` is the allocator's."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Watch() as watch:
        function()
    if on_gpu:
        watch.peak = torch.cuda.max_memory_allocated() - before
    return watch


def storage_key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def caller() -> str:
    """"file:function" of the innermost frame of this project."""
    frame = sys._getframe(2)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(REPOSITORY) and "site-packages" not in path.parts:
            return f"{path.relative_to(REPOSITORY)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "torch"
