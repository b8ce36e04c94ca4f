"""clip_loss shared by the ranks of one machine: all their processor time, and memory of each.

`python -m bench.ranks DTYPE N D ROUNDS` prints, by `WORLDS`, seconds of each round and MB.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from functools import partial

import torch
import torch.distributed as dist

import mmfast
from bench import machine, peers
from bench.measure import Timing, resident_growth
from mmfast.worlds import in_world

# ranks, threads of each; one process on as many cores meets the same neighbours in cache and memory
WORLDS = {
    "1 rank": (1, 1),
    "1 rank, 2 threads": (1, 2),
    "2 ranks": (2, 1),
    "4 ranks": (4, 1),
}


def race(dtype: str, n: int, d: int, rounds: int) -> dict[str, Timing]:
    """A batch of n pairs in all, forward and backward.

    Seconds are those of all processes together, of threads that send and receive, too. A core
    that is shared counts once, so that ranks may be more than cores.
    """
    command = [sys.executable, "-m", "bench.ranks", dtype, str(n), str(d), str(rounds)]
    done = subprocess.run(command, cwd=machine.ROOT, check=True, stdout=subprocess.PIPE, text=True)
    found = json.loads(done.stdout)
    return {name: Timing(*timing) for name, timing in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ranks", description=__doc__)
    parser.add_argument("dtype", choices=["float32", "bfloat16"])
    for size in ("n", "d", "rounds"):
        parser.add_argument(size, type=int)
    options = parser.parse_args()
    print(json.dumps({name: _shared(*world, options) for name, world in WORLDS.items()}))


def _shared(
    size: int, threads: int, options: argparse.Namespace
) -> tuple[list[float], float | None]:
    work = partial(_work, threads, options.dtype, options.n // size, options.d, options.rounds)
    ranks = in_world(size, work, seconds=60.0)
    if not all(isinstance(rank, tuple) for rank in ranks):
        raise RuntimeError(f"a rank of {size} failed: {ranks}")
    rounds = zip(*(seconds for seconds, _ in ranks), strict=True)
    return [sum(seconds) for seconds in rounds], max(grown or 0.0 for _, grown in ranks) or None


def _work(
    threads: int, dtype: str, n: int, d: int, rounds: int
) -> tuple[list[float], float | None]:
    """Processor time of this rank's rounds, and by how many MB it grew in a call before."""
    torch.set_num_threads(threads)
    inputs = peers.features(n, d, dtype)
    loss = partial(mmfast.clip_loss, group=dist.group.WORLD)
    # a small call first: connections and lazy imports are not the loss's
    peers.value_and_grads(loss, *peers.features(64, d, dtype))
    _, grown = resident_growth(partial(peers.value_and_grads, loss, *inputs))
    seconds = []
    for _ in range(rounds):
        dist.barrier()
        start = time.process_time()
        peers.value_and_grads(loss, *inputs)
        dist.barrier()
        seconds.append(time.process_time() - start)
    return seconds, grown


if __name__ == "__main__":
    main()
