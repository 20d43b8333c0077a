"""Omni-contrast of dense features inside patches: the plain form, and a fused one that never holds all distances.

A 45x45 map of 2048 channels has 121 patches, a patch 256 cells of 128 channels: four images are 32 million distances. The plain form
keeps several tensors of that many numbers until the backward pass. The fused form takes one row of patches at a time and its gradient
in the same pass, while the distances are still in the cache. On a GPU the same is one Triton kernel (`_contrast_triton.py`).
"""

import functools
import importlib
import importlib.util

import torch
import torch.nn.functional as F
from torch import Tensor

from losses.functional import full_precision, softmax_with_sum, widen
from utils.log import logger

FORMS = ("auto", "plain", "fused")
# differences |student - teacher| of a step from which compiling pays: at 2^30 it saves 0.15 s per step, and takes 2 to 10 s once
COMPILE_FROM = 1 << 30


def contrast(
    generated: Tensor,
    teacher: Tensor,
    pool: int = 4,
    patch: int = 4,
    groups: int = 16,
    tau: float = 0.07,
    negatives: str = "released",
    distance: str = "l1",
    mean: bool = False,
    form: str = "auto",
) -> Tensor:
    """Omni-contrast of two maps (B, C, h, w) inside patches, in float32 whatever the maps are in; vectors are not normalised.

    Anchor: the student's cell (pixel n, group k) of a patch; positive: the teacher's cell (n, k). Negatives, all the teacher's:
    `released` (n', k') with k' != k at any pixel n'; `omni` every other cell; `channel` the other groups at the pixel n;
    `spatial` whole pixel vectors at the other pixels (one group).

    Args:
        pool: max-pooling of both maps first, 0 for none; what does not fill a patch at the right and the bottom is left out.
        form: "plain" as written, with a gradient for both maps; "fused" equal to rounding, in blocks, with a gradient for `generated`
            alone, on a CPU compiled; "auto" is fused, on a CPU plain for `spatial` and compiled where the size repays it.

    Returns: the sum over groups of the mean over pixels of -log softmax(-distance / tau) at the positive; `mean`: the mean over
    all anchors, smaller by the number of groups.

    Raises: ValueError when the pooled map is smaller than a patch.
    """
    height, width = generated.shape[-2:]
    if min(height, width) // max(pool, 1) < patch:
        smaller = "a smaller " + f"--afdcd-pool than {pool} or " * (pool > 1) + f"--afdcd-patch than {patch}"
        raise ValueError(f"the map to contrast, {height}x{width} unpooled, has no {patch}x{patch} patch; pass a larger --crop-size or {smaller}")
    if pool:
        generated, teacher = F.max_pool2d(generated, pool), F.max_pool2d(teacher, pool)
    if negatives == "spatial":
        groups = 1
    settings = (patch, groups, tau, negatives, distance)
    # `spatial` has 16 cells in a patch, too few to save anything: fused it takes 1 to 2.3 times as long on a CPU
    if form == "plain" or (form == "auto" and negatives == "spatial" and not generated.is_cuda):
        loss = plain_contrast(generated, teacher, *settings)
    else:
        loss = fused_contrast(generated, teacher, *settings, compiled=True if form == "fused" else None)
    return loss if mean else loss * groups


@full_precision
def plain_contrast(generated: Tensor, teacher: Tensor, patch: int, groups: int, tau: float, negatives: str, distance: str) -> Tensor:
    """Mean over all anchors, from one tensor of all distances (patches, cells, cells): several times the maps, and on a GPU the
    gradient of `torch.cdist` with l1 takes the maps' size times the cells of a patch."""
    student_cells, teacher_cells = to_cells(generated, patch, groups), to_cells(teacher, patch, groups)
    similarity = -plain_distances(student_cells, teacher_cells, distance == "l1") / tau
    if (excluded := excluded_cells(patch * patch, groups, negatives, generated.device)) is not None:
        similarity = similarity.masked_fill(excluded, -torch.inf)
    return (similarity.logsumexp(-1) - similarity.diagonal(dim1=-2, dim2=-1)).mean()


