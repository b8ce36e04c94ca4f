"""Is every GPU kernel right on this device? What `bench gpu` asks before it times anything.

`python -m bench.gpu_checks` runs each kernel once on small inputs, to be run under
compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import mmfast
from bench.gpu_clock import Budget
from bench.peers import first_line
from mmfast._dispatch import Backend
from mmfast.ops import BACKENDS
from mmfast.ops import pairwise_lse as pairwise
from mmfast.ops import pairwise_softplus as sigmoid
from mmfast.ops import sample_negatives as sampling
from mmfast.ops import slerp as spherical
from mmfast.ops import sparsemax as projection
from mmfast.ops._inputs import SCORE_TYPE
from mmfast.testing import (
    CASES,
    AnyCase,
    assert_within_budget,
    in_double,
    lse_magnitudes,
    poisoned_memory,
    softplus_magnitudes,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Inputs = dict[str, Any]
Results = dict[str, Tensor]


@dataclass(frozen=True)
class Subject:
    """How an op is called, and what its errors are measured against.

    run: (inputs, backend) -> its outputs. definition: the same from plain torch, of float64
    inputs the judge. reordered: the definition with its sums in another order, so that plain
    torch's own error is seen. magnitudes: what errors are relative to, by name of the result.
    wide: the results held in float32 or better, whatever the inputs are. differentiable: whether
    the leaves have gradients.
    """

    leaves: tuple[str, ...]
    outputs: tuple[str, ...]
    wide: tuple[str, ...]
    run: Callable[[Inputs, str], tuple[Tensor, ...]]
    definition: Callable[[Inputs], tuple[Tensor, ...]]
    reordered: Callable[[Inputs], tuple[Tensor, ...]]
    magnitudes: Callable[[Inputs, Results, list[Tensor], torch.dtype], dict[str, float]]
    differentiable: bool = True

    def eps(self, name: str, dtype: torch.dtype) -> float:
        """The rounding of one result for inputs of `dtype`."""
        return torch.finfo(SCORE_TYPE[dtype] if name in self.wide else dtype).eps


@dataclass(frozen=True)
class Check:
    """One thing that was checked. error: None if it holds; skipped: why it was not looked at."""

    op: str
    backend: str
    what: str
    error: str | None = None
    skipped: str | None = None


def gpu_backends(op: str, device: str) -> Iterator[tuple[Backend, str | None]]:
    """The op's backends that are kernels for a card, each with why it cannot run on `device`."""
    probe = torch.ones(1, 1, device=device)
    for row in BACKENDS[op]:
        if "cuda" in row.devices:
            yield row, row.refusal(probe, probe)


def check_all(device: str, budget: Budget, smallest_only: bool = False) -> Iterator[Check]:
    """Every kernel of every op: values and gradients by case and type, repeats, CUDA graphs.

    Cases tagged "quick" come first for every kernel; others are skipped once `budget` is spent.
    """
    ready = []
    for op in BACKENDS:
        for row, refusal in gpu_backends(op, device):
            if refusal is not None:
                yield Check(op, row.name, "everything", skipped=refusal)
            elif op not in SUBJECTS or op not in CASES:
                why = "it has no entry in bench.gpu_checks.SUBJECTS or mmfast.testing.CASES"
                yield Check(op, row.name, "everything", error=why)
            else:
                ready.append((op, row))
    for tag in ("quick", "full"):
        for op, row in ready:
            for case in CASES[op]:
                if tag != ("quick" if "quick" in case.tags else "full") or "full" not in case.tags:
                    continue
                if smallest_only and (tag != "quick" or case.N > 100):
                    continue
                if tag == "full" and budget.left() <= 0:
                    yield Check(op, row.name, case.id, skipped="the time for checks was spent")
                    continue
                yield from _check_case(op, row, case, device)
    for op, row in ready:
        case = next(case for case in CASES[op] if "quick" in case.tags and case.N > 1)
        yield _guarded(op, row.name, "the same bits twice", _check_repeat, op, row, case, device)
        if device == "cuda":
            yield _guarded(op, row.name, "a CUDA graph", _check_graph, op, row, case)
        else:
            yield Check(op, row.name, "a CUDA graph", skipped="needs a card")


def _check_case(op: str, row: Backend, case: AnyCase, device: str) -> Iterator[Check]:
    for dtype in DTYPES:
        what = f"{case.id}, {str(dtype).removeprefix('torch.')}"
        probe = torch.ones(1, 1, dtype=dtype, device=device)
        refusal = row.refusal(probe, probe)
        if refusal is not None:
            yield Check(op, row.name, what, skipped=refusal)
        else:
            yield _guarded(op, row.name, what, check_values, op, row.name, case, dtype, device)


def _guarded(op: str, backend: str, what: str, check: Callable[..., None], *args: Any) -> Check:
    """A check that raises is red, whatever it raises: the run goes on and says so."""
    try:
        with poisoned_memory():
            check(*args)
    except Exception as error:
        return Check(op, backend, what, error=f"{type(error).__name__}: {first_line(error)}")
    return Check(op, backend, what)


