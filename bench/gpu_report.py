"""The Markdown of a `bench gpu` run, and its judgement by the targets for a card."""

from __future__ import annotations

from typing import Any

from bench.report import table, verdict_table
from bench.targets import Row, Verdict, place

# (mode, least percent of the product's rate) of pairwise_lse in bfloat16, N from 16384 up
RATES = (("fwd", 70.0), ("fwd+bwd", 60.0))
RIVALS = ("torch chunked", "torch.compile(dense)", "memeff", "inf-cl")
MOST_MS = 55.0  # the loss at N=65536, D=768 in bfloat16, on an H100 or H200
MEMORY = 1.2  # of inputs, gradients and the two vectors of log-sum-exps
ITEM = {"float32": 4, "bfloat16": 2}

METHOD = """Every time is the median of rounds in which the contenders take turns, by CUDA events
around one call; before each call 512 MiB are written, so that nothing it reads is in L2. FLOP are
those the task needs (forward 1 product of 2·N²·D, forward and backward 4), whoever spends more.
`% of peak` is of the rate of an 8192³ product of the type, measured in the same rounds; for slerp,
of the bandwidth of a copy that moves the same bytes. `peak MB` is what a call adds to the memory in
use at its peak. `dense` is open_clip's form, a product per direction.
"""
SMOKE = """A smoke run: tiny sizes on the CPU in Triton's interpreter, which show that the command
works. These are no results.
"""


def judge(rows: list[Row], device: str) -> list[Verdict]:
    """Each target by its worst row."""
    verdicts = [_rate(rows, mode, least) for mode, least in RATES]
    verdicts.append(_time(rows, device))
    verdicts += [_faster(rows, rival) for rival in RIVALS]
    verdicts.append(_memory(rows))
    return verdicts


def _rate(rows: list[Row], mode: str, least: float) -> Verdict:
    claim = f"op {mode}, bfloat16, D 512-768, N ≥ 16384: ≥ {least:.0f} % of the product's rate"
    own = [
        row
        for row in rows
        if row["op"] == "pairwise_lse"
        and row["own"]
        and row["mode"] == mode
        and row["dtype"] == "bfloat16"
        and row["n"] >= 16384
    ]
    if not own:
        return Verdict(claim, "-", "not measured", None)
    # with several backends a user gets the better one
    best: dict[tuple[int, int], Row] = {}
    for row in own:
        known = best.setdefault((row["n"], row["d"]), row)
        if row["percent_of_peak"] > known["percent_of_peak"]:
            best[row["n"], row["d"]] = row
    worst = min(best.values(), key=lambda row: row["percent_of_peak"])
    value = worst["percent_of_peak"]
    return Verdict(claim, f"{value:.1f} %" + _gap(least - value, "points"), place(worst),
                   value >= least)  # fmt: skip


def _time(rows: list[Row], device: str) -> Verdict:
    claim = f"loss fwd+bwd, N=65536, D=768, bfloat16, H100 or H200: ≤ {MOST_MS:.0f} ms"
    found = [
        row
        for row in _loss(rows)
        if row["own"] and (row["n"], row["d"], row["dtype"]) == (65536, 768, "bfloat16")
    ]
    if not found:
        return Verdict(claim, "-", "not measured", None)
    value = 1e3 * found[0]["median"]
    if "H100" not in device and "H200" not in device:
        return Verdict(claim, f"{value:.1f} ms", f"on another card, {device}", None)
    return Verdict(claim, f"{value:.1f} ms" + _gap(value - MOST_MS, "ms"), place(found[0]),
                   value <= MOST_MS)  # fmt: skip


def _faster(rows: list[Row], rival: str) -> Verdict:
    claim = f"loss fwd+bwd: faster than {rival} wherever that runs"
    ratios = []
    for row in _loss(rows):
        if row["contender"].startswith(rival):
            ratios += [(row["median"] / own["median"], row) for own in _loss(rows)
                       if own["own"] and _same_race(own, row)]  # fmt: skip
    if not ratios:
        return Verdict(claim, "-", "not measured", None)
    value, row = min(ratios, key=lambda entry: entry[0])
    return Verdict(claim, f"{value:.2f} x" + _gap(1 - value, "x"), place(row), value > 1)


def _memory(rows: list[Row]) -> Verdict:
    claim = f"memory of the loss: ≤ {MEMORY} x (inputs + gradients + log-sum-exps)"
    shares = []
    for row in _loss(rows):
        if row["own"] and row["peak_mb"] is not None:
            inputs = 2 * row["n"] * row["d"] * ITEM[row["dtype"]] / 1e6
            least = 2 * inputs + 2 * row["n"] * 4 / 1e6
            shares.append(((inputs + row["peak_mb"]) / least, row))
    if not shares:
        return Verdict(claim, "-", "not measured", None)
    value, row = max(shares, key=lambda entry: entry[0])
    return Verdict(claim, f"{value:.2f} x" + _gap(value - MEMORY, "x"), place(row),
                   value <= MEMORY)  # fmt: skip


