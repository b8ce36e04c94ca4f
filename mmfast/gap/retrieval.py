"""How often the right candidate is among the first.

A query's rank is how many wrong candidates score strictly higher than the best right one; recall at
k is the share of queries of rank below k. Ranks come from one sweep of the scores a direction: no
score is sorted, and no matrix is made.

Source: image-text retrieval as CLIP (arXiv 2103.00020) and ALBEF (arXiv 2107.07651) report it, with
several captions an image.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.gap._inputs import as_ids, as_rows, full_precision
from mmfast.losses._terms import dot_rows
from mmfast.ops.pairwise_rank import pairwise_rank

# pairs of right ones whose scores are made at a time
PAIRS = 8192


@dataclass(frozen=True, eq=False)
class Recall:
    """x_to_y, y_to_x: recall by k. x_ranks [N], y_ranks [M]: int64, 0 is best."""

    x_to_y: dict[int, float]
    y_to_x: dict[int, float]
    x_ranks: Tensor
    y_ranks: Tensor


@full_precision
@torch.no_grad()
def retrieval_recall(
    x: Any,
    y: Any,
    ks: Sequence[int] = (1, 5, 10),
    *,
    x_ids: Any = None,
    y_ids: Any = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Recall:
    """Recall at each k, both ways, in O((N + M) * D) memory.

    Equal scores do not push a candidate back: it needs a strictly higher one; a difference that
    the rounding of the products explains is none. (Published code that looks for the right score in
    the sorted row counts a tie several times, in the divisor too.) A query whose right candidates
    all score NaN is not found.

    Args:
        x: [N, D] tensor, numpy array or memmap of a floating type, images for example.
        y: [M, D] of the same type and device, captions for example.
        ks: positive whole numbers.
        x_ids, y_ids: integers [N] and [M], both or neither: rows with equal ids belong together,
            as the captions of an image. None: row i of x with row i of y.
        normalize: make rows unit first.
        backend: passed to `pairwise_rank`; None picks the fastest that can run.

    Returns:
        Recall: shares of the rows of x whose y are found, and of y whose x are, and all ranks.

    Raises:
        TypeError, ValueError: a type, shape, device or k that does not fit; a row without any
            right candidate.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "retrieval_recall"
    ks = tuple(ks)
    for k in ks:
        if isinstance(k, bool) or not isinstance(k, int) or k < 1:
            raise ValueError(f"{who}: ks must be positive whole numbers, got {k!r}")
    x, y, x_ids, y_ids = labelled_rows(who, x, y, x_ids, y_ids, normalize)
    x_ranks, y_ranks = (
        _ranks(who, names, queries, candidates, ids, backend)
        for names, queries, candidates, ids in (
            (("x", "y"), x, y, (x_ids, y_ids)),
            (("y", "x"), y, x, (y_ids, x_ids)),
        )
    )
    x_to_y, y_to_x = (
        {k: int((ranks < k).sum()) / len(ranks) for k in ks} for ranks in (x_ranks, y_ranks)
    )
    return Recall(x_to_y, y_to_x, x_ranks, y_ranks)


def labelled_rows(
    who: str, x: Any, y: Any, x_ids: Any, y_ids: Any, normalize: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of both sides and the ids that say which belong together; row numbers by default."""
    x, y = as_rows(who, normalize, paired=x_ids is None and y_ids is None, x=x, y=y)
    if x_ids is None and y_ids is None:
        own = torch.arange(len(x), device=x.device)
        return x, y, own, own
    if x_ids is None or y_ids is None:
        missing = "x_ids" if x_ids is None else "y_ids"
        raise ValueError(f"{who}: x_ids and y_ids must be given together, got no {missing}")
    return x, y, as_ids(who, "x_ids", x_ids, ("x", x)), as_ids(who, "y_ids", y_ids, ("y", y))


def _ranks(
    who: str,
    names: tuple[str, str],
    queries: Tensor,
    candidates: Tensor,
    ids: tuple[Tensor, Tensor],
    backend: str | None,
) -> Tensor:
    """How many wrong candidates score higher than the best right one, [N]."""
    best = _best_right(who, names, queries, candidates, ids)
    # both scores of a tie are sums of D products, made in different orders
    rounding = torch.finfo(best.dtype).eps * queries.shape[1] ** 0.5
    sizes = queries.norm(dim=1) * candidates.norm(dim=1).nan_to_num(0.0, posinf=0.0).max()
    _, _, above = pairwise_rank(
        queries,
        candidates,
        threshold=best + rounding * sizes,
        q_ids=ids[0],
        k_ids=ids[1],
        backend=backend,
    )
    return above.masked_fill(best == -torch.inf, len(candidates))


def _best_right(
    who: str,
    names: tuple[str, str],
    queries: Tensor,
    candidates: Tensor,
    ids: tuple[Tensor, Tensor],
) -> Tensor:
    """The largest score of each query among candidates with its id, [N]; -inf if all are NaN."""
    sorted_ids, order = ids[1].sort()
    start = torch.searchsorted(sorted_ids, ids[0])
    count = torch.searchsorted(sorted_ids, ids[0], right=True) - start
    alone = int((count == 0).sum())
    if alone:
        raise ValueError(f"{who}: {alone} rows of {names[0]} have no row of {names[1]} of their id")
    best = torch.full_like(queries[:, 0], -torch.inf)
    step = max(1, PAIRS // int(count.max()))
    for at in range(0, len(queries), step):
        block = slice(at, at + step)
        # pairs of the block: each query as often as it has right candidates, which lie in a row
        n = count[block]
        query = torch.arange(len(n), device=n.device).repeat_interleave(n)
        nth = torch.arange(len(query), device=n.device) - (n.cumsum(0) - n)[query]
        right = order[start[block][query] + nth]
        scores = dot_rows(queries[block][query], candidates[right], 1.0)
        scores = scores.masked_fill(scores.isnan(), -torch.inf)
        best[block].scatter_reduce_(0, query, scores, "amax")
    return best
