"""What lies where in a file of arrays: found without reading them, by suffix.

Sources: numpy's format description (numpy.lib.format), PKWARE's APPNOTE for local file headers of
a zip, and the header of safetensors (github.com/huggingface/safetensors): eight bytes of length,
JSON, data.
"""

import contextlib
import json
import math
import os
import struct
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy.lib import format as npy
from torch import Tensor

from mmfast.gap._inputs import as_tensor

Reader = Callable[[int, int], Tensor]
FROM_NUMPY = {"f2": torch.float16, "f4": torch.float32, "f8": torch.float64}
FROM_SAFETENSORS = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}


@dataclass(frozen=True)
class Held:
    """One array of a file. dtype: the word for it where torch or the measures have none.

    reader: from the number of a plane, or None of a 2-D array, to a function that reads rows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: Any
    reader: Callable[[int | None], Reader]


def _in_place(
    path: Path, name: str, shape: tuple[int, ...], dtype: torch.dtype, offset: int, swap: bool
) -> Held:
    """Rows that lie side by side in the file from `offset` on; `swap` their bytes when read."""
    size = dtype.itemsize
    there, needed = path.stat().st_size, offset + math.prod(shape) * size
    if there < needed:
        raise ValueError(f"{path.name} is truncated: it has {there} bytes of {needed}")

    def reader(plane: int | None) -> Reader:
        height, width = shape[-2:]
        first = offset + (plane or 0) * height * width * size

        def read(start: int, stop: int) -> Tensor:
            rows = torch.empty(stop - start, width, dtype=dtype)
            raw = rows.view(torch.uint8).view(-1).numpy()
            with path.open("rb", buffering=0) as file:
                _fill(file, first + start * width * size, raw)
            if swap:
                raw.view(f"u{size}").byteswap(inplace=True)
            return rows

        return read

    return Held(name, shape, dtype, reader)


def _fill(file: Any, offset: int, raw: Any) -> None:
    file.seek(offset)
    view = memoryview(raw)
    while view:
        got = file.readinto(view)
        if not got:
            raise OSError(f"{file.name} is shorter than when it was opened")
        view = view[got:]


def _npy_array(path: Path, name: str, file: BinaryIO) -> Held:
    """The array whose header begins where `file` stands."""
    with damaged(path, "is no .npy data"):
        version = npy.read_magic(file)
        header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, columns_first, dtype = header(file)
        _check_sizes("its shape", shape)
    known = FROM_NUMPY.get(dtype.str[1:])
    if known is None:
        return Held(name, shape, str(dtype), _never)
    if columns_first and len(shape) > 1:
        raise ValueError(
            f"{path.name} is stored by columns (Fortran order): save numpy.ascontiguousarray of it"
        )
    return _in_place(path, name, shape, known, file.tell(), not dtype.isnative)


def _never(plane: int | None) -> Reader:
    raise AssertionError("an array of this type is refused before")


def _npy(path: Path) -> list[Held]:
    with path.open("rb") as file:
        return [_npy_array(path, "", file)]


def _npz(path: Path) -> list[Held]:
    with damaged(path, "is damaged or truncated"), zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    arrays = []
    with path.open("rb") as file:
        for member in members:
            name = member.filename.removesuffix(".npy")
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(
                    f"{path.name}: {name!r} is compressed and cannot be read in place; "
                    "write it by numpy.savez"
                )
            file.seek(member.header_offset)
            head = file.read(30)
            if len(head) < 30 or not head.startswith(b"PK\x03\x04"):
                raise ValueError(f"{path.name} is damaged: {name!r} is not where it should begin")
            # the lengths of name and extra field here may differ from the directory's
            file.seek(sum(struct.unpack("<HH", head[26:])), os.SEEK_CUR)
            arrays.append(_npy_array(path, name, file))
    return arrays


def _safetensors(path: Path) -> list[Held]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        length = int.from_bytes(head, "little")
        if len(head) < 8 or length > size - 8:
            raise ValueError(f"{path.name} is no safetensors file, or truncated in its header")
        with damaged(path, "is no safetensors file"):
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            entries = [
                (name, tuple(it["shape"]), str(it["dtype"]), *it["data_offsets"])
                for name, it in header.items()
            ]
            for name, shape, _, begin, end in entries:
                _check_sizes(f"the shape of {name!r}", shape)
                _check_sizes(f"the place of {name!r}", (begin, end))
    arrays = []
    for name, shape, word, begin, end in entries:
        dtype = FROM_SAFETENSORS.get(word)
        if dtype is None:
            arrays.append(Held(name, shape, word, _never))
            continue
        if math.prod(shape) * dtype.itemsize != end - begin:
            raise ValueError(
                f"{path.name} is no safetensors file: {name!r} is {list(shape)} in "
                f"{end - begin} bytes"
            )
        arrays.append(_in_place(path, name, shape, dtype, 8 + length + begin, False))
    return arrays


def _torch(path: Path) -> list[Held]:
    with damaged(path, "cannot be loaded by torch"):
        held = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    if isinstance(held, Tensor):
        held = {"": held}
    if not isinstance(held, Mapping):
        raise ValueError(f"{path.name} must hold a tensor or a dict of them, got {_kind(held)}")
    return [of_tensor(str(name), x) for name, x in held.items() if isinstance(x, Tensor)]


def of_tensor(name: str, tensor: Tensor) -> Held:
    """A tensor, in memory or mapped by torch."""

    def reader(plane: int | None) -> Reader:
        chosen = tensor.detach() if plane is None else tensor.detach()[plane]
        layout = torch.contiguous_format
        return lambda start, stop: chosen[start:stop].cpu().clone(memory_format=layout)

    dtype = tensor.dtype if tensor.layout == torch.strided else str(tensor.layout)
    return Held(name, tuple(tensor.shape), dtype, reader)


def _parquet(path: Path) -> list[Held]:
    try:
        types, parquet = import_module("pyarrow.types"), import_module("pyarrow.parquet")
    except ImportError as error:
        raise ValueError(f"{path.name}: .parquet needs pyarrow (pip install pyarrow)") from error
    with damaged(path, "is damaged or truncated"):
        file = parquet.ParquetFile(path)
        rows, schema = file.metadata.num_rows, file.schema_arrow
        groups = _Groups(path, file)
    arrays = []
    for field in schema:
        kind = field.type
        if types.is_fixed_size_list(kind) or types.is_list(kind) or types.is_large_list(kind):
            width = kind.list_size if types.is_fixed_size_list(kind) else groups.width(field.name)
            dtype = _of_arrow(kind.value_type)
            arrays.append(
                Held(field.name, (rows, width), dtype, groups.reader([field.name], width))
            )
    if arrays:
        return arrays
    kinds = {_of_arrow(field.type) for field in schema}
    dtype = kinds.pop() if len(kinds) == 1 else "columns of several types"
    reader = groups.reader(schema.names, len(schema.names))
    return [Held("", (rows, len(schema.names)), dtype, reader)]


def _of_arrow(kind: Any) -> Any:
    words = {"halffloat": torch.float16, "float": torch.float32, "double": torch.float64}
    return words.get(str(kind), str(kind))


class _Groups:
    """The row groups of a parquet file, the last one read kept."""

    def __init__(self, path: Path, file: Any) -> None:
        self.path, self.file = path, file
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        self.ends = np.cumsum(sizes)
        self.kept: tuple[Any, Any] = (None, None)

    def width(self, column: str) -> int:
        """How long the first list is, 0 of none."""
        with damaged(self.path, "is damaged or truncated"):
            for batch in self.file.iter_batches(1, columns=[column]):
                return len(batch.column(0)[0].as_py() or ())
        return 0

    def reader(self, columns: list[str], width: int) -> Callable[[int | None], Reader]:
        return lambda plane: lambda start, stop: self._read(columns, width, start, stop)

    def _read(self, columns: list[str], width: int, start: int, stop: int) -> Tensor:
        parts = []
        while start < stop:
            group = int(np.searchsorted(self.ends, start, side="right"))
            end = min(stop, int(self.ends[group]))
            begin = int(self.ends[group - 1]) if group else 0
            parts.append(self._group(group, columns, width)[start - begin : end - begin])
            start = end
        return torch.cat(parts)

    def _group(self, group: int, columns: list[str], width: int) -> Tensor:
        at = (group, *columns)
        if self.kept[0] != at:
            self.kept = (None, None)
            with damaged(self.path, "is damaged or truncated"):
                table = self.file.read_row_group(group, columns=columns)
            made = [self._column(column, width) for column in table.columns]
            self.kept = (at, torch.cat(made, 1))
        kept: Tensor = self.kept[1]
        return kept

    def _column(self, column: Any, width: int) -> Tensor:
        whole = column.combine_chunks()
        lists = hasattr(whole.type, "value_type")
        values = whole.flatten() if lists else whole
        ragged = lists and not np.all(whole.value_lengths().to_numpy(zero_copy_only=False) == width)
        if whole.null_count or values.null_count or ragged:
            raise ValueError(f"{self.path.name} must have {width} numbers in every row")
        numbers = as_tensor("open_rows", "column", values.to_numpy(zero_copy_only=False))
        return numbers.view(len(whole), -1)


@contextlib.contextmanager
def damaged(path: Path, what: str) -> Iterator[None]:
    """Whatever a parser inside raises becomes one line that begins with the file's name.

    What the system says of the file itself, with an errno, goes through as it is.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(f"{path.name} {what}: {first_line(error)}") from error


def _check_sizes(what: str, sizes: tuple[Any, ...]) -> None:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"{what} is {list(sizes)}")


def first_line(error: BaseException) -> str:
    """The first line of a message, which may have many."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _kind(x: Any) -> str:
    return type(x).__name__


BY_SUFFIX: dict[str, Callable[[Path], list[Held]]] = {
    ".npy": _npy,
    ".npz": _npz,
    ".safetensors": _safetensors,
    ".pt": _torch,
    ".pth": _torch,
    ".parquet": _parquet,
}
