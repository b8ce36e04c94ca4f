"""sparsemax against sorting, partial sorting, and the packages that people install for it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

import mmfast
from bench import machine
from bench.measure import QUICK, Contender, Race, Unavailable

DTYPES = ("float32", "bfloat16")
# standard deviations of scores; with a temperature of 1000, as FDT is trained, supports are dense
SPREADS = {"peaked": 5.0, "partial": 1e-3, "dense": 1e-5}
# rows, entries of a row: a batch over the codebook of FDT, a large one, the classes of a classifier
SIZES = ((32, 128),) if QUICK else ((64, 16384), (4096, 16384), (4096, 256))
# matrices that are read or written at least
MOVED = {"fwd": 2, "fwd+bwd": 5}
CONTENDERS = ("sorting", "entmax, top-k", "entmax, sorting", "sparsemax package", "cpp")


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scores", SPREADS)
@pytest.mark.parametrize(("n", "d"), SIZES)
def bench_sparsemax(
    measure: Any, contender: str, mode: str, dtype: str, scores: str, n: int, d: int
) -> None:
    race = Race(
        lambda: {name: _contender(name, mode, dtype, scores, n, d) for name in CONTENDERS},
        seconds=0.1 if QUICK else 4,
        rounds=(1, 1) if QUICK else (3, 20),
        dtype=dtype,
    )
    # a table for each kind of scores
    bytes = MOVED[mode] * n * d * getattr(torch, dtype).itemsize
    measure(race, bytes=bytes, bench=f"sparsemax_{scores}")


def sorting(x: Tensor) -> Tensor:
    """Algorithm 1 of Martins and Astudillo, as published code has it; its gradient by autograd."""
    z = x - x.amax(1, keepdim=True)
    down = z.sort(1, descending=True).values
    k = torch.arange(1, z.shape[1] + 1, dtype=z.dtype)
    sums = down.cumsum(1) - 1
    size = (k * down > sums).sum(1, keepdim=True)
    tau = sums.gather(1, size - 1) / size
    # max(z - tau, 0) gives an entry at tau half a gradient, and others would disagree
    return torch.where(z > tau, z - tau, 0.0)


def find(name: str) -> Callable[[Tensor], Tensor] | Unavailable:
    """The function of that name on rows, or why there is none here."""
    if name == "sorting":
        return sorting
    if name == "cpp":
        if machine.core is None:
            return Unavailable(machine.NO_CORE)
        return lambda x: mmfast.sparsemax(x, backend="cpp")
    package = name.partition(",")[0].removesuffix(" package")
    try:
        module: Any = import_module(package)
    except ModuleNotFoundError:
        return Unavailable(f"{package} is not installed (pip install {package})")
    if package == "sparsemax":
        return module.Sparsemax(dim=1)
    # more than peaked rows need; elsewhere it doubles until it is enough
    k = 100 if name == "entmax, top-k" else None
    return lambda x: module.sparsemax(x, dim=1, k=k)


def _contender(
    name: str, mode: str, dtype: str, scores: str, n: int, d: int
) -> Contender | Unavailable:
    """Forward alone runs without autograd."""
    weights = find(name)
    if isinstance(weights, Unavailable):
        return weights
    backward = mode == "fwd+bwd"
    random = torch.Generator().manual_seed(0)
    spread = SPREADS[scores]
    x = (spread * torch.randn(n, d, generator=random)).to(getattr(torch, dtype))
    g = torch.randn(n, d, generator=random).to(x.dtype)
    x.requires_grad_(backward)

    def forward() -> tuple[Tensor, ...]:
        if name == "cpp":
            return (weights(x),)
        # sums of a half type lose the threshold: the others get float32, as autocast does it
        return (weights(x.float()).to(x.dtype),)

    def both() -> tuple[Tensor, ...]:
        (p,) = forward()
        return (p, *torch.autograd.grad(p, x, g))

    return Contender(both if backward else forward)
