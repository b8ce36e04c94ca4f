"""What tests and benchmarks share: cases, an error budget, ways to catch a kernel out."""

import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from mmfast import _dispatch
from mmfast.cases import CASES as CASES
from mmfast.cases import AnyCase as AnyCase
from mmfast.cases import Case as Case
from mmfast.cases import RowsCase as RowsCase
from mmfast.cases import ScoresCase as ScoresCase
from mmfast.cases import cases as cases
from mmfast.cases import find_case as find_case


def random_pair(
    N: int = 5,
    M: int = 4,
    D: int = 3,
    *,
    dtype: torch.dtype = torch.float64,
    requires_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """Normal q [N, D] and k [M, D] from torch's own generator."""
    q, k = (torch.randn(rows, D, dtype=dtype, requires_grad=requires_grad) for rows in (N, M))
    return q, k


def unit_rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random directions over the last axis, the same for every dtype but for its rounding."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=random, dtype=torch.float64)
    return torch.nn.functional.normalize(x, dim=-1).to(dtype)


def leaf(x: Tensor) -> Tensor:
    """A copy of `x` that requires grad."""
    return x.detach().clone().requires_grad_()


def widest(backend: str) -> torch.dtype:
    """The widest type that `backend` takes."""
    return torch.float32 if backend == "triton" else torch.float64


LAYOUTS = ("columns of a wider buffer", "every third row", "transposed", "every other column")


def strided(x: Tensor, layout: str) -> Tensor:
    """A copy of `x` [N, D] that lies between NaN in one of LAYOUTS."""
    N, D = x.shape
    views = {
        "columns of a wider buffer": lambda: x.new_full((N, 2 * D + 3), torch.nan)[:, D : 2 * D],
        "every third row": lambda: x.new_full((3 * N, D), torch.nan)[::3],
        "transposed": lambda: x.new_full((D, N), torch.nan).T,
        "every other column": lambda: x.new_full((N, 2 * D), torch.nan)[:, ::2],
    }
    return views[layout]().copy_(x)


def in_double(made: dict[str, Any]) -> dict[str, Any]:
    """A case's inputs for the float64 judge: floating tensors become new float64 leaves."""
    return {
        name: x.detach().double().requires_grad_() if _is_floating(x) else x
        for name, x in made.items()
    }


def _is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


@torch.no_grad()
def lse_magnitudes(
    q: Tensor,
    k: Tensor,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    upstream: Sequence[Tensor],
    q_ids: Tensor | None = None,
    k_ids: Tensor | None = None,
    mask: Tensor | None = None,
) -> dict[str, float]:
    """What errors of pairwise_lse are relative to: the sums of the absolute terms of each result.

    All in float64; `upstream` of rows and columns.
    """
    products = q @ k.T
    keep = torch.ones_like(products, dtype=torch.bool) if mask is None else mask
    if q_ids is not None and k_ids is not None:
        keep = keep & (q_ids[:, None] != k_ids)
    s = (scale * products).masked_fill(~keep, -math.inf)
    weights = upstream[0].abs()[:, None] * (s - rows[:, None]).exp().nan_to_num(0.0)
    weights += upstream[1].abs() * (s - columns).exp().nan_to_num(0.0)
    of_scores = 1.0 + float((scale * products).abs().max()) + math.log(max(products.shape))
    # exp(s - lse) takes over the rounding of its argument, or of those of two factors
    weights *= 1 + of_scores / 2
    return {
        "rows": of_scores,
        "columns": of_scores,
        "dq": float(scale * (weights @ k.abs()).max()),
        "dk": float(scale * (weights.T @ q.abs()).max()),
        "dscale": float((weights * products.abs()).sum()),
    }


@torch.no_grad()
def softplus_magnitudes(made: dict[str, Any], upstream: Tensor) -> dict[str, float]:
    """The same of pairwise_softplus for the inputs `made`."""
    products, scale, bias = made["q"] @ made["k"].T, made["scale"], made["bias"]
    logits = scale * products + bias
    if "q_ids" in made:
        logits = logits.masked_fill(made["q_ids"][:, None] == made["k_ids"], -math.inf)
    of_scores = 1.0 + float((scale * products).abs().max() + bias.abs())
    # each slope takes over the rounding of its score
    slopes = logits.sigmoid() * (1 + of_scores)
    weights = upstream.abs() * slopes
    return {
        "sum": float(torch.nn.functional.softplus(logits).sum() + slopes.sum()),
        "dq": float(scale * (weights @ made["k"].abs()).max()),
        "dk": float(scale * (weights.T @ made["q"].abs()).max()),
        "dscale": float((weights * products.abs()).sum()),
        "dbias": float(weights.sum()),
    }


@torch.no_grad()
def pool_magnitudes(
    made: dict[str, Any], weights: Tensor, upstream: Sequence[Tensor]
) -> dict[str, float]:
    """The same of fdt_pool for the inputs `made` and its weights [B, C].

    `upstream` of pooled and of weights.
    """
    scale = 1 / (math.sqrt(made["codebook"].shape[1]) * float(made["temperature"]))
    padded = made["tokens"].isnan()
    scores = made["tokens"].nan_to_num(0.0) @ made["codebook"].T
    winners = (
        scores.masked_fill(padded.any(2, keepdim=True), -math.inf).max(1, keepdim=True).indices
    )
    tokens, codes = made["tokens"].nan_to_num(0.0).abs(), made["codebook"].abs()
    score = 1 + float((tokens @ codes.T).max()) * scale
    # a weight takes over the rounding of its score, all of it or in proportion
    off = (weights > 0) * score if made["normalize"] == "sparsemax" else weights * score
    total = weights.sum(1, keepdim=True).clamp(min=1)
    g, h = (x.abs() for x in upstream)
    v = g @ codes.T + h
    slope = 2 * v.amax(1, keepdim=True) * (off + weights) * scale
    won = torch.zeros_like(scores).scatter_(1, winners, slope.unsqueeze(1))
    d_tokens = won @ codes
    d_codes = torch.einsum("bnc,bnd->cd", won, tokens) + (off / total).T @ g
    return {
        "pooled": float(((off + weights) / total @ codes).max()),
        "weights": score,
        "dtokens": float(d_tokens.max()),
        "dcodebook": float(d_codes.max()),
        "dtemperature": float((d_tokens * tokens).sum()) / float(made["temperature"]),
    }


@torch.no_grad()
def landscape_magnitude(
    x: Tensor, y: Tensor, shifts: Tensor, temperatures: Tensor, **options: Any
) -> float:
    """The same of shift_landscape for losses times their temperatures, in float64.

    What a side's rows are rounded by grows with the shift and as they come near 0.
    """
    u, v = (side / side.norm(dim=1, keepdim=True) for side in (x, y))
    gap = u.mean(0) - v.mean(0)
    size = 1.0
    for shift in shifts:
        step = shift * gap / gap.norm()
        nearest = [float((u - f * step).norm(dim=1).min()) for f in (0, 0.5, 1)]
        nearest += [float((v + f * step).norm(dim=1).min()) for f in (0, 0.5, 1)]
        size = max(size, float(1 + shift.abs()) ** 2 / min(*nearest, 1.0))
    return size + float(temperatures.max()) * (1 + math.log(len(x)))


def assert_within_budget(
    name: str,
    got: Tensor,
    eager: Tensor,
    exact: Tensor,
    *,
    eps: float,
    magnitude: float | None = None,
    factor: float = 2.0,
) -> None:
    """A kernel may err as much as plain torch does in the same type, times `factor`, plus a floor.

    Judged against `exact` (float64) in three ways: the largest error, the error's norm, and its
    mean, which has to vanish like that of random rounding: a lost tile shows there first.

    Args:
        got, eager, exact: one shape; infinities and NaN of `got` must stand where `exact` has them.
        eps: rounding of the type; the floor is twice this times `magnitude`.
        magnitude: what an error is relative to, default the largest finite |exact|; give it where
            `exact` is small because large terms cancel.

    Raises:
        AssertionError: naming `name`, the measure, what was allowed and what came.
    """
    got, eager, exact = (x.detach().double() for x in (got, eager, exact))
    assert got.shape == exact.shape, f"{name}: shape {list(got.shape)}, not {list(exact.shape)}"
    finite = exact.isfinite()
    same = (got == exact) | (got.isnan() & exact.isnan())
    assert bool(same[~finite].all()), f"{name}: an infinity or NaN is missing"
    assert bool(got[finite].isfinite().all()), f"{name}: not finite where the exact value is"
    if not bool(finite.any()):
        return
    error, noise, exact = (got - exact)[finite], (eager - exact)[finite], exact[finite]
    n, largest = error.numel(), float(exact.abs().max())
    if magnitude is None:
        magnitude = largest
    # from the largest entry to all of them
    spread = float(exact.norm()) / largest if largest else n**0.5
    most = factor * float(noise.abs().max()) + 2 * eps * magnitude
    norm = factor * float(noise.norm()) + 2 * eps * magnitude * spread
    # the mean of n independent errors shrinks as 1 / sqrt(n); a quarter may be shared rounding
    bias = factor * float(noise.mean().abs()) + norm / n**0.5 * (0.25 + 4 / n**0.5)
    for measure, value, allowed in (
        ("largest error", float(error.abs().max()), most),
        ("norm of the error", float(error.norm()), norm),
        ("mean error", float(error.mean().abs()), bias),
    ):
        assert value <= allowed, f"{name}: {measure} {value:.3e}, allowed {allowed:.3e}"


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Memory that mmfast allocates uninitialised holds NaN, or the lowest integer.

    An output that a kernel forgets to write then fails any comparison.
    """
    if hasattr(torch.empty, "poisons"):
        yield
        return

    def poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def wrapped(*args: Any, **kwargs: Any) -> Tensor:
            x = make(*args, **kwargs)
            if sys._getframe(1).f_globals.get("__name__", "").partition(".")[0] == "mmfast":
                x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).min)
            return x

        wrapped.poisons = True  # type: ignore[attr-defined]
        return wrapped

    with ExitStack() as stack:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (torch, "empty_strided"),
            (torch.Tensor, "new_empty"),
        ):
            stack.enter_context(patch.object(owner, name, poisoning(getattr(owner, name))))
        yield


@contextmanager
def cpu_level(name: str) -> Iterator[None]:
    """Run the compiled core at level `name`; ValueError if this machine lacks it."""
    before = _dispatch.core.isa()
    _dispatch.core.set_isa(name)
    try:
        yield
    finally:
        _dispatch.core.set_isa(before)


@dataclass
class Saved:
    """`bytes` that autograd keeps for the backward pass."""

    bytes: int = 0


@contextmanager
def saved_bytes(*inputs: Tensor) -> Iterator[Saved]:
    """Count what autograd saves inside the block, each storage once, `inputs` not at all."""
    saved = Saved()
    # held, so that no storage is freed and its address counted as another's
    seen = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in inputs}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in seen:
            seen[storage.data_ptr()] = storage
            saved.bytes += storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield saved


_operators: list[Any] = []


def import_trainer(package: str) -> Any:
    """A package that trains models, also where torchvision's compiled operators do not load.

    PyPI's torchvision is built for CUDA. Beside torch's CPU build its import fails for want of two
    operators that it extends; no trainer calls them, so here they are declared without a body.

    Raises:
        ImportError: the package is not installed.
    """
    if importlib.util.find_spec("torchvision") and not _operators:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms does not exist" not in str(error):
                raise
            library: Any = torch.library.Library("torchvision", "FRAGMENT")  # type: ignore[no-untyped-call]
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _operators.append(library)
    return importlib.import_module(package)
