"""What the losses share: argument checks and plain torch pieces that cost O(N D), never O(N M).

N rows, D width, s_ij = scale * <q_i, k_j>. Low precision inputs are widened to float32 once and
everything after that stays there; float64 stays float64.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast._ring import Ring
from mmfast.distributed import ring_group_sums, ring_total
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_number,
    as_scale,
    cast_as_matmul,
    check_tensor,
    type_name,
)

Reduction = Literal["mean", "sum", "none"]
SameId = Literal["exclude", "positive"]


def widen(x: Tensor) -> Tensor:
    """`x` in the dtype that its scores and losses are computed in."""
    return x.to(SCORE_TYPE[x.dtype])


def dot_rows(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """scale * <q_i, k_i> over the last axis, in the dtype of widened q, k [..., D]."""
    # multiply and sum, not a product: tf32 or a bf16 result would be off by 0.2 at scale 100
    return (q * k).sum(-1) * scale


def row_scores(q: Tensor, k: Tensor, scale: float | Tensor) -> Tensor:
    """Scores of picked pairs: s_ii of q, k [..., D], from the inputs that `pairwise_lse` sees."""
    q, k = cast_as_matmul(q, k)
    return dot_rows(widen(q), widen(k), scale)


def log_sum_exp(scores: Tensor, dim: int) -> Tensor:
    """logsumexp whose value is -inf and whose gradient is 0 where every score is -inf."""
    # torch's own backward there is exp(-inf - -inf) = NaN
    empty = (scores == -math.inf).all(dim, keepdim=True)
    return scores.masked_fill(empty, 0.0).logsumexp(dim).masked_fill(empty.squeeze(dim), -math.inf)


def softplus(x: Tensor) -> Tensor:
    """log(1 + exp(x)), value and gradient to the last bits of float32 and float64 at any x."""
    # past the threshold softplus(x) is x: 20, the default, would leave 1e-10 in float64
    return F.softplus(x, threshold=40.0)


def ids_or_rows(ids: Tensor | None, x: Tensor, ring: Ring | None = None) -> Tensor:
    """`ids`, or the numbers of the rows of `x`: with them only the own pair is left out."""
    if ids is not None:
        return ids
    first = 0 if ring is None else ring.first
    return torch.arange(first, first + len(x), device=x.device)


def group_sums(x: Tensor, ids: Tensor, ring: Ring | None = None) -> tuple[Tensor, Tensor]:
    """Sums of rows with equal ids: (of row i's group [N, D], its size [N, 1]).

    Of the rows of all ranks with a `ring`.
    """
    if ring is not None:
        counted = torch.cat([x, x.new_ones(len(x), 1)], 1)
        found = ring_group_sums(ring, counted, ids)
        return found[:, :-1], found[:, -1:]
    # numbering by sort has shapes known beforehand: no host sync, and it traces
    order = ids.argsort()
    ordered = ids[order]
    starts = torch.cat([ids.new_zeros(1), (ordered[1:] != ordered[:-1]).long()])
    slot = torch.zeros_like(ids).scatter(0, order, starts.cumsum(0))
    sums = torch.zeros_like(x).index_add(0, slot, x)
    sizes = x.new_zeros(len(x)).index_add(0, slot, x.new_ones(len(x)))
    return sums.index_select(0, slot), sizes[slot].unsqueeze(1)


def target_offset(
    k: Tensor,
    ids: Tensor | None,
    same_id: SameId,
    label_smoothing: float,
    ring: Ring | None = None,
) -> Tensor | None:
    """k_i minus the mean row under the target of row i, [N, D]; None where that is k_i itself.

    The target is (1 - label_smoothing) * positives + label_smoothing * remaining columns, each
    uniform: the positives of row i are itself, or with same_id="positive" its whole group; the
    columns that remain are all, or with same_id="exclude" its own and those of other ids.
    `k` [N, D] is widened; cross-entropy = softplus(others - s_ii) + scale * <q_i, offset_i>.
    """
    n = len(k) if ring is None else ring.total
    if ids is None:
        return label_smoothing * (k - _total(k, ring) / n) if label_smoothing else None
    if same_id == "exclude" and not label_smoothing:
        return None
    sums, sizes = group_sums(k, ids, ring)
    if same_id == "exclude":
        # of one single group nothing remains, however its sum was rounded
        others = (_total(k, ring) - sums).masked_fill(sizes == n, 0.0)
        return label_smoothing * (k - (others + k) / (n - sizes + 1))
    # a row alone in its group sends no gradient here at all: a tiny one, added between two large
    # ones that cancel, would be lost
    offset = (k - sums / sizes).masked_fill(sizes == 1, 0.0)
    if not label_smoothing:
        return offset
    return (1 - label_smoothing) * offset + label_smoothing * (k - _total(k, ring) / n)


def _total(k: Tensor, ring: Ring | None) -> Tensor:
    """The sum of all rows [D], of all ranks with a `ring`."""
    return k.sum(0) if ring is None else ring_total(ring, k.sum(0))


def reduce(loss: Tensor, reduction: Reduction, ring: Ring | None = None) -> Tensor:
    """`loss` [N] as a mean, a sum or as it is; by the contract of `mmfast.distributed`."""
    if reduction == "none":
        return loss
    if ring is not None:
        return loss.sum() * (ring.size / ring.total if reduction == "mean" else ring.size)
    return loss.mean() if reduction == "mean" else loss.sum()


def check_rows(
    who: str, name: str, x: Any, sizes: Sequence[int | str], like: tuple[str, Tensor] | None = None
) -> Tensor:
    """`x` as autocast leaves it; raises unless its shape is `sizes` and it matches `like`.

    A size that is a letter is free, but of those only "H" may be 0.
    """
    check_tensor(who, name, x)
    if x.dtype not in SCORE_TYPE:
        raise TypeError(
            f"{who}: {name} must be float32, float64, bfloat16 or float16, got {type_name(x.dtype)}"
        )
    x = cast_as_matmul(like[1] if like else x, x)[1]
    if x.ndim != len(sizes) or any(
        not isinstance(size, str) and size != got for size, got in zip(sizes, x.shape, strict=True)
    ):
        wanted = ", ".join(f"{size}" for size in sizes)
        suffix = f" like {like[0]}" if like else ""
        raise ValueError(f"{who}: {name} must be [{wanted}]{suffix}, got {list(x.shape)}")
    if any(
        got == 0 and isinstance(size, str) and size != "H"
        for size, got in zip(sizes, x.shape, strict=True)
    ):
        raise ValueError(f"{who}: {name} must not be empty, got {list(x.shape)}")
    if like:
        other, y = like
        if x.dtype != y.dtype:
            expected, dtype = type_name(y.dtype), type_name(x.dtype)
            raise TypeError(f"{who}: {name} must be {expected} like {other}, got {dtype}")
        if x.device != y.device:
            raise ValueError(f"{who}: {name} must be on {y.device} like {other}, got {x.device}")
    tensor: Tensor = x
    return tensor


def check_ids(who: str, ids: Any, like: tuple[str, Tensor], name: str = "ids") -> None:
    """Raises unless `ids` is int64 [N], one for each row of `like`."""
    other, y = like
    check_tensor(who, name, ids)
    if ids.dtype != torch.int64:
        raise TypeError(f"{who}: {name} must be int64, got {type_name(ids.dtype)}")
    if ids.shape != y.shape[:1]:
        raise ValueError(
            f"{who}: {name} must be [{len(y)}], one per row of {other}, got {list(ids.shape)}"
        )
    if ids.device != y.device:
        raise ValueError(f"{who}: {name} must be on {y.device} like {other}, got {ids.device}")


def check_share(who: str, name: str, share: Any, *, whole: bool = False) -> None:
    """Raises unless `share` is a number in [0, 1), with `whole` in [0, 1]."""
    if not isinstance(share, (int, float)):
        raise TypeError(f"{who}: {name} must be a number, got {type(share).__name__}")
    if not (0.0 <= share < 1.0 or (whole and share == 1.0)):
        raise ValueError(f"{who}: {name} must be in [0, 1{']' if whole else ')'}, got {share}")


def check_number(who: str, name: str, x: Any, *, positive: bool = False) -> None:
    """Raises unless `x` is a finite number, positive or, without `positive`, 0."""
    if not isinstance(x, (int, float)):
        raise TypeError(f"{who}: {name} must be a number, got {type(x).__name__}")
    if not -math.inf < x < math.inf:
        raise ValueError(f"{who}: {name} must be finite, got {x}")
    if x < 0 or (positive and x == 0):
        raise ValueError(f"{who}: {name} must be positive{'' if positive else ' or 0'}, got {x}")


def check_options(who: str, reduction: Any, same_id: Any = "exclude", group: Any = None) -> None:
    """Raises unless the words are known and no process group is given."""
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{who}: reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if same_id not in ("exclude", "positive"):
        raise ValueError(f"{who}: same_id must be 'exclude' or 'positive', got {same_id!r}")
    check_group(who, group)


def check_group(who: str, group: Any) -> None:
    """Raises unless no process group is given."""
    if group is not None:
        raise ValueError(
            f"{who}: group= is not supported yet, expected None, got {type(group).__name__}; "
            "without it each process computes the loss of its own batch"
        )


def check_batch(
    who: str,
    image: Any,
    text: Any,
    logit_scale: Any,
    ids: Any,
    reduction: Any,
    group: Any = None,
    same_id: Any = "exclude",
) -> tuple[Tensor, Tensor, Tensor]:
    """What every loss of a batch of pairs asks; image and text [B, D] as autocast leaves them,
    and the scale as a 0-dim tensor."""
    check_options(who, reduction, same_id, group)
    image = check_rows(who, "image", image, ("B", "D"))
    like = ("image", image)
    text = check_rows(who, "text", text, tuple(image.shape), like)
    if ids is not None:
        check_ids(who, ids, like)
    return image, text, as_scale(who, image, logit_scale, "logit_scale")


def as_logit_scale(who: str, x: Tensor, temperature: Any) -> Tensor:
    """1 / temperature as a 0-dim tensor; raises unless a Python number is positive."""
    if not isinstance(temperature, Tensor) and as_number(who, "temperature", temperature) <= 0:
        raise ValueError(f"{who}: temperature must be positive, got {temperature}")
    return as_scale(who, x, temperature, "temperature").reciprocal()