def check_values(op: str, backend: str, case: AnyCase, dtype: torch.dtype, device: str) -> None:
    """Outputs and gradients against float64.

    Raises:
        AssertionError: an error is over the budget that the tests give it; a wrong dtype.
    """
    subject = SUBJECTS[op]
    inputs = case.inputs(dtype, device=device)
    exact_inputs = in_double(inputs)
    upstream = _upstream(subject, inputs)
    got = _results(subject, partial(subject.run, inputs, backend), inputs, upstream)
    eager = _results(subject, partial(subject.reordered, inputs), inputs, upstream)
    exact = _results(subject, partial(subject.definition, exact_inputs), exact_inputs, upstream)
    sizes = subject.magnitudes(exact_inputs, exact, upstream, dtype)
    for name, x in got.items():
        assert x.dtype == eager[name].dtype, f"{name} is {x.dtype}, not {eager[name].dtype}"
        eps = subject.eps(name, dtype)
        if dtype == torch.float64:
            # its judge is float64 too, and errs as much
            eps *= 4
        elif dtype == torch.bfloat16 and name in ("rows", "columns"):
            # exponentials good to 3e-6 are far below what the inputs resolve
            eps *= 16
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


def _check_repeat(op: str, row: Backend, case: AnyCase, device: str) -> None:
    subject = SUBJECTS[op]
    inputs = case.inputs(device=device)
    upstream = _upstream(subject, inputs)
    run = partial(_results, subject, partial(subject.run, inputs, row.name), inputs, upstream)
    _assert_same_bits(run(), run())


def _check_graph(op: str, row: Backend, case: AnyCase) -> None:
    """Forward and backward captured once must follow inputs that change afterwards."""
    subject = SUBJECTS[op]
    inputs, others = (case.inputs(device="cuda", seed=seed) for seed in (0, 1))
    for made in (inputs, others):
        for name in subject.leaves:
            # a graph reads what is on the card, and nothing else
            made[name] = made[name].detach().cuda().requires_grad_()
    upstream = _upstream(subject, inputs)

    def run(made: Inputs) -> Results:
        return _results(subject, partial(subject.run, made, row.name), made, upstream)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(inputs)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(inputs)
    with torch.no_grad():
        for name in subject.leaves:
            inputs[name].copy_(others[name])
    graph.replay()
    _assert_same_bits(captured, run(inputs))


def _assert_same_bits(first: Results, second: Results) -> None:
    for name, x in first.items():
        # NaN is equal to nothing, so bits are compared and not values
        bits, others = (t.detach().reshape(-1).view(torch.uint8) for t in (x, second[name]))
        assert torch.equal(bits, others), f"{name} differs"


def _results(
    subject: Subject, run: Callable[[], tuple[Tensor, ...]], inputs: Inputs, upstream: list[Tensor]
) -> Results:
    """Outputs by name, and as d<leaf> the gradients of their products with `upstream`."""
    outputs = run()
    if not subject.differentiable:
        return dict(zip(subject.outputs, outputs, strict=True))
    upstream = [g.to(x.dtype) for g, x in zip(upstream, outputs, strict=True)]
    # an empty row is -inf: times its upstream it would be NaN, so gradients are given directly
    grads = torch.autograd.grad(outputs, [inputs[name] for name in subject.leaves], upstream)
    names = (*subject.outputs, *(f"d{name}" for name in subject.leaves))
    return dict(zip(names, (*outputs, *grads), strict=True))


def _upstream(subject: Subject, inputs: Inputs) -> list[Tensor]:
    """Random, and rounded to the outputs' types, so that all sides see the same."""
    with torch.no_grad():
        shapes = subject.definition(inputs)
    random = torch.Generator(shapes[0].device).manual_seed(1)
    return [
        torch.randn(x.shape, generator=random, device=x.device).to(x.dtype).double() for x in shapes
    ]


def _reordered_lse(inputs: Inputs) -> tuple[Tensor, ...]:
    flipped = {**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}
    return pairwise.reference(**flipped, columns=True)


def _lse_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    return lse_magnitudes(**inputs, rows=exact["rows"], columns=exact["columns"], upstream=upstream)


def _reordered_softplus(inputs: Inputs) -> tuple[Tensor, ...]:
    return (sigmoid.reference(**{**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}),)


def _softplus_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    return softplus_magnitudes(inputs, upstream[0])


def _drawn(
    inputs: Inputs, draw: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
) -> tuple[Tensor, ...]:
    """Score + noise, in float64, of what `draw` takes for each row.

    Whatever comes within rounding of the best is right; another column far below it is not.
    """
    q, k, scale = (inputs[name].detach() for name in ("q", "k", "scale"))
    seed = torch.full((), 7, dtype=torch.int64, device=q.device)
    ids = [
        inputs.get(name, torch.arange(len(x), device=q.device))
        for name, x in (("q_ids", q), ("k_ids", k))
    ]
    index = draw(q, k, scale, seed, *ids)
    sums = sampling.noisy_scores(q.double(), k.double(), scale, seed, *ids)
    drawn = sums.gather(1, index.clamp(min=0)[:, None]).squeeze(1)
    return (drawn.masked_fill(index < 0, -torch.inf),)


