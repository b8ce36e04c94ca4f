"""ALBEF: contrast with momentum keys and a queue, taught by the momentum encoders; matching; MLM.

One direction of the contrast, with keys k_0 ... k_(B+Q-1) those of the batch, then the queue, and
s(q, j) = <q, k_j> / temperature, is a cross-entropy with soft targets:

    loss_i = -sum_j T_ij log softmax_j(s(q_i, j))
    T_i    = alpha softmax(s(t_i, .)) + (1 - alpha) onehot(i),    t_i the momentum twin of q_i.

No T is made. With InfoNCE l_i = -log softmax_i(s(q_i, .)) and a_i the mean of the keys under the
softmax of the teacher,

    loss_i = l_i + alpha <q_i, k_i - a_i> / temperature

costs four products: scores and a mean of keys, for the teacher and for the student, whose gradient
it is; on a GPU six. Further keys of a row's id share its onehot in the same way, by their mean.

Source: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation, NeurIPS 2021, and its code, github.com/salesforce/ALBEF. The paper contrasts with the
queue alone; the code, as here, with the keys of the batch, too.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfast._ring import Ring, join
from mmfast.distributed import ring_softmax_mean, slots
from mmfast.losses._terms import (
    Reduction,
    as_logit_scale,
    check_ids,
    check_options,
    check_rows,
    check_share,
    dot_rows,
    group_sums,
    ids_or_rows,
    log_sum_exp,
    reduce,
    row_scores,
    softplus,
    widen,
)
from mmfast.losses.clip import info_nce
from mmfast.ops._inputs import as_scale, check_tensor, type_name
from mmfast.ops.pairwise_lse import softmax_mean

# as in torch and BERT
NO_LABEL = -100


def itc_loss(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: float | Tensor,
    alpha: float | Tensor,
    *,
    image_ids: Tensor | None = None,
    queue_ids: Tensor | None = None,
    reduction: Reduction = "mean",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """Image-text contrast: half of images against text keys plus half of texts against image keys.

    Keys, queues and targets are constants, as published: gradients flow to `image`, `text` and
    `temperature` alone. Memory is O((B + Q) D). A batch of one pair has the queue to contrast with.

    Args:
        image, text: unit rows [B, D] of one dtype (float32, float64, bfloat16, float16) and device;
            row i of one belongs to row i of the other. Not normalised here.
        image_m, text_m: [B, D], the same samples by the momentum encoders: keys, and teachers.
        image_queue, text_queue: [Q, D], further keys.
        temperature: divides the products, the teacher's too: a positive number, or a
            differentiable tensor of one element, whose value is not checked.
        alpha: the teacher's share of the target (published: 0.4): a number in [0, 1], or a tensor
            of one element, whose value is not checked. The teacher of a plain 0 costs nothing.
        image_ids, queue_ids: int64 [B] and [Q], both or neither. Captions of one image, as in
            retrieval fine-tuning: the rest of the target is shared among all keys of the row's id.
        reduction: "mean", "sum" or "none", over the B pairs.
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: every rank must call this, and the backward pass.
            They contrast with the keys of all ranks' batches; queues must be alike.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [B] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "itc_loss"
    check_options(who, reduction)
    image = check_rows(who, "image", image, ("B", "D"))
    like, shape = ("image", image), tuple(image.shape)
    text = check_rows(who, "text", text, shape, like)
    image_m = check_rows(who, "image_m", image_m, shape, like).detach()
    text_m = check_rows(who, "text_m", text_m, shape, like).detach()
    image_queue = check_rows(who, "image_queue", image_queue, ("Q", shape[1]), like).detach()
    queue_like, shape = ("image_queue", image_queue), tuple(image_queue.shape)
    text_queue = check_rows(who, "text_queue", text_queue, shape, queue_like).detach()
    scale, share = as_logit_scale(who, image, temperature), _as_alpha(who, image, alpha)
    if image_ids is not None or queue_ids is not None:
        if image_ids is None or queue_ids is None:
            missing = "image_ids" if image_ids is None else "queue_ids"
            raise ValueError(f"{who}: image_ids and queue_ids must come together, got no {missing}")
        check_ids(who, image_ids, like, "image_ids")
        check_ids(who, queue_ids, queue_like, "queue_ids")

    taught = isinstance(alpha, Tensor) or alpha > 0
    options, numbers = (taught, image_ids is None), {"1 / temperature": scale, "alpha": share}
    learns = {"image": image, "text": text, "temperature": scale}
    ring = join(who, group, text_m, learns, options, **numbers)

    def toward(query: Tensor, teacher: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        loss = info_nce(
            query, key, scale, negatives=queue, reduction="none", group=ring, backend=backend
        )
        offsets = []
        if image_ids is not None and queue_ids is not None:
            mean = _from_group_mean(key, queue, image_ids, queue_ids, ring)
            offsets.append((1 - share) * mean)
        if taught:
            mean = _from_taught_mean(teacher, key, queue, scale.detach(), ring, backend)
            offsets.append(share * mean)
        if offsets:
            loss = loss + dot_rows(widen(query), torch.stack(offsets).sum(0), scale)
        return loss

    both = toward(image, image_m, text_m, text_queue) + toward(text, text_m, image_m, image_queue)
    return reduce(0.5 * both, reduction, ring)


def _from_taught_mean(
    teacher: Tensor,
    key: Tensor,
    queue: Tensor,
    scale: Tensor,
    ring: Ring | None,
    backend: str | None,
) -> Tensor:
    """key_i minus the mean of all keys under the softmax of teacher i, [B, D] wide."""
    own_only = ids_or_rows(None, key, ring)
    ids: dict[str, Any] = {"q_ids": own_only, "k_ids": own_only, "backend": backend}
    # a teacher that is sure of key_i leaves a small difference, exact from the others alone
    found = [
        ring_softmax_mean(ring, teacher, key, scale, **ids),
        softmax_mean(teacher, queue, scale, backend=backend),
    ]
    off = log_sum_exp(torch.stack([rows for rows, _ in found]), 0)
    own = row_scores(teacher, key, scale)
    total = own + softplus(off - own)
    others = [(rows - total).exp().unsqueeze(1) * mean for rows, mean in found]
    return torch.sigmoid(off - own).unsqueeze(1) * widen(key) - others[0] - others[1]


def _from_group_mean(
    key: Tensor, queue: Tensor, ids: Tensor, queue_ids: Tensor, ring: Ring | None
) -> Tensor:
    """key_i minus the mean of all keys of its id, [B, D] wide; exactly 0 where it is the only one.

    O((B + Q) (D + log B)).
    """
    ordered, wide = ids.sort().values, widen(key)
    sums, counts = group_sums(wide, ids, ring)
    # keys of an id that the batch has not go to one more place, where nobody looks
    place, own = slots(ordered, queue_ids), slots(ordered, ids)
    queued = wide.new_zeros(len(ids) + 1, key.shape[1]).index_add(0, place, widen(queue))
    ones = torch.ones_like(place, dtype=wide.dtype)
    counted = wide.new_zeros(len(ids) + 1).index_add(0, place, ones).unsqueeze(1)
    return wide - (sums + queued[own]) / (counts + counted[own])


def itm_loss(logits_positive: Tensor, logits_negative: Tensor) -> Tensor:
    """Image-text matching: cross-entropy of pairs that belong together and pairs that do not.

    Args:
        logits_positive: [B, 2] of matched pairs: column 1 speaks for a match, column 0 against.
        logits_negative: [M, 2] of mismatched pairs, of the same dtype and device. Published: 2B,
            each text with an image and each image with a text that `sample_negatives` drew.

    Returns:
        The mean over all B + M pairs: float64 for float64 logits, else float32.

    Raises:
        ValueError: a shape or device that does not fit.
        TypeError: a dtype or type that does not fit.
    """
    who = "itm_loss"
    _check_logits(who, "logits_positive", logits_positive, ("B", 2))
    like = ("logits_positive", logits_positive)
    _check_logits(who, "logits_negative", logits_negative, ("M", 2), like)
    right, wrong = widen(logits_positive).diff(dim=1), widen(logits_negative).diff(dim=1)
    return softplus(torch.cat([-right, wrong])).mean()


def mlm_loss(
    logits: Tensor,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    alpha: float | Tensor = 0.0,
) -> Tensor:
    """Masked language modelling, (1 - alpha) of cross-entropy and alpha of it with the teacher's p.

    Every position is computed, also those without a label: a head that is given the masked
    positions alone saves the others.

    Args:
        logits: [..., V], float32, float64, bfloat16 or float16.
        labels: int64 [...], in [0, V), or -100 at a position that does not count.
        teacher_logits: [..., V] by the momentum model for the same masked text. A constant.
        alpha: the teacher's share: a number in [0, 1], or a tensor of one element, whose value is
            not checked.

    Returns:
        The mean over positions that count: float64 for float64 logits, else float32. Without any
        it is 0, with gradient 0, where the published code has NaN.

    Raises:
        ValueError: a shape, device or number that does not fit. A label out of range on the CPU;
            elsewhere, and under torch.compile, `gather` meets it.
        TypeError: a dtype or type that does not fit.
    """
    who = "mlm_loss"
    check_tensor(who, "logits", logits)
    _check_logits(who, "logits", logits, ("H",) * (logits.ndim - 1) + ("V",))
    _check_labels(who, labels, logits)
    share = _as_alpha(who, logits, alpha)
    counts = labels != NO_LABEL
    log_p = widen(logits).log_softmax(-1)
    loss = -log_p.gather(-1, labels.where(counts, 0).unsqueeze(-1)).squeeze(-1)
    if teacher_logits is not None:
        like = ("logits", logits)
        _check_logits(who, "teacher_logits", teacher_logits, tuple(logits.shape), like)
        p = widen(teacher_logits.detach()).softmax(-1)
        loss = (1 - share) * loss - share * (p * log_p).sum(-1)
    elif isinstance(alpha, Tensor) or alpha != 0:
        raise ValueError(f"{who}: alpha must be 0 without teacher_logits, got {alpha}")
    return loss.where(counts, 0.0).sum() / counts.sum().clamp(min=1)


def _as_alpha(who: str, x: Tensor, alpha: Any) -> Tensor:
    if not isinstance(alpha, Tensor):
        check_share(who, "alpha", alpha, whole=True)
    return as_scale(who, x, alpha, "alpha").detach()


def _check_logits(
    who: str,
    name: str,
    x: Any,
    sizes: Sequence[int | str],
    like: tuple[str, Tensor] | None = None,
) -> None:
    check_tensor(who, name, x)
    # logits are no factors of a product: autocast leaves them as they are
    with torch.autocast(x.device.type, enabled=False):
        check_rows(who, name, x, sizes, like)


def _check_labels(who: str, labels: Any, logits: Tensor) -> None:
    check_tensor(who, "labels", labels)
    if labels.dtype != torch.int64:
        raise TypeError(f"{who}: labels must be int64, got {type_name(labels.dtype)}")
    *sizes, words = logits.shape
    if list(labels.shape) != sizes:
        raise ValueError(f"{who}: labels must be {sizes} like logits, got {list(labels.shape)}")
    if labels.device != logits.device:
        raise ValueError(
            f"{who}: labels must be on {logits.device} like logits, got {labels.device}"
        )
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        wrong = labels[(labels != NO_LABEL) & ((labels < 0) | (labels >= words))]
        if len(wrong):
            raise ValueError(
                f"{who}: labels must be in [0, {words}) or {NO_LABEL}, got {wrong[0].item()}"
            )
