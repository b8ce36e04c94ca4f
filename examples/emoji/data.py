"""The pairs: features of 1,886 emoji pictures and of their names, from two frozen encoders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PAIRS = Path(__file__).with_name("emoji_pairs.npz")


@dataclass(frozen=True)
class Pairs:
    """Row i of every field belongs to emoji i."""

    image: Tensor  # [N, 1280] float32, EfficientNet-Lite0
    text: Tensor  # [N, 384] float32, all-MiniLM-L6-v2
    thumbnails: np.ndarray  # [N, 32, 32, 3] uint8, RGB on white
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Tensor) -> Pairs:
        """The pairs of these row numbers, in this order."""
        names = [self.names[row] for row in rows.tolist()]
        return Pairs(self.image[rows], self.text[rows], self.thumbnails[rows.numpy()], names)


def load(path: Path = PAIRS) -> Pairs:
    """All pairs of the file."""
    with np.load(path) as file:
        return Pairs(
            image=torch.from_numpy(file["image_features"]).float(),
            text=torch.from_numpy(file["text_features"]).float(),
            thumbnails=file["thumbnails"],
            names=file["names"].tolist(),
        )


def split(pairs: Pairs, held_out: int = 300) -> tuple[Pairs, Pairs]:
    """(training, held-out) pairs; the same ones every time, whatever the seed of the training."""
    rows = torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))
    return pairs.take(rows[held_out:]), pairs.take(rows[:held_out])
