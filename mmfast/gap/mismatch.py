"""Why a gap can pay: with mismatched pairs and a low temperature the contrastive loss prefers one.

Pairs stand on the unit sphere at given azimuths. Texts move along their meridians from pole to pole
while images stay on the equator, or move the other way; two texts may be swapped, as mislabelled
pairs are. At the equator the modalities meet.

Source: Liang et al., Mind the Gap, NeurIPS 2022 (arXiv 2203.02053), Fig. 3 and its code, which has
six pairs 20 degrees apart (the paper says 15) with the first two texts swapped, and nine pairs on
circles that both move, `NINE_PAIRS`. There it means to swap labels 3 and 8, of the two pairs that
stand close together, but assigns one tensor element after the other: 8 becomes the label of both,
`NINE_TARGETS`, and the published curve is that of one wrong pair, not of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

NINE_PAIRS = (0.0, 180.0, 90.0, 270.0, 45.0, 135.0, 315.0, 225.0, 275.4)
NINE_TARGETS = (0, 1, 2, 8, 4, 5, 6, 7, 8)


@dataclass(frozen=True, eq=False)
class Mismatch:
    """The loss of every elevation and scale; all float64.

    elevations: [E] degrees. distance: [E], of the two means, with the sign of the elevation.
    loss: [E, S], the symmetric contrastive loss.
    """

    elevations: Tensor
    distance: Tensor
    loss: Tensor


@torch.no_grad()
def mismatch_simulation(
    azimuths: Sequence[float] = (-20, 0, 20, 40, 60, 80),
    swap: tuple[int, int] | None = (0, 1),
    *,
    elevations: Sequence[float] = range(90, -91, -1),
    both_move: bool = False,
    targets: Sequence[int] | None = None,
    logit_scales: Sequence[float] = (1, 5, 35, 50, 100),
) -> Mismatch:
    """The contrastive loss of a few pairs as a gap opens between them.

    Args:
        azimuths: degrees, one for each pair.
        swap: two pairs whose texts change places; None leaves all matched.
        elevations: degrees from -90 to 90; texts stand that far below the equator.
        both_move: images stand as far above it.
        targets: which text the loss takes as right for each image, and which image for each text;
            by default those of its own place. They need be no permutation.
        logit_scales: 1 / temperature, one or more.

    Raises:
        ValueError: no azimuth, elevation or scale; swap names no two pairs, or targets no pair for
            each.
    """
    for name, values in (
        ("azimuths", azimuths),
        ("elevations", elevations),
        ("logit_scales", logit_scales),
    ):
        if len(values) == 0:
            raise ValueError(f"mismatch_simulation: {name} must hold one or more, got none")
    order = list(range(len(azimuths)))
    if swap is not None:
        if len(set(swap) & set(order)) != 2:
            raise ValueError(
                f"mismatch_simulation: swap must be two of the pairs 0 to {len(order) - 1}, "
                f"got {swap}"
            )
        i, j = swap
        order[i], order[j] = j, i
    right = torch.arange(len(order)) if targets is None else torch.tensor(list(targets))
    if len(right) != len(order) or not set(right.tolist()) <= set(order):
        raise ValueError(
            f"mismatch_simulation: targets must be {len(order)} of the pairs 0 to "
            f"{len(order) - 1}, got {tuple(right.tolist())}"
        )
    angles = torch.tensor(azimuths, dtype=torch.float64).deg2rad()
    distances, losses = [], []
    for elevation in elevations:
        image = _points(angles, elevation if both_move else 0.0)
        text = _points(angles[order], -elevation)
        distance = torch.linalg.vector_norm(image.mean(0) - text.mean(0))
        distances.append(math.copysign(float(distance), elevation))
        cosines = image @ text.T
        losses.append([_loss(float(scale) * cosines, right) for scale in logit_scales])
    columns = (elevations, distances, losses)
    return Mismatch(*(torch.tensor(values, dtype=torch.float64) for values in columns))


def _loss(logits: Tensor, targets: Tensor) -> float:
    """Symmetric cross-entropy; of a matrix so small that nothing beats it."""
    return float((F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2)


def _points(azimuths: Tensor, elevation: float) -> Tensor:
    """[N, 3] unit rows, degrees above the equator."""
    up = math.radians(elevation)
    return torch.stack(
        [
            math.cos(up) * azimuths.cos(),
            math.cos(up) * azimuths.sin(),
            torch.full_like(azimuths, math.sin(up)),
        ],
        1,
    )
