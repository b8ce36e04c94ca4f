"""`python -m bench gpu` without a card: its logic, and the whole of it in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]

# as in test_bench.py: the package is loaded by its place, and the root stays off sys.path
if "bench" not in sys.modules:
    _spec = importlib.util.spec_from_file_location(
        "bench", ROOT / "bench/__init__.py", submodule_search_locations=[str(ROOT / "bench")]
    )
    sys.modules["bench"] = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(sys.modules["bench"])

from bench import gpu, gpu_checks, gpu_races, gpu_report, machine, peers, report  # noqa: E402
from bench.gpu_checks import Check  # noqa: E402
from bench.gpu_clock import Budget, Entry, Interpreter, run_race  # noqa: E402
from bench.measure import Unavailable, check_agreement  # noqa: E402
from mmfast.ops import BACKENDS  # noqa: E402
from mmfast.testing import find_case  # noqa: E402

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
RATES = {"bfloat16": 600e3, "float32": 50e3}


class FakeDevice:
    """Every call takes what its function returns as its first output, in seconds."""

    type = "cpu"

    def __init__(self) -> None:
        self.log: list[str] = []

    def seconds(self, run: Any) -> float:
        return float(run()[0])

    def weighed(self, run: Any) -> tuple[Any, float | None]:
        return run(), 7.0

    def product_rate(self, dtype: str) -> float:
        return 100.0

    def release(self) -> None:
        self.log.append("release")


def entry(value: float, **options: Any) -> Entry:
    return Entry(lambda: lambda: (torch.tensor(value),), compared=1, **options)


def race(entries: dict[str, Entry], left: float = 100.0, rounds: tuple[int, int] = (2, 2)) -> Any:
    return run_race(FakeDevice(), entries, "float32", 0.0, rounds, Budget(left))


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run of the whole command, as a user starts it."""
    folder = tmp_path_factory.mktemp("gpu")
    command = [sys.executable, "-m", "bench", "gpu", "--smoke", "--out", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = folder.glob("gpu-*.json")
    return SimpleNamespace(
        folder=folder, run=json.loads(path.read_text()), path=path, out=done.stdout
    )


@needs_triton
def test_smoke_checks_and_times_every_op(smoke):
    run = smoke.run
    assert {check["op"] for check in run["checks"]} == set(BACKENDS)
    for op in (op for op in BACKENDS if any(row.name == "triton" for row in BACKENDS[op])):
        mine = [c for c in run["checks"] if (c["op"], c["backend"]) == (op, "triton")]
        assert sum(c["error"] is None and c["skipped"] is None for c in mine) >= 7
    races = {(row["op"], row["mode"], row["dtype"]) for row in run["rows"] if row["own"]}
    assert races == {(plan.op, plan.mode, plan.dtype) for plan in gpu_races.plans(smoke=True)}
    contenders = {row["contender"] for row in run["rows"] if row["op"] == "clip_loss"}
    assert {"mmfast", "dense", "dense, one product"} <= contenders
    missing = {entry["contender"] for entry in run["unavailable"]}
    assert {gpu_races.COMPILED, *(p.label for p in peers.CARD_PEERS.values())} <= missing
    assert {entry["clean"] for entry in run["sanitizer"]} == {None}


@needs_triton
def test_smoke_writes_json_markdown_and_pictures(smoke):
    assert smoke.path.stem.endswith("-smoke")
    assert smoke.run["machine"]["commit"] in smoke.path.stem
    text = smoke.path.with_suffix(".md").read_text()
    assert text in smoke.out
    assert "These are no results." in text
    assert "## Targets" not in text
    pictures = sorted(path.name for path in smoke.folder.glob("*.png"))
    # of time only: the interpreter weighs nothing, and slerp's passes are timed one by one
    ops = ("clip_loss", "pairwise_lse")
    assert pictures == [f"{smoke.path.stem}-{op}-time.png" for op in ops]
    for name in pictures:
        assert f"]({name})" in text
        assert (smoke.folder / name).read_bytes().startswith(b"\x89PNG")


@needs_triton
def test_the_other_report_leaves_its_json_alone(smoke):
    assert report.newest(smoke.folder) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_what_can_be_run(capsys, tmp_path):
    assert gpu.main(["--out", str(tmp_path)]) == 2
    assert "no CUDA card" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def checks_of(monkeypatch, wrong, op: str = "pairwise_lse") -> list[Check]:
    """The checks of `op` alone, run by `wrong(results of the definition)`."""
    subject = gpu_checks.SUBJECTS[op]

    def run(inputs: Any, backend: str) -> Any:
        return wrong(subject.definition(inputs))

    replaced = gpu_checks.Subject(**{**vars(subject), "run": run})
    monkeypatch.setitem(gpu_checks.SUBJECTS, op, replaced)
    for module in (gpu, gpu_checks):
        monkeypatch.setattr(module, "BACKENDS", {op: BACKENDS[op]})
    return list(gpu_checks.check_all("cpu", Budget(100), smallest_only=True))


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return 1.05 * g


def noise(outputs):
    return tuple(x * (1 + 1e-6 * torch.rand_like(x)) for x in outputs)


def fail(outputs):
    raise RuntimeError("no such tile\nand more")


@needs_triton
@pytest.mark.parametrize(
    ("wrong", "what", "error"),
    [
        (lambda xs: (xs[0] * 1.01, xs[1]), "aligned, float32", "rows: largest error"),
        (lambda xs: (xs[0], xs[1].roll(1)), "aligned, bfloat16", "columns: largest error"),
        (lambda xs: (WrongGradient.apply(xs[0]), xs[1]), "aligned, float32", "dq: "),
        (lambda xs: (xs[0].half(), xs[1]), "aligned, float32", "rows is torch.float16"),
        (noise, "the same bits twice", "differs"),
        (fail, "odd_width, float16", "RuntimeError: no such tile"),
    ],
)
def test_a_red_kernel_is_found_and_not_timed(monkeypatch, wrong, what, error):
    checks = checks_of(monkeypatch, wrong)
    found = {check.what: check.error for check in checks if check.error is not None}
    assert error in found[what]
    run: dict[str, Any] = {"rows": [], "unavailable": [], "skipped": [], "sanitizer": []}
    plans = only(monkeypatch, "pairwise_lse")
    assert list(gpu.time_all(Interpreter(), Budget(100), checks, run, smoke=True)) == []
    assert run["rows"] == []
    assert [entry["what"] for entry in run["skipped"]] == [str(plan) for plan in plans]
    assert "never reported on a red test" in run["skipped"][0]["reason"]
    run["checks"] = [vars(check) for check in checks]
    assert gpu.red(run)
    assert f"- **red**: pairwise_lse triton, {what}" in "\n".join(gpu_report.checks(run["checks"]))


def only(monkeypatch, op: str) -> list[gpu_races.Plan]:
    """Leave no race but those that rest on `op`."""
    plans = [plan for plan in gpu_races.plans(smoke=True) if plan.rests_on == op]
    monkeypatch.setattr(gpu_races, "plans", lambda smoke: iter(plans))
    return plans


@needs_triton
@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        (lambda xs: (xs[0].roll(1, 1),), {"m"}),
        (lambda xs: (xs[0] * (1 + 3e-3),), {"m"}),
        (lambda xs: (WrongGradient.apply(xs[0]),), {"da", "db", "dlam"}),
    ],
)
def test_a_wrong_slerp_is_found_in_every_type(monkeypatch, wrong, names):
    checks = checks_of(monkeypatch, wrong, "slerp")
    found = {check.what: check.error for check in checks if check.error is not None}
    for dtype in ("float32", "float16"):
        error = found[f"aligned, {dtype}"]
        assert error.removeprefix("AssertionError: ").partition(":")[0] in names


