"""The problems that tests and benchmarks pose to each op, each with the reason it is there."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One problem: q [N, D] against k [M, D], and the reason it is there.

    tags: "quick" runs everywhere, "full" also through every level and type, "bench" is timed.
    norm: the length of every row. bias: added to every score, where the op has one.
    left_out: "own" (row numbers as ids), "repeated" (few ids, many equal), "sorted" (ids in
        order, as samples of one class after another) and "mask", alone or with one of the ids.
    """

    id: str
    N: int
    M: int
    D: int
    why: str
    tags: tuple[str, ...] = ("full",)
    scale: float = 10.0
    norm: float = 1.0
    bias: float | None = None
    left_out: tuple[str, ...] = ()

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of the op: q, k, scale, and what else the case has.

        q and k are leaves that require grad; k is a slice of a wider buffer of NaN.
        """
        random = torch.Generator().manual_seed(seed)
        q = self._rows(self.N, random).to(device, dtype)
        wide = torch.full((self.M, self.D + 5), torch.nan, dtype=dtype, device=device)
        k = wide[:, 3 : 3 + self.D]
        k.copy_(self._rows(self.M, random))
        made: dict[str, Any] = {
            "q": q.requires_grad_(),
            "k": k.requires_grad_(),
            "scale": torch.tensor(self.scale, dtype=torch.float64, requires_grad=True),
        }
        if self.bias is not None:
            made["bias"] = torch.tensor(self.bias, dtype=torch.float64, requires_grad=True)
        if "own" in self.left_out:
            made["q_ids"] = torch.arange(self.N, device=device)
            made["k_ids"] = torch.arange(self.M, device=device)
        if "repeated" in self.left_out or "sorted" in self.left_out:
            q_ids = torch.randint(0, 7, (self.N,), generator=random)
            k_ids = torch.randint(0, 7, (self.M,), generator=random)
            if "sorted" in self.left_out:
                q_ids, k_ids = q_ids.sort().values, k_ids.sort().values
            made["q_ids"], made["k_ids"] = q_ids.to(device), k_ids.to(device)
        if "mask" in self.left_out:
            mask = torch.rand(self.N, self.M, generator=random) < 0.7
            # a row and a column that lose every pair
            mask[self.N // 2], mask[:, self.M // 3] = False, False
            made["mask"] = mask.to(device)
        return made

    def _rows(self, rows: int, random: torch.Generator) -> Tensor:
        x: Tensor = torch.randn(rows, self.D, generator=random, dtype=torch.float64)
        norms: Tensor = x.norm(dim=1, keepdim=True)
        return x * (self.norm / norms)


@dataclass(frozen=True)
class RowsCase:
    """One problem of paired rows: a and b [N, D], and the reason it is there.

    tags: as for `Case`. angle: between the rows of a pair, None for whatever random rows have.
    norm: the length of every row. lam: "rows" (one for each, some outside of [0, 1]) or "one".
    """

    id: str
    N: int
    D: int
    why: str
    tags: tuple[str, ...] = ("full",)
    angle: float | None = None
    norm: float = 1.0
    lam: str = "rows"

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of the op: a, b, lam, leaves that require grad.

        b is a slice of a wider buffer of NaN; lam is float64.
        """
        random = torch.Generator().manual_seed(seed)
        a, b = (self._unit_rows(random) for _ in range(2))
        if self.angle is not None:
            b -= (a * b).sum(1, keepdim=True) * a
            b /= b.norm(dim=1, keepdim=True)
            b = math.cos(self.angle) * a + math.sin(self.angle) * b
        wide = torch.full((self.N, self.D + 5), torch.nan, dtype=dtype, device=device)
        view = wide[:, 3 : 3 + self.D]
        view.copy_(self.norm * b)
        size = (self.N,) if self.lam == "rows" else ()
        lam = torch.rand(size, generator=random, dtype=torch.float64) * 1.4 - 0.2
        return {
            "a": (self.norm * a).to(device, dtype).requires_grad_(),
            "b": view.requires_grad_(),
            "lam": lam.to(device).requires_grad_(),
        }

    def _unit_rows(self, random: torch.Generator) -> Tensor:
        x: Tensor = torch.randn(self.N, self.D, generator=random, dtype=torch.float64)
        norms: Tensor = x.norm(dim=1, keepdim=True)
        return x / norms


