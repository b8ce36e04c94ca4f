"""`python -m bench OP|all [--quick] [--out DIR] [--base REV]`.

`python -m bench gpu [--smoke] [--out DIR] [--seconds S]` checks and times the kernels for a card.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import machine, report

HERE = Path(__file__).resolve().parent
# the tests of what a bench times, where they are not those of its own name
TESTS = {"losses": ("mixup", "gmc", "moco", "albef", "siglip", "sample_negatives")}
OPS = sorted(path.stem.removeprefix("bench_") for path in HERE.glob("bench_*.py"))


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["gpu"]:
        return gpu(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m bench", description="Time mmfast against the losses people use."
    )
    parser.add_argument("op", choices=[*OPS, "all", "gpu"], help="gpu has options of its own")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, seconds: a sanity check")
    parser.add_argument("--out", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument(
        "--base",
        metavar="REV",
        help="refuse if the op's tests are red, then time commit REV and this tree alike",
    )
    options = parser.parse_args(argv)
    ops = OPS if options.op == "all" else [options.op]
    out = options.out.resolve()
    if options.base is None:
        for op in ops:
            print(f"wrote {measure(op, out, options.quick)}")
        return 0

    for op in ops:
        # the script and not -m pytest, which would put the root on sys.path
        pytest = str(Path(sys.executable).with_name("pytest"))
        for stem in TESTS.get(op, (op,)):
            tests = [pytest, "-q", f"tests/test_{stem}.py"]
            if subprocess.run(tests, cwd=machine.ROOT).returncode != 0:
                print(f"tests/test_{stem}.py is red: a speed-up is never reported on a red test")
                return 1
    with installed(options.base) as base:
        for op in ops:
            # the other tree measures itself, with this tree's bench
            command = [sys.executable, "-m", "bench", op, "--out", str(base / "results")]
            command += ["--quick"] if options.quick else []
            subprocess.run(command, cwd=base, check=True)
            (before,) = (base / "results").glob(f"{op}-*.json")
            after = measure(op, out, options.quick)
            print(report.compare(report.load(before), report.load(after)))
            print("Peers did not change: where their rows moved, the machine did.")
    return 0


def gpu(argv: list[str]) -> int:
    """Run bench.gpu in a process of its own: what is imported sees the interpreter or does not."""
    environment = {**os.environ, "TRITON_INTERPRET": "1" if "--smoke" in argv else "0"}
    command = [sys.executable, "-m", "bench.gpu", *argv]
    return subprocess.run(command, env=environment).returncode


def measure(op: str, out: Path, quick: bool) -> Path:
    """Run one bench file in a process of its own; returns the JSON it wrote."""
    commit, dirty = machine.commit()
    parts = [op, machine.slug(machine.device_name()), commit]
    parts += ["dirty"] if dirty else []
    parts += ["quick"] if quick else []
    path = out / ("-".join(parts) + ".json")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pytest", "-c", str(HERE / "pytest.ini"), "-q", "-s"]
    command += ["--benchmark-quiet", f"--benchmark-json={path}", str(HERE / f"bench_{op}.py")]
    environment = {**os.environ, "MMFAST_BENCH_QUICK": "1" if quick else "0"}
    subprocess.run(command, cwd=machine.ROOT, env=environment, check=True)
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
