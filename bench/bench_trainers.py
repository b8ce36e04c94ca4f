"""The Modules that stand in for open_clip's losses, forward and backward, against those."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor, nn

import mmfast.nn
from bench import machine, peers
from bench.measure import QUICK, Contender, Race, Unavailable
from mmfast.testing import import_trainer

D = 64 if QUICK else 512
ROWS = (256,) if QUICK else (4096,)
DTYPES = ("float32", "bfloat16")
CONTENDERS = ("open_clip", "mmfast")
# products of an [N, D] with a [D, N] that each task needs
PRODUCTS = {"ClipLoss": 4, "SigLipLoss": 3}


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def bench_open_clip(measure: Any, contender: str, dtype: str, n: int) -> None:
    _race(measure, "ClipLoss", dtype, n)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", ROWS)
def bench_open_clip_siglip(measure: Any, contender: str, dtype: str, n: int) -> None:
    _race(measure, "SigLipLoss", dtype, n)


def _race(measure: Any, name: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {who: _contender(who, name, n, dtype) for who in CONTENDERS},
        seconds=0.1 if QUICK else 8,
        rounds=(4, 30),
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(PRODUCTS[name], n, D), d=D, mode="fwd+bwd")


def _contender(who: str, name: str, n: int, dtype: str) -> Contender | Unavailable:
    try:
        home = mmfast.nn if who == "mmfast" else import_trainer("open_clip.loss")
    except ImportError as error:
        return Unavailable(f"open_clip is not installed: {error}")
    module: nn.Module = getattr(home, name)()

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Any:
        return module(image, text, scale, None if name == "ClipLoss" else peers.SIGMOID_BIAS)

    return Contender(partial(peers.value_and_grads, loss, *peers.features(n, D, dtype)))
