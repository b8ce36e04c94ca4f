"""One modality in blocks of unit rows, and which rows of two modalities belong together."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.gap.files import Rows

# blocks of rows that are held at once, copies that a sweep packs included
HELD = 8
# rows of a block are no more than this: larger ones are no faster, and progress is seldom told
_MOST = 1 << 13
_LEAST = 64
Block = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Units(Generic[T]):
    """`count` units, made from their numbers when asked for: there may be billions."""

    count: int
    make: Callable[[int], T]

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, at: int) -> T:
        return self.make(at)

    def __iter__(self) -> Iterator[T]:
        return map(self.make, range(self.count))


class Side:
    """The rows `kept` of `rows` (all of them if None), read in blocks of `size`, in `dtype`.

    normalize: whether `unit` and `take` make rows unit.
    """

    def __init__(
        self,
        rows: Rows,
        kept: Tensor | None,
        size: int,
        dtype: torch.dtype,
        normalize: bool = True,
    ) -> None:
        self.rows, self.kept, self.dtype, self.normalize = rows, kept, dtype, normalize
        self.size = size
        self._units: dict[int, Tensor] = {}

    def __len__(self) -> int:
        return len(self.rows) if self.kept is None else len(self.kept)

    @property
    def width(self) -> int:
        return self.rows.shape[1]

    @property
    def blocks(self) -> Units[Block]:
        return cut(len(self), self.size)

    def raw(self, start: int, stop: int) -> Tensor:
        """Rows as they are stored, in the type of the products."""
        if self.kept is None:
            return self.rows.read(start, stop).to(self.dtype)
        return self.rows.take(self.kept[start:stop]).to(self.dtype)

    def take(self, index: Tensor) -> Tensor:
        """Unit rows of any numbers."""
        return self._made(self.take_raw(index))

    def take_raw(self, index: Tensor) -> Tensor:
        """Rows of any numbers as they are stored, in the type of the products."""
        return self.rows.take(index if self.kept is None else self.kept[index]).to(self.dtype)

    def unit(self, block: int) -> Tensor:
        """Unit rows of a block; those of the last two blocks are kept."""
        rows = self._units.pop(block, None)
        if rows is None:
            for oldest in list(self._units)[:-1]:
                del self._units[oldest]
            start = block * self.size
            rows = self._made(self.raw(start, min(start + self.size, len(self))))
        self._units[block] = rows
        return rows

    def _made(self, rows: Tensor) -> Tensor:
        return F.normalize(rows, dim=1) if self.normalize else rows

    def number(self, row: int) -> int:
        """The number of a row among all rows, the skipped ones too; -1 stays."""
        return row if self.kept is None or row < 0 else int(self.kept[row])


def cut(n: int, size: int) -> Units[Block]:
    """(start, stop) of n rows by `size`."""
    return Units(-(-n // size), lambda at: (at * size, min(at * size + size, n)))


def grid(x: Side, y: Side) -> Units[tuple[int, int]]:
    """All pairs of blocks, row by row."""
    n, m = len(x.blocks), len(y.blocks)
    return Units(n * m, lambda at: divmod(at, m))


def triangle(side: Side) -> Units[tuple[int, int]]:
    """The pairs of blocks i <= j, row by row."""
    n = len(side.blocks)
    count = n * (n + 1) // 2

    def pair(at: int) -> tuple[int, int]:
        # rows grow by one from the last one on: row k from there begins at k (k + 1) / 2
        back = count - 1 - at
        k = (math.isqrt(8 * back + 1) - 1) // 2
        return n - 1 - k, n - 1 - (back - k * (k + 1) // 2)

    return Units(count, pair)


def block_size(who: str, width: int, budget: Any, dtype: torch.dtype, beside: int = 0) -> int:
    """Rows of a block, so that all that is held at once and `beside` bytes fit the budget."""
    if isinstance(budget, bool) or not isinstance(budget, int):
        raise TypeError(f"{who}: budget must be an int, got {type(budget).__name__}")
    row = HELD * width * dtype.itemsize
    if budget < beside + _LEAST * row:
        raise ValueError(
            f"{who}: budget must be {beside + _LEAST * row} bytes or more for rows {width} wide, "
            f"got {budget}"
        )
    return min(_MOST, (budget - beside) // row)


class Matches:
    """Which rows of x [N] and y [M] have equal ids.

    y_of_x [N], x_of_y [M]: the first row of the other side with the same id, -1 of none.
    """

    def __init__(self, x_ids: Tensor, y_ids: Tensor) -> None:
        self.x_ids, self.y_ids = x_ids, y_ids
        self._order, self._start, self._count = _runs(x_ids, y_ids)
        self.y_of_x = _first(self._order, self._start, self._count)
        self.x_of_y = _first(*_runs(y_ids, x_ids))

    def count(self, start: int, stop: int) -> int:
        """How many pairs of `pairs` there are."""
        return int(self._count[start:stop].sum())

    def pairs(self, start: int, stop: int, most: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Rows (i, j) with equal ids for start <= i < stop, in order, at most `most` at a time."""
        if start == stop:
            return
        step = max(1, most // max(1, int(self._count[start:stop].max())))
        for at in range(start, stop, step):
            block = slice(at, min(at + step, stop))
            n = self._count[block]
            i = torch.arange(len(n)).repeat_interleave(n)
            nth = torch.arange(len(i)) - (n.cumsum(0) - n)[i]
            j = self._order[self._start[block][i] + nth]
            for first in range(0, len(i), most):
                part = slice(first, first + most)
                yield at + i[part], j[part]


def _runs(ids: Tensor, others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of `others` by id, and where those of each of `ids` begin there, and how many."""
    by_id, order = others.sort(stable=True)
    start = torch.searchsorted(by_id, ids)
    return order, start, torch.searchsorted(by_id, ids, right=True) - start


def _first(order: Tensor, start: Tensor, count: Tensor) -> Tensor:
    return torch.where(count > 0, order[start.clamp_max(len(order) - 1)], -1)
