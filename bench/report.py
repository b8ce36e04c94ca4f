"""`python -m bench.report`: RESULTS.md and plots from the newest JSON of each op and device."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bench.targets import LOSSES, OWN, SPARSEMAX, Row, Verdict, allowed_mb, judge, place

HERE = Path(__file__).resolve().parent
KEY = ("bench", "contender", "mode", "dtype", "n", "d")
# what the last columns of a bench compare: with the baseline of the same race, unless said
BASELINE = {
    "rate": "eager",
    "loss": "dense",
    "small": "dense",
    "mix": "formula",
    "sampling": "softmax + multinomial",
    **dict.fromkeys(SPARSEMAX, "sorting"),
    "statistics": "blocks",
    "ranks": "blocks",
    "fdt_few": "eager",
    "fdt_all": "eager",
    "landscape": "one forward of clip_loss",
    "landscape_loop": "published loop",
    "shared": "1 rank, 2 threads",
    "open_clip": "open_clip",
    "open_clip_siglip": "open_clip",
    **dict.fromkeys(LOSSES, "dense"),
}
TITLES = {
    "rate": "pairwise_lse, rows and columns, by backend",
    "growth": "pairwise_lse as N grows",
    "threads": "pairwise_lse, one thread and two",
    "loss": "clip_loss and its peers",
    "small": "clip_loss at small batches",
    "frozen": "clip_loss with a frozen tower",
    "memory": "memory of one cold call in a fresh process",
    "bandwidth": "slerp into memory that is there, and a copy of as many bytes",
    "mix": "slerp and the published formula",
    "sparsemax_peaked": "sparsemax of scores far apart: a few entries in the support",
    "sparsemax_partial": "sparsemax where an eighth of 16384 entries is in the support",
    "sparsemax_dense": "sparsemax where every entry is in the support",
    **{loss: f"{loss}_loss and its published dense form" for loss in LOSSES},
    "fdt_few": "fdt_pool, 64 samples of 49 tokens, N codes of which few survive",
    "fdt_all": "fdt_pool, the same where all codes survive",
    "sampling": "one negative a row: sample_negatives, and multinomial of a softmax",
    "statistics": "pairwise_stats of one set, and torch over blocks of rows",
    "ranks": "pairwise_rank, and torch over blocks of rows",
    "landscape": "shift_landscape, 40 shifts by 3 temperatures, and one forward of clip_loss",
    "landscape_loop": "shift_landscape and the published loop",
    "shared": "clip_loss of one batch by several ranks: processor time of all, memory of one",
    "open_clip": "nn.ClipLoss and open_clip's",
    "open_clip_siglip": "nn.SigLipLoss and open_clip's",
    "losses_memory": "memory of one cold call of each loss in a fresh process, queues of N",
}
HEADER = """# Results

Written by `python -m bench.report` from the JSON in `results/`; `make bench` measures anew.

