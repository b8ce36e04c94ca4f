"""clip_loss forward and backward against the losses people use: large, small, frozen, memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from bench import machine, memory, peers
from bench.measure import QUICK, Contender, Race, Unavailable

D = 64 if QUICK else 512
LARGE = (256,) if QUICK else (2048, 8192)
SMALL = ((64, 32),) if QUICK else tuple((n, d) for d in (256, 512, 768) for n in (256, 512, 1024))
HELD = {"dense": 256, "mmfast": 512} if QUICK else {"dense": 8192, "mmfast": 16384}
DTYPES = ("float32", "bfloat16")
COMPILED = "torch.compile(dense)"
SMALL_PEERS = ("dense", "dense, one product", "mmfast")
PEERS = ("dense", "dense, one product", "torch chunked", COMPILED, "mmfast")
FROZEN = ("both towers learn", "text frozen", "image frozen")
MODE = "fwd+bwd"


@pytest.mark.parametrize("contender", PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LARGE)
def bench_loss(measure: Any, contender: str, dtype: str, n: int) -> None:
    race = Race(
        lambda: {name: _contender(name, n, D, dtype) for name in PEERS},
        seconds=0.1 if QUICK else 8,
        rounds=(4, 30),
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(4, n, D), d=D, mode=MODE)


@pytest.mark.parametrize("contender", SMALL_PEERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "d"), SMALL)
def bench_small(measure: Any, contender: str, dtype: str, n: int, d: int) -> None:
    """Where the overhead of Python and of the threads counts."""
    race = Race(
        lambda: {name: _contender(name, n, d, dtype) for name in SMALL_PEERS},
        seconds=0.1 if QUICK else 1.5,
        rounds=(5, 15),
        dtype=dtype,
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(4, n, d), mode=MODE)


@pytest.mark.parametrize("contender", FROZEN)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", LARGE[-1:])
def bench_frozen(measure: Any, contender: str, dtype: str, n: int) -> None:
    """A tower that does not learn saves one of the four products."""
    race = Race(
        lambda: {name: _frozen(name, n, dtype) for name in FROZEN},
        seconds=0.1 if QUICK else 8,
        rounds=(4, 30),
        probe=partial(machine.probe, dtype),
    )
    measure(race, peers.products(4 if contender == FROZEN[0] else 3, n, D), d=D, mode=MODE)


@pytest.mark.parametrize("contender", HELD)
@pytest.mark.parametrize("dtype", DTYPES)
def bench_memory(measure: Any, contender: str, dtype: str) -> None:
    """One cold call in a fresh process: its peak resident growth is the result, not its time."""
    n = HELD[contender]
    measure.record(memory.in_fresh_process(contender, dtype, n, D), d=D, n=n, mode=MODE)


def _contender(name: str, n: int, d: int, dtype: str) -> Contender | Unavailable:
    if name == COMPILED and QUICK:
        return Unavailable("left out of quick runs: compiling takes longer than all the rest")
    if name == COMPILED and n < LARGE[-1]:
        return Unavailable(f"compiled for N={LARGE[-1]} only, to keep the run short")
    loss = peers.compiled_dense(n, d, dtype) if name == COMPILED else peers.find(name)
    if isinstance(loss, Unavailable):
        return loss
    inputs = peers.features(n, d, dtype)
    return Contender(partial(peers.value_and_grads, loss, *inputs))


def _frozen(name: str, n: int, dtype: str) -> Contender:
    image, text, scale = peers.features(n, D, dtype)
    if name == "text frozen":
        text = text.detach()
    if name == "image frozen":
        image = image.detach()
    return Contender(partial(peers.value_and_grads, peers.fused, image, text, scale))
