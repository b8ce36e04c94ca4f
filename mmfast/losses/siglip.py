"""The sigmoid loss of SigLIP, without the matrix of similarities.

With l_ij = logit_scale * <image_i, text_j> + logit_bias every pair is a binary decision of its own,

    loss = 1/B [ sum over i != j of softplus(l_ij) + sum over i of softplus(-l_ii) ],

which is -1/B sum log sigmoid(z_ij l_ij) with z_ij = 1 on the diagonal and -1 elsewhere. The own
pairs are left out of the sweep and added by rows, in float32 from bfloat16 rows too, so that value
and gradient keep their relative accuracy however small the loss.

Source: Zhai et al., Sigmoid Loss for Language Image Pre-Training, 2023, equation 1 and algorithm 1.
open_clip's SigLipLoss computes the same.
"""

from typing import Any

from torch import Tensor, nn

from mmfast._ring import join, whole_world
from mmfast.distributed import ring_softplus
from mmfast.losses._terms import (
    SameId,
    check_batch,
    dot_rows,
    group_sums,
    ids_or_rows,
    row_scores,
    softplus,
    widen,
)
from mmfast.ops._inputs import as_scale


def siglip_loss(
    image: Tensor,
    text: Tensor,
    logit_scale: float | Tensor,
    logit_bias: float | Tensor,
    *,
    ids: Tensor | None = None,
    same_id: SameId = "exclude",
    group: Any = None,
    backend: str | None = None,
) -> Tensor:
    """The sigmoid loss over all pairs, divided by the batch (not by the number of pairs).

    Args:
        image, text: [B, D] of one dtype (float32, float64, bfloat16, float16) and device; row i
            of one belongs to row i of the other. They are used as given: normalise them before.
        logit_scale, logit_bias: multiplies the products (exp of the learned parameter, as open_clip
            and transformers pass it), and is added to them; each a number or a differentiable
            tensor of one element, whose value is not checked.
        ids: int64 [B], by default the row number. Rows with equal ids are duplicates.
        same_id: "exclude" leaves pairs of duplicates out, "positive" makes of each a pair that
            belongs together; the divisor is B in either case.
        group: a process group whose ranks share the batch, by the contract of
            `mmfast.distributed`: every rank must call this, and the backward pass.
        backend: passed to `pairwise_softplus`; None picks the fastest that can run.

    Returns:
        A scalar: float64 for float64 inputs, else float32.

    Raises:
        ValueError: a shape, device or number that does not fit.
        TypeError: a dtype or type that does not fit.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "siglip_loss"
    image, text, scale = check_batch(who, image, text, logit_scale, ids, "sum", same_id=same_id)
    bias = as_scale(who, image, logit_bias, "logit_bias")

    options, numbers = (same_id, ids is None), {"logit_scale": scale, "logit_bias": bias}
    ring = join(who, group, text, {"image": image, "text": text, **numbers}, options, **numbers)
    left_out = ids_or_rows(ids if same_id == "exclude" else None, image, ring)
    others = ring_softplus(
        ring, image, text, scale, bias, q_ids=left_out, k_ids=left_out, backend=backend
    )
    positives = row_scores(image, text, scale) + bias
    total = others + softplus(-positives).sum()
    if ids is not None and same_id == "positive":
        # softplus(-s) = softplus(s) - s for the pairs of duplicates, which were summed as others
        text = widen(text)
        sums, sizes = group_sums(text, ids, ring)
        duplicates = (sums - text).masked_fill(sizes == 1, 0.0)
        total = total - dot_rows(widen(image), duplicates, scale).sum() - bias * (sizes - 1).sum()
    return total / (len(image) if ring is None else ring.total / ring.size)


class SigLipLoss(nn.Module):
    """`siglip_loss` with the signature of open_clip's SigLipLoss, over the default process group.

    Under DistributedDataParallel every gradient is that of one process with the whole batch, as
    open_clip's is; a rank's value is that of its own images, as there.

    Args:
        cache_labels: accepted as open_clip's is; there are no labels to keep.
        rank: number of this process.
        world_size: number of processes. From 2 on torch.distributed must be initialised at the
            first call.
        dist_impl: how open_clip's ranks exchange their texts: "bidir", "shift", "reduce" or
            "gather". They differ in what they send, not in the result, and here nothing
            depends on it.

    Raises:
        ValueError: dist_impl is another word. At a call: torch.distributed has another rank or
            size.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
    ) -> None:
        super().__init__()
        if dist_impl not in (None, "bidir", "shift", "reduce", "gather"):
            raise ValueError(
                "SigLipLoss: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather', "
                f"got {dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.dist_impl = dist_impl or "bidir"

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: float | Tensor,
        logit_bias: float | Tensor | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """The loss of unit rows image_features, text_features [B, D]; a bias of None is 0.

        With output_dict=True the result is {"contrastive_loss": loss}.
        """
        bias = 0.0 if logit_bias is None else logit_bias
        group = whole_world("SigLipLoss", self.rank, self.world_size)
        loss = siglip_loss(image_features, text_features, logit_scale, bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss
