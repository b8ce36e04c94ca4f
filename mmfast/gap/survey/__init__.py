"""How two modalities lie to each other, from files of any size: every measure in one survey.

Rows are read in blocks that fit a budget, and a matrix of similarities never exists. A survey that
is interrupted goes on where it stopped. The measures are those of `mmfast.gap`, whose modules name
their sources; their numbers are those of the whole in memory.
"""

import zlib
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import mmfast
from mmfast.gap._inputs import as_ids, full_precision
from mmfast.gap._sides import Matches, Side, block_size
from mmfast.gap.files import Rows, open_rows
from mmfast.gap.survey.assemble import CHUNK, SHOWN, assemble, cost, look
from mmfast.gap.survey.facts import PCA, Retrieval, SideFacts, Survey, Ways
from mmfast.gap.survey.passes import Data, Held
from mmfast.gap.survey.state import Progress, Steps
from mmfast.losses._terms import check_number
from mmfast.ops._inputs import SCORE_TYPE, as_number
from mmfast.ops.pairwise_stats import pairwise_stats

__all__ = ["PCA", "Retrieval", "SideFacts", "Survey", "Ways", "survey"]

SCALES = (100, 50, 30, 20, 10, 1)


@full_precision
@torch.no_grad()
def survey(
    x: Any,
    y: Any,
    *,
    labels: Any = None,
    logit_scale: float = 100.0,
    bins: int = 256,
    budget: int = 1 << 30,
    shifts: Iterable[float] | None = None,
    temperatures: Iterable[float] | None = None,
    on_nan: Literal["refuse", "skip"] = "refuse",
    state: Any = None,
    progress: Progress | None = None,
) -> Survey:
    """Every measure of the gap between two sets of embeddings, each file read a block at a time.

    Args:
        x, y: [N, D] and [M, D], anything `open_rows` takes. Rows are made unit here.
        labels: integers [N] and [M], a pair of tensors or arrays, or one for both: rows with equal
            labels belong together, as the captions of an image. Any of them is right in retrieval;
            elsewhere the first one is the partner of a row, and the others are left out. None: row
            i of x and row i of y are partners. Labels shared by many rows cost their pairs.
        logit_scale: of the loss over all pairs, 1 / temperature.
        bins: of the histograms of cosines, from -1 to 1.
        budget: bytes for blocks of rows; about 150 bytes a row come on top of it, and without the
            compiled core the products of two blocks.
        shifts, temperatures: of the loss landscape; default as published, -5 to 4.75 by 0.25 and
            1/100 to 1. Shift 0 is added where it is missing.
        on_nan: rows with NaN or infinity are refused, or skipped, without labels with their
            partners.
        state: a folder for what is done so far: a later call of the same inputs and options goes
            on from there. It is written every few seconds and whenever the call ends, early too.
        progress: called as (done, total, seconds_left); done and total are about inner products.

    Returns:
        Survey on the CPU. With the compiled core, counts, extremes and histograms are those of the
        whole in memory, moments to the last digits; without it, all but for the rounding of the
        products. These are float64 if a side is, else float32.

    Raises:
        TypeError, ValueError, OSError: as `open_rows` and the measures; rows that are not finite; a
            budget or side that is too small; a state of other inputs or options, or one that cannot
            be written. The message is one line that names the file.
    """
    rows = (open_rows(x), open_rows(y))
    ids = _labels(labels, rows)
    _check(rows, labels is not None, logit_scale, bins, on_nan)
    moves, taus = _landscape_numbers(shifts, temperatures)
    dtype = torch.promote_types(*(SCORE_TYPE[side.dtype] for side in rows))
    options = {
        "logit_scale": float(logit_scale),
        "bins": bins,
        "budget": budget,
        "chunk": CHUNK,
        "shifts": moves,
        "temperatures": taus,
    }
    width, losses = rows[0].shape[1], len(moves) * len(taus)
    # sums of products of all columns, of both sides, in float64
    size = block_size("survey", width, budget, dtype, 40 * width * width)
    # whether rows are skipped is no part of it: where they are refused nothing is done yet
    identity = {} if state is None else _identity(rows, labels, ids) | options
    steps = Steps("survey", state, identity, progress)
    with steps.kept():
        n, m = map(len, rows)
        steps.total = cost(n, m, width, size, n, losses)
        looked = tuple(look(steps, name, side, size) for name, side in zip("xy", rows, strict=True))
        kept = _kept(rows, looked, on_nan, labels is None)
        x_side, y_side = (
            Side(side, keep, size, dtype) for side, keep in zip(rows, kept, strict=True)
        )
        x_ids, y_ids = (i if k is None else i[k] for i, k in zip(ids, kept, strict=True))
        data = Data(x_side, y_side, Matches(x_ids, y_ids), bins, float(logit_scale))
        n, m = len(x_side), len(y_side)
        steps.total = cost(n, m, width, size, data.matches.count(0, n), losses)
        return assemble(steps, data, looked, {**options, "on_nan": on_nan}, labels is not None)


