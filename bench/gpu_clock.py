"""Where and how `bench gpu` times: CUDA events on a card, the CPU's clock in the interpreter."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any, Protocol

import torch

from bench.measure import TOLERANCE, Timing, Unavailable, check_agreement
from bench.peers import first_line

FLUSH_BYTES = 512 * 2**20  # ten times the L2 of an H100, and long enough to hide a launch
CUBE = 8192


class Device(Protocol):
    """What a race asks of the device it runs on."""

    type: str

    def seconds(self, run: Callable[[], Any]) -> float:
        """The time of one call whose inputs are in no cache."""

    def weighed(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        """The results of one call, and by how many MB it raised the memory in use at its peak."""

    def product_rate(self, dtype: str) -> float:
        """GFLOP/s of a product of two large matrices, now."""

    def release(self) -> None:
        """Give back what earlier calls have left."""


class Card:
    """A CUDA card: events around each call, on a device whose L2 holds something else."""

    type = "cuda"

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self._cubes: dict[str, tuple[torch.Tensor, ...]] = {}

    def seconds(self, run: Callable[[], Any]) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # also keeps the device busy while the first launch of `run` is on its way
        self._flush.zero_()
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def weighed(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        outputs = run()
        torch.cuda.synchronize()
        return outputs, (torch.cuda.max_memory_allocated() - before) / 1e6

    def product_rate(self, dtype: str) -> float:
        if dtype not in self._cubes:
            a, b = (torch.randn(CUBE, CUBE, device="cuda") for _ in range(2))
            kind = getattr(torch, dtype)
            self._cubes = {dtype: (a.to(kind), b.to(kind), torch.empty_like(a, dtype=kind))}
            self.product_rate(dtype)
        a, b, out = self._cubes[dtype]
        return 2 * CUBE**3 / self.seconds(lambda: torch.mm(a, b, out=out)) / 1e9

    def release(self) -> None:
        # torch.compile gives up in silence once one function was compiled for too many sizes
        torch.compiler.reset()
        self._cubes.clear()
        torch.cuda.empty_cache()


class Interpreter:
    """The CPU under Triton's interpreter: shows that the command works; its times say nothing."""

    type = "cpu"

    def seconds(self, run: Callable[[], Any]) -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    def weighed(self, run: Callable[[], Any]) -> tuple[Any, float | None]:
        return run(), None

    def product_rate(self, dtype: str) -> float:
        a = torch.randn(128, 128).to(getattr(torch, dtype))
        return 2 * 128**3 / self.seconds(lambda: a @ a) / 1e9

    def release(self) -> None:
        pass


class Budget:
    """Seconds that a run may take, counted from here."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._end = clock() + seconds

    def left(self) -> float:
        return self._end - self._clock()


@dataclass(frozen=True)
class Entry:
    """A contender of a race, built only when its turn comes.

    make: returns the function to time, or why there is none.
    own: it is mmfast's; an error in it is an error of the run and not of the contender.
    trusted: it is the definition in plain torch; where it disagrees, ours is wrong.
    compared: how many of its outputs, from the first, must agree with those of the first entry.
    tolerance: the dtype whose tolerance they are held to, where it is not that of the race.
    """

    make: Callable[[], Callable[[], Any] | Unavailable]
    own: bool = False
    trusted: bool = False
    compared: int = 0
    tolerance: str | None = None


@dataclass
class Result:
    """Timings by contender, and the reasons of those that could not run."""

    timings: dict[str, Timing] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def run_race(
    device: Device,
    entries: Mapping[str, Entry],
    dtype: str,
    seconds: float,
    rounds: tuple[int, int],
    budget: Budget,
) -> Result:
    """Time the entries in turns, for about `seconds`; the first of them is mmfast's.

    Before it is timed, an entry's outputs are held against the first entry's: what computes
    another thing, or fails, is not timed and gives its reason.

    Raises:
        Exception: whatever an entry of our own raises, unless it runs out of memory.
        AssertionError: a trusted entry disagrees with ours.
    """
    result = Result()
    ready: dict[str, Callable[[], Any]] = {}
    baseline: Any = None
    outputs: Any = None
    for name, entry in entries.items():
        # results of one that failed would count against the next one's memory
        outputs = None
        if budget.left() <= 0:
            result.reasons[name] = "the time of this run was spent"
            continue
        try:
            made = entry.make()
            if isinstance(made, Unavailable):
                result.reasons[name] = str(made)
                continue
            # the first call compiles and tunes: what it takes for that is not the loss's
            made()
            outputs, peak_mb = device.weighed(made)
            baseline = outputs if baseline is None else baseline
            n = entry.compared
            check_agreement(name, outputs[:n], baseline[:n], TOLERANCE[entry.tolerance or dtype])
        except torch.OutOfMemoryError:
            result.reasons[name] = "out of memory"
            continue
        except AssertionError as error:
            if entry.own or entry.trusted:
                raise
            result.reasons[name] = first_line(error)
            continue
        # a peer may raise anything else, too
        except Exception as error:
            if entry.own:
                raise
            result.reasons[name] = first_line(error)
            continue
        ready[name] = made
        result.timings[name] = Timing([], peak_mb)
    del baseline, outputs

    rates = []
    least, most = rounds
    order = list(ready)
    end = Budget(min(seconds, budget.left()))
    for turn in range(most if order else 0):
        if turn >= least and end.left() <= 0:
            break
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            result.timings[name].seconds.append(device.seconds(ready[name]))
        rates.append(device.product_rate(dtype))
    for timing in result.timings.values():
        timing.peak = {"product": median(rates)}
    return result
