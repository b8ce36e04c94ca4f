"""What a result must say about where it was measured, and how fast a product can be there."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

import mmfast
from bench.measure import QUICK, Rates

ROOT = Path(__file__).resolve().parents[1]
FLOP_PER_CYCLE = 32  # float32, per core: two 8-wide FMAs, or one 16-wide (AVX2 and Zen 4's AVX-512)

core: Any = None
NO_CORE = ""
try:
    from mmfast import _C as core
except ImportError:
    NO_CORE = "mmfast._C is not installed"


def device_name() -> str:
    """The processor's name and how many cores this process may use."""
    name = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
        name = found.group(1).strip() if found else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def slug(text: str) -> str:
    """Lower case, and a dash for everything that is not a letter or a digit."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def commit() -> tuple[str, bool]:
    """Short commit of the measured tree, and whether tracked files differ from it."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head, bool(_git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return "none", True


def facts() -> dict[str, Any]:
    """Device, versions, instruction-set level, threads, commit and load of this run."""
    revision, dirty = commit()
    return {
        "device": device_name(),
        "isa": core.isa() if core else NO_CORE,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "mmfast": mmfast.__version__,
        "commit": revision,
        "dirty": dirty,
        "quick": QUICK,
        # of the minute before: anything but a small number says that others were at work
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def probe(dtype: str, threads: int) -> Rates:
    """GFLOP/s that a product reaches now: torch.mm's, and our register tile's in cache."""
    size = _mm_size(dtype, threads)
    rates = {"torch.mm": _mm_rate(dtype, size, threads)}
    if core is not None:
        rates["own tile"] = core.tile_rate(dtype, 0.02 if QUICK else 0.1, threads)
    return rates


def tile_against_clock(readings: int = 5) -> dict[str, float]:
    """The float32 tile's rate and the clock, the best of turns; empty without the core.

    Best and not median: other work on the machine only ever lowers either.
    """
    if core is None:
        return {}
    threads = torch.get_num_threads()
    seconds = 0.02 if QUICK else 0.2
    turns = [
        (core.clock_ghz(seconds), core.tile_rate("float32", seconds, threads))
        for _ in range(readings)
    ]
    clock, rate = (max(values) for values in zip(*turns, strict=True))
    percent = 100 * rate / (FLOP_PER_CYCLE * clock * threads)
    return {"clock_ghz": clock, "tile_gflops": rate, "percent": percent}


@functools.cache
def _mm_size(dtype: str, threads: int) -> int:
    """The cube on which torch.mm is fastest here."""
    sizes = (256, 512) if QUICK else (2048, 4096)
    return max(sizes, key=lambda size: max(_mm_rate(dtype, size, threads) for _ in range(2)))


def _mm_rate(dtype: str, size: int, threads: int) -> float:
    a, b, out = _mm_arrays(dtype, size)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        torch.mm(a, b, out=out)
        return 2 * size**3 / (time.perf_counter() - start) / 1e9
    finally:
        torch.set_num_threads(before)


@functools.cache
def _mm_arrays(dtype: str, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kind = getattr(torch, dtype)
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    return a, b, torch.zeros(size, size, dtype=kind)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True)
    return done.stdout.strip()
