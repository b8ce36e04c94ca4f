"""Two pictures per op: time against N and memory against N, log-log, one line per contender."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from bench.machine import slug
from bench.targets import OWN, Row

# Okabe and Ito: told apart with any colour vision
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
THICK = (*OWN, "cuda", "triton")
QUANTITIES = {"median": ("time", "ms", 1e3), "peak_mb": ("memory", "MB", 1.0)}


def draw(op: str, machine: dict[str, Any], rows: list[Row], folder: Path) -> list[Path]:
    """Write the PNGs of one op's forward and backward; returns their paths."""
    chosen = [r for r in rows if r["mode"] == "fwd+bwd" and r["bench"] in ("rate", "loss", "small")]
    if not chosen:
        return []
    width = max(row["d"] for row in chosen if row["bench"] != "small")
    chosen = [row for row in chosen if row["d"] == width]
    measured = [key for key in QUANTITIES if any(row[key] for row in chosen)]
    return [_picture(op, machine, chosen, key, folder) for key in measured]


def _picture(op: str, machine: dict[str, Any], rows: list[Row], key: str, folder: Path) -> Path:
    name, unit, factor = QUANTITIES[key]
    dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
    # own lines first, so that mmfast has the same colour in every picture
    contenders = sorted({row["contender"] for row in rows}, key=lambda c: (c not in THICK, c))
    figure, axes = plt.subplots(
        1,
        len(dtypes),
        figsize=(5 * len(dtypes), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, dtype in zip(axes[0], dtypes, strict=True):
        for colour, contender in zip(cycle(COLOURS), contenders, strict=False):
            points = sorted(
                (row["n"], factor * row[key])
                for row in rows
                # a logarithm has no place for what did not grow
                if row["dtype"] == dtype and row["contender"] == contender and row[key]
            )
            if points:
                own = contender in THICK
                axis.plot(
                    *zip(*points, strict=True),
                    marker="o",
                    markersize=5 if own else 4,
                    linewidth=2.5 if own else 1.5,
                    color=colour,
                    label=contender,
                )
        _dress(axis, dtype, sorted({row["n"] for row in rows}))
    axes[0][0].set_ylabel(f"{name}, {unit}")
    axes[0][0].legend(frameon=False)
    figure.suptitle(f"{op}, forward and backward, D={rows[0]['d']} · {machine['device']}")
    path = folder / f"{op}-{slug(machine['device'])}-{name}.png"
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _dress(axis: Axes, dtype: str, sizes: list[int]) -> None:
    axis.set(xscale="log", yscale="log", xlabel="N", title=dtype)
    axis.set_xticks(sizes, [str(size) for size in sizes])
    axis.minorticks_off()
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
