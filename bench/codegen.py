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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.nvcc import cuda_rows

HERE = Path(__file__).resolve().parent
REPORT = HERE / "CODEGEN.md"
BUDGETS = HERE.parent / "tests" / "golden" / "codegen.json"
ARCHITECTURES = (80, 90, 100)
# shared memory a block can have, by architecture, and all of the tensor memory of 10.0
SHARED = {80: 166912, 90: 232448, 100: 232448}
TENSOR_MEMORY = 512
# what Triton calls a type; every half type makes the same code but for the name of its products
DTYPES = {"half": "bf16", "tf32": "fp32", "ieee": "fp32"}
# a depth of CLIP's; the loop over it is the same for others
DEPTH = 512
# arguments by name: pointers to data of the inputs' type, to others than float32, and sizes
DATA = frozenset({"Q", "K", "X", "Y", "A", "B", "G", "DX", "DA", "DB"})
POINTERS = {
    **dict.fromkeys(("Q_IDS", "K_IDS", "X_IDS", "Y_IDS", "SEED", "INDEX"), "i64"),
    **dict.fromkeys(("ABOVE", "COUNTS", "PLACES"), "i64"),
    "MASK": "u8",
    "WINNERS": "i32",
}
SIZES = frozenset({"N", "M"})
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
class Job:
    """One kernel to compile.

    types: of its arguments, by name; an argument that is not in it is None or a constant.
    """

    name: str
    kernel: Any
    arch: int
    types: dict[str, str]
    constants: dict[str, Any]
    tile: str = ""
    tensor_cores: bool = False
    slow: bool = False

    @property
    def key(self) -> str:
        return f"{self.name} sm_{self.arch}"


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


@cache
def triton_jobs(quick: bool) -> tuple[Job, ...]:
    """Every kernel with every tile that a launch may take."""
    jobs = (
        *_pairwise_lse_jobs(),
        *_combine_jobs(),
        *_pairwise_softplus_jobs(),
        *_sample_jobs(),
        *_rank_jobs(),
        *_stats_jobs(),
        *_pool_jobs(),
        *_landscape_jobs(),
        *_slerp_jobs(),
    )
    return tuple(job for job in jobs if not (quick and job.slow))


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


def _pairwise_lse_jobs() -> Iterator[Job]:
    from mmfast.kernels import _pairwise_lse_backward as backward
    from mmfast.kernels import _pairwise_lse_forward as forward
    from mmfast.kernels import _tiles as tiles

    kernels = {
        "forward": forward.forward_kernel,
        "gradient": backward.gradient_kernel,
        "product": backward.product_kernel,
        "flash": backward.flash_kernel,
    }
    for (key, kind, arch), rows in tiles.TILES.items():
        name, _, masked = key.partition(", ")
        if name not in kernels:
            continue
        for largest, tile in rows:
            D = min(largest, DEPTH)
            constants = tiles.constants(name, D, kind, tile)
            make = {
                "kernel": kernels[name],
                "arch": arch,
                "tile": f"{tile.n}x{tile.m}x{tile.d or D}, {tile.warps} warps, "
                f"{tile.stages} stages",
                "tensor_cores": kind != "ieee",
            }
            label = f"pairwise_lse {name}, {kind}, D={D}"
            if name == "product":
                # G k, then G^T q: which side of G is dense is known when a launch compiles
                for what, dense in (("G k", "stride_ak"), ("G^T q", "stride_an")):
                    yield Job(
                        f"{label}, {what}",
                        types=_types(kernels[name], kind, without=(dense,)),
                        constants={**constants, dense: 1, "FRESH": False},
                        slow=dense == "stride_an" or kind != "half",
                        **make,
                    )
                continue
            has_table = (f"{name}, mask", kind, arch) in tiles.TILES
            if name == "gradient" and has_table == bool(masked):
                # the gradient of the scale alone: G is summed and not stored
                yield Job(
                    f"{label}, scale alone",
                    types=_types(kernels[name], kind, without=("G", "UNIT", "MASK")),
                    constants=constants,
                    slow=True,
                    **make,
                )
            optional = {"DOTS", "UNIT"} if name == "gradient" else {"UNIT"}
            variants = {"": ("IDS", "MASK"), ", ids": ("MASK",), ", ids and mask": ()}
            for what, left in variants.items():
                # a table of its own for masks takes the variant over
                if ("mask" in what) != bool(masked) and (has_table or masked):
                    continue
                if "mask" in what and name == "flash":
                    continue
                absent = [
                    p.name
                    for p in kernels[name].params
                    if p.name in optional or p.name.endswith(left or ("none",))
                ]
                yield Job(
                    label + what,
                    types=_types(kernels[name], kind, without=absent),
                    constants=constants,
                    slow=what != ", ids" or kind != "half",
                    **make,
                )