@dataclass(frozen=True)
class ScoresCase:
    """One problem of rows of scores x [N, M], and the reason it is there.

    tags: as for `Case`. spread: standard deviation of a row. step: scores are multiples of it, if
    it is not 0. center: what is added to all of them. masked: the share of entries at -inf; the
    middle row then has no others.
    """

    id: str
    N: int
    M: int
    why: str
    tags: tuple[str, ...] = ("full",)
    spread: float = 1.0
    step: float = 0.0
    center: float = 0.0
    masked: float = 0.0

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of the op: x, a leaf and a slice of a wider buffer of NaN."""
        random = torch.Generator().manual_seed(seed)
        x = torch.randn(self.N, self.M, generator=random, dtype=torch.float64) * self.spread
        if self.step:
            x = (x / self.step).round() * self.step
        x += self.center
        if self.masked:
            x[torch.rand(x.shape, generator=random) < self.masked] = -math.inf
            x[self.N // 2] = -math.inf
        wide = torch.full((self.N, self.M + 5), torch.nan, dtype=dtype, device=device)
        view = wide[:, 3 : 3 + self.M]
        view.copy_(x)
        return {"x": view.requires_grad_()}


@dataclass(frozen=True)
class PoolCase:
    """One problem of tokens [B, N, D] against a codebook [C, D], and the reason it is there.

    tags: as for `Case`. normalize, temperature: as in the op, for random normal values in eighths:
    their scores are exact in every type, so that who wins is no matter of rounding.
    padded_score: None where every place holds a token; otherwise a third does not, in the first
        sample none does, and the places without hold NaN.
    """

    id: str
    B: int
    N: int
    C: int
    D: int
    why: str
    tags: tuple[str, ...] = ("full",)
    normalize: str = "sparsemax"
    temperature: float = 0.5
    padded_score: float | None = None

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of the op: tokens, codebook and temperature, leaves that require grad.

        Both lie in wider buffers of NaN: tokens as behind a class token, codes among columns.
        """
        random = torch.Generator().manual_seed(seed)
        B, N, C, D = self.B, self.N, self.C, self.D
        tokens = torch.full((B, N + 1, D), torch.nan, dtype=dtype, device=device)[:, 1:]
        codebook = torch.full((C, D + 5), torch.nan, dtype=dtype, device=device)[:, 3 : 3 + D]
        for x in (codebook, tokens):
            normal = torch.randn(x.shape, generator=random, dtype=torch.float64)
            x.copy_((8 * normal).round().clamp(-32, 32) / 8)
        made: dict[str, Any] = {"normalize": self.normalize}
        if self.padded_score is not None:
            mask = torch.rand(B, N, generator=random) < 0.67
            mask[0] = False
            made["mask"], made["padded_score"] = mask.to(device), self.padded_score
            tokens[~made["mask"]] = torch.nan
        temperature = torch.tensor(self.temperature, dtype=torch.float64, requires_grad=True)
        made.update(tokens=tokens.requires_grad_(), codebook=codebook.requires_grad_())
        return made | {"temperature": temperature}


