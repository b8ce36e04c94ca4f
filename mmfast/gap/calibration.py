"""Whether a choice is right as often as its softmax says.

    confidence_i = max_j softmax(z_i)_j        error = sum_b n_b / N |accuracy_b - confidence_b|

over equal bins b of confidences in (lo, hi], with the means of each bin.

Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017 (arXiv 1706.04599), whose
code has 15 bins. Of retrieval z_i are the scaled similarities of a query and all candidates.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mmfast.gap._inputs import as_ids, as_tensor, full_precision
from mmfast.gap.retrieval import labelled_rows
from mmfast.losses._terms import check_rows, widen
from mmfast.ops._inputs import as_scale
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.pairwise_rank import pairwise_rank


@dataclass(frozen=True, eq=False)
class Calibration:
    """What was said and what was right, by bins of confidence.

    error: the expected calibration error. maximum: the largest of a bin.
    count: int64 [bins]. accuracy, confidence: float64 [bins], means; NaN where a bin is empty.
    """

    error: float
    maximum: float
    count: Tensor
    accuracy: Tensor
    confidence: Tensor


@full_precision
@torch.no_grad()
def calibration_error(logits: Any, labels: Any, *, bins: int = 15) -> Calibration:
    """The expected calibration error of a classifier.

    Args:
        logits: [N, C] tensor, numpy array or memmap of a floating type.
        labels: integers [N], from 0 to C - 1.
        bins: how many.

    Raises:
        TypeError, ValueError: a type, shape, label or number that does not fit; a confidence that
            is NaN.
    """
    who = "calibration_error"
    logits = as_tensor(who, "logits", logits)
    logits = widen(check_rows(who, "logits", logits, ("N", "C")))
    labels = as_ids(who, "labels", labels, ("logits", logits))
    outside = int(((labels < 0) | (labels >= logits.shape[1])).sum())
    if outside:
        raise ValueError(
            f"{who}: labels must be from 0 to {logits.shape[1] - 1}, and {outside} are not"
        )
    log_confidence, choice = logits.log_softmax(1).max(1)
    return _binned(who, log_confidence.double().exp(), choice == labels, bins)


@full_precision
@torch.no_grad()
def retrieval_calibration_error(
    x: Any,
    y: Any,
    logit_scale: float | Tensor,
    *,
    bins: int = 15,
    x_ids: Any = None,
    y_ids: Any = None,
    normalize: bool = True,
    backend: str | None = None,
) -> Calibration:
    """The expected calibration error of retrieval: each x chooses among all y.

    In O((N + M) * D) memory. With class embeddings as y, labels as x_ids and class numbers as
    y_ids it is that of zero-shot classification.

    Args:
        x, y, x_ids, y_ids, normalize: as in `retrieval_recall`.
        logit_scale: a positive number or a tensor of one element, 1 / temperature.
        bins: how many.
        backend: passed to `pairwise_rank` and `pairwise_lse`.

    Raises:
        TypeError, ValueError: a type, shape, device or number that does not fit; a confidence that
            is NaN.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    who = "retrieval_calibration_error"
    x, y, x_ids, y_ids = labelled_rows(who, x, y, x_ids, y_ids, normalize)
    scale = as_scale(who, x, logit_scale, "logit_scale")
    if not scale > 0:
        raise ValueError(f"{who}: logit_scale must be positive, got {float(scale)}")
    largest, choice, _ = pairwise_rank(x, y, backend=backend)
    # against the others alone a confidence near 1 is exact, and never above it
    others = pairwise_lse(
        x, y, scale, q_ids=choice, k_ids=torch.arange(len(y), device=y.device), backend=backend
    )
    confidence = (scale * largest - others).double().sigmoid()
    return _binned(who, confidence, x_ids == y_ids[choice], bins)


def _binned(who: str, confidence: Tensor, right: Tensor, bins: int) -> Calibration:
    if isinstance(bins, bool) or not isinstance(bins, int) or bins < 1:
        raise ValueError(f"{who}: bins must be a positive whole number, got {bins!r}")
    unsure = int(confidence.isnan().sum())
    if unsure:
        raise ValueError(f"{who}: the confidences of {unsure} rows are NaN")
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=confidence.device)
    # the bin whose upper edge is the first not below; a confidence is above 0
    bin = torch.bucketize(confidence, edges[1:-1])
    count = bin.bincount(minlength=bins)
    accuracy, mean = (bin.bincount(v.double(), minlength=bins) / count for v in (right, confidence))
    gaps = (accuracy - mean).abs().nan_to_num(0.0)
    error = (count.double() / len(bin) * gaps).sum()
    return Calibration(float(error), float(gaps.max()), count, accuracy, mean)
