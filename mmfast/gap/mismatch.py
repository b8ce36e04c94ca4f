"""Why a gap can pay: with mismatched pairs and a low temperature the contrastive loss prefers one.

Pairs stand on the unit sphere at given azimuths. Texts move along their meridians from pole to pole
while images stay on the equator, or move the other way; two texts may be swapped, as mislabelled
pairs are. At the equator the modalities meet.

Source: Liang et al., Mind the Gap, NeurIPS 2022 (arXiv 2203.02053), Fig. 3 and its code, which has
six pairs 20 degrees apart (the paper says 15) with the first two texts swapped.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfast.losses.clip import clip_loss


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
    logit_scales: Sequence[float] = (1, 5, 35, 50, 100),
) -> Mismatch:
    """The contrastive loss of a few pairs as a gap opens between them.

    Args:
        azimuths: degrees, one for each pair.
        swap: two pairs whose texts change places; None leaves all matched.
        elevations: degrees from -90 to 90; texts stand that far below the equator.
        both_move: images stand as far above it.
        logit_scales: 1 / temperature, one or more.

    Raises:
        ValueError: no azimuth, elevation or scale; swap names no two pairs.
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
    angles = torch.tensor(azimuths, dtype=torch.float64).deg2rad()
    distances, losses = [], []
    for elevation in elevations:
        image = _points(angles, elevation if both_move else 0.0)
        text = _points(angles[order], -elevation)
        distance = torch.linalg.vector_norm(image.mean(0) - text.mean(0))
        distances.append(math.copysign(float(distance), elevation))
        losses.append([float(clip_loss(image, text, float(scale))) for scale in logit_scales])
    columns = (elevations, distances, losses)
    return Mismatch(*(torch.tensor(values, dtype=torch.float64) for values in columns))


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
