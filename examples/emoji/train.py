"""Teach two projection heads one joint space for emoji pictures and their names.

Trains once with mmfast's loss and once with the dense loss from the same seed, prints what was
learned and what either loss costs, and leaves pictures and metrics.json behind.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import compare
import pictures
import tables
import torch
import torch.nn.functional as F
from data import Pairs, load, split
from metrics import measure
from torch import Tensor, nn
from tqdm import tqdm

import mmfast

BATCH = 512
REQUIRED_RECALL = 0.25


class TwoHeads(nn.Module):
    """One small head per modality into a joint space, and the scale of its similarities."""

    def __init__(self, image_width: int = 1280, text_width: int = 384, width: int = 256):
        super().__init__()
        self.image = self.head(image_width, width)
        self.text = self.head(text_width, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    @staticmethod
    def head(width_in: int, width_out: int, hidden: int = 512) -> nn.Sequential:
        return nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(width_in, hidden),
            nn.GELU(),
            nn.Dropout(0.2),
            nn.Linear(hidden, width_out),
        )

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(image [B, 256], text [B, 256], logit_scale []): unit rows, a scale of 100 at most."""
        scale = self.log_scale.exp().clamp(max=100)
        return F.normalize(self.image(image)), F.normalize(self.text(text)), scale

    @torch.no_grad()
    def embed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Both modalities of these pairs, without dropout."""
        self.eval()
        image, text, _ = self(pairs.image, pairs.text)
        self.train()
        return image, text

    def optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@dataclass(frozen=True)
class Run:
    """One training: the trained heads, the loss of every step, and how long it took."""

    model: TwoHeads
    losses: list[float]
    epochs: int
    seconds: float


def step(
    model: TwoHeads,
    optimizer: torch.optim.Optimizer,
    loss: compare.Loss,
    image_features: Tensor,
    text_features: Tensor,
) -> float:
    """One step of training; returns its loss."""
    image, text, logit_scale = model(image_features, text_features)
    # the one line that mmfast changes: loss is mmfast.clip_loss
    value = loss(image, text, logit_scale)
    optimizer.zero_grad()
    value.backward()
    optimizer.step()
    return value.item()


def train(
    pairs: Pairs,
    loss: compare.Loss,
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
    model = TwoHeads()
    optimizer = model.optimizer()
    batches = len(pairs) // batch
    losses: list[float] = []
    start = time.perf_counter()
    with tqdm(total=epochs * batches, desc=f"training ({label})", unit="step") as bar:
        for _ in range(epochs):
            for rows in torch.randperm(len(pairs)).split(batch)[:batches]:
                losses.append(step(model, optimizer, loss, pairs.image[rows], pairs.text[rows]))
                bar.update()
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
            spent = time.perf_counter() - start
            if spent > seconds:
                break
    return Run(model, losses, len(losses) // batches, spent)


def costs(pairs: Pairs, batch: int, threads: int) -> dict[str, dict[str, float | None]]:
    """Per loss: milliseconds of it alone and of a whole step, bytes saved, bytes at its peak."""
    inputs = compare.loss_inputs(batch)
    alone, whole, saved = {}, {}, {}
    for name, loss in compare.LOSSES.items():
        model = TwoHeads()
        features = (pairs.image[:batch], pairs.text[:batch])
        alone[name] = partial(compare.forward_backward, loss, inputs)
        whole[name] = partial(step, model, model.optimizer(), loss, *features)
        saved[name] = compare.saved_bytes(loss, inputs)
    loss_ms = compare.median_ms(alone, rounds=15)
    step_ms = compare.median_ms(whole, rounds=9)
    peak = compare.peak_bytes(batch, threads)
    return {
        name: {
            "loss_ms": loss_ms[name],
            "step_ms": step_ms[name],
            "saved_bytes": saved[name],
            "peak_bytes": peak[name],
        }
        for name in compare.LOSSES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    parser.add_argument("--epochs", type=int, default=60, help="of three steps each")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="stop the first training early after these"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)

    pairs = load()
    training, held_out = split(pairs)
    print(f"{len(training):,} training pairs, {len(held_out)} held out, {args.threads} threads")

    fast = train(
        training,
        mmfast.clip_loss,
        label="mmfast",
        epochs=args.epochs,
        seconds=args.seconds,
        seed=args.seed,
    )
    dense = train(
        training, compare.dense_clip_loss, label="dense", epochs=fast.epochs, seed=args.seed
    )
    # the same seed makes the weights that both runs started from
    torch.manual_seed(args.seed)
    untrained = TwoHeads()

    before, after = untrained.embed(held_out), fast.model.embed(held_out)
    learned = {
        "untrained": measure(*before),
        "mmfast": measure(*after),
        "dense": measure(*dense.model.embed(held_out)),
    }
    difference = max(abs(a - b) for a, b in zip(fast.losses, dense.losses, strict=True))
    print("measuring what either loss costs ...")
    cost = {size: costs(pairs, size, args.threads) for size in (BATCH, len(pairs))}

    args.out.mkdir(parents=True, exist_ok=True)
    files = [
        pictures.loss_curves(args.out / "loss.png", fast.losses, dense.losses),
        pictures.joint_space(args.out / "gap.png", before, after),
        pictures.nearest_captions(args.out / "captions.png", held_out, *after),
        args.out / "metrics.json",
    ]
    report = {
        "seed": args.seed,
        "threads": args.threads,
        "epochs": fast.epochs,
        "training_seconds": {"mmfast": fast.seconds, "dense": dense.seconds},
        "held_out": learned,
        "largest_loss_difference": difference,
        "cost": cost,
        "losses": {"mmfast": fast.losses, "dense": dense.losses},
    }
    files[-1].write_text(json.dumps(report, indent=1) + "\n")

    print(f"\n{tables.learned(learned, len(held_out))}\n\n{tables.costs(cost)}\n")
    print(
        f"The two loss curves never differ by more than {difference:.1e} in {len(fast.losses)} "
        f"steps. Trained for {fast.seconds:.1f} s (mmfast) and {dense.seconds:.1f} s (dense)."
    )
    print("See " + "\n    ".join(str(file) for file in files))

    lowest = min(value for name, value in learned["mmfast"].items() if "recall@1 " in name)
    if lowest < REQUIRED_RECALL:
        raise SystemExit(
            f"Held-out recall@1 is {lowest:.3f}, but {REQUIRED_RECALL} is expected of this data: "
            f"give it more --epochs or --seconds (it had {fast.epochs} epochs)."
        )


if __name__ == "__main__":
    main()
