"""pairwise_stats of one set: its rate against half a product, and torch over blocks of rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine, peers
from bench.measure import QUICK, Contender, Race, Unavailable

D = 64 if QUICK else 512
SIZES = (128, 256) if QUICK else (2048, 8192)
BLOCK = 64 if QUICK else 1024
BINS = {"moments": 0, "histogram": 256}


@pytest.mark.parametrize("contender", ["blocks", "cpp"])
@pytest.mark.parametrize("mode", BINS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def bench_statistics(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    x, _, _ = peers.features(n, D, dtype, grad=False)
    race = Race(
        lambda: {
            "blocks": Contender(partial(blocks, x, BINS[mode])),
            "cpp": Unavailable(machine.NO_CORE)
            if machine.core is None
            else Contender(partial(swept, x, BINS[mode])),
        },
        seconds=0.1 if QUICK else 4,
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(1, n, D) // 2, d=D)


def swept(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    stats = mmfast.pairwise_stats(x, bins=bins, backend="cpp")
    histogram = torch.zeros(0) if stats.histogram is None else stats.histogram
    return torch.tensor([stats.mean, stats.std, stats.min, stats.max]), histogram


def blocks(x: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """What one writes by hand: a block of rows against itself and all later rows."""
    sums, least, largest = torch.zeros(3, dtype=torch.float64), torch.inf, -torch.inf
    histogram = torch.zeros(bins)
    for i in range(0, len(x), BLOCK):
        s = x[i : i + BLOCK] @ x[i:].T
        values = s[torch.ones_like(s, dtype=torch.bool).triu(1)].float()
        sums += torch.stack([torch.ones_like(values).sum(), values.sum(), values.square().sum()])
        least, largest = min(least, float(values.min())), max(largest, float(values.max()))
        if bins:
            histogram += torch.histc(values, bins, -1, 1)
    count, mean = sums[0], sums[1] / sums[0]
    std = ((sums[2] / count - mean**2) * count / (count - 1)).sqrt()
    return torch.tensor([mean, std, least, largest]), histogram
