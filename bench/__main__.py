"""`python -m bench OP|all [--peers] [--base REV] [--quick] [--tested] [--out DIR]`.

Times mmfast alone, or beside its peers; or a commit and this tree in turns. But for --quick and
--tested the op's tests run first, and nothing is timed where they are red.

`python -m bench gpu [--smoke] [--out DIR] [--seconds S]` checks and times the kernels for a card.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench import compare, machine, report

HERE = Path(__file__).resolve().parent
# the tests of what a bench times, where they are not those of its own name
TESTS = {"losses": ("mixup", "gmc", "moco", "albef", "siglip", "sample_negatives")}
TESTS["distributed"] = ("distributed", "distributed_trainers", "distributed_errors")
TESTS["trainers"] = ("trainers_open_clip",)
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        return gpu(argv[1:])
    options = parser().parse_args(argv)
    ops = OPS if options.op == "all" else [options.op]
    if not (options.quick or options.tested) and not green(ops):
        return 1
    run = partial(measure, quick=options.quick, peers=options.peers)
    out = options.out.resolve()
    if options.base is None:
        for op in ops:
            print(f"wrote {run(op, out)}")
        return 0
    good = True
    with installed(options.base) as base:
        for op in ops:
            good &= against(op, base, run, out, options.slower)
    return 0 if good else 1


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m bench", description="Time mmfast, and the losses people use beside it."
    )
    made.add_argument("op", choices=[*OPS, "all", "gpu"], help="gpu has options of its own")
    made.add_argument(
        "--peers", action="store_true", help="time the others, too: what RESULTS.md is made of"
    )
    made.add_argument(
        "--base", metavar="REV", help="time commit REV and this tree in turns; 1 if slower"
    )
    made.add_argument(
        "--slower",
        type=float,
        default=1.05,
        metavar="X",
        help="with --base: how many times as long a row may take (default: %(default)s)",
    )
    made.add_argument("--quick", action="store_true", help="tiny sizes, seconds: a sanity check")
    made.add_argument(
        "--tested", action="store_true", help="the op's tests were green: do not run them first"
    )
    made.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    return made


def green(ops: list[str]) -> bool:
    """Whether the tests of `ops` are: nothing is said of the speed of what is wrong."""
    # the script and not -m pytest, which would put the root on sys.path
    pytest = str(Path(sys.executable).with_name("pytest"))
    for stem in dict.fromkeys(stem for op in ops for stem in TESTS.get(op, (op,))):
        tests = [pytest, "-q", f"tests/test_{stem}.py"]
        if subprocess.run(tests, cwd=machine.ROOT).returncode != 0:
            print(f"tests/test_{stem}.py is red: a speed-up is never reported on a red test")
            return False
    return True


def against(op: str, base: Path, run: Callable[..., Path], out: Path, allowed: float) -> bool:
    """Time the commit in `base` and this tree in turns, and say what differs; False if slower."""
    turns: dict[Path, list[report.Result]] = {base: [], machine.ROOT: []}
    for tree in (base, machine.ROOT, machine.ROOT, base):
        # the other tree measures itself, with this tree's bench
        folder = out if tree == machine.ROOT else base / "results"
        turns[tree].append(report.load(run(op, folder, tree=tree)))
    before, after = turns.values()
    print(compare.comparison(before, after))
    slower = compare.slower(before, after, allowed)
    print("\n".join(slower) or f"{op}: no row takes more than {allowed} times as long")
    return not slower


def gpu(argv: list[str]) -> int:
    """Run bench.gpu in a process of its own: what is imported sees the interpreter or does not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if "--smoke" in argv else "0"}
    command = [sys.executable, "-m", "bench.gpu", *argv]
    return subprocess.run(command, env=environment).returncode


def measure(op: str, out: Path, *, quick: bool, peers: bool, tree: Path = machine.ROOT) -> Path:
    """Run one bench file, in a process of its own; returns the JSON it wrote."""
    commit, dirty = machine.commit(tree)
    parts = [op, machine.slug(machine.device_name()), commit]
    marks = {"dirty": dirty, "quick": quick, "own": not peers}
    path = out / ("-".join(parts + [word for word, there in marks.items() if there]) + ".json")
    out.mkdir(parents=True, exist_ok=True)
    bench = tree / "bench"
    command = [sys.executable, "-m", "pytest", "-c", str(bench / "pytest.ini"), "-q", "-s"]
    command += ["--benchmark-quiet", f"--benchmark-json={path}", str(bench / f"bench_{op}.py")]
    asked = {"MMFAST_BENCH_QUICK": quick, "MMFAST_BENCH_PEERS": peers}
    environment = {**os.environ, **{name: str(int(flag)) for name, flag in asked.items()}}
    subprocess.run(command, cwd=tree, env=environment, check=True)
    return path


@contextmanager
def installed(revision: str) -> Iterator[Path]:
    """A folder with that commit's mmfast, built, and this tree's bench: importable from inside."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(machine.ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", str(tree), revision], check=True)
        try:
            # inside the worktree, so that git names the base commit there
            site = tree / "bench-site"
            pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps"]
            subprocess.run([*pip, "--target", str(site), str(tree)], check=True)
            ignore = shutil.ignore_patterns("results", "__pycache__")
            shutil.copytree(HERE, site / "bench", ignore=ignore)
            yield site
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


if __name__ == "__main__":
    sys.exit(main())
