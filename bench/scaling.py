"""How the cost grows: with the batch, with threads, with ranks, and what that says of a cluster.

`python -m bench.scaling` writes SCALING.md from the results of `pairwise_lse` and `distributed`.
The last part is arithmetic, not a measurement, and says so.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bench.ranks import WORLDS
from bench.report import HERE, Result, newest, number, table
from bench.targets import Row

HEADER = """# Scaling

Written by `python -m bench.scaling` from the JSON in `results/`. A symmetric loss of N pairs of
width D is one product of 2·N²·D flop forward and four forward and backward; memory is O(N·D).
"""


def sent_bytes(n: int, d: int, ranks: int, itemsize: int, wide: int = 4) -> dict[str, int]:
    """What a rank sends in one call of `clip_loss` on a batch of n pairs, equal on all ranks.

    Forward, k and its ids (8 bytes a row) go to all others, the sums of columns come home.
    Backward, the sums and their upstream gradients go along, dk comes home; these three have `wide`
    bytes a number.
    """
    away, home = n - n // ranks, n
    return {
        "forward": away * (d * itemsize + 8) + home * wide,
        "backward": away * (d * itemsize + 8 + 2 * wide) + home * d * wide,
    }


def gathered_bytes(n: int, d: int, ranks: int, itemsize: int) -> dict[str, int]:
    """The same for both towers gathered by all ranks, and their gradients reduced and scattered."""
    both = 2 * (n - n // ranks) * d * itemsize
    return {"forward": both, "backward": both}


def render(results: list[Result]) -> str:
    """The whole of SCALING.md."""
    parts = [HEADER]
    for device in sorted({r.machine["device"] for r in results}):
        mine = [r for r in results if r.machine["device"] == device and not r.machine["quick"]]
        rows = [row for r in mine for row in r.rows]
        sections = [make(rows) for make in (_batch, _threads, _ranks)]
        if any(sections):
            parts.append(f"## {device}\n")
            parts += filter(None, sections)
    return "\n".join([*parts, projection()])


def _batch(rows: list[Row]) -> str:
    chosen = sorted((r for r in rows if r["bench"] == "growth"), key=lambda r: r["n"])
    if not chosen:
        return ""
    least = min(r["median"] / r["n"] ** 2 for r in chosen)
    body = [
        [
            f"{r['n']:,}",
            f"{1e3 * r['median']:.4g}",
            f"{1e9 * r['median'] / r['n'] ** 2:.3f}",
            f"{r['median'] / r['n'] ** 2 / least:.2f}",
        ]
        for r in chosen
    ]
    heads = ["N", "ms", "ns a pair", "of the cheapest"]
    title = f"**With the batch**: `pairwise_lse` forward, {chosen[0]['dtype']}, D={chosen[0]['d']}"
    return f"{title}\n\n{table(heads, body)}"


def _threads(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["bench"] == "threads"]
    if not chosen:
        return ""
    body = []
    for dtype in sorted({r["dtype"] for r in chosen}):
        times = {int(r["contender"]): r["median"] for r in chosen if r["dtype"] == dtype}
        for count in sorted(times):
            gain = times[min(times)] / times[count]
            body.append([dtype, str(count), f"{1e3 * times[count]:.4g}", f"{gain:.2f}"])
    title = f"**With threads**: forward and backward, N={chosen[0]['n']:,}, D={chosen[0]['d']}"
    return f"{title}\n\n{table(['dtype', 'threads', 'ms', 'x faster'], body)}"


def _ranks(rows: list[Row]) -> str:
    chosen = [r for r in rows if r["bench"] == "shared"]
    times = {(r["dtype"], r["n"], r["contender"]): r["median"] for r in chosen}
    body = []
    for r in chosen:
        same = [times.get((r["dtype"], r["n"], name)) for name in ("1 rank", "1 rank, 2 threads")]
        ranks, _ = WORLDS[r["contender"]]
        sent = sent_bytes(r["n"], r["d"], ranks, 4 if r["dtype"] == "float32" else 2)
        body.append(
            [
                r["dtype"],
                f"{r['n']:,}",
                r["contender"],
                f"{1e3 * r['median']:.4g}",
                *(number(base and r["median"] / base, 2) for base in same),
                number(r["peak_mb"], 0),
                "0" if ranks == 1 else f"{sum(sent.values()) / 1e6:.1f}",
            ]
        )
    if not body:
        return ""
    heads = [
        "dtype",
        "N",
        "",
        "CPU ms",
        "of 1 rank",
        "of 2 threads",
        "MB grown",
        "MB sent",
    ]
    title = (
        "**With ranks**: one batch of N pairs shared by all, `clip_loss` forward and backward, "
        f"D={chosen[0]['d']}, one thread a rank but where named. Processor time of all ranks "
        "together, also as that of one process on one core and on two; memory and bytes of one "
        "rank, the bytes by `sent_bytes`, which the tests count."
    )
    return f"{title}\n\n{table(heads, body)}"


# H100 SXM, NVIDIA's data sheet: 989 TFLOP/s of dense bfloat16; NVLink 900 GB/s both ways; a network
# card of 400 Gbit/s for each, as in a DGX H100. The share of the peak is our target, not measured.
PEAK, SHARE = 989e12, 0.6
LINKS = {"NVLink": 450e9, "one 400 Gbit/s card": 50e9}
CLUSTER = {"n": 1 << 20, "d": 512, "ranks": 1024, "itemsize": 2}


def projection() -> str:
    """A batch of a million pairs on 1,024 GPUs, by arithmetic."""
    n, d, ranks = (CLUSTER[name] for name in ("n", "d", "ranks"))
    b, flops = n // ranks, PEAK * SHARE
    compute = 8 * b * n * d / flops
    ring, gather = (sum(way(**CLUSTER).values()) for way in (sent_bytes, gathered_bytes))
    gathered, logits = 2 * 2 * n * d / 1e9, 4 * b * n / 1e9
    waits = 1e3 * ring / LINKS["one 400 Gbit/s card"]
    body = [
        [
            link,
            f"{1e3 * ring / rate:.1f}",
            f"{1e3 * gather / rate:.1f}",
            f"{1e3 * compute:.1f}",
            f"{ring / rate * flops / (8 * n * d):,.0f}",
        ]
        for link, rate in LINKS.items()
    ]
    heads = ["link", "ring ms", "gather ms", "products ms", "hidden from b ="]
    return f"""## {n:,} pairs on {ranks:,} GPUs: a projection

