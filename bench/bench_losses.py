"""The losses of the literature against their published dense forms; drawing negatives; memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
from torch import Tensor

from bench import machine, memory, peers, peers_losses
from bench.measure import QUICK, Contender, Race, Unavailable
from bench.peers_losses import CASES

DTYPES = ("float32", "bfloat16")
# rows, keys in the queue, width: where a loss is used, or as large as its dense form allows
SIZES = {
    "m2_mix": ((2048, 0, 512), (8192, 0, 512)),
    "v_mix": ((4096, 0, 512),),
    "l_mix": ((4096, 0, 512),),
    "vl_mix": ((4096, 0, 512),),
    "hcl": ((4096, 0, 512),),
    "gmc": ((2048, 0, 512),),
    "siglip": ((8192, 0, 512),),
    "moco": ((256, 65536, 128),),
    "tagged_moco": ((256, 65536, 128),),
    "itc": ((512, 65536, 256),),
}
RACES = [
    (loss, 64, 128 if queue else 0, 32) if QUICK else (loss, n, queue, d)
    for loss, sizes in SIZES.items()
    for n, queue, d in (sizes[:1] if QUICK else sizes)
]
N, D = (128, 64) if QUICK else (8192, 512)
# a process each: one of them shows that it works
HELD = list(CASES)[:1] if QUICK else list(CASES)
DRAWN = ("softmax + multinomial", "mmfast")


@pytest.mark.parametrize("contender", ["dense", "mmfast"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("loss", "n", "queue", "d"), RACES)
def bench_losses(
    measure: Any, contender: str, dtype: str, loss: str, n: int, queue: int, d: int
) -> None:
    race = Race(
        lambda: {
            which: peers_losses.contender(loss, which, n, queue, d, dtype)
            for which in ("dense", "mmfast")
        },
        seconds=0.1 if QUICK else 4,
        rounds=(1, 1) if QUICK else (3, 20),
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    # a table for each loss
    measure(race, CASES[loss].flops(n, queue, d), bench=loss, mode="fwd+bwd")


@pytest.mark.parametrize("contender", DRAWN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [N])
def bench_sampling(measure: Any, contender: str, dtype: str, n: int) -> None:
    """Draws differ, so nothing is compared but the time."""
    race = Race(
        lambda: {name: _drawing(name, n, dtype) for name in DRAWN},
        seconds=0.1 if QUICK else 4,
        rounds=(1, 1) if QUICK else (3, 20),
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(1, n, D), d=D, mode="fwd")


@pytest.mark.parametrize("contender", HELD)
@pytest.mark.parametrize("dtype", DTYPES[:1] if QUICK else DTYPES)
def bench_losses_memory(measure: Any, contender: str, dtype: str) -> None:
    """mmfast alone, cold in a fresh process; a queue is as long as the batch."""
    facts = {"d": D, "n": N, "mode": "fwd+bwd"}
    loss = peers_losses.find(contender, "mmfast")
    if isinstance(loss, Unavailable):
        measure.skip(str(loss), **facts)
    measure.record(memory.in_fresh_process(contender, dtype, N, D), **facts)


def _drawing(name: str, n: int, dtype: str) -> Contender | Unavailable:
    draw = peers_losses.drawing(name)
    if isinstance(draw, Unavailable):
        return draw
    q, k, _ = peers.features(n, D, dtype, grad=False)

    def run() -> tuple[Tensor, ...]:
        return (draw(q, k, peers.SCALE),)

    return Contender(run)
