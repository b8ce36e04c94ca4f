"""Debiased contrastive learning with hard negatives, a baseline for losses that mix.

Negatives weigh by their own hardness, and the share of them that are positives is taken out. With
e_ij = exp(s_ij), n_i the number of negatives of row i and <.> the mean over them,

    r_i = n_i <e_ij^(1 + beta)> / <e_ij^beta>          the negatives, reweighted
    N_i = (r_i - tau_plus n_i e_ii) / (1 - tau_plus)   less their share of positives
    loss_i = -log( e_ii / (e_ii + N_i) )

Both means are sums over a row, so r_i is two sweeps: at scales 1 + beta and beta.

Source: Robinson et al., Contrastive Learning with Hard Negative Samples, ICLR 2021, and its code,
github.com/joshr17/HCL. Also the baseline of Oh et al., Geodesic Multi-Modal Mixup, NeurIPS 2023
(`version="mixup"`).
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor

from mmfast.losses._terms import (
    Reduction,
    check_batch,
    check_share,
    group_sums,
    ids_or_rows,
    reduce,
    row_scores,
    softplus,
)
from mmfast.ops._inputs import as_scale
from mmfast.ops.pairwise_lse import pairwise_lse


def hcl_loss(
    image: Tensor,
    text: Tensor,
    *,
    logit_scale: float | Tensor = 2.0,
    tau_plus: float = 0.1,
    beta: float | Tensor = 1.0,
    version: Literal["hcl", "mixup"] = "hcl",
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The loss above, of images against texts; swap the two for the other direction.

    A row without negatives has loss 0 and gradient 0.

    Args:
        image, text: unit rows [B, D] of one dtype (float32, float64, bfloat16, float16) and
            device; row i of one belongs to row i of the other. Not normalised here.
        logit_scale: multiplies the products: a number or a differentiable tensor of one element,
            whose value is not checked.
        tau_plus: the share of negatives, in [0, 1), that are expected to be positives.
        beta: how much harder negatives weigh more; 0 weighs all alike.
        version: "hcl" keeps N_i at n_i exp(-logit_scale) or more, its least for unit rows.
            "mixup" is what the code of Oh et al. computes: no such floor, so NaN where the
            correction outweighs the rest, and B in place of n_i in the correction.
        ids: int64 [B], by default the row number. Rows with equal ids are duplicates and left out
            of each other's negatives.
        reduction: "mean", "sum" or "none", over the B rows.
        group: a process group; only None for now.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [B] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "hcl_loss"
    if version not in ("hcl", "mixup"):
        raise ValueError(f"{who}: version must be 'hcl' or 'mixup', got {version!r}")
    image, text, scale = check_batch(who, image, text, logit_scale, ids, reduction, group)
    check_share(who, "tau_plus", tau_plus)
    beta = as_scale(who, image, beta, "beta")

    positive = row_scores(image, text, scale)
    left_out = ids_or_rows(ids, image)
    hard, weight = (
        pairwise_lse(image, text, scale * b, q_ids=left_out, k_ids=left_out, backend=backend)
        for b in (1 + beta, beta)
    )
    n = len(image) - group_sums(positive.unsqueeze(1), left_out)[1].squeeze(1)
    alone = n == 0
    n = n.masked_fill(alone, 1.0)
    # log(r_i / e_ii)
    ratio = (hard - weight).masked_fill(alone, 0.0) + n.log() - positive
    if version == "mixup":
        loss = torch.log1p((ratio.exp() - tau_plus * len(image)) / (1 - tau_plus))
    else:
        floor = n.log() - scale - positive
        loss = softplus(torch.maximum(_debiased(ratio, tau_plus * n, tau_plus), floor))
    return reduce(loss.masked_fill(alone, 0.0), reduction)


def _debiased(ratio: Tensor, correction: Tensor, tau_plus: float) -> Tensor:
    """log( (exp(ratio) - correction) / (1 - tau_plus) ), -inf where nothing is left."""
    # from 0 on nothing is left: the bound keeps the derivative finite there
    rest = -torch.expm1((correction.log() - ratio).clamp(max=1.0))
    some = rest > 0
    log_rest = torch.where(some, rest, 1.0).log() - math.log1p(-tau_plus)
    return torch.where(some, ratio + log_rest, -math.inf)
