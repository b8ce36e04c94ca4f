"""How much each head of a multimodal model should weigh, by what it overfits and what it learns.

Between two checkpoints the loss L_k of head k (one for each modality and one for all together)
changes on training data (T) and on held-out data (V):

    overfit_k = |(V - T)_after - (V - T)_before|        learned_k = V_before - V_after
    weight_k = learned_k / overfit_k^2, divided by their sum

Source: Wang, Tran and Feiszli, What Makes Training Multi-modal Classification Networks Hard?, CVPR
2020 (arXiv 1905.12681). A third-party code (MultiBench) takes end values for differences and
absolute values, which is another formula.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.gap._inputs import as_tensor


def gradient_blending_weights(
    train_before: Any, held_out_before: Any, train_after: Any, held_out_after: Any
) -> Tensor:
    """The weights of the losses of K heads, which sum to 1.

    A head that grew worse on held-out data has a negative weight: the published formula says
    nothing of it, train without that head.

    Args:
        train_before, held_out_before, train_after, held_out_after: [K] tensors, arrays or
            sequences of numbers, the losses of each head at two checkpoints.

    Returns:
        float64 [K].

    Raises:
        ValueError: shapes differ; a head overfits by nothing, which would have all the weight; the
            heads together learned nothing.
    """
    losses = {
        "train_before": train_before,
        "held_out_before": held_out_before,
        "train_after": train_after,
        "held_out_after": held_out_after,
    }
    made = {name: _vector(name, value) for name, value in losses.items()}
    for name, value in made.items():
        if value.shape != made["train_before"].shape:
            raise ValueError(
                f"gradient_blending_weights: {name} must be {list(made['train_before'].shape)} "
                f"like train_before, got {list(value.shape)}"
            )
    train_0, held_out_0, train_1, held_out_1 = made.values()
    overfit = (held_out_1 - train_1) - (held_out_0 - train_0)
    return _shares("gradient_blending_weights", held_out_0 - held_out_1, overfit.square())


def gradient_blending_weights_of_gradients(gradient: Any, samples: Any, estimates: Any) -> Tensor:
    """The weights that blend K estimates of a gradient best: ∝ <gradient, v_k> / sigma_k^2.

    sigma_k^2 = mean_s <samples_s - gradient, v_k>^2. They minimise the expected overfitting per
    progress, where the errors of the estimates are uncorrelated; the form above is this from
    losses alone.

    Args:
        gradient: [P], of the true loss, as from held-out data.
        samples: [S, P], of training batches.
        estimates: [K, P], the v_k.

    Returns:
        float64 [K], which sum to 1.

    Raises:
        ValueError: shapes that do not fit; an estimate without variance; no progress at all.
    """
    who = "gradient_blending_weights_of_gradients"
    g, s, v = (
        as_tensor(who, name, x).double()
        for name, x in (("gradient", gradient), ("samples", samples), ("estimates", estimates))
    )
    if g.ndim != 1:
        raise ValueError(f"{who}: gradient must be [P], got {list(g.shape)}")
    for name, x in (("samples", s), ("estimates", v)):
        if x.ndim != 2 or x.shape[1] != len(g):
            raise ValueError(f"{who}: {name} must be [.., {len(g)}], got {list(x.shape)}")
    return _shares(who, v @ g, ((s - g) @ v.T).square().mean(0))


def _vector(name: str, x: Any) -> Tensor:
    vector = x if isinstance(x, Tensor) else torch.from_numpy(np.array(x, dtype=np.float64))
    if vector.ndim != 1 or len(vector) == 0:
        raise ValueError(f"gradient_blending_weights: {name} must be [K], got {list(vector.shape)}")
    return vector.detach().double()


def _shares(who: str, progress: Tensor, cost: Tensor) -> Tensor:
    free = (cost == 0).nonzero().flatten().tolist()
    if free:
        raise ValueError(f"{who}: {free} overfit by nothing, so that no weight is right for them")
    weights = progress / cost
    if not weights.sum() > 0:
        raise ValueError(f"{who}: there is no progress to share, it sums to {float(weights.sum())}")
    return weights / weights.sum()