@dataclass(frozen=True)
class GapCase:
    """One problem of two modalities with a gap: x and y [N, D], and the reason it is there.

    tags: as for `Case`. gap: how far the cones of x and y lie apart, beside noise of length 1.
    options: what the call is given beside.
    """

    id: str
    N: int
    D: int
    why: str
    tags: tuple[str, ...] = ("full",)
    shifts: tuple[float, ...] = (-1.5, 0.4)
    temperatures: tuple[float, ...] = (1.0, 0.05)
    gap: float = 1.0
    options: tuple[tuple[str, Any], ...] = ()

    def inputs(
        self, dtype: torch.dtype = torch.float32, *, device: str = "cpu", seed: int = 0
    ) -> dict[str, Any]:
        """Keyword arguments of the op; y is a slice of a wider buffer of NaN."""
        random = torch.Generator().manual_seed(seed)
        noise = torch.randn(3, self.N, self.D, generator=random, dtype=torch.float64) / self.D**0.5
        cone = self.gap * torch.nn.functional.normalize(torch.ones(self.D).double(), dim=0)
        lengths = torch.rand(self.N, 1, generator=random, dtype=torch.float64) + 0.5
        wide = torch.full((self.N, self.D + 5), torch.nan, dtype=dtype, device=device)
        y = wide[:, 3 : 3 + self.D]
        y.copy_((noise[0] + noise[1] - cone) * lengths)
        return {
            "x": ((noise[0] + noise[2] + cone) * lengths).to(device, dtype),
            "y": y,
            "shifts": torch.tensor(self.shifts, dtype=torch.float64),
            "temperatures": torch.tensor(self.temperatures, dtype=torch.float64),
            **dict(self.options),
        }


AnyCase = Case | RowsCase | ScoresCase | PoolCase | GapCase
_QUICK = ("quick", "full")

