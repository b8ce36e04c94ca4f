"""Contrast with a momentum encoder's keys: own key against a queue, and several positives by tags.

With s_ip = <q_i, k_p> / temperature, k_0 the own key and k_1 ... k_Q the queue,

    moco_loss_i        = -log( exp(s_i0) / sum over all p of exp(s_ip) )
    tagged_moco_loss_i = mean over positives p of -log( exp(s_ip) / denominator )

Keys are constants, so moco_loss costs two products, the scores and the mean of keys that dq is made
of; on a GPU three.

Sources: He et al., Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020,
and its code, github.com/facebookresearch/moco; Yuan et al., Multimodal Contrastive Training for
Visual Representation Learning, CVPR 2021 (tags and `mct_loss`), which has no published code.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mmfast._ring import join
from mmfast.losses._momentum import KeyQueue, check_size, follow, random_keys, slow_copy
from mmfast.losses._terms import (
    Reduction,
    as_logit_scale,
    check_number,
    check_options,
    check_rows,
    check_share,
    dot_rows,
    reduce,
    row_scores,
    softplus,
    widen,
)
from mmfast.ops._inputs import check_tensor, type_name
from mmfast.ops.pairwise_lse import pairwise_lse

Denominator = Literal["all", "negatives"]
# query, key, queue and, for several positives, the mask of them
Path = tuple[Tensor, Tensor, Tensor] | tuple[Tensor, Tensor, Tensor, Tensor]


def moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    temperature: float | Tensor,
    *,
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """InfoNCE of queries against their own key and a queue of others.

    Args:
        query: unit rows [N, D], float32, float64, bfloat16 or float16. Not normalised here.
        key: [N, D] of the same dtype and device; key i is the positive of query i. A constant: as
            published, no gradient flows to it.
        queue: [Q, D] of the same dtype and device, negatives of all rows. A constant, too.
        temperature: divides the products (published: 0.07, MoCo v2 0.2): a positive number, or a
            differentiable tensor of one element, whose value is not checked.
        reduction: "mean", "sum" or "none", over the N rows.
        backend: passed to `pairwise_lse`; None picks the fastest that can run.

    Returns:
        A scalar, or [N] for reduction="none": float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device, word or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    query, key, queue, scale = _check("moco_loss", query, key, queue, temperature, reduction)
    off = pairwise_lse(query, queue, scale, backend=backend)
    return reduce(softplus(off - row_scores(query, key, scale)), reduction)


