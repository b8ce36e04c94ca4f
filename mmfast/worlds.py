"""Worlds of processes on one machine, for tests and benchmarks of losses over a group."""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist


def in_world(size: int, run: Callable[[], Any], *, seconds: float = 30.0) -> list[Any]:
    """What `run` returns in each of `size` processes, ranks of one gloo group.

    They are forked, which is quick: call it in a process that has computed nothing yet.

    Args:
        size: number of ranks.
        run: called in each, with the default group initialised and one thread.
        seconds: the time-out of the group; after three of them what still runs is killed.

    Returns:
        By rank what `run` returned, the text of the exception it raised, or None of a process
        that died.
    """
    fork = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes = [fork.Pipe(duplex=False) for _ in range(size)]
        sends = [send for _, send in pipes]
        ranks = [
            fork.Process(target=_be_rank, args=(rank, size, folder, run, seconds, sends))
            for rank in range(size)
        ]
        until = time.monotonic() + 3 * seconds
        try:
            for process, (_, send) in zip(ranks, pipes, strict=True):
                process.start()
                send.close()
            return [_answer(receive, until - time.monotonic()) for receive, _ in pipes]
        finally:
            for process in ranks:
                process.kill()
                process.join()


def _be_rank(
    rank: int,
    size: int,
    folder: str,
    run: Callable[[], Any],
    seconds: float,
    answers: "list[Connection[Any, Any]]",
) -> None:
    # of a rank that dies the pipe must end, whoever else was forked with it
    for other in answers[:rank] + answers[rank + 1 :]:
        other.close()
    answer = answers[rank]
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    try:
        time_out = timedelta(seconds=seconds)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/store",
            rank=rank,
            world_size=size,
            timeout=time_out,
        )
        answer.send(run())
    except BaseException:  # pytest's failures are no Exceptions
        answer.send(traceback.format_exc())
    # others may still hear from this one: it stays until all have answered and it is killed
    time.sleep(3 * seconds)
    # destructors of a group whose peers are gone may wait for them
    os._exit(0)


def _answer(receive: "Connection[Any, Any]", seconds: float) -> Any:
    try:
        return receive.recv() if receive.poll(max(0.0, seconds)) else None
    except EOFError:
        return None
