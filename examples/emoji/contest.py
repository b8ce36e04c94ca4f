"""Every loss from one seed: what each of them learns and costs, as one table and one picture."""

from __future__ import annotations

import argparse
import json
from functools import partial

import compare
import pictures
import tables
from data import Pairs
from metrics import measure
from recipes import RECIPES, Gmc, Recipe
from training import BATCH, optimizer_of, step, train

import mmfast


def learned(model: Recipe, held_out: Pairs) -> dict[str, float | None]:
    """All measures by name, and the uniformity of both modalities as one."""
    values = measure(*model.embed(held_out))
    both = [values[f"uniformity of {modality}"] for modality in ("images", "texts")]
    return {**values, "uniformity": sum(both) / 2}


def step_ms(pairs: Pairs, names: list[str]) -> dict[str, float]:
    """Median milliseconds of a step of training with each loss; they take turns."""
    steps = {}
    for name in names:
        model = RECIPES[name]()
        features = pairs.image[:BATCH], pairs.text[:BATCH]
        steps[name] = partial(step, model, optimizer_of(model), *features)
    return compare.median_ms(steps, rounds=9)


def with_one_missing(model: Gmc, pairs: Pairs) -> dict[str, dict[str, float]]:
    """How often a sample is found by what is left of it."""
    image, text = model.embed(pairs)
    joint = model.embed_joint(pairs)
    # as the paper does it: the joint embedding, or without all modalities the mean of the others
    whole = mmfast.gmc_embedding([image, text], joint)
    picture, name = (mmfast.gmc_embedding(parts) for parts in ([image, None], [None, text]))
    searches = {
        "picture alone to whole": (picture, whole),
        "name alone to whole": (name, whole),
        "picture alone to name alone": (picture, name),
    }
    found = {what: mmfast.retrieval_recall(*sides, ks=(1, 10)) for what, sides in searches.items()}
    return {
        what: {f"recall@{k}": share for k, share in recall.x_to_y.items()}
        for what, recall in found.items()
    }


def run(names: list[str], training: Pairs, held_out: Pairs, args: argparse.Namespace) -> None:
    """Train with each loss, print the table, leave losses.png and losses.json in args.out."""
    options = {"epochs": args.epochs, "seconds": args.seconds, "seed": args.seed}
    runs = {name: train(training, RECIPES[name], label=name, **options) for name in names}
    print("measuring what each loss costs ...")
    times, peaks = step_ms(training, names), compare.peak_bytes(names, BATCH, args.threads)
    results = {name: learned(run.model, held_out) for name, run in runs.items()}
    for name, row in results.items():
        row |= {"step_ms": times[name], "peak_bytes": peaks[name]}
    picture, numbers = args.out / "losses.png", args.out / "losses.json"
    pictures.uniformity_and_alignment(picture, results)
    report = {
        "seed": args.seed,
        "threads": args.threads,
        "training_seconds": {name: run.seconds for name, run in runs.items()},
        "results": results,
        "losses": {name: run.losses for name, run in runs.items()},
    }
    print(f"\n{tables.contest(results, len(held_out))}\n")
    if "gmc" in runs:
        missing = with_one_missing(runs["gmc"].model, held_out)
        report["gmc, a modality missing"] = missing
        print(f"{tables.searches(missing)}\n")
    numbers.write_text(json.dumps(report, indent=1) + "\n")
    print(f"See {picture}\n    {numbers}")
