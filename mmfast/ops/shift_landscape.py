"""The contrastive loss as two modalities are shifted together or apart, without any logits.

With unit rows u_i = x_i / |x_i| and v_j = y_j / |y_j|, their gap D = mean u - mean v and a
direction d, shift l moves the rows along d and normalises them again:

    u'_i = (u_i - a_l d) / |u_i - a_l d|        v'_j = (v_j + b_l d) / |v_j + b_l d|
    "unit":  d = D / |D|,  a = b = shift / 2    "paper":  d = D,  a = b = shift

One side alone moves by all of its shift in both conventions. For every shift and temperature the
loss is that of CLIP on the pairs of each chunk of neighbouring rows,

    image_to_text = mean_i( log sum_j exp(<u'_i, v'_j> / temperature) - <u'_i, v'_i> / temperature )

and text_to_image its twin over columns. A shift changes the cosines by terms of rank one and by the
lengths of the rows alone,

    <u'_i, v'_j> = (<u_i, v_j> + b <u_i, d> - a <d, v_j> - a b <d, d>) / (|u_i - a d| |v_j + b d|),

so that one product of the rows as they are serves all of them, and an exponential a pair, shift and
temperature is what is left. Own pairs are left out of the sums: the loss is softplus(sum over the
others - own score), which stays exact when it is tiny.

Source: Liang et al., Mind the Gap, NeurIPS 2022 (arXiv 2203.02053), section 4.2 and figure 3. The
paper moves each side by lambda D; its code (github.com/Weixin-Liang/Modality-Gap) by half a shift
along the unit vector. The figure is of chunks of 50 pairs, and of one direction: its code
transposes the logits twice, so its curve is `image_to_text`, where the paper speaks of `symmetric`.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast import _dispatch
from mmfast._dispatch import Backend
from mmfast.ops._inputs import (
    SCORE_TYPE,
    as_number,
    cast_as_matmul,
    check_alike,
    check_matrix,
    check_tensor,
    dense,
    type_name,
)

# a gap that is no longer is one of rounding
_NO_GAP = 1e-14
# rows that are held in float64 at once
_ROWS = 4096


@dataclass(frozen=True)
class Landscape:
    """Losses [L, T] of L shifts and T temperatures.

    shifts [L], temperatures [T]: float64, as they were given. image_to_text: every row of x against
    the rows of y. text_to_image: the other way round. distance [L]: the length of what is left of
    the gap, negative where it has turned against the direction.
    """

    shifts: Tensor
    temperatures: Tensor
    image_to_text: Tensor
    text_to_image: Tensor
    distance: Tensor

    @property
    def symmetric(self) -> Tensor:
        """The mean of both directions [L, T], the loss CLIP trains with."""
        return (self.image_to_text + self.text_to_image) / 2


def reference(
    x: Tensor,
    y: Tensor,
    direction: Tensor,
    moves: Sequence[tuple[float, float]],
    scales: Sequence[float],
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in plain torch, shift by shift: image_to_text, text_to_image, distance.

    moves: along `direction` [D], of the unit rows of x and of y. scales: 1 / temperature.
    """
    u, v = (_unit(side.to(SCORE_TYPE[side.dtype])) for side in (x, y))
    d = direction.to(u.dtype)
    losses, distances = [], []
    for x_move, y_move in moves:
        p, q = _unit(u + x_move * d), _unit(v + y_move * d)
        gap = p.mean(0) - q.mean(0)
        distances.append(torch.where(gap @ d < 0, -1, 1) * gap.norm())
        cosines = [a @ b.T for a, b in zip(_parts(p, chunk), _parts(q, chunk), strict=True)]
        losses += [_loss(scale, cosines) for scale in scales]
    rows, columns = torch.stack(losses).view(len(moves), len(scales), 2).unbind(2)
    return rows, columns, torch.stack(distances)


def _loss(scale: float, chunks: list[Tensor]) -> Tensor:
    """Means over all pairs of the cross entropy of rows and of columns: [2]."""
    sums = [
        torch.stack([F.cross_entropy(scale * z, own, reduction="sum") for z in (s, s.T)])
        for s in chunks
        for own in [torch.arange(len(s), device=s.device)]
    ]
    return torch.stack(sums).sum(0) / sum(len(s) for s in chunks)


def _unit(rows: Tensor) -> Tensor:
    lengths: Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


