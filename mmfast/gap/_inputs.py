"""What every measure asks of its arguments: rows as tensors, ids, and full precision."""

import functools
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.losses._terms import check_ids, check_rows, widen

P = ParamSpec("P")
T = TypeVar("T")


def full_precision(measure: Callable[P, T]) -> Callable[P, T]:
    """`measure` outside of autocast, which would round its products."""

    @functools.wraps(measure)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with ExitStack() as stack:
            for device in ("cpu", "cuda"):
                if torch.is_autocast_enabled(device):
                    stack.enter_context(torch.autocast(device, enabled=False))
            return measure(*args, **kwargs)

    return run


def as_tensor(who: str, name: str, x: Any) -> Tensor:
    """A tensor as it is, a numpy array or memmap without a copy; TypeError for anything else."""
    if isinstance(x, Tensor):
        return x
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{who}: {name} must be a tensor or a numpy array, got {type(x).__name__}")
    with warnings.catch_warnings():
        # measures only read: a read-only memmap may be shared
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(x)


def as_rows(
    who: str, normalize: bool, *, paired: bool = False, least: int = 1, **sides: Any
) -> list[Tensor]:
    """The arguments `sides`, by name, as rows in float32, or float64 where they are float64.

    Rows become unit rows if `normalize`; one of zeros stays as it is.

    Args:
        paired: all sides have one shape, not just one width.
        least: how many rows there must be.

    Raises:
        TypeError: no tensor or array; no floating type; the types of the sides differ.
        ValueError: not 2-D, too few rows, a shape or device unlike that of the first side.
    """
    made: list[Tensor] = []
    like: tuple[str, Tensor] | None = None
    for name, side in sides.items():
        x = as_tensor(who, name, side)
        sizes: tuple[int | str, int | str] = ("N", "D")
        if like is not None:
            sizes = (like[1].shape[0] if paired else "M", like[1].shape[1])
        check_rows(who, name, x, sizes, like)
        if len(x) < least:
            raise ValueError(f"{who}: {name} must have {least} rows or more, got {len(x)}")
        like = like or (name, x)
        made.append(F.normalize(widen(x), dim=1) if normalize else widen(x))
    return made


def as_ids(who: str, name: str, ids: Any, like: tuple[str, Tensor]) -> Tensor:
    """`ids`, integers of any width, as int64 [N], one for each row of `like`."""
    made = as_tensor(who, name, ids)
    if not (made.is_floating_point() or made.dtype == torch.bool):
        made = made.long()
    check_ids(who, made, like, name)
    return made
