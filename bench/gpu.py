"""`python -m bench gpu --out DIR`: all that a card can tell about mmfast, in one run.

First whether every GPU kernel is right on it, then how fast those are that are. Exit status 0: all
is green; 1: something is red, and is not timed; 2: there is no card.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from bench import gpu_checks, gpu_races, gpu_report, machine, plots
from bench.gpu_checks import Check
from bench.gpu_clock import Budget, Card, Device, Interpreter, run_race
from bench.measure import rates
from bench.peers import first_line
from mmfast import _dispatch
from mmfast.ops import BACKENDS

NO_CARD = (
    "bench gpu: torch sees no CUDA card here; `python -m bench gpu --smoke --out DIR` runs the "
    "command on the CPU in Triton's interpreter, `python -m bench all` times the CPU kernels"
)
SECONDS = 480.0
RESERVE = 15.0  # of them for the last race, should it take longer than expected, and the pictures
CHECKS = 0.4  # of the time, at most, beside the cases tagged "quick"
SANITIZER_SECONDS = 150.0
RED = 99  # the exit status that compute-sanitizer is told to report errors by


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=machine.ROOT / "bench/results", metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="tiny, on the CPU, interpreted")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="what the run may take")
    options = parser.parse_args(argv)
    budget = Budget(options.seconds - RESERVE)
    if options.smoke and not _dispatch.INTERPRETED:
        parser.error("--smoke needs TRITON_INTERPRET=1; python -m bench gpu --smoke sets it")
    if not options.smoke and not torch.cuda.is_available():
        print(NO_CARD, file=sys.stderr)
        return 2
    device: Device = Interpreter() if options.smoke else Card()
    run = measure(device, budget, options.smoke)
    paths = write(run, options.out.resolve())
    print(paths[1].read_text())
    print("\n".join(f"wrote {path}" for path in paths))
    return 1 if red(run) else 0


def measure(device: Device, budget: Budget, smoke: bool) -> dict[str, Any]:
    """Everything, as what goes into the JSON file."""
    facts = machine.facts() if smoke else machine.card_facts()
    facts["triton"] = machine.triton_version()
    print("\n".join(f"{key}: {value}" for key, value in facts.items()), flush=True)
    # beside the checks, in processes of their own: both are over before anything is timed
    with Sanitizers(smoke) as sanitizers:
        share = Budget(CHECKS * budget.left())
        checks = []
        for check in gpu_checks.check_all(device.type, share, smallest_only=smoke):
            checks.append(check)
            if check.error is not None:
                print(f"red: {check.op} {check.backend}, {check.what}: {check.error}", flush=True)
        sanitizer = sanitizers.results(max(10.0, share.left()))
    run: dict[str, Any] = {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "smoke": smoke,
        "machine": facts,
        "sanitizer": sanitizer,
        "rows": [],
        "unavailable": [],
        "skipped": [],
    }
    broken = any(entry["clean"] is False for entry in sanitizer)
    for check in time_all(device, budget, checks, run, smoke, broken):
        print(f"red: {check.op}, {check.what}: {check.error}", flush=True)
        checks.append(check)
    # nothing of an op that turned out red in a race is reported either
    bad = red_ops(checks)
    run["rows"] = [row for row in run["rows"] if row["rests_on"] not in bad]
    run["checks"] = [asdict(check) for check in checks]
    run["verdicts"] = [asdict(v) for v in gpu_report.judge(run["rows"], facts["device"])]
    return run


def time_all(
    device: Device, budget: Budget, checks: list[Check], run: dict[str, Any], smoke: bool,
    broken: bool = False,
) -> Iterator[Check]:  # fmt: skip
    """Time what is green and fits; adds rows and reasons to `run`, yields what a race found red."""
    bad = set(BACKENDS) if broken else red_ops(checks)
    backends = {
        op: [row.name for row, why in gpu_checks.gpu_backends(op, device.type) if why is None]
        for op in BACKENDS
    }
    rounds = (2, 2) if smoke else (3, 20)
    speeds = {dtype: device.product_rate(dtype) for dtype in gpu_races.DTYPES}
    for plan, too_long in gpu_races.choose(gpu_races.plans(smoke), budget, speeds, rounds[0]):
        reason = too_long
        if plan.rests_on in bad:
            reason = f"{plan.rests_on} is red, and a speed-up is never reported on a red test"
        elif not backends[plan.rests_on]:
            reason = f"no kernel of {plan.rests_on} can run here"
        if reason is not None:
            run["skipped"].append({"what": str(plan), "reason": reason})
            continue
        print(f"{plan} ({budget.left():.0f} s left)", flush=True)
        entries = gpu_races.entries(plan, device, backends[plan.rests_on])
        try:
            result = run_race(
                device, entries, plan.dtype, 0 if smoke else gpu_races.SECONDS, rounds, budget
            )
        except Exception as error:
            bad.add(plan.rests_on)
            what = f"{type(error).__name__}: {first_line(error)}"
            yield Check(plan.rests_on, "race", str(plan), error=what)
            continue
        finally:
            if device.type == "cuda" and "clocks under load" not in run["machine"]:
                run["machine"]["clocks under load"] = machine.card_clocks()
            del entries
            device.release()
        rows = [
            {
                **plan.facts,
                "rests_on": plan.rests_on,
                "contender": name,
                "own": name in backends[plan.rests_on] or name == "mmfast",
                **rates(timing, plan.flops, plan.bytes),
            }
            for name, timing in result.timings.items()
        ]
        for row in rows:
            copied = next((r["median"] for r in rows if r["contender"] == "copy"), None)
            if copied is not None:
                row["percent_of_peak"] = 100 * copied / row["median"]
            share = f", {row['percent_of_peak']:.1f} % of peak" if "percent_of_peak" in row else ""
            print(f"  {row['contender']}: {1e3 * row['median']:.4g} ms{share}", flush=True)
        run["rows"] += rows
        run["unavailable"] += [
            {"what": str(plan), "contender": name, "reason": reason}
            for name, reason in result.reasons.items()
        ]


def red_ops(checks: list[Check]) -> set[str]:
    return {check.op for check in checks if check.error is not None}


def red(run: dict[str, Any]) -> bool:
    """Whether anything that was looked at is wrong."""
    return any(check["error"] is not None for check in run["checks"]) or any(
        entry["clean"] is False for entry in run["sanitizer"]
    )


class Sanitizers:
    """compute-sanitizer's memcheck and racecheck over one small call of every kernel."""

    TOOLS = ("memcheck", "racecheck")

    def __init__(self, smoke: bool) -> None:
        self._tool = find_sanitizer()
        self._why = "compute-sanitizer is neither on PATH nor in CUDA_HOME/bin"
        if smoke:
            self._tool, self._why = None, "needs a card"
        self._running: dict[str, tuple[subprocess.Popen[str], Any]] = {}

    def __enter__(self) -> Sanitizers:
        # freed memory that torch keeps would be no error to the tool
        environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        for name in self.TOOLS if self._tool else ():
            command = [str(self._tool), "--tool", name, "--error-exitcode", str(RED)]
            command += [sys.executable, "-m", "bench.gpu_checks"]
            log = tempfile.TemporaryFile("w+")
            process = subprocess.Popen(
                command, cwd=machine.ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                text=True,
            )  # fmt: skip
            self._running[name] = process, log
        return self

    def results(self, seconds: float) -> list[dict[str, Any]]:
        """By tool: clean (None: it gave no answer) and why."""
        end = Budget(min(seconds, SANITIZER_SECONDS))
        found = []
        for name in self.TOOLS:
            clean, why = None, self._why
            if name in self._running:
                process, log = self._running[name]
                try:
                    process.wait(max(0.0, end.left()))
                    log.seek(0)
                    lines = log.read().strip().splitlines() or ["no output"]
                    clean = {0: True, RED: False}.get(process.returncode)
                    why = lines[-1]
                    if clean is None:
                        why = f"exit status {process.returncode}: {why}"
                except subprocess.TimeoutExpired:
                    why = "took longer than its share of the time"
            found.append({"tool": name, "clean": clean, "why": why})
        return found

    def __exit__(self, *error: object) -> None:
        for process, log in self._running.values():
            process.kill()
            process.wait()
            log.close()


