"""Mixup on the sphere: negatives between the modalities, pairs between the samples.

With u, v the rows of image and text, m(a, b) = slerp(a, b, lam) and s(a, b) = logit_scale * <a, b>:

* m2-Mix: each negative v_j of u_i, and u_j of v_i, is replaced by m(u_j, v_j).
* V-Mix, L-Mix, VL-Mix: image, text or both are mixed with those of the partner i' = B - 1 - i, and
  the target follows: lam on i and 1 - lam on i'.

The targets of a pair i, i' are taken out of the sweep and put back one by one: with off_i the
log-sum-exp over the columns other than both, a cross-entropy of row i is

    lam * softplus(logaddexp(off_i, s_ii') - s_ii)
        + (1 - lam) * softplus(logaddexp(off_i, s_ii) - s_ii')

so a loss that is tiny, for lam next to 0 or 1, keeps its relative accuracy as clip_loss does.

Source: Oh et al., Geodesic Multi-Modal Mixup for Robust Fine-Tuning, NeurIPS 2023
(arXiv 2203.03897), and its code, github.com/changdaeoh/multimodal-mixup. The code is followed:
partners are a flip of the batch and not a permutation, VL-Mix has one lam for both modalities, and
m2-Mix adds up its directions. Only where rows are mixed with equal ones (the middle of an odd
batch, duplicates) that code gives NaN in most batches: here values and gradients are the limits.
"""

from typing import Any

import torch
from torch import Tensor

from mmfast._ring import join
from mmfast.distributed import ring_lse
from mmfast.losses._terms import (
    Reduction,
    check_batch,
    dot_rows,
    ids_or_rows,
    reduce,
    row_scores,
    softplus,
    target_offset,
    widen,
)
from mmfast.ops._inputs import as_scale
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.slerp import slerp