def _draw_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The products that a score sums, and the noise beside it."""
    with torch.no_grad():
        products = inputs["scale"] * (inputs["q"].abs() @ inputs["k"].abs().T)
    return {"drawn": 2 * float(products.max()) + 20}


def _reordered_slerp(inputs: Inputs) -> tuple[Tensor, ...]:
    a, b = inputs["a"].flip(1), inputs["b"].flip(1)
    return (spherical.reference(a, b, inputs["lam"]).flip(1),)


def _slerp_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The largest entry, and what a few roundings of the inner product do to the result.

    Near angles of 0 and pi they do much, in whatever way the weights are computed.
    """
    subject, inner = SUBJECTS["slerp"], torch.finfo(SCORE_TYPE[dtype]).eps
    moved = dict.fromkeys(exact, 0.0)
    for step in (-4 * inner, 4 * inner):
        nearby = {**inputs, "a": (inputs["a"].detach() * (1 + step)).requires_grad_()}
        run = partial(subject.definition, nearby)
        for name, x in _results(subject, run, nearby, upstream).items():
            moved[name] = max(moved[name], _largest(x - exact[name]))
    return {name: _largest(x) + moved[name] / subject.eps(name, dtype) for name, x in exact.items()}


def _largest(x: Tensor) -> float:
    finite = x.detach()[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _sparsemax_magnitudes(
    inputs: Inputs, exact: Results, upstream: list[Tensor], dtype: torch.dtype
) -> dict[str, float]:
    """The largest weight, and for a gradient the upstream that its mean is taken from."""
    return {"p": _largest(exact["p"]), "dx": _largest(upstream[0])}


# how each op of BACKENDS is checked; one that is missing here is reported red
SUBJECTS = {
    "pairwise_lse": Subject(
        leaves=("q", "k", "scale"),
        outputs=("rows", "columns"),
        wide=("rows", "columns"),
        run=lambda inputs, backend: mmfast.pairwise_lse(**inputs, columns=True, backend=backend),
        definition=lambda inputs: pairwise.reference(**inputs, columns=True),
        reordered=_reordered_lse,
        magnitudes=_lse_magnitudes,
    ),
    "pairwise_softplus": Subject(
        leaves=("q", "k", "scale", "bias"),
        outputs=("sum",),
        wide=("sum", "dbias"),
        run=lambda inputs, backend: (mmfast.pairwise_softplus(**inputs, backend=backend),),
        definition=lambda inputs: (sigmoid.reference(**inputs),),
        reordered=_reordered_softplus,
        magnitudes=_softplus_magnitudes,
    ),
    "sample_negatives": Subject(
        leaves=("q", "k", "scale"),
        outputs=("drawn",),
        wide=("drawn",),
        run=lambda inputs, backend: _drawn(
            inputs, lambda *args: torch.ops.mmfast.sample_negatives(*args, backend)
        ),
        definition=lambda inputs: _drawn(inputs, sampling.reference),
        reordered=lambda inputs: _drawn(
            {**inputs, "q": inputs["q"].flip(1), "k": inputs["k"].flip(1)}, sampling.reference
        ),
        magnitudes=_draw_magnitudes,
        differentiable=False,
    ),
    "slerp": Subject(
        leaves=("a", "b", "lam"),
        outputs=("m",),
        wide=("dlam",),
        run=lambda inputs, backend: (mmfast.slerp(**inputs, backend=backend),),
        definition=lambda inputs: (spherical.reference(**inputs),),
        reordered=_reordered_slerp,
        magnitudes=_slerp_magnitudes,
    ),
    "sparsemax": Subject(
        leaves=("x",),
        outputs=("p",),
        wide=(),
        run=lambda inputs, backend: (mmfast.sparsemax(**inputs, backend=backend),),
        definition=lambda inputs: (projection.reference(**inputs),),
        reordered=lambda inputs: (projection.reference(inputs["x"].flip(1)).flip(1),),
        magnitudes=_sparsemax_magnitudes,
    ),
}


def main() -> int:
    """Each kernel once, forward and backward, in float32 and bfloat16; no value is judged."""
    for op in BACKENDS:
        for row, refusal in gpu_backends(op, "cuda"):
            if refusal is not None:
                print(f"{op} {row.name}: not run, {refusal}")
                continue
            subject = SUBJECTS[op]
            for case in (c for c in CASES[op] if "quick" in c.tags):
                for dtype in (torch.float32, torch.bfloat16):
                    inputs = case.inputs(dtype, device="cuda")
                    run = partial(subject.run, inputs, row.name)
                    _results(subject, run, inputs, _upstream(subject, inputs))
            torch.cuda.synchronize()
            print(f"{op} {row.name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
