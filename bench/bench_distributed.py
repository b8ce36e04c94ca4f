"""clip_loss of one batch by one, two and four ranks of this machine."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from bench import peers, ranks
from bench.measure import QUICK

D = 64 if QUICK else 512
SIZES = (256,) if QUICK else (4096, 16384)
race = functools.cache(ranks.race)


@pytest.mark.parametrize("contender", ranks.WORLDS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", SIZES)
def bench_shared(measure: Any, contender: str, dtype: str, n: int) -> None:
    timing = race(dtype, n, D, 1 if QUICK else 2)[contender]
    measure.record(timing, peers.products(4, n, D), d=D, mode="fwd+bwd")
