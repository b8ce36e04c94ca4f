"""What the embeddings are like, in plain torch. Rows are unit vectors; row i is pair i."""

from __future__ import annotations

import torch
from torch import Tensor


def recall(queries: Tensor, keys: Tensor, k: int) -> float:
    """Share of queries [N, D] whose own key [N, D] is among the k most similar."""
    scores = queries @ keys.T
    better = (scores > scores.diagonal()[:, None]).sum(1)
    return (better < k).double().mean().item()


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of pairs: 0 where both rows agree, 2 where they know nothing."""
    return (x - y).square().sum(1).mean().item()


def uniformity(x: Tensor, t: float = 2.0) -> float:
    """log E exp(-t |x_i - x_j|^2) over pairs of rows: 0 for one point, lower for well spread."""
    return torch.pdist(x).square().mul(-t).exp().mean().log().item()


def gap(x: Tensor, y: Tensor) -> float:
    """Distance between the means of the two modalities."""
    return (x.mean(0) - y.mean(0)).norm().item()


def measure(image: Tensor, text: Tensor) -> dict[str, float]:
    """All of the above, by name; image, text: [N, D] unit rows."""
    return {
        "recall@1 image to text": recall(image, text, 1),
        "recall@1 text to image": recall(text, image, 1),
        "recall@10 image to text": recall(image, text, 10),
        "recall@10 text to image": recall(text, image, 10),
        "alignment": alignment(image, text),
        "uniformity of images": uniformity(image),
        "uniformity of texts": uniformity(text),
        "gap": gap(image, text),
    }
