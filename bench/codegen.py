"""`python -m bench.codegen`: what the GPU kernels compile to, without a GPU, into CODEGEN.md.

Every Triton kernel is compiled with the tile its table gives, for every architecture of the
table, and its machine code read back: registers, spills, shared memory, tensor-core instructions.
A tile that does not fit still compiles (into spills, or for tensor memory into a kernel that only
traps), so what a kernel must show is asked of the code. The rows of nvcc are added where it is.

    --check   compare with the budgets of tests/golden/codegen.json and write nothing
    --quick   with --check: bfloat16 and pairs left out by ids, what training meets most
    --update  write the budgets from what was compiled
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.codegen_jobs import ARCHITECTURES, Job, triton_jobs
from bench.nvcc import cuda_rows

HERE = Path(__file__).resolve().parent
REPORT = HERE / "CODEGEN.md"
BUDGETS = HERE.parent / "tests" / "golden" / "codegen.json"
# shared memory a block can have, by architecture, and all of the tensor memory of 10.0
SHARED = {80: 166912, 90: 232448, 100: 232448}
TENSOR_MEMORY = 512
HEADER = """# Compiled kernels

Written by `python -m bench.codegen` with triton {triton}; no card is needed and none was used.

Registers are those of a thread, of at most 255. Spills count the instructions that move registers
to memory and back: none is allowed. Tensor cores: the most frequent instruction, and how many of
all kinds. The sizes of a tile are rows, columns and depth. sm_100 counts columns of tensor memory,
of which there are 512.
"""

_MMA = re.compile(r"\b(UTC\w*MMA|[HQIO]GMMA|[HIQO]MMA)[.\w]*")
_FLOAT_ATOMIC = re.compile(r"\b(?:ATOM[GS]?|REDG?)\.\S*\bADD\.B?F\d+")


@dataclass(frozen=True)
class Row:
    """What one kernel compiled to."""

    key: str
    tile: str
    registers: int = 0
    spills: int = 0
    shared: int = 0
    tensor_memory: int = 0
    mma: str = "-"
    complaint: str = ""


def compile_job(job: Job) -> Row:
    """Compile `job` and read its code; `complaint` says what is wrong with it."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {
        name: job.constants[name] for name in ("num_warps", "num_stages") if name in job.constants
    }
    constants = {
        p.name: job.constants.get(p.name) for p in job.kernel.params if p.name not in job.types
    }
    signature = {p.name: job.types.get(p.name, "constexpr") for p in job.kernel.params}
    # what a launch finds of aligned tensors with rows of whole vectors
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, p in enumerate(job.kernel.params)
        if signature[p.name].startswith("*") or p.name.startswith("stride")
        if signature[p.name] != "constexpr"
    }
    printed = io.StringIO()
    try:
        # a failing assembler has all of its input printed
        with contextlib.redirect_stdout(printed):
            source = ASTSource(
                fn=job.kernel, signature=signature, constexprs=constants, attrs=aligned
            )
            compiled = triton.compile(
                source, target=GPUTarget("cuda", job.arch, 32), options=options
            )
    except Exception as error:
        return Row(job.key, job.tile, complaint=f"does not compile: {_last_line(error)}")
    usage, code = _disassemble(compiled.asm["cubin"])
    registers = int(re.search(r"REG:(\d+)", usage).group(1))  # type: ignore[union-attr]
    mma = [found.group(0) for found in _MMA.finditer(code)]
    row = Row(
        key=job.key,
        tile=job.tile,
        registers=registers,
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),
        shared=compiled.metadata.shared,
        tensor_memory=getattr(compiled.metadata, "tmem_size", 0) or 0,
        mma=f"{max(set(mma), key=mma.count)} x{len(mma)}" if mma else "-",
    )
    return replace(row, complaint=complaint_of(job, row, code))


def complaint_of(job: Job, row: Row, code: str) -> str:
    """What no budget can allow, as a clause after the kernel's name, or nothing."""
    if row.spills:
        return f"spills {row.spills} times"
    if row.shared > SHARED[job.arch]:
        return f"takes {row.shared} bytes of shared memory, and there are {SHARED[job.arch]}"
    if row.tensor_memory > TENSOR_MEMORY:
        return f"takes {row.tensor_memory} columns of tensor memory, and there are {TENSOR_MEMORY}"
    if job.tensor_cores and row.mma == "-":
        return "has no tensor-core instruction"
    if _FLOAT_ATOMIC.search(code):
        return "adds floating-point numbers atomically"
    return ""