CASES: dict[str, tuple[AnyCase, ...]] = {
    "fdt_pool": (
        PoolCase("single", 1, 1, 1, 1, "the smallest problem there is", _QUICK),
        PoolCase("aligned", 4, 16, 128, 64, "every tile is whole: no edge code runs"),
        PoolCase("ragged", 5, 9, 131, 33, "one row and a few columns more than whole tiles",
                 _QUICK, padded_score=-math.inf),
        PoolCase("odd_width", 3, 7, 41, 13, "D fits no vector and no bf16 pair", _QUICK,
                 padded_score=0.0),
        PoolCase("one_token", 40, 1, 70, 24, "N=1: the maximum of one; several samples a tile"),
        PoolCase("few_codes", 20, 5, 3, 24, "C below a vector: threads share the codes", _QUICK,
                 "softmax", padded_score=0.0),
        PoolCase("long", 2, 400, 65, 20, "a sample goes through several strips and tiles"),
        PoolCase("deep", 3, 11, 200, 300, "D above what one visit of the width takes"),
        PoolCase("many_codes", 2, 6, 600, 16, "several groups of codes, few of them survive",
                 temperature=0.05),
        PoolCase("all_survive", 5, 7, 300, 40, "T=1000: every code keeps a weight",
                 temperature=1000.0),
        PoolCase("soft", 4, 11, 140, 17, "softmax: every code, of weights far apart",
                 normalize="softmax", padded_score=-math.inf),
        PoolCase("gates", 4, 11, 140, 17, "sigmoid: weights that do not sum to one", _QUICK,
                 "sigmoid", padded_score=0.0),
        PoolCase("shut", 4, 11, 140, 17, "sigmoid: a sample without a token divides by nothing",
                 normalize="sigmoid", padded_score=-math.inf),
    ),
    "pairwise_lse": (
        Case("single", 1, 1, 1, "the smallest problem there is", _QUICK),
        Case("aligned", 64, 128, 64, "every tile is whole: no edge code runs", _QUICK),
        Case("ragged", 129, 257, 96, "one row and one column more than whole tiles", _QUICK),
        Case("odd_width", 37, 41, 13, "D fits no vector and no bf16 pair", _QUICK),
        Case("thin", 150, 70, 1, "D=1: an inner product without a sum"),
        Case("deep", 40, 72, 1100, "D larger than what one block of the depth can hold"),
        Case("tall", 700, 5, 24, "N far above M: the sides may swap roles", _QUICK),
        Case("flat", 5, 700, 24, "M far above N: many column groups, one short row block"),
        Case("many_lanes", 450, 1030, 32, "several tiles both ways, merged in a fixed order"),
        Case("cold", 200, 300, 48, "temperature 0.01: one term carries each sum", scale=100.0),
        Case("loud", 90, 310, 48, "scores span +-1600: one maximum a tile loses rows", norm=40.0,
             scale=1.0),
        Case("own", 300, 300, 32, "own pairs left out: ids meet on the diagonal only", _QUICK,
             left_out=("own",)),
        Case("repeated", 131, 203, 32, "few ids, so that every tile holds equal ones",
             left_out=("repeated",)),
        Case("sorted", 300, 520, 16, "ids in order: whole tiles left out, others untouched",
             left_out=("sorted",)),
        Case("mask", 131, 203, 32, "a mask with an empty row and an empty column", _QUICK,
             left_out=("mask",)),
        Case("mask_and_ids", 131, 131, 32, "both reasons to leave a pair out", _QUICK,
             left_out=("own", "mask")),
        *(
            Case(f"square_{B}", B, B, 512, why, ("bench",), scale=100.0)
            for B, why in (
                (2048, "everything fits the caches of a server"),
                (4096, "in between, to see the slope"),
                (8192, "the scores alone would be 256 MB"),
            )
        ),
    ),
    # row numbers are the ids, unless said
    "sample_negatives": (
        Case("single", 1, 2, 1, "the smallest problem there is", _QUICK),
        Case("ragged", 129, 257, 96, "one row and one column more than whole tiles", _QUICK),
        Case("odd_width", 41, 37, 13, "D fits no vector and no bf16 pair", _QUICK),
        Case("tall", 700, 5, 24, "N far above M: the sides swap roles", _QUICK),
        Case("many_lanes", 200, 450, 32, "the best of several lanes, merged"),
        Case("cold", 150, 100, 48, "temperature 0.01: few candidates matter", scale=100.0),
        Case("loud", 210, 90, 48, "scores span +-1600: the noise decides nothing", norm=40.0,
             scale=1.0),
        Case("sorted", 260, 130, 16, "ids in order: whole tiles left out, others untouched",
             left_out=("sorted",)),
    ),
    "shift_landscape": (
        GapCase("single", 1, 4, "the smallest problem there is: losses are 0", _QUICK),
        GapCase("ragged", 129, 96, "one row more than whole tiles", _QUICK),
        GapCase("chunks", 70, 13, "chunks, the last of them short; D fits no vector", _QUICK,
                options=(("chunk", 30),)),
        GapCase("many_lanes", 260, 32, "several blocks both ways, merged in a fixed order"),
        GapCase("half_lanes", 250, 24, "two long chunks on several threads",
                options=(("chunk", 125),)),
        GapCase("shared", 60, 24, "scales that add up: powers are shared",
                temperatures=(1 / 50, 1 / 30, 1 / 20, 1 / 10, 1.0)),
        GapCase("cold", 130, 24, "cosines over the whole range at 1/500: one maximum loses rows",
                _QUICK, temperatures=(0.01, 0.002), gap=0.3),
        GapCase("apart", 100, 24, "shifts that leave both sides in a point each",
                shifts=(-5.0, 4.75)),
        GapCase("paper", 100, 24, "the gap itself and not its unit vector", gap=0.5,
                options=(("convention", "paper"),)),
        GapCase("x_alone", 40, 24, "one side moves", options=(("sides", "x"),)),
        GapCase("y_alone", 40, 24, "the other one does", options=(("sides", "y"),)),
    ),
    "slerp": (
        # rows of length one and width one would all be parallel or antipodal
        RowsCase("single", 1, 1, "the smallest problem there is", _QUICK, norm=0.7),
        RowsCase("thin", 70, 1, "D=1: an inner product without a sum", norm=0.7),
        RowsCase("aligned", 64, 256, "whole vectors only, as trainers have them", _QUICK),
        RowsCase("odd_width", 37, 77, "D fits no vector", _QUICK),
        RowsCase("narrow", 300, 3, "less than a vector a row, several chunks of rows"),
        RowsCase("deep", 5, 2500, "rows longer than a GPU's program holds", _QUICK),
        RowsCase("chunks", 700, 48, "several chunks for several threads", _QUICK, lam="one"),
        RowsCase("short", 50, 32, "rows that are not unit", _QUICK, norm=0.3),
        RowsCase("same", 33, 24, "theta = 0, where the formula is 0 / 0", _QUICK, angle=0.0),
        RowsCase("close", 33, 24, "theta = 1e-3: the published derivative cancels", angle=1e-3),
        RowsCase("right", 33, 24, "theta = pi / 2", angle=math.pi / 2),
        RowsCase("wide", 33, 24, "theta = 2.8: weights grow", _QUICK, angle=2.8),
    ),
    "sparsemax": (
        ScoresCase("single", 1, 1, "the smallest problem there is", _QUICK),
        ScoresCase("aligned", 64, 256, "whole vectors only", _QUICK),
        ScoresCase("odd_width", 37, 77, "M fits no vector", _QUICK),
        ScoresCase("narrow", 300, 3, "less than a vector a row, many rows in a turn", _QUICK),
        ScoresCase("steep", 33, 50, "one entry takes all", _QUICK, spread=1000.0),
        ScoresCase("dense", 20, 1000, "every entry is in the support", _QUICK, spread=1e-4),
        ScoresCase("ties", 40, 130, "many equal entries, some at the threshold", _QUICK, step=0.25),
        ScoresCase("masked", 30, 90, "entries of -inf, and a row of them", _QUICK, masked=0.6),
        ScoresCase("far", 40, 130, "a large common part, which eats digits", center=1000.0),
        ScoresCase("some", 7, 4100, "hundreds of a few thousand, after many steps", spread=0.02),
        ScoresCase("long", 1, 17000, "more than threads of a card's block hold", spread=0.01),
    ),
}  # fmt: skip
CASES["pairwise_rank"] = (
    *CASES["sample_negatives"],
    Case("own", 150, 150, 32, "own pairs left out: ids meet on the diagonal only", _QUICK,
         left_out=("own",)),
)  # fmt: skip
# q and k are x and y; the scale is none of theirs
CASES["pairwise_stats"] = (
    Case("single", 1, 1, 1, "the smallest problem there is", _QUICK),
    Case("aligned", 192, 128, 64, "every tile is whole: no edge code runs"),
    Case("ragged", 131, 257, 96, "rows and columns behind whole tiles", _QUICK),
    Case("odd_width", 37, 41, 13, "D fits no vector and no bf16 pair", _QUICK),
    Case("flat", 5, 700, 24, "M far above N: many column groups, one short row block"),
    Case("many_lanes", 250, 430, 32, "several blocks both ways, merged in a fixed order"),
    Case("loud", 90, 310, 48, "products span +-16: most lie outside of the range", _QUICK,
         norm=4.0),
)  # fmt: skip
CASES["pairwise_softplus"] = (
    *(
        replace(case, bias=-3.0)
        for case in CASES["pairwise_lse"]
        if isinstance(case, Case) and "full" in case.tags and "mask" not in case.left_out
    ),
    Case("tiny", 60, 80, 32, "terms near e^-20: relative accuracy", _QUICK, scale=3.0, bias=-20.0),
)


def find_case(op: str, id: str) -> Any:
    """The case of `op` with this id."""
    return next(case for case in CASES[op] if case.id == id)


def cases(op: str, tag: str) -> list[Any]:
    """The cases of `op` that carry `tag`."""
    return [case for case in CASES[op] if tag in case.tags]
