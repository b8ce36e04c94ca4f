"""Finite discrete tokens: image and text described by one codebook, and their contrast.

A query map takes the tokens of each modality, patches or words, to the width of the codebook;
`fdt_pool` says how much of each code a sample holds, and describes it by that mixture of codes:

    FDT.encode_image(patches)      -> features [B, D], weights [B, C]
    FDT.encode_text(words, valid)  -> features [B, D], weights [B, C]
    fdt_loss(image, text, log_scale)

Source: Chen et al., Revisiting Multimodal Representation in Contrastive Learning: From Patch and
Token Embeddings to Finite Discrete Tokens, CVPR 2023, and its code,
github.com/yuxiaochen1103/FDT, which differs from the paper in that padded tokens get the score 0,
not -inf. `padded_score` chooses; `FDT.from_published` takes 0.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.losses._momentum import check_size
from mmfast.losses._terms import Reduction, SameId, check_batch, check_number, widen
from mmfast.losses.clip import clip_loss
from mmfast.ops._inputs import as_scale
from mmfast.ops.fdt_pool import fdt_pool

# features and weights of a batch: [B, D], [B, C]
Pooled = tuple[Tensor, Tensor]

# published name -> ours; q_map is a Sequential whose GELU has no parameters
_QUERY_MAPS = {"img_query_model.q_map": "image_query", "txt_query_model.q_map": "text_query"}
_PUBLISHED = {"space_dict": "codebook"} | {
    f"{theirs}.{layer}.{kind}": f"{ours}.{layer}.{kind}"
    for theirs, ours in _QUERY_MAPS.items()
    for layer in (0, 1, 3, 4)
    for kind in ("weight", "bias")
}
# what the published model holds beside: the towers, and two scales of which one is never used
_NOT_OURS = ("visual.", "encode_text.", "logit_scale")


def query_map(token_dim: int, dim: int) -> nn.Sequential:
    """From tokens [..., token_dim] to queries [..., dim], the layers and order as published."""
    return nn.Sequential(
        nn.LayerNorm(token_dim),
        nn.Linear(token_dim, dim),
        nn.GELU(),
        nn.LayerNorm(dim),
        nn.Linear(dim, dim),
    )


def fdt_temperature(
    step: int,
    *,
    first: float = 1000.0,
    decay: float = 1.0,
    every: int = 2700,
    least: float = 0.01,
) -> float:
    """The temperature of a training step: first * decay^(step // every), `least` at the least.

    The published trainer sets it once every 2700 steps, an epoch of its data, and keeps it in
    between. The defaults are those of its configuration, where decay = 1 leaves it at 1000 (a
    commented-out default is 0.3). Its evaluation takes step / every without rounding down, which
    is the same where a checkpoint was saved at a multiple.

    Args:
        step: steps taken, from 0.
        first: the temperature before step `every`.
        decay: its factor, once in `every` steps; in (0, 1].
        every: a number of steps.
        least: the smallest temperature; at most `first`.

    Raises:
        ValueError, TypeError: a number that does not fit.
    """
    who = "fdt_temperature"
    check_number(who, "step", step)
    check_size(who, "every", every)
    for name, x in (("first", first), ("decay", decay), ("least", least)):
        check_number(who, name, x, positive=True)
    if decay > 1:
        raise ValueError(f"{who}: decay must be in (0, 1], got {decay}")
    if least > first:
        raise ValueError(f"{who}: least must be at most first={first}, got {least}")
    return max(first * decay ** (step // every), least)


class FDT(nn.Module):
    """One codebook for two modalities, and a query map for each.

        fdt = FDT(image_dim=768, text_dim=512)
        (image, image_weights), (text, text_weights) = fdt(patches, words, text_mask=valid)
        loss = fdt_loss(image, text, log_scale)
        fdt.temperature = fdt_temperature(step, decay=0.3)

    The codebook is key and value, drawn from a standard normal, never projected or normalised.
    Published image tokens are the patches of the last layer, without the class token and its
    norm; text tokens those after the last norm, start and end included.

    Args:
        image_dim, text_dim: widths of the tokens.
        codes: C, the number of codes.
        dim: D, the width of a code.
        temperature: divides the scores; an attribute to be set between steps, which the
            state_dict holds. At the published 1000 nearly every code fires in every sample; near 1
            a few of them do.
        pool, normalize, padded_score, backend: as in `fdt_pool`.

    Raises:
        ValueError, TypeError: a number that does not fit.
    """

    def __init__(
        self,
        image_dim: int,
        text_dim: int,
        codes: int = 16384,
        dim: int = 512,
        *,
        temperature: float = 1000.0,
        pool: str = "max",
        normalize: str = "sparsemax",
        padded_score: float = -math.inf,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        sizes = {"image_dim": image_dim, "text_dim": text_dim, "codes": codes, "dim": dim}
        for name, size in sizes.items():
            check_size("FDT", name, size)
        check_number("FDT", "temperature", temperature, positive=True)
        self.codebook = nn.Parameter(torch.randn(codes, dim))
        self.image_query = query_map(image_dim, dim)
        self.text_query = query_map(text_dim, dim)
        self.image_dim = image_dim
        self.text_dim = text_dim
        self.temperature = temperature
        self.pool = pool
        self.normalize = normalize
        self.padded_score = padded_score
        self.backend = backend

    @classmethod
    def from_published(
        cls, state: Mapping[str, Tensor], *, temperature: float = 1000.0, **options: Any
    ) -> "FDT":
        """The FDT part of a published model, in the dtype and on the device of its codebook.

        Its towers and scales (`visual.*`, `encode_text.*`, `logit_scale`, `logit_scale_sd`) stay
        the caller's. Names may begin with `module.`, as DistributedDataParallel leaves them.

        Args:
            state: a state_dict of the published Clip_FDT: `torch.load(file)["model"]`.
            temperature: of the step that saved it, see `fdt_temperature`; no file holds it.
            options: further ones of FDT; padded_score is 0 unless given, as published.

        Raises:
            ValueError: a name too many or too few; a shape that does not fit.
        """
        named = {name.removeprefix("module."): x for name, x in state.items()}
        unknown = [n for n in named if n not in _PUBLISHED and not n.startswith(_NOT_OURS)]
        missing = [n for n in _PUBLISHED if n not in named]
        for what, names in (("unknown", unknown), ("missing", missing)):
            if names:
                raise ValueError(
                    "FDT.from_published: expected the state_dict of a published Clip_FDT "
                    f"(checkpoint['model']), got {what} names: {', '.join(names)}"
                )
        codes, dim = named["space_dict"].shape
        image_dim, text_dim = (len(named[f"{theirs}.0.weight"]) for theirs in _QUERY_MAPS)
        options = {"padded_score": 0.0} | options
        fdt = cls(image_dim, text_dim, codes, dim, temperature=temperature, **options)
        for theirs, ours in _PUBLISHED.items():
            x, place = named[theirs], fdt.get_parameter(ours)
            if x.shape != place.shape:
                raise ValueError(
                    f"FDT.from_published: {theirs} must be {list(place.shape)} beside its "
                    f"neighbours, got {list(x.shape)}"
                )
            # a copy: training must not write into the caller's dictionary
            place.data = x.detach().to(named["space_dict"]).clone()
        return fdt

    def encode_image(self, tokens: Tensor, mask: Tensor | None = None) -> Pooled:
        """Features [B, D] and weights [B, C] of tokens [B, N, image_dim].

        mask: bool [B, N], False where a token is padding. Nothing is normalised.
        """
        _check_tokens("image", tokens, self.image_dim)
        return self._pool(self.image_query(tokens), mask)

    def encode_text(self, tokens: Tensor, mask: Tensor | None = None) -> Pooled:
        """Features [B, D] and weights [B, C] of tokens [B, N, text_dim]; `mask` as above."""
        _check_tokens("text", tokens, self.text_dim)
        return self._pool(self.text_query(tokens), mask)

    def forward(
        self,
        image_tokens: Tensor,
        text_tokens: Tensor,
        *,
        image_mask: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> tuple[Pooled, Pooled]:
        """Both of the above."""
        image = self.encode_image(image_tokens, image_mask)
        return image, self.encode_text(text_tokens, text_mask)

    def _pool(self, queries: Tensor, mask: Tensor | None) -> Pooled:
        return fdt_pool(
            queries,
            self.codebook,
            self.temperature,
            mask=mask,
            pool=self.pool,
            normalize=self.normalize,
            padded_score=self.padded_score,
            backend=self.backend,
        )

    def get_extra_state(self) -> Tensor:
        """The temperature, for the state_dict; float64 rounds nothing away."""
        return torch.tensor(self.temperature, dtype=torch.float64)

    def set_extra_state(self, state: Tensor) -> None:
        """The temperature, from a state_dict."""
        self.temperature = state.item()

    def extra_repr(self) -> str:
        """What the print of the Module shows beside its parts."""
        codes, dim = self.codebook.shape
        return f"codes={codes}, dim={dim}, temperature={self.temperature:g}"


def _check_tokens(name: str, tokens: Tensor, width: int) -> None:
    if tokens.ndim != 3 or tokens.shape[2] != width:
        raise ValueError(f"FDT: {name} tokens must be [B, N, {width}], got {list(tokens.shape)}")


def fdt_loss(
    image: Tensor,
    text: Tensor,
    log_scale: float | Tensor,
    *,
    largest_scale: float = 100.0,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """`clip_loss` of raw features, with the published normalisation and cut of the scale.

    Rows are divided by their length + 1e-10. The scale is exp(log_scale), at most `largest_scale`;
    as published the cut is hidden from the gradient, which is that of the uncut exp and so reaches
    a parameter beyond the cut, too. (The published trainer also keeps log_scale within [3, 6], by
    a clamp of its data before and after each step, and starts it at log(1 / 0.07).)

    Args:
        image, text: [B, D] of one dtype (float32, float64, bfloat16, float16) and device.
        log_scale: the logarithm of what multiplies the products: a number or a differentiable
            tensor of one element, whose value is not checked.
        largest_scale: a positive number.
        ids, same_id, reduction, backend: as in `clip_loss`.

    Returns, Raises: as `clip_loss`.
    """
    who = "fdt_loss"
    check_number(who, "largest_scale", largest_scale, positive=True)
    # for its checks alone: autocast rounds products, not lengths
    check_batch(who, image, text, 1.0, ids, reduction, None, same_id)
    uncut = as_scale(who, image, log_scale, "log_scale").exp()
    # the difference of equals is exactly 0: it adds the gradient and nothing else
    scale = uncut.detach().clamp(max=largest_scale) + (uncut - uncut.detach())
    image, text = (
        (wide / (wide.norm(dim=1, keepdim=True) + 1e-10)).to(x.dtype)
        for x, wide in ((x, widen(x)) for x in (image, text))
    )
    options: dict[str, Any] = {"ids": ids, "same_id": same_id, "reduction": reduction}
    return clip_loss(image, text, scale, **options, backend=backend)