def _disassemble(cubin: bytes) -> tuple[str, str]:
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [tools / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        )
        code = subprocess.run(
            [tools / "nvdisasm", "-c", file.name], capture_output=True, text=True, check=True
        )
    return usage.stdout, code.stdout


def _last_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1][:160]


def _compile_number(task: tuple[bool, int]) -> Row:
    # kernels cannot be sent to another process, but it has the same list
    quick, i = task
    return compile_job(triton_jobs(quick)[i])


def triton_rows(architectures: Sequence[int], quick: bool) -> list[Row]:
    """Compile them, on every core."""
    tasks = [(quick, i) for i, job in enumerate(triton_jobs(quick)) if job.arch in architectures]
    with multiprocessing.get_context("spawn").Pool() as pool:
        return list(pool.imap(_compile_number, tasks))


def nvcc_rows(architectures: Sequence[int]) -> list[Row]:
    """The CUDA C++ kernels; none where there is no nvcc."""
    names = {80: "80", 90: "90a", 100: "100a"}
    rows = []
    for row in cuda_rows([names[arch] for arch in architectures]):
        key = f"CUDA {row['kernel']} {row['arch']}"
        if "reason" not in row:
            rows.append(
                Row(
                    key=key,
                    tile="-",
                    registers=row["registers"],
                    spills=row["spill_bytes"],
                    shared=row["shared_bytes"],
                    complaint=row["complaint"],
                )
            )
        elif not row["reason"].endswith("not found"):
            # there is a compiler, and it refused
            rows.append(Row(key=key, tile="-", complaint=f"does not compile: {row['reason']}"))
    return rows


def render(rows: Sequence[Row]) -> str:
    """The whole of CODEGEN.md."""
    import triton

    lines = [
        HEADER.format(triton=triton.__version__),
        "| kernel | tile | registers | spills | shared, KB | tensor memory | tensor cores |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        lines.append(
            f"| {row.key} | {row.tile} | {row.registers} | {row.spills} | "
            f"{row.shared / 1024:.0f} | {row.tensor_memory or '-'} | {row.mma} |"
        )
    wrong = [f"* {row.key}: {row.complaint}" for row in rows if row.complaint]
    return "\n".join([*lines, *(["", "What is wrong:", "", *wrong] if wrong else []), ""])


def check(rows: Sequence[Row], budgets: dict[str, dict[str, int]]) -> list[str]:
    """A sentence for everything that is wrong or above its budget.

    Only Triton's rows have budgets: its version is pinned, that of nvcc is the machine's.
    """
    said = [f"{row.key} {row.complaint}" for row in rows if row.complaint]
    units = {"registers": "registers", "shared": "bytes of shared memory"}
    for row in rows:
        if row.key.startswith("CUDA "):
            continue
        budget = budgets.get(row.key)
        if budget is None:
            said.append(f"{row.key} has no budget in {BUDGETS.name}; --update writes one")
            continue
        for what, unit in units.items():
            value = getattr(row, what)
            if value > budget[what]:
                said.append(f"{row.key} takes {value} {unit}, and its budget is {budget[what]}")
    return said


def budgets_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What --update stores."""
    import triton

    kernels = {
        row.key: {"registers": row.registers, "shared": row.shared}
        for row in rows
        if not row.key.startswith("CUDA ")
    }
    return {"triton": triton.__version__, "kernels": kernels}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.codegen", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    for option in ("--check", "--quick", "--update"):
        parser.add_argument(option, action="store_true")
    asked = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set, and the interpreter compiles nothing")
    part = asked.quick or set(asked.arch) != set(ARCHITECTURES)
    if part and (asked.update or not asked.check):
        parser.error("a part of the kernels can only be checked: add --check, without --update")
    rows = triton_rows(asked.arch, asked.quick)
    if not asked.quick:
        rows += nvcc_rows(asked.arch)
    if asked.update:
        BUDGETS.write_text(json.dumps(budgets_of(rows), indent=1) + "\n")
    stored = json.loads(BUDGETS.read_text())
    budgets = stored["kernels"]
    if stored["triton"] != (version := budgets_of(rows)["triton"]):
        # another compiler allocates otherwise; what no budget allows is still looked for
        print(f"the budgets are those of triton {stored['triton']}: not compared with {version}")
        budgets = budgets_of(rows)["kernels"]
    said = check(rows, budgets)
    if not asked.check:
        REPORT.write_text(render(rows))
    for sentence in said:
        print(sentence)
    print(f"{len(rows)} kernels compiled, {len(said)} complaints")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