def find_sanitizer() -> Path | None:
    """On PATH, in CUDA_HOME or CUDA_PATH, or in the folder that the toolkit installs itself to."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(str(Path(home) / "bin") for home in homes if home)]
    found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
    return Path(found) if found else None


def write(run: dict[str, Any], folder: Path) -> list[Path]:
    """The JSON, the Markdown beside it, and the pictures; returns the paths in this order."""
    facts = run["machine"]
    parts = ["gpu", machine.slug(facts["device"]), facts["commit"]]
    parts += [word for word in ("dirty", "smoke") if facts.get(word) or run.get(word)]
    stem = "-".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    # drawn aside: on the CPU the pictures of `bench all` have the same names
    with tempfile.TemporaryDirectory(dir=folder) as aside:
        for op in dict.fromkeys(row["op"] for row in run["rows"]):
            rows = [row for row in run["rows"] if row["op"] == op]
            for path in plots.draw(op, facts, rows, Path(aside)):
                quantity = path.stem.rpartition("-")[2]
                pictures.append(path.replace(folder / f"{stem}-{op}-{quantity}.png"))
    (folder / f"{stem}.json").write_text(json.dumps(run, indent=1) + "\n")
    text = gpu_report.render(run, [path.name for path in pictures])
    (folder / f"{stem}.md").write_text(text)
    return [folder / f"{stem}.json", folder / f"{stem}.md", *pictures]


if __name__ == "__main__":
    sys.exit(main())