@needs_triton
@pytest.mark.parametrize("op", sorted(gpu_checks.SUBJECTS))
def test_the_definition_itself_is_green(monkeypatch, op):
    checks = checks_of(monkeypatch, lambda outputs: outputs, op)
    assert [check.error for check in checks] == [None] * len(checks)


@pytest.mark.parametrize("dtype", gpu_checks.DTYPES, ids=str)
def test_an_op_without_triton_is_judged_by_its_entry(monkeypatch, dtype):
    case, subject = find_case("sparsemax", "odd_width"), gpu_checks.SUBJECTS["sparsemax"]

    def check(wrong: Any) -> None:
        run = {"run": lambda inputs, backend: wrong(subject.definition(inputs)[0])}
        replaced = gpu_checks.Subject(**{**vars(subject), **run})
        monkeypatch.setitem(gpu_checks.SUBJECTS, "sparsemax", replaced)
        gpu_checks.check_values("sparsemax", "", case, dtype, "cpu")

    check(lambda p: (p,))
    with pytest.raises(AssertionError, match=r"^p: "):
        check(lambda p: (p.roll(1, 1),))
    with pytest.raises(AssertionError, match=r"^dx: "):
        check(lambda p: (WrongGradient.apply(p),))


@needs_triton
def test_what_a_check_leaves_out_is_named(monkeypatch):
    checks = checks_of(monkeypatch, lambda outputs: outputs)
    skipped = {check.what for check in checks if check.skipped is not None}
    assert skipped == {"single, float64", "aligned, float64", "odd_width, float64", "a CUDA graph"}


