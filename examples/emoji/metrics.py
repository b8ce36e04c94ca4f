"""What the embeddings are like, by name. Row i is pair i."""

from __future__ import annotations

from torch import Tensor

import mmfast


def measure(image: Tensor, text: Tensor) -> dict[str, float]:
    """Recall both ways, alignment, uniformity and gap; image, text: [N, D]."""
    found = mmfast.retrieval_recall(image, text, ks=(1, 10))
    return {
        "recall@1 image to text": found.x_to_y[1],
        "recall@1 text to image": found.y_to_x[1],
        "recall@10 image to text": found.x_to_y[10],
        "recall@10 text to image": found.y_to_x[10],
        "alignment": mmfast.alignment(image, text).item(),
        "uniformity of images": mmfast.uniformity(image).item(),
        "uniformity of texts": mmfast.uniformity(text).item(),
        "gap": mmfast.modality_gap(image, text).distance.item(),
    }
