"""slerp: its bandwidth against a copy of as many bytes, its time against the published formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine, peers, peers_losses
from bench.measure import QUICK, Contender, Race, Unavailable
from bench.peers_losses import LAM

D = 64 if QUICK else 512
SIZES = (128, 256) if QUICK else (4096, 16384, 65536)
DTYPES = ("float32", "bfloat16")
# matrices of [N, D] that are read or written at least
MOVED = {"fwd": 3, "bwd": 5, "fwd+bwd": 8}


@pytest.mark.parametrize("contender", ["copy", "cpp"])
@pytest.mark.parametrize("mode", ["fwd", "bwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def bench_bandwidth(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    """Into memory that is there already: fresh pages would cost more than either."""
    race = Race(
        lambda: {"copy": _copy(n, dtype, MOVED[mode]), "cpp": _core(mode, n, dtype)},
        seconds=0.1 if QUICK else 4,
    )
    measure(race, bytes=_bytes(n, dtype, MOVED[mode]), d=D)


@pytest.mark.parametrize("contender", ["formula", "eager", "cpp"])
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", SIZES)
def bench_mix(measure: Any, contender: str, mode: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {name: _contender(name, mode, n, dtype) for name in ("formula", "eager", "cpp")},
        seconds=0.1 if QUICK else 5,
        dtype=dtype,
    )
    measure(race, bytes=_bytes(n, dtype, MOVED[mode]), d=D)


def _bytes(n: int, dtype: str, moved: int) -> int:
    return moved * n * D * getattr(torch, dtype).itemsize


def _copy(n: int, dtype: str, moved: int) -> Contender:
    """Reads half of the bytes and writes the other half."""
    source = torch.randn(moved * n * D // 2).to(getattr(torch, dtype))
    target = torch.empty_like(source).zero_()

    def run() -> tuple[Tensor, ...]:
        return (target.copy_(source),)

    return Contender(run)


def _core(mode: str, n: int, dtype: str) -> Contender | Unavailable:
    if machine.core is None:
        return Unavailable(machine.NO_CORE)
    a, b, _ = peers.features(n, D, dtype, grad=False)
    g, lam, threads = a.flip(0), torch.tensor([LAM]), torch.get_num_threads()
    out, more = torch.zeros_like(a), torch.zeros_like(a)

    def forward() -> tuple[Tensor, ...]:
        machine.core.slerp_forward(a, b, lam, out, threads)
        return (out,)

    def backward() -> tuple[Tensor, ...]:
        machine.core.slerp_backward(g, a, b, lam, out, more, None, threads)
        return (out, more)

    return Contender(forward if mode == "fwd" else backward)


def _contender(name: str, mode: str, n: int, dtype: str) -> Contender | Unavailable:
    """Forward alone runs without autograd; with backward, a and b ask for gradients."""
    if name == "cpp" and machine.core is None:
        return Unavailable(machine.NO_CORE)
    backward = mode == "fwd+bwd"
    a, b, _ = peers.features(n, D, dtype, grad=backward)
    g = a.detach().flip(0)

    def forward() -> tuple[Tensor, ...]:
        if name == "formula":
            return (peers_losses.slerp(a, b, LAM),)
        return (mmfast.slerp(a, b, LAM, backend=name),)

    def both() -> tuple[Tensor, ...]:
        (out,) = forward()
        return (out, *torch.autograd.grad(out, (a, b), g))

    return Contender(both if backward else forward)
