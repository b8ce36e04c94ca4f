"""Two commits held against each other, on the same machine, turn by turn.

Where peers were timed they did not change: a row of ours counts as slower only by what it lost
beyond them.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.report import KEY, Result, number, table
from bench.targets import Row

# what others ship, or the definition in plain torch: no part of what a commit changes
RIVALS = frozenset(
    {
        "dense",
        "dense, one product",
        "torch chunked",
        "torch.compile(dense)",
        "open_clip",
        "eager",
        "formula",
        "sorting",
        "entmax, top-k",
        "entmax, sorting",
        "sparsemax package",
        "softmax + multinomial",
        "blocks",
        "published loop",
    }
)
# beside them a copy by torch, the measure of slerp: timed always, and never ours
OTHERS = RIVALS | {"copy"}
OWN_ONLY = "only mmfast is timed without --peers"
Rows = dict[tuple[object, ...], Row]


def best(turns: Sequence[Result]) -> Rows:
    """Each row of one commit at its fastest turn."""
    rows: Rows = {}
    for result in turns:
        for row in result.rows:
            key = tuple(row[name] for name in KEY)
            if key not in rows or row["median"] < rows[key]["median"]:
                rows[key] = row
    return rows


def comparison(before: Sequence[Result], after: Sequence[Result]) -> str:
    """Rows that two commits share: before, after, and how many times faster."""
    old, new = best(before), best(after)
    body = []
    for key in (key for key in new if key in old):
        base, row = old[key], new[key]
        share = [number(r.get("percent_of_peak"), 1) for r in (base, row)]
        times = [f"{1e3 * r['median']:.4g}" for r in (base, row)]
        ratio = f"{base['median'] / row['median']:.2f}"
        body.append([*map(str, key), *times, ratio, *share])
    commits = [turns[0].machine["commit"] for turns in (before, after)]
    heads = [*KEY, *(f"{c} ms" for c in commits), "x faster", *(f"{c} % of peak" for c in commits)]
    return table(heads, body)


def slower(before: Sequence[Result], after: Sequence[Result], allowed: float) -> list[str]:
    """Which rows of ours take more than `allowed` times as long as before, in words."""
    old, new = best(before), best(after)
    took = {key: new[key]["median"] / old[key]["median"] for key in new if key in old}
    who = KEY.index("contender")
    said = []
    for key, ratio in took.items():
        if key[who] in OTHERS:
            continue
        race = key[:who] + key[who + 1 :]
        drift = [
            other
            for k, other in took.items()
            if k[who] in OTHERS and k[:who] + k[who + 1 :] == race
        ]
        machine = statistics.median(drift) if drift else 1.0
        if ratio / machine > allowed:
            beyond = f", {ratio / machine:.2f} times beyond its peers" if drift else ""
            said.append(f"{' '.join(map(str, key))}: {ratio:.2f} times as long{beyond}")
    return said
