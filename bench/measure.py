"""Interleaved timing: contenders of one race take turns, so noise hits all of them alike.

pytest-benchmark's `pedantic` runs all rounds of one function before the next one starts. Races
are therefore timed here, and the recorded rounds are then played back to `pedantic` on a clock
that moves only when a round is played: its statistics and its JSON, our order of rounds.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

QUICK = os.environ.get("MMFAST_BENCH_QUICK") == "1"
PEERS = os.environ.get("MMFAST_BENCH_PEERS") == "1"
SAMPLE = 0.02 if QUICK else 0.2  # seconds; a call shorter than this is repeated within one round
# seconds; a call shorter than this comes twice, and is timed the second time: the first one after
# another contender finds its memory gone, and on virtual machines pages may take longer than it
SETTLE = 1.0
TOLERANCE = {"float64": 1e-9, "float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}

Name = str | int  # of a contender: a backend, a peer, a size, a number of threads
Clock = Callable[[], float]
Rates = dict[str, float]  # GFLOP/s by what reached it: "own tile", "torch.mm"


class Unavailable(Exception):
    """A contender that cannot run here; its message is the reason shown in the table."""


@dataclass(frozen=True)
class Contender:
    """One function in a race.

    `number`: calls per round (None: as many as fill `SAMPLE`). `threads`: torch threads during
    the call (None: as they are).
    """

    run: Callable[[], Any]
    number: int | None = None
    threads: int | None = None


@dataclass
class Timing:
    """Rounds of one contender, in seconds per call, and what one call added to resident memory."""

    seconds: list[float] = field(default_factory=list)
    peak_mb: float | None = None
    peak: Rates = field(default_factory=dict)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    def quantile(self, q: float) -> float:
        """Linear interpolation between the sorted rounds; q in [0, 1]."""
        ordered = sorted(self.seconds)
        place = q * (len(ordered) - 1)
        low = math.floor(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (place - low) * (ordered[high] - ordered[low])


@dataclass(frozen=True)
class Race:
    """How a group is timed.

    `make` builds the contenders, the first of them the baseline; a contender may be given as an
    `Unavailable`. `seconds` is about what all rounds together may take, within `rounds` (least,
    most). With `dtype`, every contender's outputs must agree with the baseline's before anything
    is timed, within `tolerance` or that of the type. `probe(threads)` measures the peak once per
    round, beside the contenders. Without `warm_up` every call is timed and none is weighed; each
    contender then says its `number`.
    """

    make: Callable[[], Mapping[Any, Contender | Unavailable]]
    seconds: float
    rounds: tuple[int, int] = (5, 30)
    dtype: str | None = None
    tolerance: float | None = None
    probe: Callable[[int], Rates] | None = None
    warm_up: bool = True

    def without(self, names: Container[Name]) -> Race:
        """The race of all others."""
        return replace(self, make=lambda: {n: c for n, c in self.make().items() if n not in names})


RaceResult = tuple[dict[Name, Timing], dict[Name, str]]


def run_race(race: Race, clock: Clock = time.perf_counter) -> RaceResult:
    """Time all contenders in turns. Returns timings, and the reasons of those that cannot run."""
    entries = dict(race.make())
    reasons = {name: str(c) for name, c in entries.items() if isinstance(c, Unavailable)}
    contenders = {name: c for name, c in entries.items() if isinstance(c, Contender)}
    timings = {name: Timing() for name in contenders}
    if not contenders:
        return timings, reasons

    numbers = {name: contender.number or 1 for name, contender in contenders.items()}
    settles: set[Name] = set()
    baseline: Any = None
    for name, contender in contenders.items() if race.warm_up else ():
        with _threads(contender.threads):
            call = partial(_timed, contender.run, clock)
            (outputs, once), timings[name].peak_mb = resident_growth(call)
        if contender.number is None:
            numbers[name] = max(1, math.ceil(SAMPLE / once))
            settles |= {name} if once < SETTLE else set()
        if race.dtype is not None:
            baseline = outputs if baseline is None else baseline
            check_agreement(name, outputs, baseline, race.tolerance or TOLERANCE[race.dtype])

    thread_counts = sorted({_thread_count(c) for c in contenders.values()})
    readings: dict[int, list[Rates]] = {threads: [] for threads in thread_counts}
    if race.probe is not None and race.warm_up:
        for threads in thread_counts:
            race.probe(threads)

    def one_round(turn: int) -> float:
        """Every contender once, another one first each turn. Returns the seconds it took."""
        started = clock()
        order = list(contenders)
        first = turn % len(order)
        for name in order[first:] + order[:first]:
            contender, number = contenders[name], numbers[name]
            with _threads(contender.threads):
                if name in settles:
                    contender.run()
                start = clock()
                for _ in range(number):
                    contender.run()
                timings[name].seconds.append((clock() - start) / number)
        if race.probe is not None:
            for threads in thread_counts:
                readings[threads].append(race.probe(threads))
        return clock() - started

    least, most = race.rounds
    with _no_collection():
        planned = int(race.seconds / one_round(0))
        for turn in range(1, min(most, max(least, planned))):
            one_round(turn)
    for name, contender in contenders.items():
        timings[name].peak = _medians(readings[_thread_count(contender)])
    return timings, reasons


def check_agreement(name: Name, outputs: Any, baseline: Any, tolerance: float) -> None:
    """Raise AssertionError unless each output is within `tolerance` (relative L2) of the baseline.

    Not a test of accuracy, only a guard: something that computes another thing is not timed.
    """
    assert len(outputs) == len(baseline), f"{name}: {len(outputs)} outputs, not {len(baseline)}"
    for i, (got, want) in enumerate(zip(outputs, baseline, strict=True)):
        got, want = got.detach().double(), want.detach().double()
        assert got.shape == want.shape, f"{name}: output {i} is {got.shape}, not {want.shape}"
        error = float((got - want).norm() / want.norm().clamp_min(1e-300))
        assert error <= tolerance, f"{name}: output {i} is off by {error:.2g}, allowed {tolerance}"


def resident_growth(call: Callable[[], Any]) -> tuple[Any, float | None]:
    """Call, and return its result and by how many MB (1e6 bytes) resident memory rose at its peak.

    None where the system keeps no resettable high-water mark (only Linux does).
    """
    if sys.platform != "linux":
        return call(), None
    gc.collect()
    # give freed heap back first, or the call would reuse it unseen
    ctypes.CDLL(None).malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return call(), None
    before = status_mb("VmRSS")
    result = call()
    return result, max(0.0, status_mb("VmHWM") - before)


def status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {key}")


def _timed(run: Callable[[], Any], clock: Clock) -> tuple[Any, float]:
    start = clock()
    outputs = run()
    return outputs, clock() - start


def _medians(readings: list[Rates]) -> Rates:
    names = readings[0] if readings else {}
    return {name: statistics.median(r[name] for r in readings) for name in names}


def _thread_count(contender: Contender) -> int:
    return contender.threads or torch.get_num_threads()


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None and count != before:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if torch.get_num_threads() != before:
            torch.set_num_threads(before)


@contextmanager
def _no_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def rates(timing: Timing, flops: float | None, bytes: float | None) -> dict[str, Any]:
    """What a row says beside its time; keys are absent where nothing was counted."""
    row: dict[str, Any] = {
        "p20": timing.quantile(0.2),
        "median": timing.median,
        "p80": timing.quantile(0.8),
        "peak_mb": timing.peak_mb,
    }
    if bytes is not None:
        row |= {"bytes": bytes, "gb_per_s": bytes / timing.median / 1e9}
    if flops is not None:
        row |= {"flops": flops, "gflops": flops / timing.median / 1e9}
        if timing.peak:
            name, peak = max(timing.peak.items(), key=lambda entry: entry[1])
            row |= {"peak_gflops": peak, "peak_of": name, "peaks": timing.peak}
            row["percent_of_peak"] = 100 * row["gflops"] / peak
    return row


class Playback:
    """A clock that advances by one recorded round whenever `step` is called."""

    def __init__(self) -> None:
        self._now = 0.0
        self._rounds: Iterator[float] = iter(())

    def load(self, seconds: list[float]) -> None:
        self._now = 0.0
        self._rounds = iter(seconds)

    def step(self) -> None:
        self._now += next(self._rounds)

    def now(self) -> float:
        return self._now