def _combine_jobs() -> Iterator[Job]:
    from mmfast.kernels import _pairwise_lse_forward as forward
    from mmfast.kernels import _tiles as tiles

    for arch in ARCHITECTURES:
        yield Job(
            "pairwise_lse combine",
            forward.combine_kernel,
            arch,
            _types(forward.combine_kernel, "ieee", without=()),
            {"BLOCK": tiles.COMBINE},
            tile=str(tiles.COMBINE),
        )


def _pairwise_softplus_jobs() -> Iterator[Job]:
    from mmfast.kernels import _tiles as tiles
    from mmfast.kernels import pairwise_softplus

    kernel = pairwise_softplus.softplus_kernel
    # what is asked for: (constants, absent arguments)
    variants: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
        "sum alone": ({}, ("G", "Q_IDS", "K_IDS")),
        "scale alone, ids": ({"SLOPES": True, "DOTS": True}, ("G",)),
        "gradients": ({"SLOPES": True}, ("Q_IDS", "K_IDS")),
        "gradients, ids": ({"SLOPES": True}, ()),
    }
    for (name, kind, arch), rows in tiles.TILES.items():
        for _, tile in rows if name == "softplus" else ():
            constants = tiles.constants(name, DEPTH, kind, tile)
            for what, (asked, absent) in variants.items():
                yield Job(
                    f"pairwise_softplus, {kind}, D={DEPTH}, {what}",
                    kernel,
                    arch,
                    _types(kernel, kind, without=absent),
                    {"UNIT": 1.0, "SLOPES": False, "DOTS": False, **asked, **constants},
                    tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                    tensor_cores=kind != "ieee",
                    slow=what != "gradients, ids" or kind != "half",
                )


def _pool_jobs() -> Iterator[Job]:
    from mmfast.kernels import fdt_pool

    kernels = {"pool": fdt_pool.pool_kernel, "tokens": fdt_pool.tokens_kernel}
    for (name, kind, arch), rows in fdt_pool.TILES.items():
        for _, tile in rows:
            for what, absent in (("", ("MASK",)), (", mask", ())) if name == "pool" else [("", ())]:
                yield Job(
                    f"fdt_pool {name}, {kind}, D={DEPTH}{what}",
                    kernels[name],
                    arch,
                    _types(kernels[name], kind, without=absent),
                    fdt_pool.constants(name, DEPTH, kind, tile),
                    tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                    tensor_cores=kind != "ieee",
                    slow=what != "" or kind != "half",
                )
    kernel = fdt_pool.codebook_kernel
    for arch in ARCHITECTURES:
        for kind in ("half", "ieee"):
            for what, absent in (("", ("DOTS",)), (", temperature", ())):
                yield Job(
                    f"fdt_pool codebook, {DTYPES[kind]}, D={DEPTH}{what}",
                    kernel,
                    arch,
                    _types(kernel, kind, without=absent),
                    {"D": DEPTH, **fdt_pool.CODES},
                    tile=f"{fdt_pool.CODES['BLOCK_M']}x{fdt_pool.CODES['BLOCK_D']}",
                    slow=what != "" or kind != "half",
                )


def _sample_jobs() -> Iterator[Job]:
    from mmfast.kernels import sample_negatives as sample

    kernel = sample.sample_kernel
    for (_, kind, arch), rows in sample.TILES.items():
        for largest, tile in rows:
            D = min(largest, DEPTH)
            yield Job(
                f"sample_negatives, {kind}, D={D}",
                kernel,
                arch,
                _types(kernel, kind, without=()),
                sample.constants(D, kind, tile),
                tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                tensor_cores=kind != "ieee",
                slow=kind != "half",
            )


