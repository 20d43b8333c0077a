"""A frozen network without its BatchNorms: each becomes part of the convolution in front of it."""

import copy

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

TOLERANCE = 1e-9  # of the largest value of an output, in double precision; a pair that must not be folded changes the first digits


class FoldedNorm(nn.Identity):
    """What is left of a folded BatchNorm: nothing to compute, and its weight and bias, which `Segmentor.norms` hands to methods."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.register_buffer("weight", norm.weight.detach())
        self.register_buffer("bias", norm.bias.detach())


@torch.no_grad()
def fold_batchnorm(model: nn.Module, needs, size: tuple[int, int] = (64, 64)) -> tuple[nn.Module, int]:
    """(a copy in evaluation mode with the same outputs in `needs`, the number of BatchNorms that it lost); (the model, 0) where a fold
    would change an output.

    Which BatchNorm follows which convolution is seen in a pass over a picture of `size`, not guessed from names: a pair is folded if
    each of the two ran once and the one got the very tensor that the other returned. That the convolution's output went nowhere else
    cannot be seen this way, so the outputs are compared before and after, in double precision.
    """
    folded = copy.deepcopy(model).eval().double()
    channels = model.config["in_channels"]
    device = next(folded.parameters()).device
    image = 255 * torch.rand(1, channels, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(device)
    try:
        before, pairs = run_and_watch(folded, image, needs)
    except RuntimeError:  # a network from elsewhere that insists on single precision
        return model, 0
    for conv, (name, norm) in pairs:
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )  # fmt: skip
        parent, _, child = name.rpartition(".")
        setattr(folded.get_submodule(parent), child, FoldedNorm(norm))
    after = folded(image, needs)
    for need in needs:
        expected, found = getattr(before, need), getattr(after, need)
        if not (found - expected).abs().max() <= TOLERANCE * expected.abs().max():
            return model, 0
    return folded.to(next(model.parameters()).dtype).requires_grad_(False), len(pairs)


def run_and_watch(model: nn.Module, image, needs):
    """(the model's output, [(convolution, (name, BatchNorm)) ...]) of the pairs in which a BatchNorm took a convolution's output."""
    norms = {m: n for n, m in model.named_modules() if isinstance(m, nn.BatchNorm2d) and m.affine and m.track_running_stats}
    convs = [module for module in model.modules() if type(module) is nn.Conv2d]  # no subclass, which may compute with other weights
    calls, made, taken = {}, [], []  # times each module ran; (convolution, what it returned); (BatchNorm, what it took)

    def watch_conv(module, args, output):
        calls[module] = calls.get(module, 0) + 1
        made.append((module, output))

    def watch_norm(module, args, output):
        calls[module] = calls.get(module, 0) + 1
        taken.append((module, args[0]))

    handles = [m.register_forward_hook(watch_conv) for m in convs] + [m.register_forward_hook(watch_norm) for m in norms]
    try:
        output = model(image, needs)
    finally:
        for handle in handles:
            handle.remove()
    source = {id(tensor): conv for conv, tensor in made}  # `made` keeps the tensors alive, so that no id is given twice
    pairs = [(source[id(tensor)], (norms[norm], norm)) for norm, tensor in taken if id(tensor) in source]
    return output, [(conv, pair) for conv, pair in pairs if calls[conv] == calls[pair[1]] == 1]
