"""Geometric multimodal contrastive loss: every modality beside the joint embedding of all.

With z_m the rows of modality m, J those of the joint embedding, e(a, b) = exp(<a, b> / temperature)
and sums over j other than i, the loss of row i adds up over m, by `negatives`:

    "all"    1/2 [ -log e(J_i, z_i) / (e(J_i, z_i) + sum e(J_i, J_j) + sum e(J_i, z_j))
                   -log e(z_i, J_i) / (e(z_i, J_i) + sum e(z_i, J_j) + sum e(z_i, z_j)) ]
    "joint"  -log e(J_i, z_i) / sum e(J_i, J_j)
    "paper"  -log e(J_i, z_i) / (sum e(z_i, J_j) + sum e(z_i, z_j) + sum e(J_i, J_j))

The first is NT-Xent over the 2B rows [J; z_m]. Its blocks are swept one by one: J with J once for
all modalities, J with z_m for rows and columns at once, z_m with itself.

Source: Poklukar et al., Geometric Multimodal Contrastive Representation Learning, ICML 2022, and
its code, github.com/miguelsvasco/gmc, which trains with "all" and has "joint" for an ablation. The
form of the paper has no positive in its denominator, nor has "joint": they are not bounded below by
0, and go on pushing negatives apart when every positive is perfect.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast.losses._terms import (
    Reduction,
    as_logit_scale,
    check_ids,
    check_options,
    check_rows,
    ids_or_rows,
    log_sum_exp,
    reduce,
    row_scores,
    softplus,
)
from mmfast.ops.pairwise_lse import pairwise_lse

Negatives = Literal["all", "joint", "paper"]


def gmc_loss(
    modalities: Sequence[Tensor] | Tensor,
    joint: Tensor,
    temperature: float | Tensor,
    *,
    negatives: Negatives = "all",
    ids: Tensor | None = None,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The sum over modalities of their contrast with the joint embedding.

    A row without negatives has loss 0 and gradient 0.

    Args:
        modalities: one or more [B, D], or all of them as [M, B, D]; unit rows of the dtype
            (float32, float64, bfloat16, float16) and device of `joint`. Not normalised here.
        joint: [B, D], unit rows of all modalities together.
        temperature: divides the products: a positive number, or a differentiable tensor of one
            element, whose value is not checked.
        negatives: "all", "joint" or "paper": what the denominator holds, see above.
        ids: int64 [B], by default the row number. Rows with equal ids are duplicates and left out
            of each other's negatives.
        reduction: "mean", "sum" or "none", over the B rows.
        group: a process group; only None for now.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [B] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit; no modality.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "gmc_loss"
    if negatives not in ("all", "joint", "paper"):
        raise ValueError(f"{who}: negatives must be 'all', 'joint' or 'paper', got {negatives!r}")
    check_options(who, reduction, group=group)
    joint = check_rows(who, "joint", joint, ("B", "D"))
    like = ("joint", joint)
    rows = [
        check_rows(who, f"modalities[{m}]", z, tuple(joint.shape), like)
        for m, z in enumerate(modalities)
    ]
    if not rows:
        raise ValueError(f"{who}: modalities must hold one tensor or more, got none")
    if ids is not None:
        check_ids(who, ids, like)
    scale, left_out = as_logit_scale(who, joint, temperature), ids_or_rows(ids, joint)

    def among(x: Tensor) -> Tensor:
        return pairwise_lse(x, x, scale, q_ids=left_out, k_ids=left_out, backend=backend)

    joints, terms = among(joint), []
    for z in rows:
        positive = row_scores(joint, z, scale)
        if negatives == "joint":
            terms.append(_ratio(joints, positive))
            continue
        of_joint, of_z = pairwise_lse(
            joint, z, scale, q_ids=left_out, k_ids=left_out, columns=True, backend=backend
        )
        if negatives == "paper":
            terms.append(_ratio(_join(joints, of_z, among(z)), positive))
        else:
            both = _join(joints, of_joint), _join(of_z, among(z))
            terms += [0.5 * softplus(off - positive) for off in both]
    return reduce(torch.stack(terms).sum(0), reduction)


def _join(*parts: Tensor) -> Tensor:
    return log_sum_exp(torch.stack(parts), 0)


def _ratio(off: Tensor, positive: Tensor) -> Tensor:
    # nothing to tell apart where there is no negative
    return (off - positive).masked_fill(off.isneginf(), 0.0)


def gmc_embedding(modalities: Sequence[Tensor | None], joint: Tensor | None = None) -> Tensor:
    """The embedding of samples of which modalities may be missing.

    Args:
        modalities: [B, D] each, or None for one that is missing.
        joint: [B, D], where all are there.

    Returns:
        `joint` if given, else the mean of the modalities that are there, [B, D] in their dtype. As
        published the mean is not normalised again.

    Raises:
        ValueError: nothing is there, or shapes or devices differ.
        TypeError: a dtype or type that does not fit.
    """
    who = "gmc_embedding"
    if joint is not None:
        check_rows(who, "joint", joint, ("B", "D"))
        return joint
    there = {f"modalities[{m}]": z for m, z in enumerate(modalities) if z is not None}
    if not there:
        raise ValueError(f"{who}: modalities must hold one tensor or more, got none")
    (first, x), *others = there.items()
    like = first, check_rows(who, first, x, ("B", "D"))
    for name, z in others:
        check_rows(who, name, z, tuple(x.shape), like)
    # as they are: autocast rounds products, not means
    return torch.stack(list(there.values())).mean(0)


class GMCLoss(nn.Module):
    """`gmc_loss`, and with a prediction the supervised sum of it and the mean absolute error.

    Args:
        temperature, negatives: as in `gmc_loss`. Published temperatures are 0.1 (MHD) and 0.3
            (CMU-MOSI, CMU-MOSEI, Pendulum).
    """

    def __init__(self, temperature: float = 0.1, negatives: Negatives = "all") -> None:
        super().__init__()
        self.temperature = temperature
        self.negatives = negatives

    def forward(
        self,
        modalities: Sequence[Tensor] | Tensor,
        joint: Tensor,
        prediction: Tensor | None = None,
        target: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch; prediction and target of one shape, both or neither.

        Raises:
            ValueError: one of prediction and target alone, or their shapes differ.
        """
        loss = gmc_loss(modalities, joint, self.temperature, negatives=self.negatives)
        if prediction is None and target is None:
            return loss
        if prediction is None or target is None:
            missing = "prediction" if prediction is None else "target"
            raise ValueError(f"GMCLoss: prediction and target must come together, got no {missing}")
        if prediction.shape != target.shape:
            raise ValueError(
                f"GMCLoss: target must be {list(prediction.shape)} like prediction, "
                f"got {list(target.shape)}"
            )
        return loss + F.l1_loss(prediction, target)
