"""From two files of embeddings to an answer: numbers, pictures and a page to read."""

from __future__ import annotations

import json
import os
import platform
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from mmfast.gap.files import Rows, open_rows
from mmfast.gap.report.page import Picture, page
from mmfast.gap.report.tables import tables
from mmfast.gap.report.words import ALT, RULES, answers, captions, clean
from mmfast.gap.survey import Survey, survey
from mmfast.gap.survey.state import NAME as STATE
from mmfast.gap.survey.state import write_whole

SCHEMA = 1


def gap_report(
    x: Any,
    y: Any,
    out: str | os.PathLike[str],
    *,
    names: tuple[str, str] | None = None,
    resume: bool = False,
    **options: Any,
) -> Survey:
    """Survey two modalities and leave a report: report.json, report.html, pictures.

    The page needs no other file, no script and no network. Each picture stands beside it as PNG
    and SVG, for a paper. A file is written whole or not at all.

    Args:
        x, y: as `survey` takes them: tensors, arrays, memmaps, paths, lists of paths.
        out: a folder; made if it is not there.
        names: what to call x and y; by default their files' names.
        resume: keep what is done in `out` until the report is complete, and go on from there.
        options: those of `survey`: labels, logit_scale, bins, budget, shifts, temperatures, on_nan,
            progress.

    Returns:
        The survey.

    Raises:
        ModuleNotFoundError: matplotlib is not there; said before anything is computed.
        TypeError, ValueError, OSError: as `survey`; not two names; `out` cannot be written.
    """
    if find_spec("matplotlib") is None:
        raise ModuleNotFoundError("gap_report: pictures need matplotlib: pip install matplotlib")
    rows = opened(x, y, names)
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    found = survey(*rows, state=folder if resume else None, **options)
    for name, content in _files(found, rows).items():
        write_whole(folder / name, content)
    if resume:
        (folder / STATE).unlink(missing_ok=True)
    return found


def opened(x: Any, y: Any, names: tuple[str, str] | None = None) -> tuple[Rows, Rows]:
    """Both sides, by names that can be printed and told apart."""
    if names is not None and len(names) != 2:
        raise ValueError(f"gap_report: names must be two, one for each side, got {len(names)}")
    x, y = open_rows(x), open_rows(y)
    a, b = map(clean, names or (x.name, y.name))
    if a == b:
        a, b = f"{a} (first)", f"{b} (second)"
    return replace(x, name=a), replace(y, name=b)


def document(found: Survey, rows: tuple[Rows, Rows]) -> dict[str, Any]:
    """What report.json holds: a survey, what it is of and what made it."""
    return {
        "schema": SCHEMA,
        "versions": _versions(),
        "inputs": {name: side.fingerprint for name, side in zip("xy", rows, strict=True)},
        "answers": {answer.question: answer.text for answer in answers(found)},
        "survey": found.to_json(),
    }


def _files(found: Survey, rows: tuple[Rows, Rows]) -> dict[str, bytes]:
    """The content of each file; report.json last, which is new only where all the others are."""
    from mmfast.gap.report.pictures import drawn

    files = drawn(found)
    below = captions(found)
    html = page(
        f"The modality gap of {found.x.name} and {found.y.name}",
        f"{found.x.rows:,} and {found.y.rows:,} rows of width {found.x.width:,}",
        answers(found),
        [Picture(files[f"{name}.svg"].decode(), ALT[name], below[name]) for name in _names(files)],
        tables(found),
        [*found.notes, *RULES],
        {**_versions(), **_options(found)},
    )
    numbers = json.dumps(document(found, rows), indent=1, allow_nan=False) + "\n"
    return {**files, "report.html": html.encode(), "report.json": numbers.encode()}


def _names(files: dict[str, bytes]) -> list[str]:
    return [name.removesuffix(".svg") for name in files if name.endswith(".svg")]


def _versions() -> dict[str, str]:
    import mmfast

    return {
        "mmfast": mmfast.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _options(found: Survey) -> dict[str, str]:
    """Those that are one number or word."""
    single = (int, float, str)
    return {name: str(of) for name, of in found.options.items() if isinstance(of, single)}