@needs_triton
def test_an_op_that_nobody_checks_is_red(monkeypatch):
    monkeypatch.setattr(gpu_checks, "BACKENDS", {"new": BACKENDS["pairwise_lse"]})
    checks = list(gpu_checks.check_all("cpu", Budget(100)))
    assert [c.op for c in checks if c.error is not None] == ["new"]


@needs_triton
def test_checks_beyond_the_quick_ones_end_with_their_time(monkeypatch):
    monkeypatch.setattr(gpu_checks, "_check_case", lambda op, row, case, device: iter(()))
    skipped = [c.what for c in gpu_checks.check_all("cpu", Budget(0)) if c.skipped is not None]
    assert {"thin", "deep", "mask"} & set(skipped) == {"thin", "deep"}


def test_a_race_that_fails_makes_its_op_red(monkeypatch):
    monkeypatch.setattr(gpu_checks, "gpu_backends", lambda op, device: [(BACKENDS[op][0], None)])
    plans = only(monkeypatch, "pairwise_lse")

    def entries(plan: Any, device: Any, backends: list[str]) -> dict[str, Entry]:
        bad = plan.op == "pairwise_lse"
        return {"cpp": entry(1.0, own=True), "eager": entry(2.0 if bad else 1.0, trusted=True)}

    monkeypatch.setattr(gpu_races, "entries", entries)
    run: dict[str, Any] = {"rows": [], "unavailable": [], "skipped": []}
    device = FakeDevice()
    (red,) = gpu.time_all(device, Budget(100), [], run, smoke=True)
    assert (red.op, red.what) == ("pairwise_lse", "pairwise_lse fwd, bfloat16, N=48, D=16")
    assert "eager: output 0 is off by 1" in red.error
    # the loss before it was timed, nothing after it
    assert {row["op"] for row in run["rows"]} == {"clip_loss"}
    assert len(run["skipped"]) == len(plans) - 2
    assert device.log == ["release", "release"]


def test_contenders_take_turns_after_a_comparison():
    result = race({"a": entry(1.0, own=True), "b": entry(1.0005)})
    assert {name: timing.seconds for name, timing in result.timings.items()} == {
        "a": [1.0, 1.0],
        "b": pytest.approx([1.0005] * 2),
    }
    assert result.timings["a"].peak == {"product": 100.0}
    assert result.timings["a"].peak_mb == 7.0


