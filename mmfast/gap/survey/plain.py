"""Frozen dataclasses of numbers, words and tensors as what JSON can hold, and back."""

import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from torch import Tensor


def to_plain(x: Any) -> Any:
    """Dicts, lists, numbers and words; what is NaN or infinite becomes None."""
    if is_dataclass(x):
        return {field.name: to_plain(getattr(x, field.name)) for field in fields(x)}
    if isinstance(x, Tensor):
        return to_plain(x.tolist())
    if isinstance(x, dict):
        return {str(key): to_plain(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [to_plain(value) for value in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def from_plain(kind: Any, x: Any) -> Any:
    """What `to_plain` made of a `kind`: tensors are float64 or int64, None for a float is NaN."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return None if x is None else from_plain(kind, x)
    if kind is float:
        return math.nan if x is None else float(x)
    if kind is Tensor:
        return _tensor(x)
    origin = get_origin(kind) or kind
    if is_dataclass(origin):
        assert isinstance(origin, type)
        # Ways[float] says of its fields what its letter stands for
        letters = dict(zip(getattr(origin, "__parameters__", ()), get_args(kind), strict=True))
        hints = get_type_hints(origin)
        return origin(**{name: from_plain(letters.get(hints[name], hints[name]), value)
                         for name, value in x.items()})  # fmt: skip
    if origin is tuple:
        kinds = get_args(kind)
        if kinds[-1] is ...:
            return tuple(from_plain(kinds[0], value) for value in x)
        return tuple(from_plain(k, value) for k, value in zip(kinds, x, strict=True))
    if origin is dict and get_args(kind)[0] is int:
        return {int(key): from_plain(get_args(kind)[1], value) for key, value in x.items()}
    return x


def _tensor(x: Any) -> Tensor:
    numbers = np.array(_numbers(x))
    return torch.from_numpy(numbers if numbers.dtype == np.int64 else numbers.astype(np.float64))


def _numbers(x: Any) -> Any:
    if isinstance(x, list):
        return [_numbers(value) for value in x]
    return math.nan if x is None else x
