"""How far two modalities lie apart, how well pairs agree, how evenly rows spread on the sphere.

For paired rows x_i, y_i and unordered pairs of distinct rows i < j,

    gap                 |mean x - mean y|
    alignment           mean_i |x_i - y_i|^alpha
    uniformity          log mean_{i<j} exp(-t |x_i - x_j|^2)
    relative alignment  mean_i (|x_i - y_i|^2 - min_{j != i} |x_i - y_j|^2)

The distances of all pairs are inner products, |x - y|^2 = |x|^2 - 2 (<x, y> - |y|^2 / 2): sweeps
that never hold the matrix of them make both sums and minima, and their gradients.

Sources: Liang et al., Mind the Gap, NeurIPS 2022 (arXiv 2203.02053), for the gap; Wang and Isola,
Understanding Contrastive Representation Learning through Alignment and Uniformity on the
Hypersphere, ICML 2020 (arXiv 2005.10242); Oh et al., Geodesic Multi-Modal Mixup, NeurIPS 2023
(arXiv 2203.03897), for the relative alignment.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.gap._inputs import as_rows, full_precision
from mmfast.gap._streams import mean, open_sides, products
from mmfast.gap.files import is_stored
from mmfast.losses._terms import check_number
from mmfast.ops._statistics import PairwiseStats
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.pairwise_rank import pairwise_rank
from mmfast.ops.pairwise_stats import pairwise_stats


@dataclass(frozen=True, eq=False)
class Gap:
    """The means of two modalities, [D] each, and what lies between them."""

    x_mean: Tensor
    y_mean: Tensor

    @property
    def vector(self) -> Tensor:
        """mean x - mean y, [D]."""
        return self.x_mean - self.y_mean

    @property
    def distance(self) -> Tensor:
        """The length of the vector, a scalar."""
        length: Tensor = torch.linalg.vector_norm(self.vector)
        return length

    @property
    def direction(self) -> Tensor:
        """The unit vector along the gap, [D]; zeros where the means meet."""
        return F.normalize(self.vector, dim=0)


@full_precision
def modality_gap(x: Any, y: Any, *, normalize: bool = True, budget: int = 1 << 30) -> Gap:
    """The vector from the mean of y to the mean of x, and its length.

    The means of unit rows are not made unit themselves, as published.

    Args:
        x: [N, D] tensor or numpy array, float32, float64, bfloat16 or float16; or a memmap, a path
            or a list of shards, as `mmfast.gap.open_rows` takes them, which is read in blocks.
        y: [M, D] of the same type and device (those that are read in blocks may differ in type);
            not necessarily paired.
        normalize: make rows unit first.
        budget: bytes for the blocks.

    Returns:
        Gap of tensors, differentiable unless read in blocks: float64 for float64 inputs, else
        float32.

    Raises:
        TypeError, ValueError: a type, shape or device that does not fit.
    """
    if is_stored(x) or is_stored(y):
        return Gap(*map(mean, open_sides("modality_gap", normalize, budget, x, y)))
    x, y = as_rows("modality_gap", normalize, x=x, y=y)
    return Gap(x.mean(0), y.mean(0))


@full_precision
def alignment(x: Any, y: Any, alpha: float = 2.0, *, normalize: bool = True) -> Tensor:
    """mean_i |x_i - y_i|^alpha: 0 where all pairs agree. Also a loss.

    Args:
        x, y: [N, D] tensors, numpy arrays or memmaps of one floating type.
        alpha: a positive number. Of a pair at distance 0 the gradient is 0 from 1 on, and NaN
            below.
        normalize: make rows unit first.

    Returns:
        A scalar, float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: a type, shape, device or number that does not fit.
    """
    check_number("alignment", "alpha", alpha, positive=True)
    x, y = as_rows("alignment", normalize, paired=True, x=x, y=y)
    distances: Tensor = torch.linalg.vector_norm(x - y, dim=1)
    return distances.pow(alpha).mean()


@full_precision
def uniformity(
    x: Any, t: float = 2.0, *, normalize: bool = True, backend: str | None = None
) -> Tensor:
    """log mean_{i<j} exp(-t |x_i - x_j|^2): 0 for one point, lower for well spread. Also a loss.

    In O(N * D) memory, gradients included. Of two modalities together it is that of
    `torch.cat([x, y])`; the published validation code of Geodesic Multi-Modal Mixup joins the
    images with themselves instead, so that every pair at distance 0 counts.

    Args:
        x: [N, D] tensor, numpy array or memmap of a floating type, N at least 2.
        t: a positive number.
        normalize: make rows unit first.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, float64 for float64 inputs, else float32.

    Raises:
        TypeError, ValueError: a type, shape or number that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    check_number("uniformity", "t", t, positive=True)
    (x,) = as_rows("uniformity", normalize, least=2, x=x)
    N = len(x)
    own = torch.arange(N, device=x.device)
    lifted = _lift(x, x, normalize)
    rows = pairwise_lse(lifted.q, lifted.k, 2 * t, q_ids=own, k_ids=own, backend=backend)
    # every unordered pair twice
    return (rows - t * lifted.squares).logsumexp(0) - math.log(N * (N - 1))