def test_who_cannot_run_or_computes_another_thing_gives_a_reason():
    def out_of_memory() -> Any:
        raise torch.OutOfMemoryError("tried to allocate 34 GiB")

    entries = {
        "a": entry(1.0, own=True),
        "far": entry(1.1),
        "near enough": entry(1.05, tolerance="bfloat16"),
        "large": Entry(lambda: out_of_memory),
        "absent": Entry(lambda: Unavailable("not installed")),
        "broken": Entry(lambda: 1 / 0),
    }
    result = race(entries)
    assert list(result.timings) == ["a", "near enough"]
    assert result.reasons == {
        "far": "far: output 0 is off by 0.1, allowed 0.001",
        "large": "out of memory",
        "absent": "not installed",
        "broken": "division by zero",
    }


def test_our_own_errors_and_the_definitions_disagreement_are_raised():
    with pytest.raises(ZeroDivisionError):
        race({"a": Entry(lambda: 1 / 0, own=True)})
    with pytest.raises(AssertionError, match="b: output 0"):
        race({"a": entry(1.0, own=True), "b": entry(1.1, trusted=True)})


def test_a_race_ends_with_the_budget():
    result = race({"a": entry(1.0)}, left=-1.0)
    assert result.reasons == {"a": "the time of this run was spent"}
    assert result.timings == {}
    # out of time after the first rounds: no more of the twenty
    assert len(race({"a": entry(1.0)}, rounds=(3, 20)).timings["a"].seconds) == 3


def test_what_does_not_fit_is_skipped_and_smaller_races_still_run():
    now = [0.0]
    budget = Budget(40.0, lambda: now[0])
    reasons = {}
    for plan, reason in gpu_races.choose(gpu_races.plans(smoke=False), budget, RATES, rounds=3):
        reasons[plan] = reason
        if reason is None:
            now[0] += plan.estimate(RATES, 3)
    taken = [plan for plan, reason in reasons.items() if reason is None]
    assert sum(plan.estimate(RATES, 3) for plan in taken) <= 40.0
    assert 1 <= len(taken) < len(reasons)
    assert (taken[0].op, taken[0].n, taken[0].d) == ("clip_loss", 65536, 768)
    # a smaller race later in the list was taken after a larger one was not
    order = list(reasons)
    assert any(order.index(plan) > order.index(last) for plan in taken
               for last, reason in reasons.items() if reason is not None)  # fmt: skip
    assert any(reason and reason.endswith("s were left") for reason in reasons.values())


def test_the_headline_fits_the_time_of_a_run():
    # what an H100's rates make of all races in the eight minutes, less what the checks may take
    left = gpu.SECONDS * (1 - gpu.CHECKS)
    plans = list(gpu_races.plans(smoke=False))
    bfloat16 = [p for p in plans if p.dtype == "bfloat16" and p.n in (16384, 65536)]
    assert sum(plan.estimate(RATES, 3) for plan in bfloat16) <= left


def row(contender: str, median: float, own: bool = False, **facts: Any) -> dict[str, Any]:
    defaults = {"op": "clip_loss", "mode": "fwd+bwd", "dtype": "bfloat16", "n": 65536, "d": 768}
    times = {"p20": median, "median": median, "p80": median}
    extra = {"gflops": 4e5, "percent_of_peak": 65.0, "peak_mb": 180.0}
    return {"contender": contender, "own": own, **times, **extra, **defaults, **facts}


def good_rows() -> list[dict[str, Any]]:
    rows = [row("mmfast", 0.050, own=True)]
    rows += [row(f"{name} 1.0 (a note)", 0.060) for name in gpu_report.RIVALS]
    for mode, percent in (("fwd", 71.0), ("fwd+bwd", 61.0)):
        facts = {"op": "pairwise_lse", "mode": mode, "n": 16384, "own": True}
        rows += [row("triton", 0.01, percent_of_peak=percent, **facts)]
        rows += [row("cuda", 0.02, percent_of_peak=percent / 2, **facts)]
    return rows