def _parts(x: Tensor, size: int = _ROWS) -> list[Tensor]:
    """`x` in parts of neighbouring rows."""
    return [x[i : i + size] for i in range(0, len(x), size)]


class _Side(NamedTuple):
    """What a cosine needs to know of one side, in float64."""

    inverse: Tensor  # one over the lengths of the rows [N]
    along: Tensor  # of the unit rows, times the direction [N]
    factors: Tensor  # one over the lengths of the moved rows [L, N]
    centre: Tensor  # the mean of the moved unit rows [L, D]


def _move(x: Tensor, direction: Tensor, moves: Tensor) -> _Side:
    moves = moves[:, None]
    parts, total = [], torch.zeros(len(moves), len(direction), dtype=moves.dtype, device=x.device)
    for rows in _parts(x):
        wide = rows.double()
        inverse = 1 / wide.norm(dim=1)
        along = wide @ direction * inverse
        # below 0 by rounding alone
        squares = 1 + 2 * moves * along + moves**2 * (direction @ direction)
        factors = squares.clamp_min(0).rsqrt()
        total = total + (factors * inverse) @ wide
        parts.append((inverse, along, factors))
    inverse, along, factors = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    centre = (total + moves * factors.sum(1, keepdim=True) * direction) / len(x)
    return _Side(inverse, along, factors, centre)


def moved_sums(x: Tensor, y: Tensor, shifts: Sequence[float], direction: Tensor) -> Tensor:
    """Sums of the unit rows of x and of y that both sides' shifts move, float64 [2, L, D]: what
    the means of a whole come from, where blocks of it are shifted along one unit `direction`."""
    moves = _on(x.device, shifts) / 2
    sides = (_move(x, direction, -moves), _move(y, direction, moves))
    return torch.stack([side.centre * len(x) for side in sides])


def _gap(x: Tensor, y: Tensor) -> Tensor:
    """The mean of the unit rows of x less that of y, float64 [D]."""
    sums = [
        torch.stack([_unit(rows.double()).sum(0) for rows in _parts(side)]).sum(0)
        for side in (x, y)
    ]
    return (sums[0] - sums[1]) / len(x)


def _own_products(x: Tensor, y: Tensor) -> Tensor:
    """<x_i, y_i> in float64 [N]."""
    pairs = zip(_parts(x), _parts(y), strict=True)
    return torch.cat([(a.double() * b.double()).sum(1) for a, b in pairs])


