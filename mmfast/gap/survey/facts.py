"""What `survey` found, as plain as a reader of it needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch import Tensor

from mmfast.gap.measures import Gap
from mmfast.gap.survey.plain import from_plain, to_plain
from mmfast.ops._statistics import PairwiseStats
from mmfast.ops.shift_landscape import Landscape

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Ways(Generic[T]):
    """One thing of each row of x among all of y, and of each of y among all of x."""

    x_to_y: T
    y_to_x: T


@dataclass(frozen=True, eq=False)
class SideFacts:
    """One modality.

    rows: how many were used. nan_rows: how many hold NaN or infinity, and first_nan_rows the
    numbers of the first ones. zero_rows: how many are zeros, kept as they are. alone: how many
    have a label that the other side lacks. mean: of unit rows, float64 [D]. cosines: of all pairs
    of distinct rows. uniformity: as `mmfast.uniformity`.
    """

    name: str
    rows: int
    width: int
    dtype: str
    nan_rows: int
    first_nan_rows: tuple[int, ...]
    zero_rows: int
    alone: int
    mean: Tensor
    cosines: PairwiseStats
    uniformity: float


@dataclass(frozen=True, eq=False)
class PCA:
    """Unit rows of both sides together on their first axes.

    variance_ratio: float64 [up to 6], shares of all variance. centre: [D]. axes: [2, D]; the mean
    of x lies to the right of that of y. x_points, y_points: [up to 2000, 2], evenly spaced rows;
    a mean m is at axes @ (m - centre).
    """

    variance_ratio: Tensor
    centre: Tensor
    axes: Tensor
    x_points: Tensor
    y_points: Tensor


@dataclass(frozen=True, eq=False)
class Retrieval:
    """How the queries that have a right candidate find it; of several right ones the best.

    recall: by k, the share whose rank is k or less, 1 the best rank. found: int64 [K], how many
    have a rank of ks [K] or less, from 1 to all candidates.
    """

    queries: int
    candidates: int
    recall: dict[int, float]
    median_rank: float
    ks: Tensor
    found: Tensor


@dataclass(frozen=True, eq=False)
class Survey:
    """What `survey` found.

    paired: how many rows of x have a partner in y; if none, paired quantities are NaN or None.
    pairs: cosines of partners. others: of pairs of x and y that do not belong together.
    alignment, relative_alignment: as the measures of these names. uniformity: of both together.
    loss: InfoNCE each way over all pairs, at options["logit_scale"]. landscape: that of chunks of
    options["chunk"] pairs, float64; its shifts hold 0. notes: sentences on what was left out.
    """

    x: SideFacts
    y: SideFacts
    labelled: bool
    paired: int
    pairs: PairwiseStats | None
    others: PairwiseStats
    gap: Gap
    alignment: float
    uniformity: float
    relative_alignment: Ways[float]
    pca: PCA
    retrieval: Ways[Retrieval | None]
    loss: Ways[float]
    landscape: Landscape | None
    notes: tuple[str, ...]
    seconds: float
    options: dict[str, Any]

    @property
    def symmetric_loss(self) -> float:
        """The mean of both ways, the loss CLIP trains with."""
        return (self.loss.x_to_y + self.loss.y_to_x) / 2

    @property
    def rest(self) -> int | None:
        """The index of shift 0 in the landscape, None without one."""
        return None if self.landscape is None else int(self.landscape.shifts.abs().argmin())

    def to_json(self) -> dict[str, Any]:
        """Dicts, lists, numbers and words for `json.dumps`; NaN and infinity become None."""
        plain: dict[str, Any] = to_plain(self)
        return plain

    @classmethod
    def from_json(cls, plain: dict[str, Any]) -> Survey:
        """The survey that `to_json` made `plain` of; tensors are float64 or int64."""
        made: Survey = from_plain(cls, plain)
        return made
