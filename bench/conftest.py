"""The `measure` fixture, and what the run adds to pytest-benchmark's JSON."""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import pytest

from bench import machine
from bench.compare import OWN_ONLY, RIVALS
from bench.measure import PEERS, Playback, Race, RaceResult, Timing, rates, run_race

_tape = Playback()
_races = pytest.StashKey[dict[str, RaceResult]]()
_missing = pytest.StashKey[list[dict[str, Any]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_races] = {}
    config.stash[_missing] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=_tape.now, disable_gc=False))


class Measure:
    """One row of the table, for the contender this bench function was parametrised with.

    The other parameters name the race; it is timed once, when the first contender comes by.
    """

    def __init__(self, benchmark: Any, request: pytest.FixtureRequest) -> None:
        self._benchmark = benchmark
        self._config = request.config
        parameters = dict(request.node.callspec.params)
        self._contender = parameters.pop("contender")
        bench = request.node.originalname.removeprefix("bench_")
        self._group = "-".join([bench, *map(str, parameters.values())])
        self._facts = {"bench": bench, "contender": self._contender, **parameters}

    def __call__(
        self, race: Race, flops: float | None = None, bytes: float | None = None, **facts: Any
    ) -> None:
        """Time the race. `flops` and `bytes`: what the task needs, whoever does it.

        A contender that cannot run is skipped, and its reason goes into the JSON.
        """
        if self._contender in RIVALS and not PEERS:
            self.skip(OWN_ONLY, **facts)
        races = self._config.stash[_races]
        if self._group not in races:
            races[self._group] = run_race(race if PEERS else race.without(RIVALS))
        timings, reasons = races[self._group]
        if self._contender in reasons:
            self.skip(reasons[self._contender], **facts)
        self.record(timings[self._contender], flops, bytes, **facts)

    def skip(self, reason: str, **facts: Any) -> NoReturn:
        """Leave this row out, and the reason in the JSON."""
        self._config.stash[_missing].append({**self._facts, **facts, "reason": reason})
        pytest.skip(reason)

    def record(
        self, timing: Timing, flops: float | None = None, bytes: float | None = None, **facts: Any
    ) -> None:
        """Hand rounds that were timed elsewhere to pytest-benchmark."""
        self._benchmark.group = self._group
        self._benchmark.extra_info.update(self._facts, **facts, **rates(timing, flops, bytes))
        _tape.load(timing.seconds)
        self._benchmark.pedantic(_tape.step, rounds=len(timing.seconds))
        print(f"  {self._group} {self._contender}: {1e3 * timing.median:.4g} ms", flush=True)


@pytest.fixture
def measure(benchmark: Any, request: pytest.FixtureRequest) -> Measure:
    return Measure(benchmark, request)


@functools.cache
def _machine_facts() -> dict[str, Any]:
    return {**machine.facts(), "tile": machine.tile_against_registers()}


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    # pytest-benchmark's own list: processor flags, host and build names, a page of noise in a diff
    machine_info.clear()
    machine_info.update(_machine_facts())


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    # the commit is in machine_info; this one repeats it with the branch and the folder's name
    del output_json["commit_info"]
    output_json["unavailable"] = config.stash[_missing]
    for entry in output_json["benchmarks"]:
        del entry["options"]
        entry["stats"].pop("data", None)
