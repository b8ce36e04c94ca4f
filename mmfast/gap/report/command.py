"""The command `mmfast gap`: what two files of embeddings say of the modality gap."""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfast.gap._formats import BY_SUFFIX, damaged
from mmfast.gap.files import Rows, open_rows
from mmfast.gap.report import document, gap_report, opened
from mmfast.gap.report.tables import as_text, tables
from mmfast.gap.report.words import answers, plain
from mmfast.gap.survey import Survey, survey

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
FORMATS = f"Files end in {', '.join(BY_SUFFIX)}"


def main(argv: Sequence[str]) -> int:
    """Run `mmfast gap` with these arguments and return its exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.resume and args.out is None:
        parser.error("--resume keeps its state in --out DIR, and there is none")
    try:
        # leaving it clears its line before anything else is printed
        with _Progress(sys.stderr.isatty() and not args.quiet) as progress:
            found, rows = _run(args, progress)
        _print(found, rows, args)
    except BrokenPipeError:
        # who read the output has enough; what is left of it would be an error at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ModuleNotFoundError, OSError, TypeError, ValueError) as error:
        print(f"mmfast gap: {_in_its_words(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        go_on = "run it again to go on" if args.resume else "with --resume it would go on from here"
        print(f"mmfast gap: interrupted; {go_on}", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mmfast gap",
        description="How two modalities lie to each other: gap, cone, loss along the gap, "
        f"retrieval. {FORMATS}; a folder or a pattern in quotes stands for its files, sorted by "
        "name, as one.",
    )
    parser.add_argument("images", metavar="IMAGES", help="rows [N, D] of one modality")
    second = "rows [N, D] of the other; row i belongs to row i unless there are labels"
    parser.add_argument("texts", metavar="TEXTS", help=second)
    keys = parser.add_mutually_exclusive_group()
    keys.add_argument("--key", help="which array of a file that holds several, of both")
    keys.add_argument("--keys", nargs=2, metavar=("KX", "KY"), help="one for each")
    parser.add_argument(
        "--labels",
        nargs="+",
        metavar="FILE",
        help="integers in .npy, for both sides or one file each: rows of equal labels belong "
        "together",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="leave a report there")
    parser.add_argument("--logit-scale", type=float, default=100.0, metavar="S")
    parser.add_argument("--bins", type=int, default=256, metavar="N", help="of histograms")
    parser.add_argument(
        "--budget", type=_bytes, default=_bytes("1G"), help="memory to work in, as 2G (1G)"
    )
    parser.add_argument("--skip-nan", action="store_true", help="leave out rows with NaN")
    parser.add_argument("--resume", action="store_true", help="go on where it was interrupted")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print only what went wrong")
    return parser


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGT]?)(?:i?B)?", text, re.IGNORECASE)
    if match is None:
        raise argparse.ArgumentTypeError(f"a size must be like 512M or 2G, got {text!r}")
    return int(float(match[1]) * UNITS[match[2].upper()])


def _run(args: argparse.Namespace, progress: _Progress | None) -> tuple[Survey, tuple[Rows, Rows]]:
    keys = args.keys or (args.key, args.key)
    x = open_rows(_sources(args.images), keys[0])
    rows = opened(x, open_rows(_sources(args.texts), keys[1]))
    options: dict[str, Any] = {
        "labels": _labels(args.labels),
        "logit_scale": args.logit_scale,
        "bins": args.bins,
        "budget": args.budget,
        "on_nan": "skip" if args.skip_nan else "refuse",
        "progress": progress,
    }
    if args.out is None:
        return survey(*rows, **options), rows
    return gap_report(*rows, args.out, resume=args.resume, **options), rows


def _sources(path: str) -> Any:
    """A file as it is, a folder or a pattern as the files it stands for."""
    if Path(path).is_dir():
        found = [str(p) for p in Path(path).iterdir() if p.suffix.lower() in BY_SUFFIX]
        if not found:
            raise FileNotFoundError(f"{path} has no file that ends in {', '.join(BY_SUFFIX)}")
        return sorted(found)
    if not Path(path).exists() and glob.has_magic(path):
        found = sorted(glob.glob(path))
        if not found:
            raise FileNotFoundError(f"{path} matches no file")
        return found
    return path


def _labels(paths: Sequence[str] | None) -> Any:
    if paths is None:
        return None
    if len(paths) > 2:
        raise ValueError(f"--labels takes one file or two, got {len(paths)}")
    arrays = []
    for path in paths:
        with damaged(Path(path), "is no .npy file of integers"), Path(path).open("rb") as file:
            arrays.append(np.load(file))
    return arrays[0] if len(arrays) == 1 else tuple(arrays)


def _in_its_words(error: Exception) -> str:
    """The message as one of a command: without the name of a function, options as it has them."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = re.sub(r"^(survey|pairwise_stats|gap_report|open_rows): ", "", str(error))
    return text.replace("on_nan='skip'", "--skip-nan")


class _Progress:
    """A line on the terminal, where there is one: how much is done, and the time that is left."""

    def __init__(self, on: bool) -> None:
        self.on = on
        self.shown = 0.0

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *error: object) -> None:
        self._draw("")

    def __call__(self, done: float, total: float, left: float | None) -> None:
        now = time.monotonic()
        if now - self.shown >= 0.2:
            self.shown = now
            self._draw(f"{done / total:4.0%}" + ("" if left is None else f", {_clock(left)} left"))

    def _draw(self, words: str) -> None:
        if self.on:
            print(f"\r\x1b[K{words}", end="", file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _print(found: Survey, rows: tuple[Rows, Rows], args: argparse.Namespace) -> None:
    # a name in a script that the terminal cannot show is no reason to show nothing
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    if args.json:
        print(json.dumps(document(found, rows), indent=1, allow_nan=False))
    elif not args.quiet:
        print(as_text(tables(found)))
        for answer in answers(found):
            print(f"\n{_filled(f'{answer.question} {answer.text}')}")
        for note in found.notes:
            print(f"\n{_filled(note)}")
        if args.out is not None:
            print(f"\nSee {args.out / 'report.html'}")
    # here, where an error still becomes a line
    sys.stdout.flush()


def _filled(text: str) -> str:
    return plain(textwrap.fill(text, 92))
