"""The model: one small head per modality into a joint space, and a scale that is learned."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE_WIDTH, TEXT_WIDTH, WIDTH = 1280, 384, 256
# from the widths of its input and output
MakeHead = Callable[[int, int], nn.Module]


class Unit(nn.Module):
    """Rows [B, D] of length 1."""

    def forward(self, rows: Tensor) -> Tensor:
        return F.normalize(rows)


def small_head(width_in: int, width_out: int, hidden: int = 512) -> nn.Sequential:
    """From features [B, width_in] to unit rows [B, width_out]."""
    return nn.Sequential(
        nn.Dropout(0.3),
        nn.Linear(width_in, hidden),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.Linear(hidden, width_out),
        Unit(),
    )


class FirstColumns(nn.Module):
    """A head that does nothing, for measuring what a loss costs without heads."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.width = width_out

    def forward(self, rows: Tensor) -> Tensor:
        return rows[:, : self.width]


class TwoHeads(nn.Module):
    """One head for images, one for texts."""

    def __init__(self, make_head: MakeHead = small_head):
        super().__init__()
        self.image = make_head(IMAGE_WIDTH, WIDTH)
        self.text = make_head(TEXT_WIDTH, WIDTH)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Unit rows (image [B, 256], text [B, 256]) of features [B, 1280] and [B, 384]."""
        return self.image(image), self.text(text)


class Scale(nn.Module):
    """What multiplies similarities: learned as a logarithm, 100 at most."""

    def __init__(self, first: float):
        super().__init__()
        self.log = nn.Parameter(torch.tensor(math.log(first)))

    def forward(self) -> Tensor:
        return self.log.exp().clamp(max=100)
