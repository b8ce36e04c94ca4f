"""pairwise_lse (rows and columns of one visit): rate against the peak, growth with N, threads."""

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
SIZES = (128, 256) if QUICK else (2048, 4096, 8192)
GROWTH = (128, 256, 512) if QUICK else (1024, 2048, 4096, 8192, 16384, 32768, 65536)
BACKENDS = ("eager", "cpp")
THREADS = (1, 2)
DTYPES = ("float32", "bfloat16")
PRODUCTS = {"fwd": 1, "fwd+bwd": 4}


@pytest.mark.parametrize("contender", BACKENDS)
@pytest.mark.parametrize("mode", PRODUCTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def bench_rate(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {backend: _contender(mode, n, dtype, backend) for backend in BACKENDS},
        seconds=0.1 if QUICK else 5,
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(PRODUCTS[mode], n, D), d=D)


@pytest.mark.parametrize("contender", GROWTH)
@pytest.mark.parametrize("mode", ["fwd"])
@pytest.mark.parametrize("dtype", ["bfloat16"])
def bench_growth(measure: Any, contender: int, mode: str, dtype: str) -> None:
    """The same number of pairs at every size but the largest, which runs once: 4 times as many."""
    second = GROWTH[-2]
    race = Race(
        lambda: {
            n: _contender(mode, n, dtype, "cpp", number=max(1, (second // n) ** 2)) for n in GROWTH
        },
        seconds=0,
        rounds=(1, 1),
        warm_up=False,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(PRODUCTS[mode], contender, D), d=D, n=contender)


@pytest.mark.parametrize("contender", THREADS)
@pytest.mark.parametrize("mode", ["fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES[-1:])
def bench_threads(measure: Any, contender: int, mode: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {count: _on_threads(count, mode, n, dtype) for count in THREADS},
        seconds=0.1 if QUICK else 8,
        rounds=(4, 30),
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(PRODUCTS[mode], n, D), d=D)


def _on_threads(count: int, mode: str, n: int, dtype: str) -> Contender | Unavailable:
    if count > torch.get_num_threads():
        return Unavailable(f"needs {count} threads, torch has {torch.get_num_threads()} here")
    return _contender(mode, n, dtype, "cpp", threads=count)


def _contender(
    mode: str, n: int, dtype: str, backend: str, **options: int
) -> Contender | Unavailable:
    """Forward alone runs without autograd; with backward, q, k and the scale ask for gradients."""
    backward = mode == "fwd+bwd"
    q, k, scale = peers.features(n, D, dtype, grad=backward)
    # positive, so that the scale's gradient is no sum that cancels
    upstream = tuple(torch.rand(n, generator=torch.Generator().manual_seed(s)) for s in (1, 2))

    def forward() -> tuple[Tensor, ...]:
        return mmfast.pairwise_lse(q, k, scale, columns=True, backend=backend)

    def both() -> tuple[Tensor, ...]:
        values = forward()
        grads = torch.autograd.grad(values, (q, k, scale), upstream)
        return (*values, *grads)

    if backend == "cpp" and machine.core is None:
        return Unavailable(machine.NO_CORE)
    return Contender(both if backward else forward, **options)