def _loss(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["op"] == "clip_loss"]


def _same_race(a: Row, b: Row) -> bool:
    return all(a[key] == b[key] for key in ("op", "mode", "dtype", "n", "d"))


def _gap(short: float, unit: str) -> str:
    """By how much a target is missed; nothing where it is met."""
    return f" (missed by {short:.3g} {unit})" if short > 0 else ""


def render(run: dict[str, Any], pictures: list[str]) -> str:
    """The whole report of the run as Markdown."""
    machine = run["machine"]
    state = " (uncommitted changes)" if machine["dirty"] else ""
    parts = [f"# GPU run on {machine['device']}, {machine['commit']}{state}\n"]
    parts.append(SMOKE if run["smoke"] else METHOD)
    parts.append(table(["fact", "value"], [[str(k), str(v)] for k, v in machine.items()]))
    parts += ["## Correctness\n", *checks(run["checks"]), *sanitizers(run["sanitizer"])]
    if not run["smoke"]:
        verdicts = [Verdict(**verdict) for verdict in run["verdicts"]]
        parts += ["## Targets\n", verdict_table(verdicts)]
    for op in dict.fromkeys(row["op"] for row in run["rows"]):
        parts += [f"## {op}\n", rows_table([row for row in run["rows"] if row["op"] == op])]
    parts += [f"![{name}]({name})\n" for name in pictures]
    for title, reason in (("unavailable", "Not available"), ("skipped", "Skipped")):
        if run[title]:
            parts += [f"## {reason}\n", *_grouped(run[title])]
    return "\n".join(parts)


def checks(found: list[dict[str, Any]]) -> list[str]:
    """Counts by op and backend, then every red check and the reasons of the skipped ones."""
    body = []
    for op, backend in dict.fromkeys((c["op"], c["backend"]) for c in found):
        mine = [c for c in found if (c["op"], c["backend"]) == (op, backend)]
        red = sum(c["error"] is not None for c in mine)
        skipped = sum(c["skipped"] is not None for c in mine)
        body.append([op, backend, str(len(mine) - red - skipped), str(red), str(skipped)])
    lines = [table(["op", "backend", "green", "red", "skipped"], body)]
    lines += [f"- **red**: {c['op']} {c['backend']}, {c['what']}: {c['error']}"
              for c in found if c["error"] is not None]  # fmt: skip
    lines += _grouped(
        [
            {"what": f"{c['op']} {c['backend']}", "contender": c["what"], "reason": c["skipped"]}
            for c in found
            if c["skipped"] is not None
        ]
    )
    return lines


def sanitizers(found: list[dict[str, Any]]) -> list[str]:
    lines = []
    for entry in found:
        state = {True: "clean", False: "**errors**", None: "not run"}[entry["clean"]]
        lines.append(f"- compute-sanitizer {entry['tool']}: {state}: {entry['why']}")
    return [*lines, ""]


def rows_table(rows: list[Row]) -> str:
    heads = ["N", "D", "dtype", "mode", "contender", "ms (p20 to p80)", "TFLOP/s or GB/s"]
    heads += ["% of peak", "peak MB", "x faster than"]
    body = []
    for row in rows:
        times = " to ".join(f"{1e3 * row[q]:.4g}" for q in ("p20", "p80"))
        rate = row["gflops"] / 1e3 if "gflops" in row else row["gb_per_s"]
        percent = row.get("percent_of_peak")
        peak_mb = row["peak_mb"]
        body.append(
            [
                *(str(row[key]) for key in ("n", "d", "dtype", "mode", "contender")),
                f"{1e3 * row['median']:.4g} ({times})",
                f"{rate:.4g}",
                "-" if percent is None else f"{percent:.1f}",
                "-" if peak_mb is None else f"{peak_mb:.0f}",
                _speed_up(row, rows),
            ]
        )
    return table(heads, body)


def _speed_up(row: Row, rows: list[Row]) -> str:
    """Against the definition in the same race."""
    for other in rows:
        if other["contender"] in ("dense", "eager") and _same_race(row, other):
            return f"{other['median'] / row['median']:.2f} {other['contender']}"
    return "-"


def _grouped(found: list[dict[str, Any]]) -> list[str]:
    """One line for what shares a reason."""
    names: dict[tuple[str, str], list[str]] = {}
    for entry in found:
        names.setdefault((entry.get("contender", ""), entry["reason"]), []).append(entry["what"])
    lines = []
    for (contender, reason), whats in names.items():
        where = "; ".join(dict.fromkeys(whats))
        lines.append(f"- {contender + ': ' if contender else ''}{reason} ({where})")
    return [*lines, ""] if lines else []