def test_all_targets_met():
    verdicts = gpu_report.judge(good_rows(), "NVIDIA H100 80GB HBM3")
    assert [v.met for v in verdicts] == [True] * 8
    assert not any("missed" in v.figure for v in verdicts)


def test_nothing_measured_meets_nothing():
    assert {v.met for v in gpu_report.judge([], "NVIDIA H100")} == {None}


@pytest.mark.parametrize(
    ("missed", "which", "change", "gap"),
    [
        (0, {"contender": "triton", "mode": "fwd"}, {"percent_of_peak": 66.8}, "3.2 points"),
        (1, {"contender": "triton", "mode": "fwd+bwd"}, {"percent_of_peak": 59.0}, "1 points"),
        (2, {"contender": "mmfast"}, {"median": 0.058}, "3 ms"),
        (3, {"contender": "torch chunked 1.0 (a note)"}, {"median": 0.040}, "0.2 x"),
        (5, {"contender": "memeff 1.0 (a note)"}, {"median": 0.045}, "0.1 x"),
        (7, {"contender": "mmfast"}, {"peak_mb": 500.0}, "x"),
    ],
)
def test_each_target_is_missed_by_its_own_row(missed, which, change, gap):
    rows = good_rows()
    (hit,) = [r for r in rows if which.items() <= r.items()]
    hit.update(change)
    verdicts = gpu_report.judge(rows, "NVIDIA H100 80GB HBM3")
    assert [i for i, v in enumerate(verdicts) if v.met is not True] == [missed]
    assert f"(missed by {gap}" in verdicts[missed].figure or gap == "x"
    assert "missed by" in verdicts[missed].figure


def test_the_time_target_is_for_its_cards():
    verdict = gpu_report.judge(good_rows(), "NVIDIA L4")[2]
    assert verdict.met is None
    assert verdict.figure == "50.0 ms"


def test_the_report_shows_targets_and_speed_ups():
    run = {
        "smoke": False,
        "machine": {"device": "NVIDIA H100", "commit": "abc", "dirty": False},
        "checks": [vars(Check("slerp", "cuda", "everything", skipped="no nvcc"))],
        "sanitizer": [{"tool": "memcheck", "clean": True, "why": "ERROR SUMMARY: 0 errors"}],
        "verdicts": [vars(v) for v in gpu_report.judge(good_rows(), "NVIDIA H100")],
        "rows": [*good_rows(), row("dense", 0.1)],
        "unavailable": [{"what": "r1", "contender": "inf-cl", "reason": "not installed"}] * 2,
        "skipped": [{"what": "r2", "reason": "about 9 s, and 3 s were left"}],
    }
    text = gpu_report.render(run, ["a.png"])
    assert "2.00 dense" in text
    assert "- everything: no nvcc (slerp cuda)" in text
    assert "- compute-sanitizer memcheck: clean: ERROR SUMMARY: 0 errors" in text
    assert "- inf-cl: not installed (r1)\n" in text
    assert "- about 9 s, and 3 s were left (r2)" in text
    assert "![a.png](a.png)" in text
    assert text.count("| yes ") == 8


@pytest.mark.parametrize(
    ("script", "clean", "why"),
    [
        ("echo ERROR SUMMARY: 0 errors", True, "ERROR SUMMARY: 0 errors"),
        ("echo 3 errors; exit 99", False, "3 errors"),
        ("echo no such device; exit 1", None, "exit status 1: no such device"),
        ("exec sleep 30", None, "took longer than its share of the time"),
    ],
)
def test_a_sanitizers_answer(monkeypatch, tmp_path, script, clean, why):
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert gpu.find_sanitizer() == tool
    with gpu.Sanitizers(smoke=False) as sanitizers:
        found = sanitizers.results(0.3 if "sleep" in script else 30)
    assert [entry["tool"] for entry in found] == ["memcheck", "racecheck"]
    assert {(entry["clean"], entry["why"]) for entry in found} == {(clean, why)}
    run = {"checks": [], "sanitizer": found}
    assert gpu.red(run) is (clean is False)


