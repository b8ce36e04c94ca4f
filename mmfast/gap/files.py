"""Rows of embeddings wherever they are kept, read a block at a time.

Files of .npy, .npz and .safetensors are read at an offset and not mapped: a block costs what it
holds, and a file that shrinks meanwhile is an error and no crash. .pt is mapped by torch, a memmap
by whoever made it, and .parquet is read a row group at a time.
"""

from __future__ import annotations

import os
import zlib
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmfast.gap import _formats
from mmfast.gap._inputs import as_tensor
from mmfast.ops._inputs import SCORE_TYPE, type_name

# bytes of a tensor whose checksum is made at a time
_PIECE = 1 << 24


@dataclass(frozen=True, eq=False)
class Rows:
    """N rows of width D that need not fit in memory.

    name: shown to people. shape: (N, D). dtype: of what is stored. read_rows, identify: how it
    is done; call `read` and look at `fingerprint`.
    """

    name: str
    shape: tuple[int, int]
    dtype: torch.dtype
    read_rows: Callable[[int, int], Tensor]
    identify: Callable[[], list[Any]]

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def fingerprint(self) -> list[Any]:
        """What tells this source from a changed one: path, bytes, mtime in ns and key of a file,
        type, shape and checksum of what is in memory."""
        return self.identify()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows start to stop, [stop - start, D] of the stored type, on the CPU.

        Raises:
            OSError: the file cannot be read any more, or is shorter than it was.
            ValueError: a row group of a .parquet is damaged or has rows of another width.
        """
        if start == stop:
            return torch.empty(0, self.shape[1], dtype=self.dtype)
        return self.read_rows(start, stop)

    def take(self, index: Tensor) -> Tensor:
        """Rows of any numbers int64 [n], [n, D]; neighbours are read at once."""
        if len(index) == 0:
            return self.read(0, 0)
        numbers, place = torch.unique(index, return_inverse=True)
        breaks = (numbers.diff() != 1).nonzero()[:, 0] + 1
        runs = torch.tensor_split(numbers, breaks)
        return torch.cat([self.read(int(run[0]), int(run[-1]) + 1) for run in runs])[place]


def open_rows(source: Any, key: str | int | None = None) -> Rows:
    """Embeddings [N, D] in memory or in files, without reading them.

    Args:
        source: a tensor, numpy array or memmap; a path; a sequence of those, which are shards in
            that order; or Rows, returned as they are. By suffix a file is
            .npy; .npz as numpy.savez writes it (a compressed one cannot be read in place);
            .safetensors; .pt or .pth, a tensor or a dict of tensors in torch.save's zip format;
            .parquet, which needs pyarrow: a column of lists, or float columns alone, and holds
            one row group in memory.
        key: which array of a file that holds several. Of an array [A, N, D], as Mind the Gap
            publishes its features, the number of a plane; "name:1" is plane 1 of array "name".

    Returns:
        Rows of float16, bfloat16, float32 or float64.

    Raises:
        OSError: a path that cannot be read.
        TypeError: a source or a type of elements that is not in the lists above.
        ValueError: a damaged file, an unknown suffix, a key that is missing or wrong, a shape that
            is not [N, D], nothing in it, shards that do not fit together. All are one line that
            begins with the file's name.
    """
    if isinstance(source, Rows):
        if key is not None:
            raise ValueError(f"{source.name} is open already, choose its key before: got {key!r}")
        return source
    if isinstance(source, (str, os.PathLike)):
        return _open_file(Path(source), key)
    if isinstance(source, (list, tuple)):
        return _open_shards(source, key)
    return _open_array(source, key)


def is_stored(source: Any) -> bool:
    """Whether `source` is rows to be streamed, and not a tensor or an array in memory."""
    if isinstance(source, (list, tuple)):
        kinds = (Rows, str, os.PathLike, np.ndarray, Tensor)
        return len(source) > 0 and all(isinstance(shard, kinds) for shard in source)
    return isinstance(source, (Rows, str, os.PathLike, np.memmap))


def _open_file(path: Path, key: str | int | None) -> Rows:
    opener = _formats.BY_SUFFIX.get(path.suffix.lower())
    try:
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a directory; name its files")
        facts = path.stat()
        if opener is None:
            known = ", ".join(_formats.BY_SUFFIX)
            raise ValueError(f"{path.name}: suffix must be one of {known}, got {path.suffix!r}")
        arrays = opener(path)
    except OSError as error:
        if error.strerror is None:
            raise
        raise type(error)(f"{path} cannot be read: {error.strerror}") from error
    mark = [
        str(path.resolve()),
        facts.st_size,
        facts.st_mtime_ns,
        None if key is None else f"{key}",
    ]
    return _checked(path.name, arrays, key, mark)


def _open_array(source: Any, key: str | int | None) -> Rows:
    tensor = as_tensor("open_rows", "source", source).detach()
    filename = getattr(source, "filename", None)
    name = Path(filename).name if isinstance(source, np.memmap) and filename else "array"
    held = _formats.of_tensor("", tensor)

    def checksum() -> int:
        rows = tensor.reshape(len(tensor), -1)
        step = max(1, _PIECE // (rows.shape[1] * rows.element_size()))
        crc = 0
        for start in range(0, len(rows), step):
            part = rows[start : start + step].cpu().contiguous().view(torch.uint8)
            crc = zlib.crc32(part.numpy().data, crc)
        return crc

    rows = _checked(name, [held], key, [])
    facts = [type_name(tensor.dtype), list(tensor.shape), None if key is None else f"{key}"]
    return Rows(rows.name, rows.shape, rows.dtype, rows.read_rows, lambda: [*facts, checksum()])


def _checked(
    name: str, arrays: Sequence[_formats.Held], key: str | int | None, mark: list[Any]
) -> Rows:
    array, plane = _chosen(name, arrays, key)
    shown = f"{name}: {array.name!r}" if array.name else f"{name}: the array"
    if array.dtype not in SCORE_TYPE:
        kind = type_name(array.dtype) if isinstance(array.dtype, torch.dtype) else array.dtype
        raise TypeError(f"{shown} must be float16, bfloat16, float32 or float64, got {kind}")
    shape = array.shape
    if len(shape) == 3 and plane is None:
        raise ValueError(
            f"{shown} is {list(shape)}, not [N, D]: choose one of its planes by key, "
            f"{_key_of(array, 0)!r} to {_key_of(array, shape[0] - 1)!r}"
        )
    if len(shape) not in (2, 3) or (len(shape) == 2 and plane is not None):
        wanted = "[N, D]" if plane is None else "[A, N, D] for a plane of it"
        raise ValueError(f"{shown} must be {wanted}, got {list(shape)}")
    if plane is not None and not plane < shape[0]:
        raise ValueError(f"{shown} has planes 0 to {shape[0] - 1}, got key {key!r}")
    rows, width = shape[-2:]
    if rows == 0 or width == 0:
        raise ValueError(f"{shown} is empty, {list(shape)}")
    title = name if key is None else f"{name}[{key}]"
    return Rows(title, (rows, width), array.dtype, array.reader(plane), lambda: mark)


def _key_of(array: _formats.Held, plane: int) -> str:
    return f"{array.name}:{plane}" if array.name else f"{plane}"


def _chosen(
    name: str, arrays: Sequence[_formats.Held], key: str | int | None
) -> tuple[_formats.Held, int | None]:
    """The array that `key` names, and the plane of it."""
    named = {array.name: array for array in arrays}
    if not named:
        raise ValueError(f"{name} holds no arrays")
    wanted = "" if key is None else str(key)
    if wanted in named:
        return named[wanted], None
    head, _, tail = wanted.rpartition(":")
    plane = int(tail) if tail.isascii() and tail.isdigit() else None
    if plane is not None and head in named:
        return named[head], plane
    if len(named) == 1 and head == "" and (plane is not None or key is None):
        return arrays[0], plane
    there = ", ".join(sorted(named))
    if key is None:
        raise ValueError(f"{name} holds several arrays, choose one by key: {there}")
    if there == "":
        raise ValueError(f"{name} holds one array without a name, got key {wanted!r}")
    raise ValueError(f"{name} has no key {wanted!r}, only: {there}")


def _open_shards(sources: Sequence[Any], key: str | int | None) -> Rows:
    if not sources:
        raise ValueError("open_rows: source must hold one shard or more, got none")
    for source in sources:
        if isinstance(source, (int, float, list, tuple)):
            kind = type(source).__name__
            raise TypeError(f"open_rows: shards must be paths, tensors or arrays, got {kind}")
    shards = [open_rows(source, key) for source in sources]
    first, last = shards[0], shards[-1]
    for shard in shards:
        if shard.shape[1] != first.shape[1]:
            raise ValueError(
                f"{shard.name}: rows must be {first.shape[1]} wide like those of {first.name}, "
                f"got {shard.shape[1]}"
            )
        if shard.dtype != first.dtype:
            raise TypeError(
                f"{shard.name}: rows must be {type_name(first.dtype)} like those of {first.name}, "
                f"got {type_name(shard.dtype)}"
            )
    ends = list(accumulate(len(shard) for shard in shards))

    def read(start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            at = bisect_right(ends, start)
            begin = ends[at] - len(shards[at])
            end = min(stop, ends[at])
            parts.append(shards[at].read(start - begin, end - begin))
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    name = first.name if len(shards) == 1 else f"{first.name} to {last.name} ({len(shards)} shards)"
    shape = (ends[-1], first.shape[1])
    return Rows(name, shape, first.dtype, read, lambda: [shard.fingerprint for shard in shards])
