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

from bench.gpu_clock import Budget
from bench.gpu_subjects import SUBJECTS, Inputs, Results, Subject, results
from bench.peers import first_line
from mmfast._dispatch import Backend
from mmfast.ops import BACKENDS
from mmfast.testing import CASES, AnyCase, assert_within_budget, in_double, poisoned_memory

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


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
                why = "it has no entry in bench.gpu_subjects.SUBJECTS or mmfast.testing.CASES"
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
    got = results(subject, partial(subject.run, inputs, backend), inputs, upstream)
    eager = results(subject, partial(subject.reordered, inputs), inputs, upstream)
    exact = results(subject, partial(subject.definition, exact_inputs), exact_inputs, upstream)
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
    run = partial(results, subject, partial(subject.run, inputs, row.name), inputs, upstream)
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
        return results(subject, partial(subject.run, made, row.name), made, upstream)

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


def _upstream(subject: Subject, inputs: Inputs) -> list[Tensor]:
    """Random, and rounded to the outputs' types, so that all sides see the same."""
    with torch.no_grad():
        shapes = subject.definition(inputs)
    random = torch.Generator(shapes[0].device).manual_seed(1)
    return [
        torch.randn(x.shape, generator=random, device=x.device).to(x.dtype).double() for x in shapes
    ]


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
                    results(subject, run, inputs, _upstream(subject, inputs))
            torch.cuda.synchronize()
            print(f"{op} {row.name}: ran")
    return 0


if __name__ == "__main__":
    sys.exit(main())