def test_the_facts_of_a_card(monkeypatch, tmp_path):
    card = SimpleNamespace(
        name="NVIDIA H100", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30,
        uuid="1234",
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        '#!/bin/sh\n[ "$1" = --id=GPU-1234 ] && echo "580.1, 1980 MHz, 2619 MHz, 700 W"\n'
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    facts = machine.card_facts()
    assert (facts["device"], facts["capability"], facts["memory_gib"]) == ("NVIDIA H100", "9.0", 80)
    assert (facts["driver_version"], facts["clocks.max.sm"]) == ("580.1", "1980 MHz")
    assert {"commit", "torch", "triton", "cuda", "host", "float32_products"} <= facts.keys()
    tool.write_text("#!/bin/sh\nexit 9\n")
    assert machine.card_clocks() == {}


def test_without_a_sanitizer_the_reason_is_given(monkeypatch):
    monkeypatch.setattr(gpu, "find_sanitizer", lambda: None)
    with gpu.Sanitizers(smoke=False) as sanitizers:
        assert "neither on PATH" in sanitizers.results(1)[0]["why"]


def test_an_error_of_the_sanitizer_stops_all_timing():
    run: dict[str, Any] = {"rows": [], "unavailable": [], "skipped": []}
    assert list(gpu.time_all(FakeDevice(), Budget(100), [], run, smoke=True, broken=True)) == []
    assert run["rows"] == []
    assert len(run["skipped"]) == len(list(gpu_races.plans(smoke=True)))


def fake_package(name: str) -> ModuleType:
    """A package of that name with the real one's interface, computing in plain torch."""
    module = ModuleType(name)

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature, normalized_inputs=False, stable=True):
            assert normalized_inputs
            assert not stable
            self.scale = torch.tensor(1 / temperature)

        def __call__(self, image, text):
            return peers.dense(image, text, self.scale)

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        logits = scale * q @ k.T
        return logits.logsumexp(1) - logits.diagonal()

    def fused_siglip_loss(image, text, log_temperature, bias):
        logits = image @ text.T * log_temperature.exp() + bias
        labels = 2 * torch.eye(len(image)) - 1
        return -torch.nn.functional.logsigmoid(labels * logits).sum() / len(image)

    for function in (MemoryEfficientCLIPLoss, cal_flash_loss, fused_siglip_loss):
        setattr(module, function.__name__, function)
    return module


@pytest.mark.parametrize("name", sorted(peers.CARD_PEERS))
def test_adapters_of_packages_compute_their_definition(monkeypatch, name):
    peer = peers.CARD_PEERS[name]
    monkeypatch.setitem(sys.modules, peer.module, fake_package(peer.module))
    image, text, scale = peers.features(33, 16, "float32")
    scale = scale if peer.learns_scale else scale.detach()
    got, want = (
        peers.value_and_grads(loss, image, text, scale) for loss in (peer.load(), peer.definition)
    )
    assert len(want) == 3 + peer.learns_scale
    check_agreement(name, got, want, 1e-5)


def test_a_package_that_is_missing_or_broken_says_so(monkeypatch):
    peer = peers.CARD_PEERS["memeff"]
    monkeypatch.setitem(sys.modules, "memeff", None)
    assert "pip install memeff" in str(peer.load())
    monkeypatch.setitem(sys.modules, "memeff", ModuleType("memeff"))
    assert str(peer.load()).startswith("memeff does not import: ")
