"""Peak resident growth of one loss's forward and backward, in a process that did nothing before.

`python -m bench.memory LOSS DTYPE N D` prints it as JSON.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial

import torch

from bench import machine, peers, peers_losses
from bench.measure import Contender, Timing, Unavailable, resident_growth


def in_fresh_process(loss: str, dtype: str, n: int, d: int) -> Timing:
    """One cold round, timed and weighed in a process of its own."""
    command = [sys.executable, "-m", "bench.memory", loss, dtype, str(n), str(d)]
    command += ["--threads", str(torch.get_num_threads())]
    done = subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    result = json.loads(done.stdout)
    return Timing([result["seconds"]], result["growth_mb"])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.memory", description=__doc__)
    parser.add_argument("loss", choices=sorted(peers.LOSSES) + sorted(peers_losses.CASES))
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    parser.add_argument("n", type=int)
    parser.add_argument("d", type=int)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    # a small call first: thread pools and lazy imports are not the loss's memory
    small, large = (_contender(options.loss, options.dtype, n, options.d) for n in (64, options.n))
    if isinstance(small, Unavailable) or isinstance(large, Unavailable):
        parser.error(str(small))
    small.run()
    start = time.perf_counter()
    _, growth = resident_growth(large.run)
    seconds = time.perf_counter() - start
    print(json.dumps({"growth_mb": growth, "seconds": seconds}))


def _contender(loss: str, dtype: str, n: int, d: int) -> Contender | Unavailable:
    if loss in peers_losses.CASES:
        return peers_losses.contender(loss, "mmfast", n, n, d, dtype)
    found = peers.find(loss)
    if isinstance(found, Unavailable):
        return found
    return Contender(partial(peers.value_and_grads, found, *peers.features(n, d, dtype)))


if __name__ == "__main__":
    main()
