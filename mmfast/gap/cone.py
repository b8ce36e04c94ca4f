"""Why encoders start in narrow cones: cosines under random initialisation, and their theory.

A random layer h -> phi(W h + b), W and b from N(0, 1 / width), raises the cosine c of two inputs.
Over wide layers, with r^2 = |h|^2, the outputs before phi have variance (r^2 + 1) / width and
correlation rho = (r^2 c + 1) / (r^2 + 1), and the next cosine is

    c' = E phi(u) phi(v) / E phi(u)^2       of u, v normal with that variance and correlation

which for ReLU is (sqrt(1 - rho^2) + rho (pi - arccos rho)) / pi, with r'^2 = (r^2 + 1) / 2.

Sources: Liang et al., Mind the Gap, NeurIPS 2022 (arXiv 2203.02053), section 3 and Fig. 2; Cho and
Saul, Kernel Methods for Deep Learning, NeurIPS 2009, for E phi(u) phi(v) of ReLU.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmfast.gap._inputs import as_rows, full_precision
from mmfast.gap.measures import cosine_stats
from mmfast.ops._statistics import PairwiseStats

Activation = Literal["relu", "leaky_relu", "linear", "maxout", "sigmoid", "tanh"]
LEAK = 0.01


@dataclass(frozen=True, eq=False)
class Cone:
    """Cosines of the pairs of rows, one PairwiseStats for each initialisation.

    axes: [S, D] float64, the mean unit row of each; its square length is the mean cosine, a row
    with itself included.
    """

    stats: tuple[PairwiseStats, ...]
    axes: Tensor

    @property
    def mean(self) -> float:
        """The mean cosine, over all initialisations."""
        return math.fsum(s.mean for s in self.stats) / len(self.stats)

    @property
    def min(self) -> float:
        """The least cosine of all."""
        return min(s.min for s in self.stats)

    @property
    def std_of_means(self) -> float:
        """How much the mean cosine varies between initialisations; NaN of one."""
        if len(self.stats) < 2:
            return math.nan
        return float(np.std([s.mean for s in self.stats], ddof=1))

    @property
    def initialization_share(self) -> float:
        """The share of the variance of unit rows that the initialisation explains; NaN of one.

        Near 1 every initialisation has its own narrow cone, and two encoders start apart. Of a
        linear last layer it is at least the mean cosine of the layer before (Theorem 2).
        """
        S = len(self.axes)
        if S < 2:
            return math.nan
        own = self.axes.square().sum(1).mean()
        # of two different initialisations, so that few of them bias nothing
        crossed = (self.axes.sum(0).square().sum() / S - own) / (S - 1)
        return float((own - crossed) / (1 - crossed))


@full_precision
@torch.no_grad()
def cone_effect(
    encoder: Callable[[int], Any] | Any,
    seeds: Sequence[int] = (0, 1, 2, 3, 4),
    *,
    bins: int | None = 256,
    backend: str | None = None,
) -> Cone:
    """Cosines between the outputs of an encoder, for each of its initialisations.

    Args:
        encoder: given a seed, the rows [N, D] of an encoder initialised from it, as a tensor or
            array of a floating type; or such rows themselves, which are one initialisation.
        seeds: what to initialise from; of no use with rows.
        bins: of each histogram of cosines, as in `cosine_stats`.
        backend: passed to `cosine_stats`.

    Returns:
        Cone. A pair of a row with itself is left out, as in the published statistics of encoders.

    Raises:
        TypeError, ValueError: rows of a type or shape that does not fit; no seed.
        RuntimeError: `backend` cannot run here; the message says why.
    """
    if callable(encoder) and not seeds:
        raise ValueError("cone_effect: seeds must hold one or more, got none")
    outputs = (encoder(seed) for seed in seeds) if callable(encoder) else iter([encoder])
    stats, axes = [], []
    for output in outputs:
        (rows,) = as_rows("cone_effect", True, least=2, rows=output)
        stats.append(cosine_stats(rows, bins=bins, normalize=False, backend=backend))
        axes.append(rows.double().mean(0))
    return Cone(tuple(stats), torch.stack(axes).cpu())


@dataclass(frozen=True, eq=False)
class MLPCone:
    """Mean cosines after 0, 1, ... `depth` layers, over all pairs with a row and itself included.

    measured: [S, depth + 1], for each seed. predicted: [depth + 1], of infinitely wide layers.
    Both float64.
    """

    activation: str
    measured: Tensor
    predicted: Tensor


@torch.no_grad()
def mlp_cone(
    activation: Activation = "relu",
    *,
    depth: int = 25,
    rows: int = 1024,
    width: int = 512,
    seeds: Sequence[int] = (0,),
) -> MLPCone:
    """The mean cosine of normal inputs, layer by layer through a random network.

    Args:
        activation: "relu", "leaky_relu" (slope 0.01), "linear", "maxout" (of two maps), "sigmoid"
            or "tanh".
        depth, rows, width: of the network; the published ones by default.
        seeds: of the inputs and the weights, one network for each.

    Raises:
        ValueError: an unknown activation, a number below 1, no seed.
    """
    if activation not in _ACTIVATIONS:
        names = ", ".join(repr(name) for name in _ACTIVATIONS)
        raise ValueError(f"mlp_cone: activation must be one of {names}, got {activation!r}")
    for name, n in (("depth", depth), ("rows", rows), ("width", width), ("seeds", len(seeds))):
        if n < 1:
            raise ValueError(f"mlp_cone: {name} must be 1 or more, got {n}")
    measured = [
        # the square length of the mean unit row is the mean of all products
        [
            float(F.normalize(h, dim=1).double().mean(0).square().sum())
            for h in mlp_layers(activation, depth, rows, width, seed)
        ]
        for seed in seeds
    ]
    c = torch.tensor(predicted_cosines(activation, depth, width), dtype=torch.float64)
    return MLPCone(activation, torch.tensor(measured, dtype=torch.float64), c + (1 - c) / rows)


def mlp_layers(
    activation: Activation, depth: int, rows: int, width: int, seed: int
) -> Iterator[Tensor]:
    """Normal inputs [rows, width] and the outputs of each layer of a random network, float32."""
    random = torch.Generator().manual_seed(seed)
    function, maps, _ = _ACTIVATIONS[activation]
    h = torch.randn(rows, width, generator=random)
    yield h
    for _ in range(depth):
        weights = torch.randn(maps, width + 1, width, generator=random) / width**0.5
        h = function(*(torch.addmm(w[-1], h, w[:-1]) for w in weights))
        yield h


def predicted_cosines(activation: Activation, depth: int, width: int) -> list[float]:
    """The cosine of two different inputs after 0, 1, ... `depth` wide layers."""
    moments = _ACTIVATIONS[activation][2]
    cosine, square = 0.0, float(width)
    cosines = [cosine]
    for _ in range(depth):
        variance, rho = (square + 1) / width, (square * cosine + 1) / (square + 1)
        rho = min(rho, 1.0)  # deep in the cone rounding goes past it
        same, mixed = (moments(variance, r) for r in (1.0, rho))
        cosine, square = mixed / same, width * same
        cosines.append(cosine)
    return cosines


def _leaky(variance: float, rho: float, slope: float) -> float:
    kappa = (math.sqrt(1 - rho * rho) + rho * (math.pi - math.acos(rho))) / math.pi
    return variance * (slope * rho + (1 - slope) ** 2 * kappa / 2)


def _maxout(variance: float, rho: float) -> float:
    # max(a, b) = (a + b) / 2 + |a - b| / 2, whose two parts are independent
    return variance * (rho / 2 + (math.sqrt(1 - rho * rho) + rho * math.asin(rho)) / math.pi)


def _smooth(function: Callable[[Any], Any]) -> Callable[[float, float], float]:
    """E function(u) function(v) by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(64)
    weights = weights / weights.sum()

    def moment(variance: float, rho: float) -> float:
        u = nodes[:, None]
        v = rho * u + math.sqrt(1 - rho * rho) * nodes
        values = function(math.sqrt(variance) * u) * function(math.sqrt(variance) * v)
        return float(weights @ values @ weights)

    return moment


# the function, of how many linear maps, and E phi(u) phi(v) given variance and correlation
_ACTIVATIONS: dict[str, tuple[Callable[..., Tensor], int, Callable[[float, float], float]]] = {
    "relu": (torch.relu, 1, lambda variance, rho: _leaky(variance, rho, 0.0)),
    "leaky_relu": (
        lambda h: F.leaky_relu(h, LEAK),
        1,
        lambda variance, rho: _leaky(variance, rho, LEAK),
    ),
    "linear": (lambda h: h, 1, lambda variance, rho: variance * rho),
    "maxout": (torch.maximum, 2, _maxout),
    "sigmoid": (torch.sigmoid, 1, _smooth(lambda u: 1 / (1 + np.exp(-u)))),
    "tanh": (torch.tanh, 1, _smooth(np.tanh)),
}
