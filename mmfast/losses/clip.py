"""InfoNCE and the symmetric loss of CLIP, without the matrix of similarities.

With s_ij = logit_scale * <q_i, k_j> the loss of row i is

    -log( exp(s_ii) / (exp(s_ii) + sum of exp over the negatives) ) = softplus(off_i - s_ii),

off_i the log-sum-exp of the negatives alone. Leaving the positive out of the sum, instead of
subtracting it from a sum over all, keeps the relative accuracy of value and gradient however
small the loss: float32 to 1e-4 and bfloat16 to 1e-2 at a loss of 1e-8.

Sources: van den Oord et al., Representation Learning with Contrastive Predictive Coding, 2018;
Radford et al., Learning Transferable Visual Models From Natural Language Supervision, 2021;
Khosla et al., Supervised Contrastive Learning, 2020 (several positives, the mean outside the log).
"""

from typing import Any

import torch
from torch import Tensor, nn

from mmfast._ring import Ring, join, whole_world
from mmfast.distributed import ring_lse
from mmfast.losses._terms import (
    Reduction,
    SameId,
    check_batch,
    check_ids,
    check_options,
    check_rows,
    check_share,
    dot_rows,
    ids_or_rows,
    log_sum_exp,
    reduce,
    row_scores,
    softplus,
    target_offset,
    widen,
)
from mmfast.ops._inputs import as_scale
from mmfast.ops.pairwise_lse import pairwise_lse


