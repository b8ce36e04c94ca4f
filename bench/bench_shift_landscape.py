"""The landscape of 120 losses against as many dense ones, and against one forward of the loss."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine, peers, peers_losses
from bench.measure import QUICK, Contender, Race, Unavailable

N, D = (128, 32) if QUICK else (8192, 512)
# the published grid, and the temperatures of the paper's figure
SHIFTS = [-5 + 0.25 * step for step in range(0, 40, 10 if QUICK else 1)]
TEMPERATURES = (1 / 100, 1 / 50, 1.0)
FORWARD = "one forward of clip_loss"
DTYPES = ("float32", "bfloat16")


@pytest.mark.parametrize("contender", [FORWARD, "mmfast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [N])
def bench_landscape(measure: Any, contender: str, dtype: str, n: int) -> None:
    """They compute different things: only their times are compared."""
    race = Race(
        lambda: {FORWARD: _forward(n, dtype), "mmfast": _landscape("mmfast", n, dtype)},
        seconds=0.1 if QUICK else 12,
        rounds=(1, 1) if QUICK else (3, 10),
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(1, n, D), d=D, mode="fwd")


@pytest.mark.parametrize("contender", ["published loop", "mmfast"])
@pytest.mark.parametrize("dtype", DTYPES[:1])
@pytest.mark.parametrize("n", [N // 4])
def bench_landscape_loop(measure: Any, contender: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {name: _landscape(name, n, dtype) for name in ("published loop", "mmfast")},
        seconds=0.1 if QUICK else 12,
        rounds=(1, 1) if QUICK else (3, 10),
        dtype=dtype,
    )
    measure(race, peers.products(1, n, D), d=D, mode="fwd")


def _forward(n: int, dtype: str) -> Contender:
    image, text, scale = peers.features(n, D, dtype, grad=False)
    return Contender(lambda: (mmfast.clip_loss(image, text, scale),))


def _landscape(name: str, n: int, dtype: str) -> Contender | Unavailable:
    # this bench measures older commits, too
    if not hasattr(mmfast, "shift_landscape"):
        return Unavailable("this mmfast has no shift_landscape")
    image, text, _ = peers.features(n, D, dtype, grad=False)

    def run() -> tuple[Tensor, ...]:
        if name == "mmfast":
            return (mmfast.shift_landscape(image, text, SHIFTS, TEMPERATURES).symmetric,)
        return (peers_losses.shift_landscape(image, text, SHIFTS, TEMPERATURES),)

    return Contender(torch.no_grad()(run))
