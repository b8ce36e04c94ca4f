"""pairwise_rank: its rate against a product, and torch over blocks of rows."""

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


@pytest.mark.parametrize("contender", ["blocks", "cpp"])
@pytest.mark.parametrize("mode", ["fwd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def bench_ranks(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    """The hardest negative of each row, and how many outdo its own pair."""
    q, k, _ = peers.features(n, D, dtype, grad=False)
    own = (q.float() * k.float()).sum(1)
    race = Race(
        lambda: {
            "blocks": Contender(partial(blocks, q, k, own)),
            "cpp": Unavailable(machine.NO_CORE)
            if machine.core is None
            else Contender(partial(swept, q, k, own)),
        },
        seconds=0.1 if QUICK else 4,
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(1, n, D), d=D)


def swept(q: Tensor, k: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    ids = torch.arange(len(q))
    largest, _, above = mmfast.pairwise_rank(
        q, k, threshold=own, q_ids=ids, k_ids=ids, backend="cpp"
    )
    return largest, above


def blocks(q: Tensor, k: Tensor, own: Tensor) -> tuple[Tensor, ...]:
    largest, above = [], []
    for i in range(0, len(q), BLOCK):
        s = q[i : i + BLOCK] @ k.T
        s.diagonal(i).fill_(-torch.inf)
        largest.append(s.topk(1, dim=1).values.squeeze(1))
        above.append((s > own[i : i + BLOCK, None]).sum(1))
    return torch.cat(largest).float(), torch.cat(above)