def info_nce(
    q: Tensor,
    k: Tensor,
    logit_scale: float | Tensor,
    *,
    negatives: Tensor | None = None,
    hard_negatives: Tensor | None = None,
    mixed: Tensor | None = None,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of pairs (q_i, k_i) against every other row and any extra negatives.

    loss_i = -log( exp(s_ii) / (exp(s_ii) + sum over negatives of exp(s)) ), where the negatives of
    row i are all k_j of another id, all `negatives` and its own `hard_negatives`, together.
    Rows need not be unit. A row without negatives has loss 0 and gradient 0.

    Args:
        q: queries [N, D], float32, float64, bfloat16 or float16.
        k: keys [N, D] of the same dtype and device; k_i is the positive of q_i.
        logit_scale: multiplies the products (1 / temperature): a number or a tensor of one
            element, differentiable. A value inside a tensor is not checked: NaN flows through.
        negatives: [M, D], extra columns shared by all rows, such as a queue. With `group` those of
            this rank's rows: give all ranks the same.
        hard_negatives: [N, H, D], extra columns of each row; H may be 0. O(N H D) memory.
        mixed: [N, D], stands in for k in every off-diagonal place; the positive stays k_i.
        ids: int64 [N], by default the row number. Rows with equal ids are duplicates.
        same_id: "exclude" leaves duplicates out of the negatives; "positive" makes them further
            positives: loss_i = lse over everything - mean of s_ij over {j: id_j = id_i}.
            "positive" cannot be joined with `mixed`, whose rows have no ids of their own.
        reduction: "mean", "sum" or "none".
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: every rank must call this, and the backward pass.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [N] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "info_nce"
    check_options(who, reduction, same_id)
    q = check_rows(who, "q", q, ("N", "D"))
    n, d = q.shape
    like = ("q", q)
    k = check_rows(who, "k", k, (n, d), like)
    scale = as_scale(who, q, logit_scale, "logit_scale")
    if ids is not None:
        check_ids(who, ids, like)
    if negatives is not None:
        negatives = check_rows(who, "negatives", negatives, ("M", d), like)
    if hard_negatives is not None:
        hard_negatives = check_rows(who, "hard_negatives", hard_negatives, (n, "H", d), like)
    if mixed is not None:
        mixed = check_rows(who, "mixed", mixed, (n, d), like)
        if same_id == "positive":
            raise ValueError(
                f"{who}: mixed cannot be joined with same_id='positive', "
                "whose further positives are rows of k, not mixtures; expected mixed=None"
            )

    columns = k if mixed is None else mixed
    options = (same_id, ids is None, mixed is None, negatives is None)
    learns = {"q": q, "k": k, "mixed": columns, "logit_scale": scale}
    ring = join(who, group, columns, learns, options, logit_scale=scale)
    left_out = _left_out(ids, same_id, q, ring)
    off, _ = ring_lse(ring, q, columns, scale, q_ids=left_out, k_ids=left_out, backend=backend)
    terms = [off]
    if negatives is not None:
        terms.append(pairwise_lse(q, negatives, scale, backend=backend))
    if hard_negatives is not None and hard_negatives.shape[1] > 0:
        terms.append(log_sum_exp(row_scores(q.unsqueeze(1), hard_negatives, scale), 1))
    if len(terms) > 1:
        off = log_sum_exp(torch.stack(terms), 0)

    wide_q, wide_k = widen(q), widen(k)
    loss = softplus(off - dot_rows(wide_q, wide_k, scale))
    offset = target_offset(wide_k, ids, same_id, 0.0, ring)
    if offset is not None:
        loss = loss + dot_rows(wide_q, offset, scale)
    return reduce(loss, reduction, ring)


def clip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    *,
    label_smoothing: float = 0.0,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Symmetric InfoNCE: half of image against all texts plus half of text against all images.

    Both directions come from one visit of the similarities, four products forward and backward.
    A batch of one pair has loss 0 and gradient 0.

    Args:
        image, text: [B, D] of one dtype (float32, float64, bfloat16, float16) and device; row i
            of one belongs to row i of the other. They are used as given: normalise them before.
        logit_scale: multiplies the products: exp of the learned parameter, as open_clip and
            transformers pass it; a number or a differentiable tensor of one element, whose
            value is not checked.
        label_smoothing: share in [0, 1) of the target spread evenly over the columns that remain.
            O(B D), as everything beside the sweep.
        ids: int64 [B], by default the row number. Rows with equal ids are duplicates.
        same_id: "exclude" leaves duplicates out of the negatives, "positive" shares the target
            evenly among them.
        reduction: "mean", "sum" or "none", over the B pairs.
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: every rank must call this, and the backward pass.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [B] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "clip_loss"
    image, text, scale = check_batch(who, image, text, logit_scale, ids, reduction, same_id=same_id)
    check_share(who, "label_smoothing", label_smoothing)

    options = (same_id, ids is None, label_smoothing)
    learns = {"image": image, "text": text, "logit_scale": scale}
    ring = join(who, group, text, learns, options, logit_scale=scale)
    left_out = _left_out(ids, same_id, image, ring)
    rows, columns = ring_lse(
        ring, image, text, scale, q_ids=left_out, k_ids=left_out, columns=True, backend=backend
    )
    wide_image, wide_text = widen(image), widen(text)
    positive = dot_rows(wide_image, wide_text, scale)
    loss = softplus(rows - positive) + softplus(columns - positive)
    for anchor, target in ((wide_image, wide_text), (wide_text, wide_image)):
        offset = target_offset(target, ids, same_id, label_smoothing, ring)
        if offset is not None:
            loss = loss + dot_rows(anchor, offset, scale)
    return reduce(0.5 * loss, reduction, ring)


def _left_out(ids: Tensor | None, same_id: SameId, q: Tensor, ring: Ring | None) -> Tensor:
    # as further positives duplicates stay in the sum, and only the row's own pair is left out
    return ids_or_rows(ids if same_id == "exclude" else None, q, ring)


class ClipLoss(nn.Module):
    """`clip_loss` with the signature of open_clip's ClipLoss, over the default process group.

    Under DistributedDataParallel every gradient is that of one process with the whole batch, and
    the value is the rank's own mean, whatever the flags. open_clip 3.3.0 (and this) by flags, W
    ranks with equal batches:

        local_loss  gather_with_grad  value of a rank   its gradient of the features
        False       False             of whole batch    1 / W of this
        False       True              of whole batch    the same
        True        False             own mean          lacks all terms in which the features are
                                                        another's columns, its own rows' included
        True        True              own mean          the same

    The gradient of the scale is the same in all four, after DDP's averaging.

    Args:
        local_loss, gather_with_grad, cache_labels: accepted as open_clip's are, and without effect:
            ranks share their work in one way, and there are no labels to keep.
        rank: number of this process.
        world_size: number of processes. From 2 on torch.distributed must be initialised at the
            first call.
        use_horovod: only False.

    Raises:
        ValueError: use_horovod is set. At a call: torch.distributed has another rank or size.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        super().__init__()
        if use_horovod:
            raise ValueError(
                "ClipLoss: use_horovod must be False, got True; Horovod is not supported"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit rows image_features, text_features [B, D].

        `logit_bias` shifts every logit alike, which a softmax does not see: it does not change
        the loss, and a learnable one gets a gradient of 0.
        With output_dict=True the result is {"contrastive_loss": loss}.
        """
        group = whole_world("ClipLoss", self.rank, self.world_size)
        loss = clip_loss(image_features, text_features, logit_scale, group=group)
        if isinstance(logit_bias, Tensor):
            # part of the graph, so that DistributedDataParallel does not wait for its gradient
            loss = loss + 0.0 * logit_bias.sum().to(loss.dtype)
        return {"contrastive_loss": loss} if output_dict else loss