@full_precision
def relative_alignment(
    x: Any, y: Any, *, normalize: bool = True, backend: str | None = None
) -> Tensor:
    """mean_i (|x_i - y_i|^2 - min_{j != i} |x_i - y_j|^2): below 0 where pairs are nearest.

    One direction: each x among all y. Published with texts as x and images as y, so that the
    hardest negative of a text is the nearest wrong image. Also a loss. In O(N * D) memory.
    The published code's options to take the mean of a row or its k largest distances are not here:
    they count 10,000, which it writes in the place of own pairs, as a distance.

    Args:
        x, y: [N, D] tensors, numpy arrays or memmaps of one floating type, N at least 2.
        normalize: make rows unit first.
        backend: passed to `pairwise_rank`; None picks the fastest that can run.

    Returns:
        A scalar, float64 for float64 inputs, else float32. Of equally near negatives the first
        has the gradient.

    Raises:
        TypeError, ValueError: a type, shape or device that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    x, y = as_rows("relative_alignment", normalize, paired=True, least=2, x=x, y=y)
    own = torch.arange(len(x), device=x.device)
    lifted = _lift(x, y, normalize)
    largest, _, _ = pairwise_rank(lifted.q, lifted.k, q_ids=own, k_ids=own, backend=backend)
    nearest = lifted.squares - 2 * largest
    positive: Tensor = (x - y).square().sum(1)
    return (positive - nearest).mean()


class _Lifted(NamedTuple):
    """|x_i - y_j|^2 = squares_i - 2 <q_i, k_j>."""

    q: Tensor
    k: Tensor
    squares: Tensor | float


def _lift(x: Tensor, y: Tensor, unit: bool) -> _Lifted:
    if unit:
        return _Lifted(x, y, 2.0)
    # distances do not change, but would drown in the squares of rows far from 0
    center = y.detach().mean(0)
    x = x - center
    k = x if y is x else y - center
    half = 0.5 * k.square().sum(1, keepdim=True)
    q = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    return _Lifted(q, torch.cat([k, -half], 1), x.square().sum(1))


@full_precision
def cosine_stats(
    x: Any,
    y: Any = None,
    *,
    bins: int | None = 256,
    range: tuple[float, float] = (-1.0, 1.0),
    normalize: bool = True,
    budget: int = 1 << 30,
    backend: str | None = None,
) -> PairwiseStats:
    """Count, mean, spread, extremes and histogram of the cosines of all pairs.

    The published statistics of one modality are those of all ordered pairs of distinct rows: the
    same mean, extremes and quantiles; `std` differs by the divisor alone, as each pair counts once.

    Args:
        x: [N, D] tensor or numpy array of a floating type; or a memmap, a path or a list of shards,
            as `mmfast.gap.open_rows` takes them, which is read in blocks.
        y: [M, D] of the same type and device (those that are read in blocks may differ in type).
            None: the pairs i < j of x.
        bins, range: of the histogram, as in `pairwise_stats`. A cosine that rounding puts past 1
            counts as `above`.
        normalize: make rows unit first.
        budget: bytes for the blocks.
        backend: passed to `pairwise_stats`; None picks the fastest that can run.

    Returns:
        PairwiseStats, without a gradient.

    Raises:
        TypeError, ValueError: a type, shape, device or number that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    sides = {"x": x} if y is None else {"x": x, "y": y}
    options: dict[str, Any] = {"bins": bins, "range": range, "backend": backend}
    if any(map(is_stored, sides.values())):
        return products(open_sides("cosine_stats", normalize, budget, *sides.values()), **options)
    return pairwise_stats(*as_rows("cosine_stats", normalize, **sides), **options)


class Procrustes(NamedTuple):
    """What `procrustes` found.

    rotation: [D, D], orthogonal. aligned: y @ rotation, [N, D]. residual: the mean squared
    distance of x and `aligned`, a scalar.
    """

    rotation: Tensor
    aligned: Tensor
    residual: Tensor


@full_precision
@torch.no_grad()
def procrustes(x: Any, y: Any, *, normalize: bool = True) -> Procrustes:
    """The orthogonal map that brings y nearest to x, from the singular vectors of x.T @ y.

    How much of a gap is only turned: a rotation that closes it leaves no residual. Mind the Gap
    amends random initialisations with it. Reflections are allowed; nothing is shifted or scaled.
    With fewer than D independent rows the map is one of many, the residual is not.

    Args:
        x, y: [N, D] tensors, numpy arrays or memmaps of one floating type.
        normalize: make rows unit first.

    Returns:
        Procrustes in float64 for float64 inputs, else float32, without a gradient.

    Raises:
        TypeError, ValueError: a type, shape or device that does not fit.
    """
    x, y = as_rows("procrustes", normalize, paired=True, x=x, y=y)
    u, _, vt = torch.linalg.svd(y.T @ x)
    rotation = u @ vt
    aligned = y @ rotation
    return Procrustes(rotation, aligned, (x - aligned).square().sum(1).mean())
