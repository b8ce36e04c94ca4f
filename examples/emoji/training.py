"""The training loop, the same for every recipe."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from data import Pairs
from recipes import Recipe
from torch import Tensor
from tqdm import tqdm

BATCH = 512


@dataclass(frozen=True)
class Run:
    """One training: what it trained, the loss of every step, and how long it took."""

    model: Recipe
    losses: list[float]
    epochs: int
    seconds: float


def optimizer_of(model: Recipe) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=model.learning_rate)


def step(model: Recipe, optimizer: torch.optim.Optimizer, image: Tensor, text: Tensor) -> float:
    """One step of training with features of both modalities; returns its loss."""
    value = model.loss(image, text)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def train(
    pairs: Pairs,
    recipe: Callable[[], Recipe],
    *,
    label: str,
    epochs: int,
    seconds: float = math.inf,
    seed: int = 0,
    batch: int = BATCH,
) -> Run:
    """Train fresh heads for some epochs, fewer if the seconds run out first.

    The seed alone decides the first weights, the batches and the dropout, so two runs that
    differ in nothing but the loss see the same numbers.
    """
    torch.manual_seed(seed)
    model = recipe()
    optimizer = optimizer_of(model)
    batches = len(pairs) // batch
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=epochs * batches, desc=f"training ({label})", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(pairs)).split(batch)[:batches]:
                losses.append(step(model, optimizer, pairs.image[rows], pairs.text[rows]))
                bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            spent = time.perf_counter() - start
            if spent > seconds:
                break
    return Run(model, losses, len(losses) // batches, spent)
