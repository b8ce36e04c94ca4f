"""The losses people use today, in one signature: (image [B, D], text [B, D], scale) -> scalar.

`scale` is a 0-dim float32 tensor that learns, as in CLIP; features and logits stay in the
features' dtype. FLOPs are counted as what the task needs (`products`), not what a peer spends.

Peers that need a card and their own package are in `CARD_PEERS`, with what sets each apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from bench.measure import Unavailable

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
SCALE = 1 / 0.07  # where CLIP's training starts


def products(count: int, n: int, d: int, m: int | None = None) -> int:
    """Flop of `count` products of an [n, d] with a [d, m] matrix; m is n if not given."""
    return count * 2 * n * (n if m is None else m) * d


def features(
    n: int, d: int, dtype: str, grad: bool = True, device: str = "cpu"
) -> tuple[Tensor, Tensor, Tensor]:
    """Image and text rows of unit length, somewhat alike in pairs, and the scale; random."""
    generator = torch.Generator(device).manual_seed(0)
    image, noise = (torch.randn(n, d, generator=generator, device=device) for _ in range(2))
    image, text = F.normalize(image, dim=1), F.normalize(image + 2 * noise, dim=1)
    kind = getattr(torch, dtype)
    scale = torch.tensor(SCALE, device=device)
    image, text = image.to(kind), text.to(kind)
    return image.requires_grad_(grad), text.requires_grad_(grad), scale.requires_grad_(grad)


def dense(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """open_clip's form: each direction multiplies anew."""
    target = torch.arange(len(image), device=image.device)
    rows = F.cross_entropy(scale * image @ text.T, target)
    columns = F.cross_entropy(scale * text @ image.T, target)
    return (rows + columns) / 2


def dense_one_product(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """The second direction reads the transpose of the first one's logits."""
    target = torch.arange(len(image), device=image.device)
    logits = scale * image @ text.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def torch_chunked(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """torch's loss that never holds all logits, once per direction; the scale rides on the rows."""
    target = torch.arange(len(image), device=image.device)
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


@dataclass(frozen=True)
class CardPeer:
    """A loss from a package of its own that runs on a card.

    differs: in what it is not the loss of the others, for the table; empty if in nothing.
    definition: the loss it computes, in plain torch.
    learns_scale: False where its temperature is a number and gets no gradient.
    tf32: its float32 products are TF32.
    """

    package: str
    module: str
    adapt: Callable[[], Loss]
    definition: Loss = dense
    differs: str = ""
    learns_scale: bool = True
    tf32: bool = False

    def load(self) -> Loss | Unavailable:
        """The loss, or why it cannot be had here."""
        try:
            import_module(self.module)
            return self.adapt()
        except ModuleNotFoundError as error:
            return Unavailable(f"{error.name} is not installed (pip install {self.package})")
        # a package made for other versions may fail in any way; its first line is the reason
        except Exception as error:
            return Unavailable(f"{self.package} does not import: {first_line(error)}")

    @property
    def label(self) -> str:
        """The package, its version where it is installed, and what sets it apart."""
        try:
            version = " " + metadata.version(self.package)
        except metadata.PackageNotFoundError:
            version = ""
        return f"{self.package}{version}" + (f" ({self.differs})" if self.differs else "")


SIGMOID_BIAS = -10.0  # where SigLIP's training starts


def sigmoid(
    image: Tensor, text: Tensor, scale: Tensor, bias: float | Tensor = SIGMOID_BIAS
) -> Tensor:
    """SigLIP's loss: one term a pair, no sum over rows."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=logits.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def _memeff() -> Loss:
    from memeff import MemoryEfficientCLIPLoss

    # stable=True, its default, would return other gradients than the loss's
    loss = MemoryEfficientCLIPLoss(1 / SCALE, normalized_inputs=True, stable=False)
    return lambda image, text, scale: loss(image, text)


def _inf_cl() -> Loss:
    from inf_cl import cal_flash_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        rows = cal_flash_loss(image, text, scale=scale).mean()
        return (rows + cal_flash_loss(text, image, scale=scale).mean()) / 2

    return loss


def _siglip_kernel() -> Loss:
    from siglip_kernel import fused_siglip_loss

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        bias = torch.full_like(scale, SIGMOID_BIAS)
        return fused_siglip_loss(image, text, scale.log(), bias)

    return loss


CARD_PEERS = {
    "memeff": CardPeer("memeff", "memeff", _memeff, differs="fixed temperature, float32 as TF32",
                       learns_scale=False, tf32=True),
    "inf-cl": CardPeer("inf-cl", "inf_cl", _inf_cl, differs="always TF32", tf32=True),
    "siglip-kernel": CardPeer("siglip-kernel", "siglip_kernel", _siglip_kernel,
                              definition=sigmoid, differs="sigmoid loss"),
}  # fmt: skip


def compiled_dense(n: int, d: int, dtype: str, device: str = "cpu") -> Loss | Unavailable:
    """torch.compile of `dense`, compiled and warmed for these sizes."""
    loss = torch.compile(dense, dynamic=False)
    try:
        value_and_grads(loss, *features(n, d, dtype, device=device))
    except torch.OutOfMemoryError:
        return Unavailable("out of memory")
    # a compiler that fails may raise anything; its first line is the reason in the table
    except Exception as error:
        return Unavailable(f"torch.compile failed: {first_line(error)}")
    return loss


def first_line(error: BaseException) -> str:
    """What fits a table of an error's text; its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def value_and_grads(loss: Callable[..., Tensor], *inputs: Any) -> tuple[Tensor, ...]:
    """Forward and backward; the value and the gradients of those inputs that ask for one."""
    value = loss(*inputs)
    asked = [t for t in inputs if isinstance(t, Tensor) and t.requires_grad]
    return (value, *torch.autograd.grad(value, asked))
