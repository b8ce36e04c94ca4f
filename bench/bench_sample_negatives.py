"""sample_negatives: its time against softmax and multinomial over the matrix of scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine, peers
from bench.measure import QUICK, Contender, Race, Unavailable

D = 64 if QUICK else 512
SIZES = (128, 256) if QUICK else (2048, 8192)
DTYPES = ("float32", "bfloat16")
CONTENDERS = ("softmax, multinomial", "cpp")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", ["fwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def bench_draw(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    """Draws differ by contender, so their outputs are not compared."""
    race = Race(
        lambda: {name: _contender(name, n, dtype) for name in CONTENDERS},
        seconds=0.1 if QUICK else 5,
    )
    measure(race, peers.products(1, n, D), d=D)


def published(q: Tensor, k: Tensor, scale: Tensor) -> Tensor:
    """As ALBEF weighs its negatives, all rows of them drawn at once."""
    weights = torch.softmax(scale * q @ k.T, dim=1).fill_diagonal_(0)
    return torch.multinomial(weights, 1).squeeze(1)


def _contender(name: str, n: int, dtype: str) -> Contender | Unavailable:
    if name == "cpp" and machine.core is None:
        return Unavailable(machine.NO_CORE)
    q, k, scale = peers.features(n, D, dtype, grad=False)

    def run() -> tuple[Tensor, ...]:
        if name == "cpp":
            return (mmfast.sample_negatives(q, k, scale, backend=name),)
        return (published(q, k, scale),)

    return Contender(run)
