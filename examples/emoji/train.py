"""Teach two projection heads one joint space for emoji pictures and their names.

Trains once with mmfast's loss and once with the dense loss from the same seed, prints what was
learned and what either loss costs, and leaves pictures, metrics.json and a report on the modality
gap behind. With --loss it trains with each of those losses instead and compares them (contest.py).
"""

from __future__ import annotations

import argparse
import json
import math
from functools import partial
from pathlib import Path

import compare
import contest
import pictures
import tables
import torch
from data import Pairs, load, split
from metrics import measure
from recipes import RECIPES, Scaled
from training import BATCH, optimizer_of, step, train

import mmfast

REQUIRED_RECALL = 0.25


def costs(pairs: Pairs, batch: int, threads: int) -> dict[str, dict[str, float | None]]:
    """Per loss: milliseconds of it alone and of a whole step, bytes saved, bytes at its peak."""
    inputs = compare.loss_inputs(batch)
    alone, whole, saved = {}, {}, {}
    for name, loss in compare.LOSSES.items():
        model = Scaled(loss)
        features = (pairs.image[:batch], pairs.text[:batch])
        alone[name] = partial(compare.forward_backward, loss, inputs)
        whole[name] = partial(step, model, optimizer_of(model), *features)
        saved[name] = compare.saved_bytes(loss, inputs)
    loss_ms = compare.median_ms(alone, rounds=15)
    step_ms = compare.median_ms(whole, rounds=9)
    peak = compare.peak_bytes(compare.LOSSES, batch, threads)
    return {
        name: {
            "loss_ms": loss_ms[name],
            "step_ms": step_ms[name],
            "saved_bytes": saved[name],
            "peak_bytes": peak[name],
        }
        for name in compare.LOSSES
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--loss",
        nargs="+",
        choices=[*RECIPES, "all"],
        metavar="NAME",
        help=f"compare these losses: {', '.join(RECIPES)} or all",
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    parser.add_argument("--epochs", type=int, default=60, help="of three steps each")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="stop the first training, with --loss each, early after these",
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    pairs = load()
    training, held_out = split(pairs)
    print(f"{len(training):,} training pairs, {len(held_out)} held out, {args.threads} threads")
    args.out.mkdir(parents=True, exist_ok=True)
    if args.loss:
        names = [name for name in RECIPES if name in args.loss or "all" in args.loss]
        contest.run(names, training, held_out, args)
    else:
        two_losses(pairs, training, held_out, args)


def two_losses(pairs: Pairs, training: Pairs, held_out: Pairs, args: argparse.Namespace) -> None:
    """CLIP's loss twice, mmfast's and the dense one: learned alike, at what cost?"""
    fast = train(
        training,
        partial(Scaled, mmfast.clip_loss),
        label="mmfast",
        epochs=args.epochs,
        seconds=args.seconds,
        seed=args.seed,
    )
    dense = train(
        training,
        partial(Scaled, compare.dense_clip_loss),
        label="dense",
        epochs=fast.epochs,
        seed=args.seed,
    )
    # the same seed makes the weights that both runs started from
    torch.manual_seed(args.seed)
    untrained = Scaled(mmfast.clip_loss)

    before, after = untrained.embed(held_out), fast.model.embed(held_out)
    learned = {
        "untrained": measure(*before),
        "mmfast": measure(*after),
        "dense": measure(*dense.model.embed(held_out)),
    }
    difference = max(abs(a - b) for a, b in zip(fast.losses, dense.losses, strict=True))
    print("measuring what either loss costs ...")
    cost = {size: costs(pairs, size, args.threads) for size in (BATCH, len(pairs))}

    files = [
        pictures.loss_curves(args.out / "loss.png", fast.losses, dense.losses),
        pictures.joint_space(args.out / "gap.png", before, after),
        pictures.nearest_captions(args.out / "captions.png", held_out, *after),
        args.out / "metrics.json",
    ]
    scale = fast.model.scale().item()
    gap = args.out / "gap"
    mmfast.gap_report(*after, gap, names=("pictures", "names"), logit_scale=scale)
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
    print(f"What the {len(held_out)} held-out pairs say of the gap: {gap / 'report.html'}")

    lowest = min(value for name, value in learned["mmfast"].items() if "recall@1 " in name)
    if lowest < REQUIRED_RECALL:
        raise SystemExit(
            f"Held-out recall@1 is {lowest:.3f}, but {REQUIRED_RECALL} is expected of this data: "
            f"give it more --epochs or --seconds (it had {fast.epochs} epochs)."
        )


if __name__ == "__main__":
    main()
