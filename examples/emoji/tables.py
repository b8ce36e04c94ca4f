"""What was learned and what it cost, as text."""

from __future__ import annotations

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
            # the peak needs Linux's /proc
            cell = "unknown" if value is None else f"{value * unit:.{digits}f}"
            line += f"{cell:>{CELL}}"
        lines.append(line)
    return "\n".join(lines)
