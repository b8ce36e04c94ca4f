"""m3-Mix: the symmetric contrastive loss and every mix of `mmfast.losses.mixup`, weighted.

    loss = clip + w(e) * (w_v V-Mix + w_l L-Mix + w_vl VL-Mix + w_m2 m2-Mix)

each mix with a lam of its own, drawn once a batch.

Source: Oh et al., Geodesic Multi-Modal Mixup for Robust Fine-Tuning, NeurIPS 2023
(arXiv 2203.03897), and its code, github.com/changdaeoh/multimodal-mixup.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from mmfast.losses._terms import Reduction, SameId, check_batch, check_number, reduce
from mmfast.losses.clip import clip_loss
from mmfast.losses.mixup import l_mix_loss, m2_mix_loss, v_mix_loss, vl_mix_loss
from mmfast.ops._inputs import as_scale

MIXES = {"v": v_mix_loss, "l": l_mix_loss, "vl": vl_mix_loss}
# of the published scripts for m3-Mix, which vary in the weight of "vl"
WEIGHTS = {"v": 0.05, "l": 0.05, "vl": 0.1, "m2": 0.01}
ALPHAS = {"v": 0.5, "l": 0.5, "vl": 0.5, "m2": 0.2}
M2_LOGIT_SCALE = 1 / 0.07


def m3_mix_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    m2_logit_scale: float | Tensor = M2_LOGIT_SCALE,
    weights: Mapping[str, float] | None = None,
    alphas: Mapping[str, float] | None = None,
    epoch: int | None = None,
    original_neg: bool = False,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """clip_loss + w(e) * (weighted V-Mix, L-Mix, VL-Mix and m2-Mix), each with a lam of its own.

    Args:
        image, text, reduction, backend: as in `m2_mix_loss`.
        group: only None for now, as in `v_mix_loss`.
        logit_scale: of all terms but m2-Mix.
        m2_logit_scale: of m2-Mix; 1 / 0.07 in the published scripts.
        weights: by kind, of "v", "l", "vl", "m2"; a kind that is missing or 0 is not computed.
            None takes those of the published scripts, WEIGHTS of this file.
        alphas: by kind: lam ~ Beta(alpha, alpha), one draw a call for each kind that is computed,
            in the order above. Kinds that are missing have those of the scripts, ALPHAS.
        epoch: from 0; w(e) = 1 / (epoch + 1). None is the published run without a schedule, w = 1.
        original_neg: of V-Mix, L-Mix and VL-Mix, as in `v_mix_loss`.
        ids: int64 [B], by default the row number; rows with equal ids are duplicates, in
            `clip_loss` by `same_id`, elsewhere as in `v_mix_loss` and `m2_mix_loss`.
        same_id: "exclude" or "positive", as in `clip_loss`.
        generator: what lam is drawn from, by default torch's own. Give one of equal seed to all
            processes that share a batch.

    Returns, Raises: as in `m2_mix_loss`.
    """
    who = "m3_mix_loss"
    image, text, scale = check_batch(who, image, text, logit_scale, ids, reduction, group, same_id)
    m2_scale = as_scale(who, image, m2_logit_scale, "m2_logit_scale")
    weights = WEIGHTS if weights is None else _by_kind(who, "weights", weights)
    alphas = ALPHAS if alphas is None else ALPHAS | _by_kind(who, "alphas", alphas)
    schedule = _schedule(who, epoch)
    options: dict[str, Any] = {"ids": ids, "reduction": "none", "backend": backend}
    loss = clip_loss(image, text, scale, same_id=same_id, **options)
    kinds = [kind for kind in ALPHAS if weights.get(kind, 0.0) > 0.0]
    lams = _draw([alphas[kind] for kind in kinds], image, generator)
    for kind, lam in zip(kinds, lams, strict=True):
        if kind == "m2":
            term = m2_mix_loss(image, text, m2_scale, lam, **options)
        else:
            mix = MIXES[kind]
            term = mix(image, text, scale, lam, original_neg=original_neg, **options)
        loss = loss + schedule * weights[kind] * term
    return reduce(loss, reduction)


def _by_kind(who: str, name: str, given: Mapping[str, float]) -> dict[str, float]:
    for kind, value in given.items():
        if kind not in ALPHAS:
            raise ValueError(f"{who}: {name} must be of 'v', 'l', 'vl' and 'm2', got {kind!r}")
        check_number(who, f"{name}[{kind!r}]", value, positive=name == "alphas")
    return dict(given)


def _schedule(who: str, epoch: int | None) -> float:
    if epoch is None:
        return 1.0
    if not isinstance(epoch, int) or epoch < 0:
        raise ValueError(f"{who}: epoch must be None or a number from 0, got {epoch!r}")
    return 1 / (epoch + 1)


def _draw(alphas: list[float], x: Tensor, generator: torch.Generator | None) -> list[Tensor]:
    """lam ~ Beta(alpha, alpha) for each, float32 tensors of no dimension."""
    device = x.device if generator is None else generator.device
    both = torch.tensor(alphas, dtype=torch.float32, device=device).reshape(-1, 1).expand(-1, 2)
    # what torch.distributions.Beta calls too; only here it takes a generator. All in one call:
    # torch.compile takes two calls with equal arguments for one
    return list(torch._sample_dirichlet(both, generator)[:, 0].unbind())


class M3MixLoss(nn.Module):
    """`m3_mix_loss` called as open_clip's ClipLoss is.

    Args:
        m2_logit_scale, weights, alphas, original_neg, generator: as in `m3_mix_loss`.

    Attributes:
        epoch: the trainer's, from 0, for the schedule; None, as at the start, is no schedule.
    """

    def __init__(
        self,
        *,
        m2_logit_scale: float = M2_LOGIT_SCALE,
        weights: Mapping[str, float] | None = None,
        alphas: Mapping[str, float] | None = None,
        original_neg: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.options = {
            "m2_logit_scale": m2_logit_scale,
            "weights": weights,
            "alphas": alphas,
            "original_neg": original_neg,
            "generator": generator,
        }
        self.epoch: int | None = None

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit rows image_features, text_features [B, D], the mean of the batch.

        With output_dict=True the result is {"contrastive_loss": loss}.
        """
        options: dict[str, Any] = {**self.options, "epoch": self.epoch}
        loss = m3_mix_loss(image_features, text_features, logit_scale, **options)
        return {"contrastive_loss": loss} if output_dict else loss


class M2MixLoss(M3MixLoss):
    """clip_loss + weight * m2_mix_loss, lam ~ Beta(alpha, alpha); called as M3MixLoss is.

    Defaults are those of a published script, which vary in weight from 0.001 to 0.05.
    """

    def __init__(
        self,
        *,
        weight: float = 0.01,
        alpha: float = 0.5,
        m2_logit_scale: float = M2_LOGIT_SCALE,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            m2_logit_scale=m2_logit_scale,
            weights={"m2": weight},
            alphas={"m2": alpha},
            generator=generator,
        )
