"""What losses with a momentum encoder share: the slow copy, how it follows, and the queue of keys.

Source: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
"""

import copy
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AnyModule = TypeVar("AnyModule", bound=nn.Module)


def slow_copy(fast: AnyModule) -> AnyModule:
    """A deep copy of `fast` that no gradient reaches."""
    return copy.deepcopy(fast).requires_grad_(False)


@torch.no_grad()
def follow(slow: nn.Module, fast: nn.Module, momentum: float) -> None:
    """slow <- momentum * slow + (1 - momentum) * fast, for parameters, in place.

    Buffers, such as running statistics, stay each module's own. Keep parameters in float32:
    bfloat16 has no room for 1 - momentum.
    """
    for a, b in zip(slow.parameters(), fast.parameters(), strict=True):
        a.lerp_(b, 1 - momentum)


def random_keys(size: int, width: int) -> Tensor:
    """Random unit rows [size, width], which a queue of keys starts from."""
    return F.normalize(torch.randn(size, width), dim=1)


def check_size(who: str, name: str, size: Any) -> None:
    """Raises unless `size` is an int from 1."""
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"{who}: {name} must be a number from 1, got {size!r}")


class KeyQueue(nn.Module):
    """The last keys, first in first out, as buffers: a state_dict resumes them exactly.

    Args:
        rows: [size, ...], what it holds at first.

    Attributes:
        rows: [size, ...], the keys.
        pointer: int64, where the next key goes.
    """

    rows: Tensor
    pointer: Tensor

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.register_buffer("rows", rows)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))

    def snapshot(self, like: Tensor) -> Tensor:
        """The rows in the dtype of `like`, a copy: a backward pass needs them as they were."""
        return self.rows.to(like.dtype, copy=True)

    @torch.no_grad()
    def push(self, keys: Tensor) -> None:
        """Overwrite the oldest rows by `keys` [B, ...]; any B, also one that wraps around."""
        size = len(self.rows)
        places = (self.pointer + torch.arange(len(keys), device=keys.device)) % size
        # of more keys than there is room for, the last stay
        self.rows.index_copy_(0, places[-size:], keys[-size:].to(self.rows.dtype))
        self.pointer.add_(len(keys)).remainder_(size)
