"""Measures of rows that are read a block at a time."""

from typing import Any

import torch
from torch import Tensor

from mmfast.gap._sides import Side, block_size, grid, triangle
from mmfast.gap.files import open_rows
from mmfast.ops._inputs import SCORE_TYPE
from mmfast.ops._statistics import PairwiseStats
from mmfast.ops.pairwise_stats import pairwise_stats


def open_sides(who: str, normalize: bool, budget: int, *sources: Any) -> list[Side]:
    """Sides of one width, in the widest type of their products."""
    rows = [open_rows(source) for source in sources]
    for side in rows[1:]:
        if side.shape[1] != rows[0].shape[1]:
            raise ValueError(
                f"{who}: {side.name} must be {rows[0].shape[1]} wide like {rows[0].name}, "
                f"got {side.shape[1]}"
            )
    double = any(SCORE_TYPE[side.dtype] == torch.float64 for side in rows)
    dtype = torch.float64 if double else torch.float32
    size = block_size(who, rows[0].shape[1], budget, dtype)
    return [Side(side, None, size, dtype, normalize) for side in rows]


def mean(side: Side) -> Tensor:
    """Of all rows [D], summed in float64."""
    total = torch.zeros(side.width, dtype=torch.float64)
    for block in range(len(side.blocks)):
        total += side.unit(block).sum(0, dtype=torch.float64)
    return (total / len(side)).to(side.dtype)


def products(sides: list[Side], **options: Any) -> PairwiseStats:
    """`pairwise_stats` of two sides, or of the distinct rows of one."""
    x, y = sides[0], sides[-1]
    found = None
    for i, j in triangle(x) if x is y else grid(x, y):
        same = x is y and i == j
        part = pairwise_stats(
            x.unit(i),
            None if same else y.unit(j),
            row_offset=i * x.size,
            column_offset=0 if same else j * y.size,
            **options,
        )
        found = part if found is None else found + part
    assert found is not None
    return found
