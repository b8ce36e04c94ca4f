"""The lines mmfast has set itself, each judged by its worst row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OWN = ("cpp", "mmfast")
LOSSES = (
    "m2_mix", "v_mix", "l_mix", "vl_mix", "hcl", "gmc", "siglip", "moco", "tagged_moco", "itc",
)  # fmt: skip
SPARSEMAX = ("sparsemax_peaked", "sparsemax_partial", "sparsemax_dense")


@dataclass(frozen=True)
class Verdict:
    """`met` is None where nothing was measured; `figure` and `where` describe the worst row."""

    claim: str
    figure: str
    where: str
    met: bool | None


def judge(rows: Iterable[Row], tiles: list[dict[str, float]]) -> list[Verdict]:
    """Every target against the rows of one machine, and how its tile fares against its limit."""
    rows = list(rows)
    return [
        _at_least("op forward, N ≥ 2048: ≥ 90 % of peak", _rate(rows, "fwd"), 90, "%"),
        _at_least("op fwd+bwd, N ≥ 2048: ≥ 85 % of peak", _rate(rows, "fwd+bwd"), 85, "%"),
        _tile(tiles),
        _at_most(
            "memory of the loss at N=16384: ≤ 6·N·D·4 bytes + 64 MB", _memory(rows), 100, "% of it"
        ),
        *(
            _at_least(f"loss, {dtype}: ≥ {bound}x {peer}", _speedup(rows, dtype, peer), bound, "x")
            for dtype, peer, bound in (
                ("float32", "dense", 2.3),
                ("float32", "torch chunked", 1.9),
                ("bfloat16", "dense", 2.0),
                ("bfloat16", "torch chunked", 3.5),
            )
        ),
        _at_least("small batches: never slower than dense", _small(rows), 1, "x"),
        _at_most(
            "one tower frozen: three products of four, ≤ 0.80 of the time", _frozen(rows), 0.8, "x"
        ),
        _at_least("1 → 2 threads: ≥ 1.9x", _threads(rows), 1.9, "x"),
        _at_most(
            "cost of a pair, N from 2048 to 65536: within 10 %", _growth(rows), 1.1, "x", digits=3
        ),
        _at_least("slerp: ≥ 80 % of the bandwidth of a copy", _bandwidth(rows), 80, "%"),
        _at_least("slerp: ≥ 4x the published formula", _mix(rows), 4, "x"),
        *(
            _at_least(
                f"{bench}: ≥ {bound}x {peer}",
                _ratios(_select(rows, bench=bench), peer, "mmfast"),
                bound,
                "x",
            )
            for bench, peer, bound in (
                ("m2_mix", "dense", 2.2),
                ("itc", "dense", 2.5),
                ("sampling", "softmax + multinomial", 5),
            )
        ),
        *(
            _at_least(
                f"statistics of one set, {what}: ≥ {bound} % of half a product at peak",
                _percent(
                    _select(
                        rows,
                        bench="statistics",
                        mode=mode,
                        contender="cpp",
                        n=8192,
                        dtype="float32",
                    )
                ),
                bound,
                "%",
            )
            for what, mode, bound in (
                ("no histogram", "moments", 85),
                ("256 bins", "histogram", 75),
            )
        ),
        _at_least(
            "ranks, float32, N=8192: ≥ 90 % of peak",
            _percent(_select(rows, bench="ranks", contender="cpp", n=8192, dtype="float32")),
            90,
            "%",
        ),
        *(
            _at_least(
                f"{loss}: time ≤ its products / (0.8 of peak)",
                _percent(_select(rows, bench=loss, contender="mmfast")),
                80,
                "% of peak",
            )
            for loss in LOSSES
        ),
        _at_least("sparsemax: ≥ 20x sorting", _sparsemax(rows, "sorting"), 20, "x"),
        _at_least(
            "sparsemax: not slower than entmax's top-k", _sparsemax(rows, "entmax, top-k"), 1, "x"
        ),
        _at_least(
            "fdt_pool forward, few codes: ≥ 85 % of peak",
            _percent(_select(rows, bench="fdt_few", mode="fwd", contender="cpp")),
            85,
            "%",
        ),
        _at_most(
            "fdt_pool, few codes: backward ≤ 0.15 of forward", _backward_share(rows), 0.15, "x"
        ),
        *(
            _at_least(
                f"fdt_pool {mode}, {what} codes: ≥ {bound}x plain torch",
                _ratios(_select(rows, bench=f"fdt_{what}", mode=mode), "eager", "cpp"),
                bound,
                "x",
            )
            for mode, what, bound in (("fwd+bwd", "few", 4.5), ("bwd", "all", 3))
        ),
        _at_most(
            "landscape of 120 losses, float32: ≤ 8 forwards of one", _landscape(rows), 8, "forwards"
        ),
        _at_most(
            "2 and 4 ranks, N=16384: ≤ 1.1x the processor time of one on as many cores",
            _shared(rows),
            1.1,
            "x",
        ),
    ]


# (figure, where it was measured), one per row that a target speaks of
Figures = list[tuple[float, str]]


def _at_least(claim: str, figures: Figures, bound: float, unit: str) -> Verdict:
    return _verdict(claim, figures, min, lambda x: x >= bound, unit, 2)


def _at_most(claim: str, figures: Figures, bound: float, unit: str, digits: int = 2) -> Verdict:
    return _verdict(claim, figures, max, lambda x: x <= bound, unit, digits)


def _verdict(
    claim: str,
    figures: Figures,
    worst: Callable[[Figures], tuple[float, str]],
    holds: Callable[[float], bool],
    unit: str,
    digits: int,
) -> Verdict:
    if not figures:
        return Verdict(claim, "-", "not measured", None)
    value, where = worst(figures)
    return Verdict(claim, f"{value:.{digits}f} {unit}", where, holds(value))


def _select(rows: list[Row], **wanted: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def place(row: Row) -> str:
    """Where a figure was measured, for a reader."""
    return f"N={row['n']}, D={row['d']}, {row['dtype']}"


def _rate(rows: list[Row], mode: str) -> Figures:
    chosen = _select(rows, bench="rate", mode=mode, contender="cpp")
    return _percent([row for row in chosen if row["n"] >= 2048])


def _percent(chosen: list[Row]) -> Figures:
    return [
        (row["percent_of_peak"], place(row))
        for row in chosen
        # the peak is the larger of two rates: one of them alone judges nothing
        if "own tile" in row["peaks"]
    ]


def _tile(tiles: list[dict[str, float]]) -> Verdict:
    claim = "own float32 tile: ≥ 90 % of multiply-adds from registers"
    for tile in tiles:
        if tile["percent"] > 105:
            # more than the core can do: the limit was read while others held the cores
            figure = f"{tile['percent']:.0f} %"
            return Verdict(claim, figure, "disturbed: measure again on a quiet machine", None)
    # the best: other work on the machine only ever lowers it
    best = [max((t["percent"], f"{t['tile_gflops']:.0f} GFLOP/s") for t in tiles)] if tiles else []
    return _at_least(claim, best, 90, "%")


def allowed_mb(row: Row) -> float:
    return 6 * row["n"] * row["d"] * 4 / 1e6 + 64


def _memory(rows: list[Row]) -> Figures:
    chosen = _select(rows, bench="memory", contender="mmfast", n=16384)
    return [
        (100 * row["peak_mb"] / allowed_mb(row), f"{place(row)}: {row['peak_mb']:.0f} MB")
        for row in chosen
        if row["peak_mb"] is not None
    ]


def _ratios(rows: list[Row], base: str | int, other: str | int) -> Figures:
    """Time of `base` over the time of `other`, race by race."""
    figures = []
    for row in _select(rows, contender=other):
        same = {key: row[key] for key in ("bench", "n", "d", "dtype", "mode")}
        figures += [
            (b["median"] / row["median"], place(row)) for b in _select(rows, contender=base, **same)
        ]
    return figures


def _speedup(rows: list[Row], dtype: str, peer: str) -> Figures:
    return _ratios(_select(rows, bench="loss", dtype=dtype, n=8192), peer, "mmfast")


def _small(rows: list[Row]) -> Figures:
    # at 256 rows the target speaks of float32 only
    chosen = [
        row
        for row in _select(rows, bench="small")
        if row["n"] >= (256 if row["dtype"] == "float32" else 512)
    ]
    return _ratios(chosen, "dense", "mmfast")


def _frozen(rows: list[Row]) -> Figures:
    chosen = _select(rows, bench="frozen", n=8192)
    return [
        (1 / ratio, f"{where}, {name}")
        for name in ("text frozen", "image frozen")
        for ratio, where in _ratios(chosen, "both towers learn", name)
    ]


def _threads(rows: list[Row]) -> Figures:
    return _ratios(_select(rows, bench="threads", n=8192), 1, 2)


def _bandwidth(rows: list[Row]) -> Figures:
    ratios = _ratios(_select(rows, bench="bandwidth", mode="fwd"), "copy", "cpp")
    return [(100 * ratio, where) for ratio, where in ratios]


def _backward_share(rows: list[Row]) -> Figures:
    chosen = _select(rows, bench="fdt_few", contender="cpp")
    return [
        (backward["median"] / forward["median"], place(forward))
        for forward in _select(chosen, mode="fwd")
        for backward in _select(chosen, mode="bwd", dtype=forward["dtype"])
    ]


def _mix(rows: list[Row]) -> Figures:
    return _ratios(_select(rows, bench="mix"), "formula", "cpp")


def _sparsemax(rows: list[Row], peer: str) -> Figures:
    return [
        (ratio, f"{where}, {bench.removeprefix('sparsemax_')}")
        for bench in SPARSEMAX
        for ratio, where in _ratios(_select(rows, bench=bench, n=4096, d=16384), peer, "cpp")
    ]


def _landscape(rows: list[Row]) -> Figures:
    # on a matrix unit the products of bfloat16 cost nearly nothing, and the exponentials as ever
    chosen = _select(rows, bench="landscape", dtype="float32")
    return _ratios(chosen, "mmfast", "one forward of clip_loss")


def _shared(rows: list[Row]) -> Figures:
    chosen = _select(rows, bench="shared", n=16384)
    return [
        (1 / ratio, f"{where}, {ranks}")
        for ranks in ("2 ranks", "4 ranks")
        for ratio, where in _ratios(chosen, "1 rank, 2 threads", ranks)
    ]


def _growth(rows: list[Row]) -> Figures:
    chosen = [row for row in _select(rows, bench="growth") if row["n"] >= 2048]
    if not chosen or max(row["n"] for row in chosen) < 65536:
        return []
    costs = {row["n"]: row["median"] / row["n"] ** 2 for row in chosen}
    low, high = min(costs, key=costs.__getitem__), max(costs, key=costs.__getitem__)
    return [(costs[high] / costs[low], f"N={high} over N={low}, {chosen[0]['dtype']}")]
