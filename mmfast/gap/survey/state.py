"""Work in steps that survives an interrupt: what is done is kept in a file and taken up again."""

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch

from mmfast.gap._formats import first_line
from mmfast.gap._sides import Units
from mmfast.ops._statistics import PairwiseStats

T = TypeVar("T")
H = TypeVar("H")
Progress = Callable[[float, float, float], None]
NAME = "state.pt"
# seconds between two writes of the state; a write may take this share of the time
_EVERY = 5.0
_SHARE = 0.05


class Steps:
    """Folds over units of known costs, written to a folder now and then.

    identity: what the work is made of, by the word people know it by: numbers, words, or a dict
    with the name of an input and its fingerprint. A state of anything else is refused.
    total: the sum of all costs.
    """

    def __init__(
        self, who: str, folder: Any, identity: Mapping[str, Any], progress: Progress | None
    ) -> None:
        self.path = None if folder is None else Path(folder) / NAME
        self.identity = dict(identity)
        self.progress = progress
        self.total = 0.0
        self.done = 0.0
        # by name: units done, what they made, what they cost
        self._folds: dict[str, tuple[int, Any, float]] = {}
        self._before, self._begun, self._worked = 0.0, time.monotonic(), 0.0
        self._next_write = self._begun + _EVERY
        self._dirty = self._broken = False
        if self.path is not None:
            self._resume(who, self.path)

    @property
    def seconds(self) -> float:
        """How long the work took, interrupted runs included."""
        return self._before + time.monotonic() - self._begun

    def fold(
        self,
        name: str,
        units: Units[T],
        start: H,
        step: Callable[[H, T], H],
        cost: Callable[[T], float],
    ) -> H:
        """`step(held, unit)` over all units from `start` on. A step leaves `held` as it is."""
        already, held, spent = self._folds.setdefault(name, (0, start, 0.0))
        self.done += spent
        for at in range(already, len(units)):
            unit = units[at]
            held, spent = step(held, unit), spent + cost(unit)
            # one assignment: an interrupt finds a step done or not begun
            self._folds[name] = (at + 1, held, spent)
            self._dirty = True
            self._tell(cost(unit))
            if time.monotonic() > self._next_write:
                self._write()
        made: H = held
        return made

    @contextlib.contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever ends the work inside, what is done is written."""
        # a folder that cannot be written is said before the work
        self._dirty = not self._folds
        self._write()
        try:
            yield
            if self.progress is not None:
                self.progress(self.total, self.total, 0.0)
        finally:
            # a disk that was full a moment ago is no reason to hide what was raised
            if not self._broken:
                self._write()

    def _tell(self, cost: float) -> None:
        self.done += cost
        self._worked += cost
        # the first units may cost nothing, and say nothing of the time that is left
        if self.progress is not None and self._worked > 0:
            left = (time.monotonic() - self._begun) / self._worked * (self.total - self.done)
            self.progress(min(self.done, self.total), self.total, max(0.0, left))

    def _write(self) -> None:
        if self.path is None or not self._dirty:
            return
        begun = time.monotonic()
        state = {"identity": self.identity, "folds": self._folds, "seconds": self.seconds}
        data = io.BytesIO()
        torch.save(state, data)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.path, data.getbuffer())
        except OSError as error:
            self._broken = True
            raise type(error)(f"{self.path} cannot be written: {error.strerror}") from error
        self._dirty = False
        now = time.monotonic()
        self._next_write = now + max(_EVERY, (now - begun) / _SHARE)

    def _resume(self, who: str, path: Path) -> None:
        if not path.exists():
            return
        try:
            with torch.serialization.safe_globals([PairwiseStats]):
                state = torch.load(path, weights_only=True)
            was, folds, seconds = (state[name] for name in ("identity", "folds", "seconds"))
        except Exception as error:
            line = first_line(error)
            raise ValueError(f"{path} is no state of {who} ({line}): remove it") from error
        for name, value in self.identity.items():
            if was.get(name) != value:
                raise ValueError(
                    f"{path} was made with {_told(name, was.get(name), value)}: "
                    "remove it to begin again"
                )
        self._folds, self._before = folds, seconds


def _told(name: str, was: Any, now: Any) -> str:
    """What changed, in words short enough for a line."""
    if not isinstance(now, dict):
        return f"{name} {was!r}, not {now!r}"
    before, after = (it["name"] if it else "nothing" for it in (was, now))
    return f"{after} as it was before it changed" if before == after else f"{before}, not {after}"


def write_whole(path: Path, data: Any) -> None:
    """`data` is in the file, or the file is as it was."""
    beside = path.with_name(f".{path.name}.part")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
