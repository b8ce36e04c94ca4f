"""Statistics of a set larger than one cares to copy, from a file of float16 rows: rate and memory.

`python -m bench.large_statistics [N] [D] [--folder DIR]` writes the file, and prints JSON. At the
default size it takes a minute or two on two cores, and 0.2 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import mmfast
from bench import machine, peers
from bench.measure import resident_growth, status_mb

BLOCK = 4096
BINS = 256


def write(path: Path, n: int, d: int) -> np.ndarray[Any, Any]:
    """Unit rows in random directions about a common one."""
    random = torch.Generator().manual_seed(0)
    rows = np.lib.format.open_memmap(path, "w+", np.float16, (n, d))
    for i in range(0, n, BLOCK):
        block = torch.randn(len(rows[i : i + BLOCK]), d, generator=random) + 0.5
        rows[i : i + BLOCK] = torch.nn.functional.normalize(block, dim=1).half().numpy()
    rows.flush()
    return np.load(path, mmap_mode="c")


def measure(rows: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The rate against half a product at float32's peak, and memory. The peak is read afterwards:
    its operands are not ours to weigh. Pages of the file count as memory, `file_mb` at most, though
    the system can take them back."""
    n, d = rows.shape
    threads = torch.get_num_threads()
    x = torch.from_numpy(rows)
    mmfast.pairwise_stats(x[:512].clone(), bins=BINS, backend="cpp")  # thread pools and imports
    start, cpu = time.perf_counter(), time.process_time()
    stats, growth = resident_growth(lambda: mmfast.pairwise_stats(x, bins=BINS, backend="cpp"))
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    resident = status_mb("VmHWM") if sys.platform == "linux" else None
    probes = [machine.probe("float32", threads) for _ in range(5)]
    peaks = {name: float(np.median([probe[name] for probe in probes])) for name in probes[0]}
    rate = peers.products(1, n, d) / 2 / seconds / 1e9
    return {
        "n": n,
        "d": d,
        "bins": BINS,
        "seconds": seconds,
        # of all threads: what other work on the machine does not lengthen
        "cpu_seconds": cpu,
        "gflops": rate,
        "peaks": peaks,
        "percent_of_peak": 100 * rate / max(peaks.values()),
        "file_mb": rows.nbytes / 1e6,
        "growth_mb": growth,
        "resident_mb": resident,
        "pairs": stats.count,
        "mean": stats.mean,
        "std": stats.std,
    }


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.large_statistics", description=__doc__)
    parser.add_argument("n", type=int, nargs="?", default=200_000)
    parser.add_argument("d", type=int, nargs="?", default=512)
    parser.add_argument("--folder", type=Path, help="where the file stands meanwhile")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        rows = write(Path(folder) / "rows.npy", options.n, options.d)
        print(json.dumps({**machine.facts(), **measure(rows)}, indent=2))


if __name__ == "__main__":
    main()