**Not measured.** With N pairs on W ranks, b = N / W a rank, width D, s bytes an element:

* products of a rank: 8·b·N·D flop, four products of b rows with N, one of them a second time made;
  a loss that gathers both towers has logits of its images and of its texts, kept, and makes two
  products forward and four backward, 12·b·N·D;
* bytes that a rank sends: (N - b)·(s·D + 8) + 4·N forward, (N - b)·(s·D + 16) + 4·D·N backward:
  about N·D·(2·s + 4), the same for any number of ranks;
* memory of a rank: its own rows, two packets of b rows and their sums, O(b·D); gathered features
  alone are 2·s·N·D, here {gathered:.1f} GB, and the logits of b rows, {logits:.1f} GB.

So the ring hides behind the products where b ≥ (2·s + 4) / 8 · F / R, with F flop/s of a rank and R
bytes/s of its link, whatever N and D are. For N = {n:,}, D = {d}, bfloat16, b = {b:,}, on H100s at
{SHARE:.0%} of {PEAK / 1e12:.0f} TFLOP/s (data sheet; the share is a target):

{table(heads, body)}
Over the network a rank waits {waits:.0f} ms a step for the ring, beside the seconds that a large
encoder takes for {b:,} pairs. It sends {ring / 1e9:.1f} GB a step, gathering {gather / 1e9:.1f}:
the ring saves memory and products, not bytes.
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--results", type=Path, default=HERE / "results", metavar="DIR")
    parser.add_argument("--out", type=Path, default=HERE / "SCALING.md", metavar="FILE")
    options = parser.parse_args(argv)
    options.out.write_text(render(newest(options.results)))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