def _swept(
    x: Tensor,
    y: Tensor,
    direction: Tensor,
    moves: Sequence[tuple[float, float]],
    scales: Sequence[float],
    chunk: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """What `reference` returns, from one product."""
    x_moves, y_moves = (_on(x.device, side) for side in zip(*moves, strict=True))
    a, b = _move(x, direction, x_moves), _move(y, direction, y_moves)
    x_moves, y_moves = x_moves[:, None], y_moves[:, None]
    a_offsets = y_moves * (a.along + x_moves * (direction @ direction))
    b_offsets = x_moves * b.along
    dtype = SCORE_TYPE[x.dtype]
    terms = [
        [z.to(dtype) for z in (side.inverse, offsets, side.factors)]
        for side, offsets in ((a, a_offsets), (b, b_offsets))
    ]
    sums = _log_sums(x, *terms[0], y, *terms[1], list(scales), chunk, backend)
    own = _own_products(x, y) * a.inverse * b.inverse
    own = (own + a_offsets + b_offsets) * a.factors * b.factors
    losses = [_losses(part, own, scales).to(dtype) for part in sums]
    gap = a.centre - b.centre
    distance = torch.where(gap @ direction < 0, -1, 1) * gap.norm(dim=1)
    return losses[0], losses[1], distance.to(dtype)


def _losses(sums: Tensor, own: Tensor, scales: Sequence[float]) -> Tensor:
    """Means of softplus(sums [L, T, N] - own scores): float64 [L, T]."""
    scale = _on(sums.device, scales)[:, None]
    zero = torch.zeros((), dtype=torch.float64, device=sums.device)
    # a shift at a time: all of them in float64 would be the largest arrays of the call
    return torch.stack(
        [torch.logaddexp(s - scale * z, zero).mean(1) for s, z in zip(sums, own, strict=True)]
    )


def _on(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """float64 on `device`."""
    if device.type == "cpu":
        return torch.tensor(numbers, dtype=torch.float64)
    # a copy from the host's memory would end the capture of a CUDA graph
    return torch.stack([torch.full((), z, dtype=torch.float64, device=device) for z in numbers])


def _cpp(*inputs: Any) -> tuple[Tensor, Tensor]:
    x, x_inverse, x_offsets, x_factors, y, y_inverse, y_offsets, y_factors, *rest = inputs
    scales, chunk = rest
    (L, N), T = x_offsets.shape, len(scales)
    rows, columns = (torch.empty(L, T, N, dtype=x_offsets.dtype) for _ in range(2))
    of_x, of_y = (x_inverse, x_offsets, x_factors), (y_inverse, y_offsets, y_factors)
    results = (rows.view(L * T, N), columns.view(L * T, N))
    _dispatch.core.shift_landscape(
        dense(x), *of_x, dense(y), *of_y, scales, chunk, *results, torch.get_num_threads()
    )
    return rows, columns


def _triton(*inputs: Any) -> Any:
    return _dispatch.kernels("shift_landscape").log_sums(*inputs)


def _fake(x: Tensor, x_inverse: Tensor, x_offsets: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    (L, N), T = x_offsets.shape, len(others[-3])
    return x_offsets.new_empty(L, T, N), x_offsets.new_empty(L, T, N)


BACKENDS = (
    Backend("cpp", ("cpu",), _dispatch.cpp_missing, _dispatch.CPP_EVIDENCE),
    Backend(
        "triton", _dispatch.TRITON_DEVICES, _dispatch.triton_missing, _dispatch.TRITON_EVIDENCE
    ),
    _dispatch.EAGER,
)

# log-sum-exps [L, T, N] over the other rows of a chunk, for rows and for columns, of scale times
# (<x_i, y_j> x_inverse_i y_inverse_j + x_offset_i + y_offset_j) x_factor_i y_factor_j
_log_sums = _dispatch.define(
    "shift_landscape(Tensor x, Tensor x_inverse, Tensor x_offsets, Tensor x_factors, Tensor y, "
    "Tensor y_inverse, Tensor y_offsets, Tensor y_factors, float[] scales, int chunk, "
    "str backend) -> (Tensor, Tensor)",
    _fake,
    {"cpp": _cpp, "triton": _triton},
)


def shift_landscape(
    x: Tensor,
    y: Tensor,
    shifts: Iterable[float] | Tensor,
    temperatures: Iterable[float] | Tensor,
    *,
    direction: Tensor | None = None,
    convention: Literal["unit", "paper"] = "unit",
    sides: Literal["both", "x", "y"] = "both",
    chunk: int | None = None,
    backend: str | None = None,
) -> Landscape:
    """CLIP's loss for every shift along the modality gap and every temperature, from one product.

    In O(N * (D + L * T)) memory. No gradient flows: this measures, it does not train.

    Args:
        x: [N, D] images, float32, float64, bfloat16 or float16; any row stride. Rows are
            normalised here, in float64 and not in their own type.
        y: [N, D] texts of the same type and device; y_i belongs to x_i.
        shifts: L numbers, or a tensor of them, which is read back. Positive ones move x toward y.
        temperatures: T numbers above 0, the same way. One whose inverse is the sum of two others'
            takes a multiplication where the others take an exponential: 1/20 beside 1/10 does.
        direction: [D] of any floating type, from y to x. Default: mean of the unit rows of x less
            that of y.
        convention: "unit" (the published code): along the direction's unit vector, half a shift a
            side. "paper": a shift times the direction as it is, each side.
        sides: which side moves. "x" or "y" alone takes a whole shift where both take half a one.
        chunk: the loss is taken within this many neighbouring pairs and averaged over all pairs (a
            last chunk may be smaller); the published figure has 50. Default: all N.
        backend: "cpp", "triton", "eager", or None for the first that can run.

    Returns:
        A Landscape; losses and distances are float64 for float64 inputs and float32 for the others.
        The distance is between the means of all rows, whatever the chunk.
        Under autocast x and y are cast as a matmul would cast them. A NaN or an infinity in x, y or
        the direction makes everything NaN, and so does, for its shift, a row that lands on 0.

    Raises:
        TypeError: an argument of the wrong type; integer or mixed types of x and y.
        ValueError: a wrong shape, device, word or number; no shift or temperature; on the CPU and
            outside torch.compile (elsewhere results are NaN) a row of zeros, and in the convention
            "unit" a gap or direction of length 0.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    op = "shift_landscape"
    check_tensor(op, "x", x)
    check_tensor(op, "y", y)
    x, y = cast_as_matmul(x.detach(), y.detach())
    _check_sides(op, x, y)
    numbers = _numbers(op, "shifts", shifts)
    taus = _numbers(op, "temperatures", temperatures)
    for tau in taus:
        if not (tau > 0 and math.isfinite(1 / tau)):
            raise ValueError(f"{op}: temperatures must be above 0, got {tau}")
    _check_words(op, convention, sides)
    size = _check_chunk(op, chunk, len(x))
    if direction is not None:
        _check_direction(op, direction, x)
    name = _dispatch.choose(op, backend, BACKENDS, x, y)
    # autocast must not touch the float64 products here, nor the definition's
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        look = x.device.type == "cpu" and not torch.compiler.is_compiling()
        if look:
            _check_rows(op, x, y)
        d = _gap(x, y) if direction is None else direction.detach().double()
        if convention == "unit":
            if look and d.norm() <= (_NO_GAP if direction is None else 0):
                raise ValueError(f"{op}: {_no_direction(direction)}")
            d = d / d.norm()
        share = 0.5 if convention == "unit" and sides == "both" else 1.0
        moves = [
            (-share * s if sides != "y" else 0.0, share * s if sides != "x" else 0.0)
            for s in numbers
        ]
        scales = [1 / tau for tau in taus]
        if name == "eager":
            rows, columns, distance = reference(x, y, d, moves, scales, size)
        else:
            rows, columns, distance = _swept(x, y, d, moves, scales, size, name)
    return Landscape(_on(x.device, numbers), _on(x.device, taus), rows, columns, distance)


def _check_sides(op: str, x: Tensor, y: Tensor) -> None:
    check_matrix(op, "x", x, "N, D")
    check_matrix(op, "y", y, "N, D")
    if x.shape != y.shape:
        raise ValueError(f"{op}: y must be {list(x.shape)} like x, got {list(y.shape)}")
    check_alike(op, "y", y, "x", x)


def _numbers(op: str, name: str, values: Any) -> list[float]:
    if isinstance(values, Tensor):
        if values.dim() != 1:
            raise ValueError(f"{op}: {name} must be 1-D, got {list(values.shape)}")
        values = values.tolist()
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{op}: {name} must be numbers in a row, got {type(values).__name__}")
    numbers = [as_number(op, name, value) for value in values]
    if not numbers:
        raise ValueError(f"{op}: {name} must hold at least one number, got none")
    return numbers


def _check_words(op: str, convention: str, sides: str) -> None:
    if convention not in ("unit", "paper"):
        raise ValueError(f'{op}: convention must be "unit" or "paper", got {convention!r}')
    if sides not in ("both", "x", "y"):
        raise ValueError(f'{op}: sides must be "both", "x" or "y", got {sides!r}')


def _check_chunk(op: str, chunk: int | None, N: int) -> int:
    if chunk is None:
        return N
    if isinstance(chunk, bool) or not isinstance(chunk, int):
        raise TypeError(f"{op}: chunk must be an int or None, got {type(chunk).__name__}")
    if chunk < 1:
        raise ValueError(f"{op}: chunk must be at least 1, got {chunk}")
    return min(chunk, N)


def _check_direction(op: str, direction: Tensor, x: Tensor) -> None:
    check_tensor(op, "direction", direction)
    if not direction.is_floating_point():
        raise TypeError(f"{op}: direction must be floating point, got {type_name(direction.dtype)}")
    if direction.shape != x.shape[1:]:
        raise ValueError(f"{op}: direction must be [D={x.shape[1]}], got {list(direction.shape)}")
    if direction.device != x.device:
        raise ValueError(f"{op}: direction must be on {x.device} like x, got {direction.device}")


def _check_rows(op: str, x: Tensor, y: Tensor) -> None:
    for name, side in (("x", x), ("y", y)):
        empty = (side == 0).all(1)
        if empty.any():
            row = int(empty.int().argmax())
            raise ValueError(f"{op}: row {row} of {name} is zero, which cannot be normalised")


def _no_direction(direction: Tensor | None) -> str:
    if direction is None:
        return (
            "the unit rows of x and y have the same mean, so that there is no gap to shift along; "
            "pass a direction"
        )
    return "direction must not be zero, which has no unit vector"