def _rank_jobs() -> Iterator[Job]:
    from mmfast.kernels import _tiles as tiles
    from mmfast.kernels import pairwise_rank

    kernel = pairwise_rank.rank_kernel
    # what is not given
    variants = {"bare": ("THRESHOLD", "ABOVE", "Q_IDS", "K_IDS"), "threshold, ids": ()}
    for (name, kind, arch), rows in tiles.TILES.items():
        for _, tile in rows if name == "rank" else ():
            for what, absent in variants.items():
                yield Job(
                    f"pairwise_rank, {kind}, D={DEPTH}, {what}",
                    kernel,
                    arch,
                    _types(kernel, kind, without=absent),
                    tiles.constants(name, DEPTH, kind, tile),
                    tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                    tensor_cores=kind != "ieee",
                    slow=what == "bare" or kind != "half",
                )


def _stats_jobs() -> Iterator[Job]:
    from mmfast.kernels import _tiles as tiles
    from mmfast.kernels import pairwise_stats

    kernel = pairwise_stats.stats_kernel
    # bins, and whether one set meets itself
    variants = {"bare": (0, False), "256 bins, one set": (256, True), "4096 bins": (4096, False)}
    for (name, kind, arch), rows in tiles.TILES.items():
        for _, tile in rows if name == "stats" else ():
            for what, (bins, distinct) in variants.items():
                slots = pairwise_stats.passes(bins) if bins else (1, 1)
                yield Job(
                    f"pairwise_stats, {kind}, D={DEPTH}, {what}",
                    kernel,
                    arch,
                    _types(kernel, kind, without=() if bins else ("EDGES", "RANGE")),
                    pairwise_stats.constants(DEPTH, kind, tile, distinct, *slots),
                    tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                    tensor_cores=kind != "ieee",
                    slow=what != "256 bins, one set" or kind != "half",
                )


def _landscape_jobs() -> Iterator[Job]:
    from mmfast.kernels import shift_landscape as landscape

    kernel = landscape.landscape_kernel
    for (_, kind, arch), rows in landscape.TILES.items():
        for largest, tile in rows:
            D = min(largest, DEPTH)
            yield Job(
                f"shift_landscape, {kind}, D={D}",
                kernel,
                arch,
                _types(kernel, kind, without=()),
                landscape.constants(D, kind, tile),
                tile=f"{tile.n}x{tile.m}x{tile.d}, {tile.warps} warps, {tile.stages} stages",
                tensor_cores=kind != "ieee",
                slow=kind != "half",
            )


def _slerp_jobs() -> Iterator[Job]:
    if find_spec("mmfast.kernels.slerp") is None:
        return
    from mmfast.kernels import slerp

    for arch in ARCHITECTURES:
        for kind in ("half", "ieee"):
            for D in (DEPTH, 2 * slerp.WIDEST):
                constants = slerp.launch_constants(1 << 16, D)
                for name, kernel in (
                    ("forward", slerp.forward_kernel),
                    ("backward", slerp.backward_kernel),
                ):
                    yield Job(
                        f"slerp {name}, {DTYPES[kind]}, D={D}",
                        kernel,
                        arch,
                        _types(kernel, kind, without=()),
                        constants,
                        tile=f"{constants['BLOCK_N']}x{constants['BLOCK_D']}",
                        slow=D > slerp.WIDEST or kind != "half",
                    )


def _types(kernel: Any, kind: str, without: Sequence[str]) -> dict[str, str]:
    """Types of `kernel`'s run-time arguments by what their names say."""
    types = {}
    names = {parameter.name for parameter in kernel.params}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in without:
            continue
        if name in SIZES or name[0].islower() or (name == "K" and "OUT" in names):
            types[name] = "i32"
        else:
            data = DTYPES[kind] if name in DATA else POINTERS.get(name, "fp32")
            types[name] = f"*{data}"
    return types


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
