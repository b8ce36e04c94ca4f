"""What the CUDA C++ kernels compile to, without a GPU: registers, spills, and 16-byte accesses."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SOURCES = sorted((Path(__file__).resolve().parents[1] / "csrc" / "cuda").glob("*.cu"))
TOOLKIT = Path("/usr/local/cuda/bin")

_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")
_WIDE = re.compile(r"\b(LDG|STG)\.E(?:\.\w+)*?\.128\b")


def cuda_rows(archs: Sequence[str | int]) -> list[dict[str, Any]]:
    """One row for each kernel of csrc/cuda and each architecture ("80", "90a", ...).

    Keys: kernel, arch, registers, stack_bytes, spill_bytes, shared_bytes, wide_loads and
    wide_stores (LDG.E.128 and STG.E.128 in its code), complaint (what a kernel must not do, or "").
    Where nothing can be compiled: one row for each source and architecture with kernel, arch and
    reason.
    """
    nvcc, cuobjdump = _tool("nvcc"), _tool("cuobjdump")
    missing = [name for name, tool in (("nvcc", nvcc), ("cuobjdump", cuobjdump)) if tool is None]
    rows: list[dict[str, Any]] = []
    for source in SOURCES:
        for arch in archs:
            if nvcc is None or cuobjdump is None:
                reason = f"{' and '.join(missing)} not found"
                rows.append({"kernel": source.stem, "arch": f"sm_{arch}", "reason": reason})
            else:
                rows += _compile(nvcc, cuobjdump, source, f"sm_{arch}")
    return rows


def _tool(name: str) -> str | None:
    found = shutil.which(name) or shutil.which(name, path=str(TOOLKIT))
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin:
        # Triton's wheel brings cuobjdump along
        folder = Path(triton.origin).parent / "backends" / "nvidia" / "bin"
        found = shutil.which(name, path=str(folder))
    return found


def _compile(nvcc: str, cuobjdump: str, source: Path, arch: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        cubin = f"{folder}/{source.stem}.cubin"
        options = ["-std=c++17", "-O3", f"-arch={arch}", "-Xptxas", "-v"]
        built = _run([nvcc, "-cubin", *options, str(source), "-o", cubin])
        if built.returncode:
            lines = [line for line in built.stderr.splitlines() if "error" in line]
            reason = f"nvcc: {lines[0] if lines else built.stderr.strip()[-200:]}"
            return [{"kernel": source.stem, "arch": arch, "reason": reason}]
        read = _run([cuobjdump, "-sass", cubin])
        if read.returncode:
            reason = f"cuobjdump: {read.stderr.strip()[-200:]}"
            return [{"kernel": source.stem, "arch": arch, "reason": reason}]
    return rows_of(arch, built.stderr, read.stdout)


def rows_of(arch: str, ptxas: str, sass: str) -> list[dict[str, Any]]:
    """The rows in what `ptxas -v` said of one file and the listing of its machine code."""
    wide = _wide_accesses(sass)
    rows: list[dict[str, Any]] = []
    symbol, function, stack, spills = "", "", 0, 0
    for line in ptxas.splitlines():
        if found := _ENTRY.search(line):
            symbol, stack, spills = found.group(1), 0, 0
        elif found := _PROPERTIES.search(line):
            function = found.group(1)
        elif found := _SPILLS.search(line):
            frame, *bytes_moved = map(int, found.groups())
            stack += frame if function == symbol else 0
            spills += sum(bytes_moved)  # those of the functions that it calls as well
        elif (found := _REGISTERS.search(line)) and symbol:
            row = {
                "kernel": symbol,
                "arch": arch,
                "registers": int(found.group(1)),
                "stack_bytes": stack,
                "spill_bytes": spills,
                "shared_bytes": int(found.group(2) or 0),
                "wide_loads": wide[symbol, "LDG"],
                "wide_stores": wide[symbol, "STG"],
            }
            rows.append(row)
            symbol = ""
    for row, name in zip(rows, _readable([row["kernel"] for row in rows]), strict=True):
        row["kernel"] = name
        row["complaint"] = _complaint(row)
    return sorted(rows, key=lambda row: row["kernel"])


def _wide_accesses(sass: str) -> Counter[tuple[str, str]]:
    counts: Counter[tuple[str, str]] = Counter()
    symbol = ""
    for line in sass.splitlines():
        if found := re.search(r"Function : (\w+)", line):
            symbol = found.group(1)
        elif found := _WIDE.search(line):
            counts[symbol, found.group(1)] += 1
    return counts


def _readable(symbols: list[str]) -> list[str]:
    """`slerp_forward_rows<float, 4, 32, 8>`: the kernel and its plan, where c++filt is there."""
    filt = shutil.which("c++filt")
    if filt is None:
        return symbols
    names = _run([filt, *symbols]).stdout.splitlines() if symbols else []
    pattern = re.compile(r"(\w+)<mmfast::cuda::Plan(<[^>]*>)")
    found = [pattern.search(name) for name in names]
    return [
        f"{m.group(1)}{m.group(2)}" if m else name for m, name in zip(found, names, strict=True)
    ]


def _complaint(row: dict[str, Any]) -> str:
    if row["spill_bytes"]:
        return f"spills {row['spill_bytes']} bytes"
    # a plan of one element to a pack is for addresses that allow no more
    one_by_one = re.search(r"<\w+, 1, |PlanI\w+?Li1E", row["kernel"])
    if not one_by_one and not (row["wide_loads"] and row["wide_stores"]):
        return "reads or writes fewer than 16 bytes at a time"
    return ""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)
