"""The fused contrast on a GPU, in Triton: distances, softmax and gradient of some anchors of one patch in one program.

Not yet run on a GPU: checked in Triton's interpreter against the plain form (tests/test_contrast.py). Imported where a GPU and Triton,
which comes with the CUDA builds of PyTorch, are there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

DISTANCES = 8192  # of one program, in registers: 32 anchors of a patch of 256 cells


def tile(student: Tensor, teacher: Tensor, excluded: Tensor | None, tau: float, l1: bool, with_gradient: bool):
    """The losses of all anchors and their gradient: cells (P, n, C), (P, n, C) -> (P, n), (P, n, C) or (); inside in float32."""
    patches, cells, width = student.shape
    # cells side by side, so that the threads of a program, one to a teacher's cell, read what lies together
    ours, theirs = student.float().mT.contiguous(), teacher.float().mT.contiguous()  # (P, C, n)
    losses = ours.new_empty(patches, cells)
    gradient = torch.empty_like(ours) if with_gradient else None
    columns = triton.next_power_of_2(cells)
    rows = min(columns, max(1, DISTANCES // columns))
    with torch.cuda.device_of(student):
        _contrast[(patches, triton.cdiv(cells, rows))](
            ours, theirs, None if excluded is None else excluded.to(torch.int8), losses, gradient, cells, width, 1 / tau,
            ROWS=rows, COLUMNS=columns, L1=l1, EXCLUDES=excluded is not None, GRADIENT=with_gradient, num_warps=8,
        )  # fmt: skip
    return losses.to(student.dtype), gradient.mT.to(student.dtype) if with_gradient else ()


@triton.jit
def _contrast(
    student, teacher, excluded, losses, gradient, cells, width, inverse_tau,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, L1: tl.constexpr, EXCLUDES: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    patch = tl.program_id(0).to(tl.int64)
    row, column = tl.program_id(1) * ROWS + tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    row_exists, column_exists = row < cells, column < cells
    start = patch * cells * width
    distance = tl.zeros((ROWS, COLUMNS), tl.float32)
    for channel in range(width):
        x = tl.load(student + start + channel * cells + row, mask=row_exists, other=0.0)
        t = tl.load(teacher + start + channel * cells + column, mask=column_exists, other=0.0)
        difference = x[:, None] - t[None, :]
        distance += tl.abs(difference) if L1 else difference * difference
    if not L1:
        distance = tl.sqrt(distance)
    similarity = tl.where(column_exists[None, :], -distance * inverse_tau, float("-inf"))
    if EXCLUDES:
        exists = row_exists[:, None] & column_exists[None, :]
        drop = tl.load(excluded + row[:, None] * cells + column[None, :], mask=exists, other=0)
        similarity = tl.where(drop != 0, float("-inf"), similarity)
    own = row[:, None] == column[None, :]
    largest = tl.max(similarity, 1)
    share = tl.exp(similarity - largest[:, None])
    total = tl.sum(share, 1)
    positive = tl.sum(tl.where(own, similarity, 0.0), 1)
    tl.store(losses + patch * cells + row, tl.log(total) + largest - positive, mask=row_exists)
    if GRADIENT:
        weight = (tl.where(own, 1.0, 0.0) - share / total[:, None]) * inverse_tau
        if not L1:
            weight = tl.where(distance > 0, weight / tl.where(distance > 0, distance, 1.0), 0.0)
        for channel in range(width):
            x = tl.load(student + start + channel * cells + row, mask=row_exists, other=0.0)
            t = tl.load(teacher + start + channel * cells + column, mask=column_exists, other=0.0)
            difference = x[:, None] - t[None, :]
            if L1:
                difference = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, 0.0))
            tl.store(gradient + start + channel * cells + row, tl.sum(weight * difference, 1), mask=row_exists)
