"""What `codegen` compiles: each Triton kernel with each tile of its table, and architecture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

ARCHITECTURES = (80, 90, 100)
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
