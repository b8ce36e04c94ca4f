"""What every op asks of its arguments: checks in the user's names, and casts as torch does them.

Shapes, types, devices and Python numbers are checked; values inside tensors are not, so that
nothing here waits for a device. All of it traces under `torch.compile(fullgraph=True)`.
"""

import math
import numbers
from typing import Any

import torch
from torch import Tensor

# what scores and their sums are held in, by the type of the inputs
SCORE_TYPE = {
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}


def type_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def check_tensor(op: str, name: str, x: object) -> None:
    """TypeError unless `x` is a tensor."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(x).__name__}")


def cast_as_matmul(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """`q` and `k` as `q @ k.T` would take them: in the autocast type where autocast is on."""
    if not torch.is_autocast_enabled(q.device.type):
        return q, k
    dtype = torch.get_autocast_dtype(q.device.type)
    # float64 is left alone, as torch leaves it
    if q.dtype in SCORE_TYPE and q.dtype != torch.float64:
        q = q.to(dtype)
    if k.dtype in SCORE_TYPE and k.dtype != torch.float64:
        k = k.to(dtype)
    return q, k


def dense(x: Tensor) -> Tensor:
    """`x` as DLPack takes it: without a graph, elements of a row side by side, rows anywhere."""
    x = x.detach()
    return x if x.stride(1) == 1 else x.contiguous()


def check_matrix(op: str, name: str, x: Tensor, letters: str) -> None:
    """2-D, of a floating type, no empty side; `letters` are its sides in the message."""
    if x.dim() != 2:
        raise ValueError(f"{op}: {name} must be 2-D [{letters}], got {list(x.shape)}")
    if x.dtype not in SCORE_TYPE:
        raise TypeError(
            f"{op}: {name} must be float32, float64, bfloat16 or float16, got {type_name(x.dtype)}"
        )
    if x.shape[0] == 0 or x.shape[1] == 0:
        raise ValueError(f"{op}: {name} must have no empty side, got {list(x.shape)}")


def check_alike(op: str, name: str, x: Tensor, like: str, y: Tensor) -> None:
    """`x` has the type and the device of `y`, which the message calls `like`."""
    if x.dtype != y.dtype:
        raise TypeError(
            f"{op}: {name} must be {type_name(y.dtype)} like {like}, got {type_name(x.dtype)}"
        )
    if x.device != y.device:
        raise ValueError(f"{op}: {name} must be on {y.device} like {like}, got {x.device}")


def check_pair(op: str, q: Tensor, k: Tensor) -> None:
    """`q` [N, D] and `k` [M, D]: one floating type, one device, no empty side."""
    for name, x in (("q", q), ("k", k)):
        check_matrix(op, name, x, "rows, D")
    if q.shape[1] != k.shape[1]:
        raise ValueError(f"{op}: k must have D={q.shape[1]} columns like q, got {k.shape[1]}")
    check_alike(op, "k", k, "q", q)


def check_ids(op: str, q: Tensor, k: Tensor, q_ids: Tensor | None, k_ids: Tensor | None) -> None:
    """Both or neither; int64 [N] and [M] on the device of `q`."""
    if q_ids is None and k_ids is None:
        return
    for name, ids, letter, rows in (
        ("q_ids", q_ids, "N", q.shape[0]),
        ("k_ids", k_ids, "M", k.shape[0]),
    ):
        if ids is None:
            raise ValueError(f"{op}: q_ids and k_ids must be given together, got no {name}")
        check_tensor(op, name, ids)
        if ids.dtype != torch.int64:
            raise TypeError(f"{op}: {name} must be int64, got {type_name(ids.dtype)}")
        if ids.shape != (rows,):
            raise ValueError(f"{op}: {name} must be [{letter}={rows}], got {list(ids.shape)}")
        if ids.device != q.device:
            raise ValueError(f"{op}: {name} must be on {q.device} like q, got {ids.device}")


def check_mask(op: str, q: Tensor, k: Tensor, mask: Tensor | None) -> None:
    """bool [N, M] on the device of `q`, or None."""
    if mask is None:
        return
    check_tensor(op, "mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"{op}: mask must be bool, got {type_name(mask.dtype)}")
    if mask.shape != (q.shape[0], k.shape[0]):
        raise ValueError(
            f"{op}: mask must be [N={q.shape[0]}, M={k.shape[0]}], got {list(mask.shape)}"
        )
    if mask.device != q.device:
        raise ValueError(f"{op}: mask must be on {q.device} like q, got {mask.device}")


def as_scale(op: str, q: Tensor, scale: float | Tensor, name: str = "scale") -> Tensor:
    """`scale` as a 0-dim tensor; a Python number becomes float64, which rounds nothing away."""
    if isinstance(scale, Tensor):
        if not scale.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {type_name(scale.dtype)}")
        if scale.numel() != 1:
            raise ValueError(f"{op}: {name} must have one element, got {list(scale.shape)}")
        # torch lets a 0-dim CPU tensor meet any device; the other way round would wait for it
        if scale.device != q.device and scale.device.type != "cpu":
            raise ValueError(f"{op}: {name} must be on {q.device} like q, got {scale.device}")
        return scale if scale.dim() == 0 else scale.reshape(())
    return torch.tensor(as_number(op, name, scale), dtype=torch.float64)


def as_number(op: str, name: str, x: Any) -> float:
    """A finite Python number as a float; the message says that a tensor would do, too."""
    if isinstance(x, bool) or not isinstance(x, (float, int, numbers.Real)):
        raise TypeError(f"{op}: {name} must be a number or a tensor, got {type(x).__name__}")
    value = float(x)
    # not isfinite: torch.compile turns a float that changes into a symbol, which this can take
    if not -math.inf < value < math.inf:
        raise ValueError(f"{op}: {name} must be finite, got {x}")
    return value