Contenders of one race take turns, round by round, and a row is the median of its rounds. FLOP are
those the task needs (forward 1 product of 2·N²·D, forward and backward 4, with a frozen tower 3),
whoever spends more; of the other losses those that mmfast's form takes, counted in
`peers_losses.py`. Peak is the larger of two rates measured in the same rounds: `torch.mm` at its
better size, and mmfast's own register tile in cache. Peak MB is how far resident memory rose
during one call. `dense` is the published form; of clip_loss open_clip's, a product per direction.
"""


@dataclass(frozen=True)
class Result:
    """One JSON file: one op on one device at one commit."""

    op: str
    when: str
    machine: dict[str, Any]
    rows: list[Row]
    unavailable: list[Row]


def load(path: Path) -> Result:
    """Read what `python -m bench` wrote."""
    data = json.loads(path.read_text())
    return Result(
        op=Path(data["benchmarks"][0]["fullname"].split("::")[0]).stem.removeprefix("bench_"),
        when=data["datetime"],
        machine=data["machine_info"],
        rows=[entry["extra_info"] for entry in data["benchmarks"]],
        unavailable=data["unavailable"],
    )


def newest(folder: Path) -> list[Result]:
    """The newest result of each (device, op): with peers, and no quick run, where there is one."""
    # what `bench gpu` writes has its own report beside it
    paths = [path for path in sorted(folder.glob("*.json")) if not path.name.startswith("gpu-")]
    results = [load(path) for path in paths]
    results.sort(key=lambda r: (not r.machine["quick"], r.machine.get("peers", True), r.when))
    latest = {(r.machine["device"], r.op): r for r in results}
    return [latest[key] for key in sorted(latest)]


def render(results: list[Result], plots: dict[str, list[str]]) -> str:
    """The whole of RESULTS.md; `plots` maps (device/op) to picture paths."""
    parts = [HEADER]
    for device in sorted({r.machine["device"] for r in results}):
        mine = [r for r in results if r.machine["device"] == device]
        parts.append(f"## {device}\n")
        full = [r for r in mine if not r.machine["quick"]]
        tiles = [r.machine["tile"] for r in full if r.machine["tile"]]
        parts.append(verdict_table(judge([row for r in full for row in r.rows], tiles)))
        for result in mine:
            parts.append(section(result))
            parts += [f"![{Path(p).stem}]({p})\n" for p in plots.get(f"{device}/{result.op}", [])]
    return "\n".join(parts)


def verdict_table(verdicts: list[Verdict]) -> str:
    mark = {True: "yes", False: "**no**", None: "-"}
    body = [[v.claim, v.figure, v.where, mark[v.met]] for v in verdicts]
    return table(["target", "worst figure", "where", "met"], body)


def section(result: Result) -> str:
    """One op on one device: its tables, its worst rows, what could not run."""
    m = result.machine
    state = " (uncommitted changes)" if m["dirty"] else ""
    lines = [
        f"### {result.op} · {m['isa']} · {m['threads']} threads · torch {m['torch']}"
        f" · {m['commit']}{state} · load before {m['load']}\n"
    ]
    if m["quick"]:
        lines.append("A quick run: tiny sizes that show the bench works. These are no results.\n")
    lines += [peaks(result.rows)] if any("peaks" in row for row in result.rows) else []
    for bench in dict.fromkeys(row["bench"] for row in result.rows):
        rows = [row for row in result.rows if row["bench"] == bench]
        lines.append(f"**{TITLES.get(bench, bench)}**\n")
        lines.append(bench_table(bench, rows))
    lines += worst(result.rows)
    if result.unavailable:
        lines.append("Not available:\n")
        names: dict[tuple[str, str], list[str]] = {}
        for u in result.unavailable:
            names.setdefault((u["bench"], u["reason"]), []).append(str(u["contender"]))
        lines += [
            f"- {bench}, {', '.join(dict.fromkeys(who))}: {reason}"
            for (bench, reason), who in names.items()
        ]
        lines.append("")
    return "\n".join(lines)


def bench_table(bench: str, rows: list[Row]) -> str:
    """Rows of one bench; the last columns hold what this bench compares."""
    keys = ["n", "queue", "d"] if any(row.get("queue") for row in rows) else ["n", "d"]
    keys += ["dtype", "mode", "contender"]
    heads = [key.upper() if len(key) == 1 else key for key in keys] + ["ms (p20 to p80)"]
    heads += ["GFLOP/s", "% of peak", "peak MB", *_compared(bench)]
    body = []
    for row in rows:
        times = " to ".join(f"{1e3 * row[q]:.4g}" for q in ("p20", "p80"))
        body.append(
            [
                *(str(row[key]) for key in keys),
                f"{1e3 * row['median']:.4g} ({times})",
                number(row.get("gflops"), 1),
                number(row.get("percent_of_peak"), 1),
                number(row["peak_mb"], 0),
                *_comparison(bench, row, rows),
            ]
        )
    return table(heads, body)


def _compared(bench: str) -> list[str]:
    if bench in BASELINE:
        return [f"x faster than {BASELINE[bench]}", f"memory, x {BASELINE[bench]}"]
    return {
        "growth": ["cost of a pair, x smallest N"],
        "threads": ["x faster than one"],
        "frozen": ["time, x both learn"],
        "memory": ["allowed MB"],
        "losses_memory": ["bytes per N·D"],
        "bandwidth": ["GB/s", "% of copy"],
    }.get(bench, [])


def _comparison(bench: str, row: Row, rows: list[Row]) -> list[str]:
    if bench == "memory":
        return [f"{allowed_mb(row):.0f}" if row["contender"] in OWN else "-"]
    if bench == "losses_memory":
        grown = row["peak_mb"]
        return [number(None if grown is None else 1e6 * grown / (row["n"] * row["d"]), 1)]
    if bench == "growth":
        first = min(rows, key=lambda r: r["n"])
        cost = (row["median"] / row["n"] ** 2) / (first["median"] / first["n"] ** 2)
        return [f"{cost:.3f}"]
    race = [r for r in rows if all(r[key] == row[key] for key in ("mode", "dtype", "n", "d"))]
    base = race[0]
    if bench == "frozen":
        return [f"{row['median'] / base['median']:.2f}"]
    faster = f"{base['median'] / row['median']:.2f}"
    if bench == "threads":
        return [faster]
    if bench == "bandwidth":
        return [number(row.get("gb_per_s"), 1), f"{100 * base['median'] / row['median']:.0f}"]
    if bench not in BASELINE:
        return []
    if base["contender"] != BASELINE[bench]:
        return ["-", "-"]
    weighed = row["peak_mb"] is not None and base["peak_mb"]
    return [faster, f"{row['peak_mb'] / base['peak_mb']:.2f}" if weighed else "-"]


def peaks(rows: list[Row]) -> str:
    """The peaks as they were in the rounds: median over races, and the spread between them."""
    heads = ["dtype", "threads", "own tile, GFLOP/s", "torch.mm, GFLOP/s"]
    body = []
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for row in rows:
        if "peaks" in row:
            threads = str(row["contender"]) if row["bench"] == "threads" else "all"
            groups.setdefault((row["dtype"], threads), []).append(row["peaks"])
    for (dtype, threads), readings in groups.items():
        body.append([dtype, threads, *(_spread(readings, n) for n in ("own tile", "torch.mm"))])
    return table(heads, body)


def _spread(readings: list[dict[str, float]], name: str) -> str:
    found = sorted(r[name] for r in readings if name in r)
    if not found:
        return "not available"
    return f"{median(found):.0f} ({found[0]:.0f} to {found[-1]:.0f})"


def worst(rows: list[Row]) -> list[str]:
    """The lowest rate and the lowest speed-up of mmfast's own rows."""
    lines = []
    own = [row for row in rows if row["contender"] in OWN and "percent_of_peak" in row]
    if own:
        low = min(own, key=lambda row: row["percent_of_peak"])
        lines.append(
            f"Worst rate: {low['percent_of_peak']:.1f} % of peak ({low['bench']}, {low['mode']}, "
            f"{place(low)}).\n"
        )
    speedups = []
    for row in own:
        peers = [r for r in rows if all(r[k] == row[k] for k in KEY if k != "contender")]
        rivals = [r for r in peers if r["contender"] not in OWN]
        if rivals:
            best = min(rivals, key=lambda r: r["median"])
            speedups.append((best["median"] / row["median"], best["contender"], row))
    if speedups:
        ratio, name, row = min(speedups, key=lambda s: s[0])
        lines.append(
            f"Worst speed-up over the fastest other contender: {ratio:.2f}x over {name} "
            f"({row['bench']}, {row['mode']}, {place(row)}).\n"
        )
    return lines


def table(heads: list[str], body: list[list[str]]) -> str:
    """A Markdown table with aligned columns: readable as text, too."""
    lines = [heads, *body]
    widths = [max(len(line[i]) for line in lines) for i in range(len(heads))]
    rendered = [
        "| " + " | ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    ]
    rendered.insert(1, "| " + " | ".join("-" * w for w in widths) + " |")
    return "\n".join(rendered) + "\n"


def number(value: float | None, digits: int) -> str:
    """A cell of a table; a dash where nothing was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


def main(argv: list[str] | None = None) -> None:
    from bench import plots

    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS.md", metavar="FILE")
    options = parser.parse_args(argv)
    results = newest(options.results)
    if not results:
        parser.error(f"no results in {options.results}: run python -m bench all first")
    pictures = {
        f"{r.machine['device']}/{r.op}": [
            os.path.relpath(path, options.out.parent)
            for path in plots.draw(r.op, r.machine, r.rows, options.results)
        ]
        for r in results
    }
    text = render(results, pictures)
    options.out.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
