"""What a result must say about where it was measured, and how fast a product can be there."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import mmfast
from bench.measure import PEERS, QUICK, Rates

ROOT = Path(__file__).resolve().parents[1]

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


def commit(tree: Path = ROOT) -> tuple[str, bool]:
    """Short commit of `tree`, and whether tracked files differ from it."""
    try:
        head = _git(tree, "rev-parse", "--short=10", "HEAD")
        return head, bool(_git(tree, "status", "--porcelain", "--untracked-files=no"))
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
        "peers": PEERS,
        # of the minute before: anything but a small number says that others were at work
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    }


def card_facts() -> dict[str, Any]:
    """The CUDA card in use, its capability, memory, driver and clocks, beside the versions."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        **facts(),
        "host": device_name(),
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "triton": triton_version(),
        "float32_products": torch.get_float32_matmul_precision(),
        **_nvidia_smi("driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit"),
    }


def card_clocks() -> dict[str, str]:
    """Clocks, power and temperature at this moment; empty without nvidia-smi."""
    return _nvidia_smi("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _nvidia_smi(*keys: str) -> dict[str, str]:
    # torch knows the card by its UUID, whatever CUDA_VISIBLE_DEVICES has made of the numbers
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = [
        "nvidia-smi",
        f"--id={uuid}",
        f"--query-gpu={','.join(keys)}",
        "--format=csv,noheader",
    ]
    try:
        done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in done.stdout.splitlines()[0].split(",")]
    return dict(zip(keys, values, strict=True))


def probe(dtype: str, threads: int) -> Rates:
    """GFLOP/s that a product reaches now: torch.mm's, and our register tile's in cache."""
    size = _mm_size(dtype, threads)
    rates = {"torch.mm": _mm_rate(dtype, size, threads)}
    if core is not None:
        rates["own tile"] = core.tile_rate(dtype, 0.02 if QUICK else 0.1, threads)
    return rates


def tile_against_registers(readings: int = 5) -> dict[str, float]:
    """The float32 tile's rate and that of multiply-adds from registers; empty without the core.

    The best of turns and not a median: other work on the machine only ever lowers either.
    """
    if core is None:
        return {}
    threads = torch.get_num_threads()
    seconds = 0.02 if QUICK else 0.2
    turns = [
        (core.multiply_add_rate(seconds, threads), core.tile_rate("float32", seconds, threads))
        for _ in range(readings)
    ]
    limit, rate = (max(values) for values in zip(*turns, strict=True))
    return {"limit_gflops": limit, "tile_gflops": rate, "percent": 100 * rate / limit}


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


def _git(tree: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=tree, check=True, capture_output=True, text=True)
    return done.stdout.strip()
