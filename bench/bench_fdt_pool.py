"""fdt_pool where few codes survive and where all do, against the definition in plain torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine
from bench.measure import QUICK, TOLERANCE, Contender, Race, Unavailable

# samples, tokens of a sample, codes, width: a batch of a GPU as it was published
B, N, C, D = (4, 5, 128, 64) if QUICK else (64, 49, 16384, 512)
BACKENDS = ("eager", "cpp")
DTYPES = ("float32", "bfloat16")
MODES = ("fwd", "bwd", "fwd+bwd")
# random normal tokens and codes: five codes a sample, or every one
TEMPERATURES = {"fdt_few": 1.0, "fdt_all": 1e5}


@pytest.mark.parametrize("contender", BACKENDS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("support", TEMPERATURES)
def bench_pool(measure: Any, contender: str, mode: str, dtype: str, support: str) -> None:
    """The product of tokens and codes is what the task needs; the backward pass needs none."""
    race = Race(
        lambda: {name: _contender(name, mode, dtype, TEMPERATURES[support]) for name in BACKENDS},
        seconds=0.1 if QUICK else 8,
        rounds=(1, 1) if QUICK else (3, 20),
        dtype=dtype,
        # one winner of a million that rounding picks otherwise moves gradients by 1.5e-3
        tolerance=max(TOLERANCE[dtype], 0.01),
        probe=partial(machine.probe, dtype),
    )
    flops = None if mode == "bwd" else 2.0 * B * N * C * D
    measure(race, flops, n=C, d=D, bench=support)


def _contender(backend: str, mode: str, dtype: str, temperature: float) -> Contender | Unavailable:
    if backend == "cpp" and machine.core is None:
        return Unavailable(machine.NO_CORE)
    generator = torch.Generator().manual_seed(0)
    tokens, codebook, g = (
        torch.randn(*size, generator=generator).to(getattr(torch, dtype))
        for size in ((B, N, D), (C, D), (B, D))
    )
    leaves = tokens, codebook
    for x in leaves:
        x.requires_grad_(mode != "fwd")

    def forward() -> tuple[Tensor, ...]:
        return mmfast.fdt_pool(tokens, codebook, temperature, backend=backend)

    def backward(pooled: Tensor, keep: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(pooled, leaves, g, retain_graph=keep)

    if mode == "fwd":
        return Contender(forward)
    if mode == "bwd":
        kept, _ = forward()
        return Contender(lambda: backward(kept, True))
    return Contender(lambda: backward(forward()[0], False))