def plain_distances(student: Tensor, teacher: Tensor, l1: bool, most: int = 2**31 - 1) -> Tensor:
    """`distances` by torch.cdist, whose gradient on a GPU has cells times the numbers of the student and counts them in 32 bits: as many
    patches at a time as have no more than `most`, at least one."""
    step = max(1, most // max(1, student[0].numel() * teacher.shape[1]))
    # the matrix product form of l2 loses the small distances, which decide at tau 0.07
    measure = functools.partial(torch.cdist, p=1.0 if l1 else 2.0, compute_mode="donot_use_mm_for_euclid_dist")
    parts = [measure(*part) for part in zip(student.split(step), teacher.split(step), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def fused_contrast(
    generated: Tensor, teacher: Tensor, patch: int, groups: int, tau: float, negatives: str, distance: str, compiled: bool | None = None
) -> Tensor:
    """`plain_contrast` without a tensor of all distances, and without a gradient for the teacher.

    Args:
        compiled: whether a CPU runs compiled kernels; None: from `COMPILE_FROM` differences on.
    """
    assert not teacher.requires_grad, "the fused contrast has no gradient for the teacher"
    with torch.autocast(generated.device.type, enabled=False):
        return _FusedContrast.apply(generated, teacher, patch, groups, tau, negatives, distance == "l1", compiled)


class _FusedContrast(torch.autograd.Function):
    """The gradient of an anchor's loss with respect to its distances is (1 at the positive - softmax) / tau, at hand in the forward
    pass. What is kept for the backward pass is the gradient per anchor, or the few pairs of cells that it is the sum of."""

    @staticmethod
    def forward(ctx, generated, teacher, patch, groups, tau, negatives, l1, compiled):
        batch, rows, columns, *_, width = cell_view(generated, patch, groups).shape
        cells, excluded = patch * patch * groups, None
        anchors = batch * rows * columns * cells
        if negatives == "channel":
            cells = groups  # an anchor meets its own pixel alone: a patch of one pixel, and 1/16 of the distances of a 4x4 patch
        else:
            excluded = excluded_cells(patch * patch, groups, negatives, generated.device)
        if tile := triton_tile(generated.device):
            bands = [...]
        else:
            if compiled is None:
                compiled = anchors * cells * width >= COMPILE_FROM
            kernel = None
            if compiled and not generated.is_cuda:
                dtype = torch.promote_types(generated.dtype, torch.float32)
                kernel = compiled_distances(columns * patch * patch * groups // cells, cells, width, l1, dtype)
            tile = functools.partial(plain_tile, measure=kernel or distances)
            bands = [(image, row) for image in range(batch) for row in range(rows)]
        ctx.shape = patch, groups, cells
        ctx.bands, ctx.anchors, ctx.l1, ctx.kept = bands, anchors, l1, []
        total = torch.zeros((), dtype=torch.float64, device=generated.device)
        for band in bands:
            losses, kept = tile(*cells_of(band, ctx.shape, generated, teacher), excluded, tau, l1, ctx.needs_input_grad[0])
            total += losses.sum(dtype=torch.float64)
            ctx.kept.append(kept)
        ctx.save_for_backward(generated, teacher)
        return (total / anchors).to(losses.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, scale):
        generated, teacher = ctx.saved_tensors
        gradient = torch.zeros_like(generated)
        for band, kept in zip(ctx.bands, ctx.kept, strict=True):
            change = kept if isinstance(kept, Tensor) else pull_pairs(*kept, *cells_of(band, ctx.shape, generated, teacher), ctx.l1)
            target = cell_view(gradient, *ctx.shape[:2])[band]
            # scaled before it is rounded to the map's type: per anchor, and without a loss scale, float16 would lose it
            target.copy_((change * (scale / ctx.anchors)).view(target.shape))
        return gradient, *[None] * 7


def cells_of(band, shape: tuple[int, int, int], *maps: Tensor) -> list[Tensor]:
    """The cells (P, n, C) of some patches of each map, in float32 or float64; `shape` is the patch, the groups and n."""
    patch, groups, cells = shape
    return [widen(view[band].reshape(-1, cells, view.shape[-1])) for view in (cell_view(x, patch, groups) for x in maps)]


def plain_tile(student: Tensor, teacher: Tensor, excluded: Tensor | None, tau: float, l1: bool, with_gradient: bool, measure):
    """The losses of the anchors of a few patches, and what their gradient takes: cells (P, n, C), (P, n, C) -> (P, n) and either the
    gradient (P, n, C) or, where few pairs of cells matter, the arguments of `pull_pairs` in front of the cells; () for none."""
    distance = measure(student, teacher, l1)  # (P, n, n)
    similarity = distance / -tau
    if excluded is not None:
        similarity.masked_fill_(excluded, -torch.inf)
    weights, log_sum = softmax_with_sum(similarity, -1)
    losses = log_sum - similarity.diagonal(dim1=-2, dim2=-1)
    if not with_gradient:
        return losses, ()
    weights.diagonal(dim1=-2, dim2=-1).sub_(1)
    # the sum over teacher cells rounds off smaller ones; distances of 100 over tau 0.07 leave two or three in 256
    matters = weights.abs() > torch.finfo(weights.dtype).eps / teacher.shape[1]
    weights /= -tau
    if not l1:
        weights = torch.where(distance > 0, weights / distance, 0)
    # finding the pairs blocks a GPU, and beyond one in 40 of them the gathers cost more than all differences
    if not student.is_cuda and 40 * matters.count_nonzero() <= matters.numel():
        anchors, others = matters.flatten(0, 1).nonzero(as_tuple=True)  # of P * n, of n
        return losses, (anchors.int(), others.int(), weights[matters])
    return losses, pull(weights, student, teacher, l1)


def distances(student: Tensor, teacher: Tensor, l1: bool) -> Tensor:
    """All distances inside patches: (P, n, C), (P, n, C) -> (P, n, n)."""
    found = student.new_empty(*student.shape[:2], teacher.shape[1])
    for block, difference in differences(student, teacher):
        found[block] = (difference.abs_() if l1 else difference.square_()).sum(-1)
    return found if l1 else found.sqrt_()


def pull(weights: Tensor, student: Tensor, teacher: Tensor, l1: bool) -> Tensor:
    """Sum over teacher cells of weight * sign(student - teacher), l2: weight * (student - teacher): (P, n, n), ... -> (P, n, C)."""
    found = torch.empty_like(student)
    for block, difference in differences(student, teacher):
        found[block] = (weights[block][..., None, :] @ (difference.sign_() if l1 else difference)).squeeze(-2)
    return found


def pull_pairs(anchors: Tensor, others: Tensor, weights: Tensor, student: Tensor, teacher: Tensor, l1: bool) -> Tensor:
    """`pull` from some pairs alone: anchors, of all P * n, others, of the n in the anchor's patch, and their weights, (pairs,) each."""
    cells = teacher.shape[1]
    difference = student.flatten(0, 1)[anchors].sub_(teacher.flatten(0, 1)[anchors // cells * cells + others])  # (pairs, C)
    change = (difference.sign_() if l1 else difference).mul_(weights[:, None])
    return torch.zeros_like(student).flatten(0, 1).index_add_(0, anchors, change).view_as(student)


def differences(student: Tensor, teacher: Tensor):
    """Blocks of student - teacher for all pairs of cells in a patch: (index of patches and anchors, (p, a, n, C)), in one buffer that
    a CPU's cache holds (4 MiB), 64 MiB on a GPU."""
    patches, cells, width = teacher.shape
    size = 1 << (24 if teacher.is_cuda else 20)
    anchors = max(1, min(cells, size // (cells * width)))
    step = max(1, min(patches, size // (anchors * cells * width)))
    buffer = student.new_empty(step, anchors, cells, width)
    for patch in range(0, patches, step):
        for anchor in range(0, cells, anchors):
            block = slice(patch, patch + step), slice(anchor, anchor + anchors)
            ours, theirs = student[block][:, :, None], teacher[block[0], None]
            yield block, torch.sub(ours, theirs, out=buffer[: ours.shape[0], : ours.shape[1]])


@functools.cache
def compiled_distances(patches: int, cells: int, width: int, l1: bool, dtype: torch.dtype):
    """`distances` compiled for a CPU and one shape; None, with a line in the log, where that fails."""

    def whole(student, teacher, l1):
        if not torch.compiler.is_compiling():  # switched off by the environment, or in a dispatch mode such as a counter of operations
            return distances(student, teacher, l1)
        difference = student[:, :, None] - teacher[:, None]
        return difference.abs().sum(-1) if l1 else difference.square().sum(-1).sqrt()

    kernel = torch.compile(whole, dynamic=False)  # nothing in it breaks the graph; fullgraph=True would raise in a dispatch mode (torch 2.14)
    example = torch.zeros(patches, cells, width, dtype=dtype)
    try:
        with torch.no_grad():  # as it is called later: the mode is a part of what is compiled
            kernel(example, example, l1)
    except Exception as error:  # no compiler, one that does not work, a platform without inductor: each raises something else
        logger.warning("Af-DCD's contrast is not compiled and takes twice the time (%s: %s)", type(error).__name__, str(error).split("\n")[0])
        return None
    return kernel


@functools.cache
def triton_tile(device: torch.device):
    """What a GPU runs instead of `plain_tile`; None on a CPU, without Triton, and, with a line in the log, where the kernel fails."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return None
    try:
        tile = importlib.import_module("losses._contrast_triton").tile
        cells = torch.zeros(1, 256, 128, device=device)  # one patch as published
        tile(cells, cells, excluded_cells(16, 16, "released", device), 1.0, True, True)
    except Exception as error:  # a broken Triton, no C compiler, a GPU that it does not know, one with too little memory in its cores
        logger.warning("Af-DCD's contrast runs without its Triton kernel and takes longer (%s: %s)", type(error).__name__, str(error).split("\n")[0])
        return None
    return tile


def cell_view(x: Tensor, patch: int, groups: int) -> Tensor:
    """(B, C, h, w) -> a view (B, rows, columns, patch, patch, groups, C/groups) of the whole patches from the top left."""
    rows, columns = x.shape[-2] // patch, x.shape[-1] // patch
    x = x[..., : rows * patch, : columns * patch].unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).unflatten(1, (groups, -1))
    return x.permute(0, 3, 5, 4, 6, 1, 2)


def to_cells(x: Tensor, patch: int, groups: int) -> Tensor:
    """(B, C, h, w) -> (patches, patch*patch*groups, C/groups): whole patches from the top left, cells ordered by pixel, then group."""
    return cell_view(x, patch, groups).flatten(3, 5).flatten(0, 2)


def excluded_cells(pixels: int, groups: int, negatives: str, device=None) -> Tensor | None:
    """(cells, cells) bool: teacher cells that are neither positive nor negative of an anchor; None when there are none."""
    if negatives in ("omni", "spatial"):
        return None
    cell = torch.arange(pixels * groups, device=device)
    pixel, group = cell // groups, cell % groups
    same_pixel, same_group = pixel[:, None] == pixel, group[:, None] == group
    return same_group & ~same_pixel if negatives == "released" else ~same_pixel
