"""What was learned and what it cost, as text."""

from __future__ import annotations

from collections.abc import Iterable

LABEL, CELL = 28, 11


def learned(columns: dict[str, dict[str, float]], held_out: int) -> str:
    """One measure a line, one model a column; recalls beside what a guess would reach."""
    names = [*columns, "by chance"]
    lines = [f"{f'{held_out} held-out pairs':{LABEL}}" + "".join(f"{n:>{CELL}}" for n in names)]
    for measure in next(iter(columns.values())):
        cells = [f"{values[measure]:.3f}" for values in columns.values()]
        if measure.startswith("recall@"):
            k = int(measure.removeprefix("recall@").split()[0])
            cells.append(f"{k / held_out:.3f}")
        lines.append(f"{measure:{LABEL}}" + "".join(f"{cell:>{CELL}}" for cell in cells))
    return "\n".join(lines)


def costs(by_batch: dict[int, dict[str, dict[str, float | None]]]) -> str:
    """Milliseconds and megabytes, one loss a column, one batch size after the other."""
    columns = [(size, name) for size, losses in by_batch.items() for name in losses]
    lines = [
        f"{'batch':{LABEL}}" + "".join(f"{size:>{CELL},}" for size, _ in columns),
        f"{'loss':{LABEL}}" + "".join(f"{name:>{CELL}}" for _, name in columns),
    ]
    for label, key, unit, digits in (
        ("loss alone, ms", "loss_ms", 1.0, 1),
        ("whole step, ms", "step_ms", 1.0, 1),
        ("saved for backward, MB", "saved_bytes", 1e-6, 2),
        ("growth of peak memory, MB", "peak_bytes", 1e-6, 1),
    ):
        line = f"{label:{LABEL}}"
        for size, name in columns:
            value = by_batch[size][name][key]
            line += f"{_cell(value, unit, digits):>{CELL}}"
        lines.append(line)
    return "\n".join(lines)


# heading in two parts, key, unit, digits
CONTEST = (
    ("i to t", "r@1", "recall@1 image to text", 1.0, 3),
    ("t to i", "r@1", "recall@1 text to image", 1.0, 3),
    ("i to t", "r@10", "recall@10 image to text", 1.0, 3),
    ("t to i", "r@10", "recall@10 text to image", 1.0, 3),
    ("align-", "ment", "alignment", 1.0, 3),
    ("unifor-", "mity", "uniformity", 1.0, 3),
    ("", "gap", "gap", 1.0, 3),
    ("step", "ms", "step_ms", 1.0, 1),
    ("peak", "MB", "peak_bytes", 1e-6, 1),
)


def contest(rows: dict[str, dict[str, float | None]], held_out: int) -> str:
    """One loss a line, and what a guess would reach; 93 characters wide."""
    above, below, keys, units, digits = zip(*CONTEST, strict=True)
    lines = [_line(f"{held_out} held out", above), _line("loss", below)]
    for name, row in rows.items():
        values = [row[key] for key in keys]
        lines.append(_line(name, map(_cell, values, units, digits)))
    chance = [f"{k / held_out:.3f}" for k in (1, 1, 10, 10)]
    return "\n".join([*lines, _line("by chance", chance)])


def searches(rows: dict[str, dict[str, float]]) -> str:
    """One kind of search a line, one recall a column."""
    lines = [_line("gmc, a modality missing", next(iter(rows.values())), LABEL, CELL)]
    for name, row in rows.items():
        lines.append(_line(name, (f"{value:.3f}" for value in row.values()), LABEL, CELL))
    return "\n".join(lines)


def _line(label: str, cells: Iterable[str], width: int = 12, each: int = 9) -> str:
    return f"{label:{width}}" + "".join(f"{cell:>{each}}" for cell in cells)


def _cell(value: float | None, unit: float, digits: int) -> str:
    # the peak needs Linux's /proc
    return "unknown" if value is None else f"{value * unit:.{digits}f}"
