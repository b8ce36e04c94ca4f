"""The bench's own logic: turns, playback, targets, report. No test here looks at a clock."""

from __future__ import annotations

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DTYPES = ("float32", "bfloat16")

# bench/ is not installed and the root must stay off sys.path, so the package is loaded by its place
_spec = importlib.util.spec_from_file_location(
    "bench", ROOT / "bench/__init__.py", submodule_search_locations=[str(ROOT / "bench")]
)
sys.modules["bench"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["bench"])

from bench import (  # noqa: E402 (needs the package loaded above)
    compare,
    large_statistics,
    machine,
    peers,
    peers_losses,
    report,
    scaling,
    targets,
)
from bench.__main__ import main  # noqa: E402
from bench.measure import (  # noqa: E402
    SAMPLE,
    Contender,
    Playback,
    Race,
    Timing,
    Unavailable,
    check_agreement,
    resident_growth,
    run_race,
)


class FakeTime:
    """A clock that only the contenders move; `log` keeps who ran."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def contender(self, name: str, *seconds: float, value: Any = (), **options: Any) -> Contender:
        """Takes `seconds` in turn, call by call, the last of them for ever."""
        durations = list(seconds)

        def run() -> Any:
            self.log.append(name)
            self.now += durations.pop(0) if len(durations) > 1 else durations[0]
            return value

        return Contender(run, **options)


def test_contenders_take_turns_and_another_is_first_each_round():
    time = FakeTime()
    race = Race(lambda: {n: time.contender(n, 1.0) for n in "abc"}, seconds=9, rounds=(2, 30))
    timings, reasons = run_race(race, time)
    assert time.log == list("abc" + "abc" + "bca" + "cab")
    assert reasons == {}
    assert timings["a"].seconds == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (3, 3), (100, 5)])
def test_rounds_fill_the_budget_within_their_bounds(seconds, rounds):
    time = FakeTime()
    race = Race(lambda: {"a": time.contender("a", 1.0)}, seconds=seconds, rounds=(2, 5))
    assert len(run_race(race, time)[0]["a"].seconds) == rounds


def test_warm_up_is_not_timed_and_short_calls_are_repeated():
    time = FakeTime()
    race = Race(lambda: {"a": time.contender("a", 0.005, 0.001)}, seconds=0, rounds=(3, 3))
    timings, _ = run_race(race, time)
    # the first call took 5 ms: as many such calls as fill a sample, after one that is not timed
    assert time.log == ["a"] * (1 + 3 * (1 + math.ceil(SAMPLE / 0.005)))
    assert timings["a"].seconds == pytest.approx([0.001] * 3)


def test_without_warm_up_every_call_is_timed():
    time = FakeTime()
    race = Race(
        lambda: {"a": time.contender("a", 7.0, number=2)}, seconds=0, rounds=(1, 1), warm_up=False
    )
    timings, _ = run_race(race, time)
    assert time.log == ["a", "a"]
    assert timings["a"].seconds == [7.0]
    assert timings["a"].peak_mb is None


def test_who_cannot_run_gives_a_reason():
    time = FakeTime()
    race = Race(lambda: {"a": Unavailable("no compiler"), "b": time.contender("b", 1.0)}, seconds=0)
    timings, reasons = run_race(race, time)
    assert reasons == {"a": "no compiler"}
    assert list(timings) == ["b"]


def test_a_race_in_which_nobody_can_run():
    assert run_race(Race(lambda: {"a": Unavailable("why")}, seconds=0)) == ({}, {"a": "why"})


def test_something_that_computes_another_thing_is_not_timed():
    time = FakeTime()
    right, wrong = (torch.ones(3),), (torch.full((3,), 1.01),)
    contenders = {
        "a": time.contender("a", 1.0, value=right),
        "b": time.contender("b", 1.0, value=wrong),
    }
    with pytest.raises(AssertionError, match=r"b: output 0 is off by 0\.01, allowed 0\.001"):
        run_race(Race(lambda: contenders, seconds=0, dtype="float32"), time)
    assert time.log == ["a", "b"]
    run_race(Race(lambda: contenders, seconds=0, dtype="bfloat16"), time)


def test_agreement_wants_the_same_shapes_and_no_nan():
    one = (torch.ones(3),)
    with pytest.raises(AssertionError, match="2 outputs, not 1"):
        check_agreement("a", one * 2, one, 1.0)
    with pytest.raises(AssertionError, match="output 0 is"):
        check_agreement("a", (torch.ones(4),), one, 1.0)
    with pytest.raises(AssertionError, match="off by nan"):
        check_agreement("a", (torch.full((3,), float("nan")),), one, 1.0)


def test_threads_hold_during_the_call_only_and_the_peak_is_of_those_threads():
    before = torch.get_num_threads()
    seen = []
    contenders = {
        count: Contender(lambda: seen.append(torch.get_num_threads()), number=1, threads=count)
        for count in (1, 2)
    }
    race = Race(
        lambda: contenders,
        seconds=0,
        rounds=(3, 3),
        probe=lambda threads: {"torch.mm": 10.0 * threads, "own tile": 7.0 * threads},
    )
    timings, _ = run_race(race)
    assert seen == [1, 2, 1, 2, 2, 1, 1, 2]
    assert torch.get_num_threads() == before
    assert timings[1].peak == {"torch.mm": 10.0, "own tile": 7.0}
    assert timings[2].peak == {"torch.mm": 20.0, "own tile": 14.0}


def test_quantiles_interpolate():
    timing = Timing([4.0, 1.0, 3.0, 2.0])
    assert timing.median == 2.5
    assert timing.quantile(0.0) == 1.0
    assert timing.quantile(0.5) == 2.5
    assert timing.quantile(0.8) == pytest.approx(3.4)
    assert timing.quantile(1.0) == 4.0
    assert Timing([5.0]).quantile(0.2) == 5.0


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux keeps a high-water mark")
def test_resident_growth_sees_what_is_gone_again():
    result, megabytes = resident_growth(lambda: float(torch.ones(25_000_000).sum()))
    assert result == 25_000_000
    assert 95 <= megabytes <= 130


def test_playback_moves_only_by_recorded_rounds():
    tape = Playback()
    tape.load([2.0, 3.0])
    start = tape.now()
    tape.step()
    tape.step()
    assert tape.now() - start == 5.0
    with pytest.raises(StopIteration):
        tape.step()


def test_the_fixture_hands_recorded_rounds_to_pytest_benchmark(tmp_path):
    (tmp_path / "pytest.ini").write_text((ROOT / "bench/pytest.ini").read_text())
    (tmp_path / "conftest.py").write_text("from bench.conftest import *  # noqa: F403\n")
    (tmp_path / "bench_toy.py").write_text(
        "import pytest\n"
        "from bench.measure import Contender, Race, Timing, Unavailable\n"
        "@pytest.mark.parametrize('contender', ['a', 'gone'])\n"
        "@pytest.mark.parametrize('n', [4])\n"
        "def bench_toy(measure, contender, n):\n"
        "    make = lambda: {'a': Contender(tuple), 'gone': Unavailable('not here')}\n"
        "    measure(Race(make, seconds=0, rounds=(3, 3), probe=lambda threads: {'mm': 1}), 1e9)\n"
        "@pytest.mark.parametrize('contender', ['b'])\n"
        "def bench_recorded(measure, contender):\n"
        "    timing = Timing([2.0, 4.0, 3.0], 12.0, {'mm': 1.0, 'tile': 2.0})\n"
        "    measure.record(timing, flops=3e9, bytes=6e9, d=8)\n"
    )
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "pytest", "-q", f"--benchmark-json={path}", "bench_toy.py"]
    paths = f"pythonpath={ROOT}"
    done = subprocess.run([*command, "-o", paths], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    data = json.loads(path.read_text())
    rows = {entry["extra_info"]["contender"]: entry for entry in data["benchmarks"]}
    assert rows.keys() == {"a", "b"}
    assert rows["a"]["stats"]["rounds"] == 3
    assert rows["b"]["stats"]["median"] == pytest.approx(3.0)
    assert rows["b"]["stats"]["max"] == pytest.approx(4.0)
    expected = {"bench": "recorded", "d": 8, "gflops": 1.0, "gb_per_s": 2.0, "peak_mb": 12.0}
    expected["median"] = 3.0
    expected |= {"peak_of": "tile", "peak_gflops": 2.0, "percent_of_peak": 50.0}
    assert expected.items() <= rows["b"]["extra_info"].items()
    gone = {"bench": "toy", "contender": "gone", "n": 4, "reason": "not here"}
    assert data["unavailable"] == [gone]
    assert {"device", "isa", "threads", "torch", "commit", "dirty", "load"} <= data[
        "machine_info"
    ].keys()


@pytest.mark.filterwarnings("ignore:mmfast. pairwise_lse falls back")
@pytest.mark.parametrize("name", ["dense", "dense, one product", "torch chunked", "mmfast"])
def test_peers_compute_the_same_loss(name):
    loss = peers.find(name)
    if isinstance(loss, Unavailable):
        pytest.skip(str(loss))
    inputs = peers.features(33, 16, "float32")
    exact = [t.detach().double().requires_grad_() for t in inputs]
    truth = peers.value_and_grads(peers.dense, *exact)
    check_agreement(name, peers.value_and_grads(loss, *inputs), truth, 1e-5)


def test_flop_are_counted_by_products():
    assert peers.products(4, 8192, 512) == 8 * 8192**2 * 512
    assert peers.products(3, 256, 128, 65536) == 6 * 256 * 65536 * 128
    assert peers_losses.CASES["moco"].flops(256, 65536, 128) == 4 * 256 * 65536 * 128
    assert peers_losses.CASES["itc"].flops(512, 65536, 256) == 16 * 512 * 66048 * 256
    assert peers_losses.CASES["hcl"].flops(4096, 0, 512) == 16 * 4096**2 * 512


@pytest.mark.parametrize("name", targets.LOSSES)
def test_dense_forms_of_the_literature_compute_the_same_loss(name):
    loss = peers_losses.find(name, "mmfast")
    assert not isinstance(loss, Unavailable)
    inputs = peers_losses.CASES[name].inputs(34, 55, 16, "float32")
    exact = [
        x.detach().double().requires_grad_(x.requires_grad)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for x in inputs
    ]
    truth = peers.value_and_grads(peers_losses.find(name, "dense"), *exact)
    assert len(truth) > 1
    check_agreement(name, peers.value_and_grads(loss, *inputs), truth, 1e-5)


def test_every_loss_of_the_targets_has_a_case_and_the_other_way_round():
    assert set(peers_losses.CASES) == set(targets.LOSSES)


def test_a_loss_that_an_older_commit_lacks_gives_a_reason(monkeypatch):
    monkeypatch.delattr(peers_losses.mmfast, "hcl_loss")
    contender = peers_losses.contender("hcl", "mmfast", 8, 0, 4, "float32")
    assert str(contender) == "this mmfast has no hcl_loss"
    assert isinstance(contender, Unavailable)


@pytest.mark.parametrize("name", ["softmax + multinomial", "mmfast"])
def test_draws_are_the_hardest_negatives_at_a_large_scale(name):
    draw = peers_losses.drawing(name)
    assert not isinstance(draw, Unavailable)
    q = peers.features(20, 512, "float32", grad=False)[0]
    # row i is as near to its own column as to the next: only leaving the own out finds the next
    k = q + q.roll(1, 0)
    assert torch.equal(draw(q, k, 100.0), torch.arange(20).roll(-1))


def row(bench: str, contender: Any, median: float, **facts: Any) -> dict[str, Any]:
    defaults = {"n": 8192, "d": 512, "dtype": "float32", "mode": "fwd+bwd", "peak_mb": 100.0}
    times = {"p20": median, "median": median, "p80": median}
    return {"bench": bench, "contender": contender, **times, **defaults, **facts}


def good_rows() -> list[dict[str, Any]]:
    """Every target met, none with much room."""
    peaks = {"own tile": 230.0, "torch.mm": 130.0}
    rows = [
        row("rate", "cpp", 1.0, mode=mode, dtype=dtype, percent_of_peak=percent, peaks=peaks)
        for mode, percent in (("fwd", 91.0), ("fwd+bwd", 86.0))
        for dtype in DTYPES
    ]
    rows += [row("memory", "mmfast", 1.0, n=16384, dtype=t, peak_mb=260.0) for t in DTYPES]
    for dtype, dense, chunked in (("float32", 2.4, 2.0), ("bfloat16", 2.1, 3.6)):
        times = {"dense": dense, "torch chunked": chunked, "mmfast": 1.0}
        rows += [row("loss", name, t, dtype=dtype) for name, t in times.items()]
    rows += [row("small", name, t, n=256) for name, t in (("dense", 1.1), ("mmfast", 1.0))]
    frozen = {"both towers learn": 1.0, "text frozen": 0.78, "image frozen": 0.76}
    rows += [row("frozen", name, t) for name, t in frozen.items()]
    rows += [row("threads", count, t) for count, t in ((1, 1.95), (2, 1.0))]
    rows += [row("growth", n, c * n * n, n=n) for n, c in ((2048, 1.05), (8192, 1.0), (65536, 1.1))]
    rows += [row("bandwidth", name, t, mode="fwd") for name, t in (("copy", 0.81), ("cpp", 1.0))]
    rows += [row("mix", name, t) for name, t in (("formula", 4.1), ("cpp", 1.0))]
    dense = dict.fromkeys(targets.LOSSES, 2.3) | {"itc": 2.6}
    for name, t in dense.items():
        own = {"percent_of_peak": 80.5, "peaks": peaks}
        rows += [row(name, "dense", t), row(name, "mmfast", 1.0, **own)]
    drawn = {"softmax + multinomial": 5.1, "mmfast": 1.0}
    rows += [row("sampling", name, t, mode="fwd") for name, t in drawn.items()]
    for bench, mode, percent in (
        ("statistics", "moments", 85.5),
        ("statistics", "histogram", 75.5),
        ("ranks", "fwd", 90.5),
    ):
        own = {"percent_of_peak": percent, "peaks": peaks, "mode": mode}
        rows += [row(bench, "blocks", 3.0, mode=mode), row(bench, "cpp", 1.0, **own)]
    projected = {"sorting": 20.5, "entmax, top-k": 1.02, "cpp": 1.0}
    for bench in targets.SPARSEMAX:
        rows += [row(bench, name, t, n=4096, d=16384) for name, t in projected.items()]
    for mode, eager, own in (("fwd", 4.0, 1.0), ("bwd", 4.0, 0.14), ("fwd+bwd", 4.6, 1.0)):
        rate = {"percent_of_peak": 86.0, "peaks": peaks} if mode == "fwd" else {}
        rows += [row("fdt_few", "eager", eager, mode=mode)]
        rows += [row("fdt_few", "cpp", own, mode=mode, **rate)]
    rows += [row("fdt_all", name, t, mode="bwd") for name, t in (("eager", 3.1), ("cpp", 1.0))]
    landscape = {"one forward of clip_loss": 1.0, "mmfast": 7.9}
    rows += [row("landscape", name, t, mode="fwd") for name, t in landscape.items()]
    shared = {"1 rank, 2 threads": 1.0, "2 ranks": 1.05, "4 ranks": 1.09}
    return rows + [row("shared", name, t, n=16384) for name, t in shared.items()]


TARGETS = 38
GOOD_TILE = {"limit_gflops": 236.0, "tile_gflops": 220.0, "percent": 93.0}


def test_all_targets_met():
    assert [v.met for v in targets.judge(good_rows(), [GOOD_TILE])] == [True] * TARGETS


def test_nothing_measured_meets_nothing():
    verdicts = targets.judge([], [])
    assert [v.met for v in verdicts] == [None] * TARGETS
    assert {v.where for v in verdicts} == {"not measured"}


@pytest.mark.parametrize(
    ("missed", "which", "change"),
    [
        (0, {"bench": "rate", "mode": "fwd", "dtype": "bfloat16"}, {"percent_of_peak": 89.9}),
        (1, {"bench": "rate", "mode": "fwd+bwd", "dtype": "float32"}, {"percent_of_peak": 84.9}),
        (3, {"bench": "memory", "dtype": "bfloat16"}, {"peak_mb": 266.0}),
        (4, {"bench": "loss", "contender": "dense", "dtype": "float32"}, {"median": 2.29}),
        (5, {"bench": "loss", "contender": "torch chunked", "dtype": "float32"}, {"median": 1.89}),
        (6, {"bench": "loss", "contender": "dense", "dtype": "bfloat16"}, {"median": 1.99}),
        (7, {"bench": "loss", "contender": "torch chunked", "dtype": "bfloat16"}, {"median": 3.4}),
        (8, {"bench": "small", "contender": "mmfast"}, {"median": 1.2}),
        (9, {"bench": "frozen", "contender": "image frozen"}, {"median": 0.9}),
        (10, {"bench": "threads", "contender": 2}, {"median": 1.1}),
        (11, {"bench": "growth", "contender": 65536}, {"median": 1.2 * 65536**2}),
        (12, {"bench": "bandwidth", "contender": "cpp"}, {"median": 1.02}),
        (13, {"bench": "mix", "contender": "cpp"}, {"median": 1.03}),
        (14, {"bench": "m2_mix", "contender": "mmfast"}, {"median": 1.05}),
        (15, {"bench": "itc", "contender": "dense"}, {"median": 2.4}),
        (16, {"bench": "sampling", "contender": "mmfast"}, {"median": 1.03}),
        (
            17,
            {"bench": "statistics", "mode": "moments", "contender": "cpp"},
            {"percent_of_peak": 84.9},
        ),
        (
            18,
            {"bench": "statistics", "mode": "histogram", "contender": "cpp"},
            {"percent_of_peak": 74.9},
        ),
        (19, {"bench": "ranks", "contender": "cpp"}, {"percent_of_peak": 89.9}),
        (36, {"bench": "landscape", "contender": "mmfast"}, {"median": 8.1}),
        (37, {"bench": "shared", "contender": "4 ranks"}, {"median": 1.11}),
        *(
            (20 + i, {"bench": loss, "contender": "mmfast"}, {"percent_of_peak": 79.9})
            for i, loss in enumerate(targets.LOSSES)
        ),
        (30, {"bench": "sparsemax_dense", "contender": "sorting"}, {"median": 19.9}),
        (31, {"bench": "sparsemax_peaked", "contender": "entmax, top-k"}, {"median": 0.99}),
        (32, {"bench": "fdt_few", "mode": "fwd", "contender": "cpp"}, {"percent_of_peak": 84.9}),
        (33, {"bench": "fdt_few", "mode": "bwd", "contender": "cpp"}, {"median": 0.16}),
        (34, {"bench": "fdt_few", "mode": "fwd+bwd", "contender": "cpp"}, {"median": 1.03}),
        (35, {"bench": "fdt_all", "contender": "cpp"}, {"median": 1.04}),
    ],
)
def test_each_target_is_missed_by_its_own_worst_row(missed, which, change):
    rows = good_rows()
    hits = [r for r in rows if which.items() <= r.items()]
    assert len(hits) == 1
    hits[0].update(change)
    verdicts = targets.judge(rows, [GOOD_TILE])
    assert [i for i, v in enumerate(verdicts) if not v.met] == [missed]


def test_a_slow_tile_is_missed():
    verdicts = targets.judge(good_rows(), [{**GOOD_TILE, "percent": 89.0}])
    assert [i for i, v in enumerate(verdicts) if not v.met] == [2]


def test_a_tile_faster_than_its_limit_is_a_bad_reading():
    verdict = targets.judge([], [GOOD_TILE, {**GOOD_TILE, "percent": 132.0}])[2]
    assert verdict.met is None
    assert "disturbed" in verdict.where


def test_a_peak_without_the_own_tile_judges_nothing():
    rows = good_rows()
    for r in rows:
        if "peaks" in r:
            r["peaks"] = {"torch.mm": 130.0}
    met = [v.met for v in targets.judge(rows, [])]
    assert met[:3] + met[17:30] + met[32:33] == [None] * 17


def test_small_bfloat16_batches_of_256_are_no_target():
    rows = [
        row("small", c, t, n=256, dtype="bfloat16") for c, t in (("dense", 1.0), ("mmfast", 2.0))
    ]
    assert targets.judge(rows, [])[8].met is None


def test_bandwidth_is_shown_against_the_copy_of_its_race():
    rows = [
        row("bandwidth", c, t, mode="fwd", gb_per_s=g)
        for c, t, g in (("copy", 1.0, 40.0), ("cpp", 1.25, 32.0))
    ]
    last = report.bench_table("bandwidth", rows).splitlines()[-1]
    assert [cell.strip() for cell in last.split("|")[-3:-1]] == ["32.0", "80"]


def test_a_loss_with_a_queue_shows_how_long_it_is():
    lines = report.bench_table("moco", [row("moco", "dense", 1.0, queue=65536)]).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:4]] == ["N", "queue", "D"]
    assert [cell.strip() for cell in lines[2].split("|")[1:4]] == ["8192", "65536", "512"]


def test_memory_of_a_loss_is_shown_per_element():
    rows = [row("losses_memory", "hcl", 1.0, peak_mb=mb) for mb in (41.94304, None)]
    lines = report.bench_table("losses_memory", rows).splitlines()
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["10.0", "-"]


def test_the_quick_run_of_the_losses_fills_every_table(tmp_path):
    command = [
        sys.executable,
        "-m",
        "bench",
        "losses",
        "--quick",
        "--peers",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (result,) = report.newest(tmp_path)
    lacking = {u["bench"] for u in result.unavailable}
    own = {r["bench"] for r in result.rows if r["contender"] == "mmfast"}
    assert own | lacking == {*targets.LOSSES, "sampling"}
    assert not own & lacking
    assert all("percent_of_peak" in r for r in result.rows if r["bench"] != "losses_memory")
    text = report.render([result], {})
    for bench in (*targets.LOSSES, "sampling", "losses_memory"):
        assert f"**{report.TITLES[bench]}**" in text


def write(folder: Path, name: str, rows: list[dict[str, Any]], when: str, **facts: Any) -> Path:
    machine = {
        "device": "Toy, 2 cores",
        "isa": "avx2",
        "threads": 2,
        "torch": "2.13",
        "commit": "abc",
    }
    machine |= {"dirty": False, "quick": False, "tile": GOOD_TILE, "load": 0.1, **facts}
    fullname = f"bench_{name}.py::bench_x"
    entries = [{"fullname": fullname, "extra_info": r} for r in rows]
    missing = [{"bench": "rate", "contender": "cuda", "reason": "no such card"}]
    data = {
        "datetime": when,
        "machine_info": machine,
        "benchmarks": entries,
        "unavailable": missing,
    }
    path = folder / f"{name}-{when}-{machine['commit']}.json"
    path.write_text(json.dumps(data))
    return path


def test_newest_prefers_full_runs_and_keeps_ops_apart(tmp_path):
    write(tmp_path, "clip", good_rows(), "2025-01-01", commit="old")
    write(tmp_path, "clip", good_rows(), "2025-02-01", commit="new")
    write(tmp_path, "clip", good_rows(), "2025-03-01", commit="quick", quick=True)
    write(tmp_path, "pairwise_lse", good_rows(), "2025-01-05", commit="lse", quick=True)
    found = [(r.op, r.machine["commit"]) for r in report.newest(tmp_path)]
    assert found == [("clip", "new"), ("pairwise_lse", "lse")]


def test_report_writes_tables_and_pictures(tmp_path, capsys):
    results = tmp_path / "results"
    results.mkdir()
    rate = [row("rate", c, t, n=n) for n in (2048, 8192) for c, t in (("eager", 4.0), ("cpp", 2.0))]
    for percent, own in ((89.0, rate[1]), (87.5, rate[3])):
        own |= {"percent_of_peak": percent, "gflops": 201.0, "peaks": {"own tile": 230.0}}
    write(results, "pairwise_lse", rate, "2025-01-01", dirty=True)
    write(results, "clip", good_rows(), "2025-01-01")
    report.main(["--results", str(results), "--out", str(tmp_path / "RESULTS.md")])
    text = (tmp_path / "RESULTS.md").read_text()
    assert text in capsys.readouterr().out
    assert "### pairwise_lse · avx2 · 2 threads · torch 2.13 · abc (uncommitted changes)" in text
    assert "(uncommitted changes) · load before 0.1" in text
    assert "Worst rate: 87.5 % of peak (rate, fwd+bwd, N=8192, D=512, float32)." in text
    assert "Worst speed-up over the fastest other contender: 2.00x over eager" in text
    assert "- rate, cuda: no such card" in text
    assert len({len(line) for line in text.splitlines() if line.startswith("| target")}) == 1
    for op in ("pairwise_lse", "clip"):
        for quantity in ("time", "memory"):
            name = f"results/{op}-toy-2-cores-{quantity}.png"
            assert f"]({name})" in text
            assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_a_quick_run_says_that_it_is_none(tmp_path):
    path = write(tmp_path, "clip", good_rows(), "2025-01-01", quick=True)
    text = report.render([report.load(path)], {})
    assert "These are no results." in text
    assert text.count("not measured") == TARGETS


def test_no_results_is_an_error(tmp_path, capsys):
    with pytest.raises(SystemExit):
        report.main(["--results", str(tmp_path)])
    assert "run python -m bench all first" in capsys.readouterr().err


def test_compare_shows_shared_rows_only(tmp_path):
    before = write(tmp_path, "clip", [row("loss", "mmfast", 3.0)], "2025-01-01", commit="old")
    rows = [row("loss", "mmfast", 2.0), row("loss", "new peer", 1.0)]
    after = write(tmp_path, "clip", rows, "2025-01-02", commit="new")
    text = compare.comparison([report.load(before)], [report.load(after)])
    assert "old ms" in text
    assert "new ms" in text
    assert "| 1.50 " in text
    assert "new peer" not in text


def turns(folder: Path, *rows: list[dict[str, Any]]) -> list[report.Result]:
    return [report.load(write(folder, "clip", part, f"{i}")) for i, part in enumerate(rows)]


def test_a_commit_counts_at_its_fastest_turn(tmp_path):
    before = turns(tmp_path, [row("loss", "mmfast", 1.0)], [row("loss", "mmfast", 2.0)])
    after = turns(tmp_path, [row("loss", "mmfast", 9.0)], [row("loss", "mmfast", 1.1)])
    assert compare.slower(before, after, 1.2) == []
    (said,) = compare.slower(before, after, 1.05)
    assert said.startswith("loss mmfast")
    assert said.endswith("1.10 times as long")


def test_what_peers_lost_too_was_the_machine(tmp_path):
    before = turns(tmp_path, [row("loss", "mmfast", 1.0), row("loss", "dense", 1.0)])
    after = turns(tmp_path, [row("loss", "mmfast", 1.5), row("loss", "dense", 1.4)])
    assert compare.slower(before, after, 1.1) == []
    assert "1.07 times beyond its peers" in compare.slower(before, after, 1.05)[0]
    before = turns(tmp_path, [row("bandwidth", "cpp", 1.0), row("bandwidth", "copy", 1.0)])
    after = turns(tmp_path, [row("bandwidth", "cpp", 1.5), row("bandwidth", "copy", 1.5)])
    assert compare.slower(before, after, 1.05) == []


def test_every_rival_is_one_in_the_tables():
    files = "".join(path.read_text() for path in (ROOT / "bench").glob("bench_*.py"))
    named = files + (ROOT / "bench" / "peers.py").read_text()
    assert {name for name in compare.RIVALS if f'"{name}"' not in named} == set()


def test_peers_are_left_out_of_a_race_unless_asked_for():
    time = FakeTime()
    race = Race(lambda: {n: time.contender(n, 1.0) for n in ("dense", "mmfast")}, seconds=0)
    timings, _ = run_race(race.without(compare.RIVALS), time)
    assert list(timings) == ["mmfast"]
    assert set(time.log) == {"mmfast"}


@pytest.mark.parametrize("options", [[], ["--base", "HEAD"]])
def test_nothing_is_timed_on_a_red_test(monkeypatch, capsys, options):
    calls = []

    def red(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command)
        return subprocess.CompletedProcess(command, 1)

    monkeypatch.setattr(subprocess, "run", red)
    assert main(["clip", *options]) == 1
    assert [command[-1] for command in calls] == ["tests/test_clip.py"]
    assert "never reported on a red test" in capsys.readouterr().out


def test_the_tests_asked_are_those_of_every_loss_that_is_timed(monkeypatch, capsys):
    calls = []

    def last_is_red(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        calls.append(command[-1])
        return subprocess.CompletedProcess(command, int(command[-1] == "tests/test_moco.py"))

    monkeypatch.setattr(subprocess, "run", last_is_red)
    assert main(["losses", "--base", "HEAD"]) == 1
    assert calls == [f"tests/test_{stem}.py" for stem in ("mixup", "gmc", "moco")]
    assert "tests/test_moco.py is red" in capsys.readouterr().out


def test_the_bytes_of_a_rank_are_those_that_the_ring_sends():
    # what tests/test_distributed.py counts in float64: 3 ranks of 4 rows, 5 wide
    sent = scaling.sent_bytes(12, 5, 3, 8, wide=8)
    assert sent == {"forward": 8 * (8 * 6 + 12), "backward": 8 * (8 * 8 + 12 * 5)}
    assert scaling.sent_bytes(12, 5, 1, 4)["forward"] == 12 * 4


def test_scaling_has_a_table_for_each_way_to_grow(tmp_path):
    growth = [row("growth", str(n), n * n / 1e9, n=n) for n in (1024, 2048)]
    growth[1]["median"] *= 1.5
    threads = [row("threads", str(t), 1.0 / t) for t in (1, 2)]
    shared = [row("shared", name, 1.0, n=4096) for name in ("1 rank, 2 threads", "2 ranks")]
    rows = [*growth, *threads, *shared]
    text = scaling.render([report.load(write(tmp_path, "all", rows, "2025-01-01"))])
    assert "| 2,048 | 6.291 | 1.500     | 1.50" in text
    assert "| 2       | 500  | 2.00" in text
    sent = 2048 * (4 * 512 + 8) + 4096 * 4 + 2048 * (4 * 512 + 16) + 4096 * 4 * 512
    assert f" {sent / 1e6:.1f} " in text
    assert "**Not measured.**" in text


def test_table_columns_are_aligned():
    lines = report.table(["a", "long head"], [["1", "2"], ["333", "4"]]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1] == "| --- | --------- |"


@pytest.mark.skipif(machine.core is None, reason=machine.NO_CORE)
def test_large_statistics_are_those_of_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "probe", lambda *_: {"own tile": 50.0, "torch.mm": 40.0})
    rows = large_statistics.write(tmp_path / "rows.npy", 300, 8)
    found = large_statistics.measure(rows)
    products = torch.from_numpy(rows).double() @ torch.from_numpy(rows).double().T
    pairs = products[torch.ones_like(products, dtype=torch.bool).triu(1)]
    assert found["pairs"] == len(pairs)
    assert found["mean"] == pytest.approx(pairs.mean().item(), abs=1e-6)
    assert found["std"] == pytest.approx(pairs.std().item(), abs=1e-6)
    assert found["gflops"] * found["seconds"] * 1e9 == pytest.approx(300**2 * 8)
    assert found["percent_of_peak"] == pytest.approx(2 * found["gflops"])