def m2_mix_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    lam: float | Tensor,
    *,
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE in both directions against negatives that lie between image and text.

    loss_i = softplus(lse_{j != i} s(u_i, m_j) - s_ii) + softplus(lse_{j != i} s(v_i, m_j) - s_ii)
    with m_j = slerp(u_j, v_j, lam): the positive stays as it is, and the mixture of the own pair
    is no negative. The sum of the directions, as published; the mean is half of it. Both come from
    one sweep of [u; v] against m, and the gradient flows through m too.
    A batch of one pair has loss 0 and gradient 0.

    Args:
        image, text: unit rows [B, D] of one dtype (float32, float64, bfloat16, float16) and
            device; row i of one belongs to row i of the other. Not normalised here.
        logit_scale: multiplies the products (1 / temperature; 1 / 0.07 in the published scripts):
            a number or a differentiable tensor of one element, whose value is not checked.
        lam: the share of the image in a mixture: a number or a differentiable tensor of one
            element. Published: one draw of Beta(0.5, 0.5) a batch.
        ids: int64 [B], by default the row number. Rows with equal ids are duplicates: the mixture
            of one is no negative of another.
        reduction: "mean", "sum" or "none", over the B pairs.
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: every rank must call this, and the backward pass. `lam` must be
            alike on all of them.
        backend: passed to `slerp` and `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [B] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "m2_mix_loss"
    image, text, scale = check_batch(who, image, text, logit_scale, ids, reduction)
    lam = as_scale(who, image, lam, "lam")
    mixed, options = slerp(image, text, lam, backend=backend), (ids is None,)
    learns = {"image": image, "text": text, "logit_scale": scale, "lam": lam}
    ring = join(who, group, mixed, learns, options, logit_scale=scale, lam=lam)
    left_out = ids_or_rows(ids, image, ring)
    both = torch.cat([image, text])
    off, _ = ring_lse(
        ring, both, mixed, scale, q_ids=left_out.repeat(2), k_ids=left_out, backend=backend
    )
    off_image, off_text = off.chunk(2)
    positive = row_scores(image, text, scale)
    loss = softplus(off_image - positive) + softplus(off_text - positive)
    return reduce(loss, reduction, ring)


def v_mix_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    lam: float | Tensor,
    *,
    ids: Tensor | None = None,
    original_neg: bool = False,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Symmetric cross-entropy of mixed images against texts, the target shared as the mixture is.

    Half of the rows of s(slerp(u_i, u_i', lam), v_j) under T = lam I + (1 - lam) R, and half of the
    columns under its transpose; i' = B - 1 - i and R is I with its rows in reverse.
    In the middle of an odd batch i' = i: the row is its own mixture, its target 1. In a shuffled
    batch partners are random.

    Args:
        image, text, logit_scale, reduction, backend: as in `m2_mix_loss`.
        lam: the share of row i in its mixture with row i'. Published: one draw a batch.
        ids: int64 [B], by default the row number. Rows with equal ids share their part of the
            target evenly, as same_id="positive" of `clip_loss` does. They cannot be left out: the
            duplicates of i and of i' carry two different ids.
        original_neg: only the targets' own scores, (i, i) and (i, i'), are those of mixtures; all
            others are s(u_i, v_j). An option of the published code. Cannot be joined with `ids`,
            whose further targets would be negatives that are not mixed.
        group: only None for now: partners of a batch on several ranks would have to meet.

    Returns, Raises: as in `m2_mix_loss`.
    """
    return _uni_mix_loss(
        "v", image, text, logit_scale, lam, ids, original_neg, reduction, group, backend
    )


def l_mix_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    lam: float | Tensor,
    *,
    ids: Tensor | None = None,
    original_neg: bool = False,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`v_mix_loss` with the texts mixed: scores s(u_i, slerp(v_j, v_j', lam)), the same targets."""
    return _uni_mix_loss(
        "l", image, text, logit_scale, lam, ids, original_neg, reduction, group, backend
    )


def vl_mix_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    lam: float | Tensor,
    *,
    ids: Tensor | None = None,
    original_neg: bool = False,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """`v_mix_loss` with images and texts mixed, by one lam, under the targets I + R.

    A row of the target sums to 2, as published: a normalised one gives half of this loss.
    """
    return _uni_mix_loss(
        "vl", image, text, logit_scale, lam, ids, original_neg, reduction, group, backend
    )


def _uni_mix_loss(
    kind: str,
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    lam: float | Tensor,
    ids: Tensor | None,
    original_neg: bool,
    reduction: Reduction,
    group: Any,
    backend: str | None,
) -> Tensor:
    who = f"{kind}_mix_loss"
    image, text, scale = check_batch(who, image, text, logit_scale, ids, reduction, group)
    lam = as_scale(who, image, lam, "lam")
    if original_neg and ids is not None:
        raise ValueError(
            f"{who}: original_neg cannot be joined with ids, whose further targets would not be "
            "mixtures; expected ids=None"
        )
    q = slerp(image, image.flip(0), lam, backend=backend) if "v" in kind else image
    k = slerp(text, text.flip(0), lam, backend=backend) if "l" in kind else text
    rows = torch.arange(len(q), device=q.device)
    partner_rows = rows.flip(0)
    pair = torch.minimum(rows, partner_rows)
    swept = (image, text) if original_neg else (q, k)
    off_rows, off_columns = pairwise_lse(
        *swept, scale, q_ids=pair, k_ids=pair, columns=True, backend=backend
    )
    alone, shares = rows == partner_rows, (1.0, 1.0) if kind == "vl" else (lam, 1 - lam)
    wide_q, wide_k = widen(q), widen(k)
    own, partner = dot_rows(wide_q, wide_k, scale), dot_rows(wide_q, wide_k.flip(0), scale)
    loss = _cross_entropy(off_rows, own, partner, alone, shares)
    loss = loss + _cross_entropy(off_columns, own, partner.flip(0), alone, shares)
    if ids is not None:
        loss = loss + _shared_targets(wide_q, wide_k, scale, ids, shares)
    return reduce(0.5 * loss, reduction)


def _cross_entropy(
    off: Tensor,
    own: Tensor,
    partner: Tensor,
    alone: Tensor,
    shares: tuple[float | Tensor, float | Tensor],
) -> Tensor:
    """Targets on `own` and `partner`, [B] each, among these and the `off` beside them.

    A row that is `alone` has one score under two names, which must not count twice.
    """
    beside_own = torch.where(alone, off, torch.logaddexp(off, partner))
    beside_partner = torch.where(alone, off, torch.logaddexp(off, own))
    return shares[0] * softplus(beside_own - own) + shares[1] * softplus(beside_partner - partner)


def _shared_targets(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    ids: Tensor,
    shares: tuple[float | Tensor, float | Tensor],
) -> Tensor:
    """What rows and columns [B] add where targets are means over rows of equal ids; q, k wide."""

    def offset(x: Tensor) -> Tensor:
        wanted = target_offset(x, ids, "positive", 0.0)
        assert wanted is not None
        return wanted

    # row i of the target looks at the groups of i and i'; column j at the rows i, and at the
    # rows whose partner is one, in its group
    of_rows = shares[0] * offset(k) + shares[1] * offset(k).flip(0)
    of_columns = shares[0] * offset(q) + shares[1] * offset(q.flip(0))
    return dot_rows(q, of_rows, scale) + dot_rows(k, of_columns, scale)