def tagged_moco_loss(
    query: Tensor,
    key: Tensor,
    queue: Tensor,
    positives: Tensor,
    temperature: float | Tensor,
    *,
    denominator: Denominator = "all",
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """`moco_loss` with further positives in the queue, such as samples that share enough tags.

    Args:
        query, key, queue, temperature, reduction, backend: as in `moco_loss`.
        positives: bool [N, 1 + Q], True where a key is a positive of the row: column 0 stands for
            its own key, which counts whatever is there, and the others for the queue.
        denominator: what stands beside a positive: "all" keys, as in the supervised contrastive
            loss of Khosla et al. 2020, or itself and the "negatives" alone. Which of them Yuan et
            al. used is not known.

    Memory beside `positives` is O((N + Q) D). "all" costs three products, on a GPU four,
    "negatives" seven: its rows are scored in blocks of D, and once more in the backward pass.

    Returns, Raises: as in `moco_loss`.
    """
    who = "tagged_moco_loss"
    if denominator not in ("all", "negatives"):
        raise ValueError(f"{who}: denominator must be 'all' or 'negatives', got {denominator!r}")
    query, key, queue, scale = _check(who, query, key, queue, temperature, reduction)
    _check_positives(who, positives, query, queue)
    own, further = row_scores(query, key, scale), positives[:, 1:]
    # the products of these blocks stay in the type of the scores under autocast, too
    with torch.autocast(query.device.type, enabled=False):
        if denominator == "all":
            loss = softplus(pairwise_lse(query, queue, scale, backend=backend) - own)
            loss = loss + dot_rows(widen(query), _from_mean(key, queue, further), scale)
        else:
            blocks = (torch.split(x, query.shape[1]) for x in (query, own, further))
            loss = torch.cat(
                [
                    checkpoint(
                        _beside_negatives, *block, queue, scale, backend,
                        use_reentrant=False, preserve_rng_state=False,
                    )
                    for block in zip(*blocks, strict=True)
                ]
            )  # fmt: skip
    return reduce(loss, reduction)


def _from_mean(key: Tensor, queue: Tensor, further: Tensor) -> Tensor:
    """key_i minus the mean of its positives, [N, D] wide; exactly 0 where it is the only one."""
    key, queue = widen(key), widen(queue)
    sums, counts = [], []
    # a block of D rows of the mask is, as numbers, as large as the queue
    for block in torch.split(further, queue.shape[1]):
        numbers = block.to(queue.dtype)
        sums.append(numbers @ queue)
        counts.append(numbers.sum(1, keepdim=True))
    n = torch.cat(counts)
    return (n * key - torch.cat(sums)) / (n + 1)


def _beside_negatives(
    query: Tensor, own: Tensor, further: Tensor, queue: Tensor, scale: Tensor, backend: str | None
) -> Tensor:
    """The mean over positives of softplus(lse of the negatives - score), for a block of rows."""
    off = pairwise_lse(query, queue, scale, mask=~further, backend=backend)
    scores = scale * (widen(query) @ widen(queue).T)
    each = softplus(off.unsqueeze(1) - scores).masked_fill(~further, 0.0)
    return (softplus(off - own) + each.sum(1)) / (1 + further.sum(1, dtype=own.dtype))


def mct_loss(
    image: Path,
    text: Path,
    image_to_text: Path,
    text_to_image: Path,
    temperature: float | Tensor,
    *,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    denominator: Denominator = "all",
    reduction: Reduction = "mean",
    backend: str | None = None,
) -> Tensor:
    """Multimodal contrastive training: one contrast inside each modality, two across, weighted.

    Each of the four is (query, key, queue) as for `moco_loss`, or (query, key, queue, positives) as
    for `tagged_moco_loss`, in a space of its own heads: the two inside a modality may have widths
    of their own. Yuan et al. give positives by tags to the paths inside a modality.

    Args:
        image, text: the path inside each modality.
        image_to_text: image queries against keys and queue of texts.
        text_to_image: text queries against keys and queue of images.
        temperature, reduction, backend: as in `moco_loss`.
        weights: one for each path, in the order above. The published ones are not known.
        denominator: as in `tagged_moco_loss`.

    Returns, Raises: as in `moco_loss`.
    """
    who = "mct_loss"
    paths = {
        "image": image,
        "text": text,
        "image_to_text": image_to_text,
        "text_to_image": text_to_image,
    }
    if len(weights) != len(paths):
        raise ValueError(f"{who}: weights must be 4 numbers, got {len(weights)}")
    options: dict[str, Any] = {"reduction": reduction, "backend": backend}
    terms = []
    for (name, path), weight in zip(paths.items(), weights, strict=True):
        check_number(who, f"weight of {name}", weight)
        if len(path) not in (3, 4):
            raise ValueError(
                f"{who}: {name} must be (query, key, queue) or (query, key, queue, positives), "
                f"got {len(path)} of them"
            )
        check_tensor(who, f"the query of {name}", path[0])
        if len(path[0]) != len(image[0]):
            raise ValueError(
                f"{who}: {name} must have {len(image[0])} queries like image, got {len(path[0])}"
            )
        if len(path) == 4:
            term = tagged_moco_loss(*path, temperature, denominator=denominator, **options)
        else:
            term = moco_loss(*path, temperature, **options)
        terms.append(weight * term)
    return torch.stack(terms).sum(0)


def _check(
    who: str, query: Any, key: Any, queue: Any, temperature: Any, reduction: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_options(who, reduction)
    query = check_rows(who, "query", query, ("N", "D"))
    like = ("query", query)
    key = check_rows(who, "key", key, tuple(query.shape), like)
    queue = check_rows(who, "queue", queue, ("Q", query.shape[1]), like)
    return query, key.detach(), queue.detach(), as_logit_scale(who, query, temperature)


def _check_positives(who: str, positives: Any, query: Tensor, queue: Tensor) -> None:
    check_tensor(who, "positives", positives)
    if positives.dtype != torch.bool:
        raise TypeError(f"{who}: positives must be bool, got {type_name(positives.dtype)}")
    if positives.shape != (len(query), 1 + len(queue)):
        raise ValueError(
            f"{who}: positives must be [{len(query)}, {1 + len(queue)}], one per query and key, "
            f"got {list(positives.shape)}"
        )
    if positives.device != query.device:
        raise ValueError(
            f"{who}: positives must be on {query.device} like query, got {positives.device}"
        )


class MoCoLoss(nn.Module):
    """`moco_loss` with its momentum encoder and queue.

    In training a call moves the momentum encoder first, key <- m key + (1 - m) query, and enqueues
    the batch's keys last, as published. In evaluation it does neither. Buffers of the encoder, such
    as running statistics, are its own in each copy. Batches are not shuffled among processes.

    Args:
        encoder: maps a batch to [B, width]; rows are normalised here. A deep copy becomes the
            momentum encoder. Keep parameters in float32: bfloat16 has no room for 1 - momentum.
        width: of its outputs.
        queue_size: number of keys kept; any, also one that is no multiple of the batch.
        momentum: m, in [0, 1).
        temperature: as in `moco_loss`.
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: the keys of all are enqueued, so that queues stay alike where
            they, and the encoders, start alike. None keeps each process to itself.

    Raises:
        ValueError, TypeError: a number that does not fit.
    """

    def __init__(
        self,
        encoder: nn.Module,
        width: int,
        queue_size: int = 65536,
        *,
        momentum: float = 0.999,
        temperature: float = 0.07,
        group: Any = None,
    ) -> None:
        super().__init__()
        check_share("MoCoLoss", "momentum", momentum)
        check_size("MoCoLoss", "width", width)
        check_size("MoCoLoss", "queue_size", queue_size)
        self.encoder = encoder
        self.key_encoder = slow_copy(encoder)
        self.queue = KeyQueue(random_keys(queue_size, width))
        self.momentum = momentum
        self.temperature = temperature
        self.group = group

    def forward(self, query: Any, key: Any) -> Tensor:
        """The loss of a batch: two views of its samples, one for each encoder."""
        q = F.normalize(self.encoder(query), dim=1)
        with torch.no_grad():
            if self.training:
                follow(self.key_encoder, self.encoder, self.momentum)
            k = F.normalize(self.key_encoder(key), dim=1)
        terms = moco_loss(q, k, self.queue.snapshot(q), self.temperature, reduction="none")
        ring = join("MoCoLoss", self.group, k)
        if self.training:
            self.queue.push(k if ring is None else torch.cat(ring.gather("keys", k)))
        return reduce(terms, "mean", ring)