def _labels(labels: Any, rows: tuple[Rows, Rows]) -> tuple[Tensor, Tensor]:
    """int64 ids of the rows of both sides; row numbers by default."""
    if labels is None:
        return torch.arange(len(rows[0])), torch.arange(len(rows[1]))
    both = labels if isinstance(labels, (tuple, list)) and len(labels) == 2 else (labels, labels)
    x_ids, y_ids = (
        as_ids("survey", "labels", given, (side.name, torch.empty(len(side), 0))).cpu().contiguous()
        for given, side in zip(both, rows, strict=True)
    )
    return x_ids, y_ids


def _check(
    rows: tuple[Rows, Rows], labelled: bool, logit_scale: Any, bins: Any, on_nan: Any
) -> None:
    check_number("survey", "logit_scale", logit_scale, positive=True)
    if on_nan not in ("refuse", "skip"):
        raise ValueError(f"survey: on_nan must be 'refuse' or 'skip', got {on_nan!r}")
    pairwise_stats(torch.ones(1, 1), bins=bins)
    x, y = rows
    if y.shape[1] != x.shape[1]:
        raise ValueError(
            f"{y.name}: rows must be {x.shape[1]} wide like those of {x.name}, got {y.shape[1]}"
        )
    if not labelled and len(x) != len(y):
        raise ValueError(
            f"{y.name} has {len(y)} rows and {x.name} has {len(x)}: without labels row i of one "
            "belongs to row i of the other"
        )
    for side in rows:
        if len(side) < 2:
            raise ValueError(f"{side.name} must have 2 rows or more, got {len(side)}")


def _landscape_numbers(shifts: Any, temperatures: Any) -> tuple[list[float], list[float]]:
    """As published where none are given; shift 0 is always there."""
    if shifts is None:
        shifts = np.arange(-5, 5, 0.25)
    if temperatures is None:
        temperatures = [1 / scale for scale in SCALES]
    moves = [as_number("survey", "shifts", float(shift)) for shift in shifts]
    if 0.0 not in moves:
        moves = sorted([*moves, 0.0])
    taus = [as_number("survey", "temperatures", float(tau)) for tau in temperatures]
    for tau in taus:
        check_number("survey", "temperatures", tau, positive=True)
    if not taus:
        raise ValueError("survey: temperatures must hold at least one number, got none")
    return moves, taus


def _identity(rows: tuple[Rows, Rows], labels: Any, ids: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """What a state is of, so that it is never taken up by anything else."""
    made: dict[str, Any] = {"mmfast": mmfast.__version__}
    made |= {
        name: {"name": side.name, "mark": side.fingerprint}
        for name, side in zip("xy", rows, strict=True)
    }
    for name, side in zip("xy", ids, strict=True):
        mark = None if labels is None else zlib.crc32(side.numpy().data)
        made[f"labels of {name}"] = {"name": f"labels of {name}", "mark": mark}
    return made


def _kept(
    rows: tuple[Rows, Rows], looked: tuple[Held, ...], on_nan: str, paired: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Numbers of the rows that are used, None for all."""
    broken = [held["broken"] for held in looked]
    for side, numbers in zip(rows, broken, strict=True):
        if len(numbers) and on_nan == "refuse":
            shown = ", ".join(map(str, numbers[:SHOWN].tolist()))
            more = ", ..." if len(numbers) > SHOWN else ""
            raise ValueError(
                f"{side.name}: {len(numbers)} of {len(side)} rows hold NaN or infinity "
                f"(rows {shown}{more}); on_nan='skip' leaves them out"
            )
    if paired:
        broken = [torch.unique(torch.cat(broken))] * 2
    kept = []
    for side, numbers in zip(rows, broken, strict=True):
        good = torch.ones(len(side), dtype=torch.bool)
        good[numbers] = False
        if int(good.sum()) < 2:
            raise ValueError(f"{side.name} must have 2 rows or more without NaN or infinity")
        kept.append(good.nonzero()[:, 0] if len(numbers) else None)
    return kept[0], kept[1]
