"""Which tiles the kernels over pairs take, by kernel, type, architecture and depth.

Tables and not a search: the same tile every time, on a machine's first call too. Nothing here
looks at the number of multiprocessors, so that two cards of one architecture agree to the bit.
"""

from collections.abc import Mapping
from math import isqrt

import torch
from torch import Tensor
from triton import next_power_of_2

from mmfast.kernels._tile import INTERPRETED, Tile, architecture, precision

# columns of a program that merges partial sums
COMBINE = 256
# no tile is larger, either way
LARGEST = 256
# sides of a chunk of G are multiples of it, to be whole tiles
CHUNK = 32 if INTERPRETED else LARGEST

# what decides so far; whoever times a tile on a card writes here what was measured
COMPILED = "compiles without spills with and without ids; not yet timed on a card"
MASKED = "compiles without spills with ids and a mask; not yet timed on a card"


def _tile(n: int, m: int, d: int, halves: int, warps: int, stages: int) -> Tile:
    return Tile(n, m, d, halves, warps, stages, COMPILED)


def _masked(n: int, m: int, d: int, halves: int, warps: int, stages: int) -> Tile:
    return Tile(n, m, d, halves, warps, stages, MASKED)


ANY = 1 << 30
# (kernel, type, architecture) -> (largest D, tile), the smallest D first
Table = Mapping[tuple[str, str, int], tuple[tuple[int, Tile], ...]]
TILES: Table = {
    ("forward", "half", 80): ((ANY, _tile(128, 128, 32, 2, 8, 4)),),
    ("forward", "half", 90): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("forward", "half", 100): ((ANY, _tile(128, 64, 64, 1, 8, 3)),),
    ("forward", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("forward", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("forward", "tf32", 100): ((ANY, _tile(128, 64, 32, 2, 8, 3)),),
    ("forward", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("forward", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("forward", "ieee", 100): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("forward, mask", "half", 80): ((ANY, _masked(128, 128, 64, 2, 8, 3)),),
    ("forward, mask", "tf32", 80): ((ANY, _masked(128, 64, 32, 2, 8, 3)),),
    ("forward, mask", "tf32", 90): ((ANY, _masked(128, 64, 32, 2, 8, 3)),),
    ("forward, mask", "ieee", 80): ((ANY, _masked(64, 64, 32, 1, 8, 3)),),
    ("forward, mask", "ieee", 90): ((ANY, _masked(64, 64, 32, 1, 8, 3)),),
    ("forward, mask", "ieee", 100): ((ANY, _masked(64, 32, 32, 1, 4, 3)),),
    ("gradient", "half", 80): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("gradient", "half", 90): ((ANY, _tile(128, 256, 64, 2, 8, 3)),),
    ("gradient", "half", 100): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("gradient", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("gradient", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("gradient", "tf32", 100): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("gradient", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("gradient", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("gradient", "ieee", 100): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("gradient, mask", "half", 90): ((ANY, _masked(128, 128, 64, 2, 8, 3)),),
    ("softplus", "half", 80): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("softplus", "half", 90): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("softplus", "half", 100): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("softplus", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("softplus", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("softplus", "tf32", 100): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("softplus", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("softplus", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("softplus", "ieee", 100): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("rank", "half", 80): ((ANY, _tile(128, 128, 32, 2, 8, 4)),),
    ("rank", "half", 90): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("rank", "half", 100): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("rank", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("rank", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("rank", "tf32", 100): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("rank", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("rank", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 8, 3)),),
    ("rank", "ieee", 100): ((ANY, _tile(64, 32, 32, 1, 4, 3)),),
    ("stats", "half", 80): ((ANY, _tile(128, 64, 64, 2, 8, 3)),),
    ("stats", "half", 90): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("stats", "half", 100): ((ANY, _tile(128, 128, 64, 2, 8, 3)),),
    ("stats", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("stats", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("stats", "tf32", 100): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("stats", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("stats", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("stats", "ieee", 100): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("product", "half", 80): ((ANY, _tile(128, 256, 64, 2, 8, 3)),),
    ("product", "half", 90): ((ANY, _tile(128, 256, 64, 2, 8, 3)),),
    ("product", "half", 100): ((ANY, _tile(128, 256, 64, 2, 8, 3)),),
    ("product", "tf32", 80): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("product", "tf32", 90): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("product", "tf32", 100): ((ANY, _tile(128, 128, 32, 2, 8, 3)),),
    ("product", "ieee", 80): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("product", "ieee", 90): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    ("product", "ieee", 100): ((ANY, _tile(64, 64, 32, 1, 4, 3)),),
    # the depth of a flash tile is all of D: 0 stands for it
    ("flash", "half", 80): (
        (64, _tile(128, 64, 0, 1, 8, 3)),
        (128, _tile(64, 64, 0, 1, 4, 3)),
    ),
    ("flash", "half", 90): (
        (64, _tile(128, 128, 0, 1, 8, 2)),
        (128, _tile(128, 64, 0, 1, 8, 3)),
    ),
    ("flash", "half", 100): ((128, _tile(64, 64, 0, 1, 4, 3)),),
    ("flash", "tf32", 80): ((128, _tile(64, 32, 0, 1, 4, 2)),),
    ("flash", "tf32", 90): ((128, _tile(64, 32, 0, 1, 4, 2)),),
    ("flash", "tf32", 100): ((128, _tile(64, 32, 0, 1, 4, 2)),),
    ("flash", "ieee", 80): ((128, _tile(32, 32, 0, 1, 4, 2)),),
    ("flash", "ieee", 90): ((128, _tile(32, 32, 0, 1, 4, 2)),),
    ("flash", "ieee", 100): ((128, _tile(32, 32, 0, 1, 4, 2)),),
}

# about eight programs for each multiprocessor of a large card: its last wave is then nearly full
GROUPS, SPLITS, PROGRAMS = (3, 2, 6) if INTERPRETED else (32, 32, 1024)


def pick(
    kernel: str, x: Tensor, N: int, M: int, masked: bool = False, table: Table = TILES
) -> Tile:
    """The tile of `kernel` for [N, M] and inputs like `x` [*, D]."""
    if INTERPRETED:
        return _interpreted(N, M)
    kind, arch = kind_of(x.dtype), architecture(x.device)
    rows = table[kernel, kind, arch]
    if masked:
        rows = table.get((f"{kernel}, mask", kind, arch), rows)
    return next(tile for largest, tile in rows if largest >= x.shape[1])


def constants(kernel: str, D: int, kind: str, tile: Tile) -> dict[str, int | str]:
    """What a launch of `kernel` is compiled for, beside the types of its arguments."""
    made: dict[str, int | str] = {
        "D": D,
        "BLOCK_N": tile.n,
        "BLOCK_M": tile.m,
        "PRECISION": kind,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    if kernel == "flash":
        return made | {"BLOCK_D": max(16, next_power_of_2(D))}
    return made | {"BLOCK_D": tile.d, "HALVES": tile.halves}


def kind_of(dtype: torch.dtype) -> str:
    """How tiles of `dtype` are multiplied: "half", or "ieee" and "tf32" for float32."""
    return precision() if dtype == torch.float32 else "half"


def shares(row_blocks: int, column_tiles: int, columns: bool) -> tuple[int, int]:
    """Row blocks of a group and column tiles of a split.

    The splits, and with them the rows, are the same with and without columns. Without columns
    nothing is gained by a program with more than one row block.
    """
    splits = max(min(column_tiles, SPLITS), min(column_tiles, PROGRAMS // row_blocks))
    groups = max(min(row_blocks, GROUPS), min(row_blocks, PROGRAMS // splits))
    return -(-row_blocks // groups) if columns else 1, -(-column_tiles // splits)


def chunk(N: int, M: int, elements: int) -> tuple[int, int]:
    """Sides of a chunk of at most `elements` of [N, M], as square as they come.

    Squares visit the sums of dq and dk least often. A side is a multiple of CHUNK unless N or M
    ends first, and never smaller.
    """

    def fit(size: int, most: int) -> int:
        most = max(most // CHUNK * CHUNK, CHUNK)
        # as even as they come: no thin chunk at the end
        parts = -(-size // most)
        return min(size, -(-size // (parts * CHUNK)) * CHUNK)

    R = fit(N, isqrt(elements))
    C = fit(M, elements // R)
    return fit(N, elements // C), C


def _interpreted(N: int, M: int) -> Tile:
    # a tile takes milliseconds whatever its size: a few dozen of them, and several where there
    # is something to merge
    side = 32
    while side < LARGEST and 16 * side * side < N * M:
        side *= 2
    return Tile(side, side, 32, 1, 1, 1, "the interpreter")
