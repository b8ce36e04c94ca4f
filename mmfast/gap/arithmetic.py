"""Whether words move images: "the cat sits" + stands - sits should find "the cat stands".

    target = image_query + lam (word_to - word_from)

is looked for among all images but the query, and counts as found where the picked image shows the
wanted caption.

Source: Couairon et al., Embedding Arithmetic of Multimodal Queries for Image Retrieval, CVPR 2022
workshops (arXiv 2112.03162), and its code, github.com/facebookresearch/SIMAT.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from mmfast.gap._inputs import as_ids, as_rows, as_tensor, full_precision
from mmfast.losses._terms import check_number
from mmfast.ops.pairwise_rank import pairwise_rank


class Arithmetic(NamedTuple):
    """score: percent of the weight that was found. picked: int64 [T], the chosen image of each."""

    score: float
    picked: Tensor


@full_precision
@torch.no_grad()
def embedding_arithmetic(
    images: Any,
    words: Any,
    *,
    query: Any,
    word_from: Any,
    word_to: Any,
    target: Any,
    oracle: Any,
    weights: Any = None,
    lam: float = 1.0,
    threshold: float = 0.5,
    normalize: bool = True,
    backend: str | None = None,
) -> Arithmetic:
    """The SIMAT score of T transformations, without a [T, N] matrix of scores.

    The moved image is not made unit again, as published. One value of lam a call: the published
    numbers of Geodesic Multi-Modal Mixup are the best of twelve values on the evaluation set.

    Args:
        images: [N, D] tensor, numpy array or memmap of a floating type, the database.
        words: [W, D] of the same type and device.
        query: integers [T], the row of `images` that each transformation starts from.
        word_from, word_to: integers [T], rows of `words`.
        target: integers [T], the wanted column of `oracle`.
        oracle: [N, C] tensor, numpy array or memmap, how well image n shows caption c; SIMAT's is
            made by OSCAR. Only T of its entries are read.
        weights: [T], None for equal ones. Published: norm2 ** -0.5.
        lam: how far to go.
        threshold: what `oracle` must exceed.
        normalize: make rows unit first.
        backend: passed to `pairwise_rank`; None picks the fastest that can run.

    Raises:
        TypeError, ValueError: a type, shape, index or number that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "embedding_arithmetic"
    check_number(who, "lam", lam)
    images, words = as_rows(who, normalize, images=images, words=words)
    if len(images) < 2:
        raise ValueError(f"{who}: images must have 2 rows or more, got {len(images)}")
    oracle = as_tensor(who, "oracle", oracle)
    if oracle.ndim != 2 or len(oracle) != len(images):
        raise ValueError(f"{who}: oracle must be [{len(images)}, C], got {list(oracle.shape)}")
    query = as_tensor(who, "query", query)
    at, before, after, wanted = (
        _indices(who, name, index, query, rows)
        for name, index, rows in (
            ("query", query, len(images)),
            ("word_from", word_from, len(words)),
            ("word_to", word_to, len(words)),
            ("target", target, oracle.shape[1]),
        )
    )
    moved = images[at] + lam * (words[after] - words[before])
    everyone = torch.arange(len(images), device=images.device)
    _, picked, _ = pairwise_rank(moved, images, q_ids=at, k_ids=everyone, backend=backend)
    found = (oracle[picked, wanted] > threshold).double()
    if weights is None:
        return Arithmetic(100 * float(found.mean()), picked)
    weights = as_tensor(who, "weights", weights).double()
    if weights.shape != at.shape:
        raise ValueError(f"{who}: weights must be [{len(at)}], got {list(weights.shape)}")
    return Arithmetic(100 * float(found @ weights / weights.sum()), picked)


def _indices(who: str, name: str, index: Any, like: Tensor, rows: int) -> Tensor:
    made = as_ids(who, name, index, ("query", like))
    outside = int(((made < 0) | (made >= rows)).sum())
    if outside:
        raise ValueError(f"{who}: {name} must be from 0 to {rows - 1}, and {outside} are not")
    return made
