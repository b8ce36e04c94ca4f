"""The losses people use today, in one signature: (image [B, D], text [B, D], scale) -> scalar.

`scale` is a 0-dim float32 tensor that learns, as in CLIP; features and logits stay in the
features' dtype. FLOPs are counted as what the task needs (`products`), not what a peer spends.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from bench.measure import Unavailable

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = 1 / 0.07  # where CLIP's training starts


def products(count: int, n: int, d: int) -> int:
    """Flop of `count` products of an [n, d] with a [d, n] matrix."""
    return count * 2 * n * n * d


def features(n: int, d: int, dtype: str, grad: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text rows of unit length, somewhat alike in pairs, and the scale; random."""
    generator = torch.Generator().manual_seed(0)
    image, noise = (torch.randn(n, d, generator=generator) for _ in range(2))
    image, text = F.normalize(image, dim=1), F.normalize(image + 2 * noise, dim=1)
    kind = getattr(torch, dtype)
    scale = torch.tensor(SCALE)
    image, text = image.to(kind), text.to(kind)
    return image.requires_grad_(grad), text.requires_grad_(grad), scale.requires_grad_(grad)


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's form: each direction multiplies anew."""
    target = torch.arange(len(image))
    rows = F.cross_entropy(scale * image @ text.T, target)
    columns = F.cross_entropy(scale * text @ image.T, target)
    return (rows + columns) / 2


def dense_one_product(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The second direction reads the transpose of the first one's logits."""
    target = torch.arange(len(image))
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def torch_chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """torch's loss that never holds all logits, once per direction; the scale rides on the rows."""
    target = torch.arange(len(image))
    options = torch.nn.LinearCrossEntropyOptions()
    rows = F.linear_cross_entropy(scale * image, text, target, options=options)
    columns = F.linear_cross_entropy(scale * text, image, target, options=options)
    return (rows + columns) / 2


def fused(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    return mmfast.clip_loss(image, text, scale)


LOSSES: dict[str, Loss] = {
    "dense": dense,
    "dense, one product": dense_one_product,
    "mmfast": fused,
}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    LOSSES["torch chunked"] = torch_chunked


def find(name: str) -> Loss | Unavailable:
    """The loss of that name, or why there is none here."""
    if name == "torch chunked" and name not in LOSSES:
        return Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")
    return LOSSES[name]


def compiled_dense(n: int, d: int, dtype: str) -> Loss | Unavailable:
    """torch.compile of `dense`, compiled and warmed for these sizes."""
    loss = torch.compile(dense, dynamic=False)
    try:
        value_and_grads(loss, *features(n, d, dtype))
    # a compiler that fails may raise anything; its first line is the reason in the table
    except Exception as error:
        return Unavailable(f"torch.compile failed: {str(error).strip().splitlines()[0]}")
    return loss


def value_and_grads(loss: Loss, image: Tensor, text: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
    """Forward and backward; the value and the gradients of those inputs that ask for one."""
    value = loss(image, text, scale)
    asked = [t for t in (image, text, scale) if t.requires_grad]
    return (value, *torch.autograd.grad(value, asked))
