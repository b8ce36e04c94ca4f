"""What `bench gpu` times: the races, the most telling first, and who takes part in each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

import mmfast
from bench import peers
from bench.gpu_clock import Budget, Device, Entry
from bench.measure import TOLERANCE, Unavailable, check_agreement

PRODUCTS = {"fwd": 1, "fwd+bwd": 4}
# arrays of [N, D] that slerp reads and writes
ARRAYS = {"fwd": 3, "bwd": 5}
COMPILED = "torch.compile(dense)"
DTYPES = ("bfloat16", "float32")
# (N, D), by what their figures are worth: a target's own size first, then the range around it
SIZES = (
    (65536, 768),
    (16384, 512),
    (131072, 512),
    (4096, 512),
    (16384, 768),
    (65536, 512),
    (131072, 768),
    (4096, 768),
)
SLERP_SIZES = ((65536, 768), (131072, 512))
SMOKE_SIZES = ((48, 16),)
# of the peak that a contender reaches, slow and fast together: for the estimate of a race's time
SLOW = 0.3
COMPILE_SECONDS = 12.0
SECONDS = 2.5  # of rounds, once there are enough


@dataclass(frozen=True)
class Plan:
    """One race. op: what is raced; rests_on: the op whose checks must hold first."""

    op: str
    rests_on: str
    mode: str
    dtype: str
    n: int
    d: int

    def __str__(self) -> str:
        return f"{self.op} {self.mode}, {self.dtype}, N={self.n}, D={self.d}"

    @property
    def facts(self) -> dict[str, Any]:
        """What every row of the race says; `bench` is the name its kind has in the other tables."""
        bench = "loss" if self.op == "clip_loss" else "rate"
        return {"op": self.op, "bench": bench, "mode": self.mode, "dtype": self.dtype,
                "n": self.n, "d": self.d}  # fmt: skip

    @property
    def flops(self) -> int | None:
        return None if self.op == "slerp" else peers.products(PRODUCTS[self.mode], self.n, self.d)

    @property
    def bytes(self) -> int | None:
        if self.op != "slerp":
            return None
        return ARRAYS[self.mode] * self.n * self.d * getattr(torch, self.dtype).itemsize

    def estimate(self, rates: dict[str, float], rounds: int) -> float:
        """Seconds that the race will take; `rates`: GFLOP/s of a product, by dtype."""
        contenders, compiling = (8, COMPILE_SECONDS) if self.op == "clip_loss" else (2, 2.0)
        seconds = contenders * (rounds + 2) * (self.flops or 0) / (SLOW * 1e9 * rates[self.dtype])
        return SECONDS + compiling + seconds


def plans(smoke: bool) -> Iterator[Plan]:
    """All races, the most telling first: bfloat16 before float32, the loss before its parts."""
    sizes, slerp_sizes = (SMOKE_SIZES, SMOKE_SIZES) if smoke else (SIZES, SLERP_SIZES)
    for dtype in DTYPES:
        for n, d in sizes:
            yield Plan("clip_loss", "pairwise_lse", "fwd+bwd", dtype, n, d)
            for mode in PRODUCTS:
                yield Plan("pairwise_lse", "pairwise_lse", mode, dtype, n, d)
        for n, d in slerp_sizes:
            for mode in ARRAYS:
                yield Plan("slerp", "slerp", mode, dtype, n, d)


def choose(
    plans: Iterator[Plan], budget: Budget, rates: dict[str, float], rounds: int
) -> Iterator[tuple[Plan, str | None]]:
    """Each race as its turn comes, with why it does not fit what is left of the budget."""
    for plan in plans:
        needed, left = plan.estimate(rates, rounds), budget.left()
        fits = needed <= left
        yield plan, None if fits else f"about {needed:.0f} s, and {max(left, 0.0):.0f} s were left"


def entries(plan: Plan, device: Device, backends: list[str]) -> dict[str, Entry]:
    """The contenders of a race; mmfast's own first, by the backends that can run here."""
    make = {"clip_loss": _clip, "pairwise_lse": _lse, "slerp": _slerp}[plan.op]
    return make(plan, _Inputs(plan, device.type), backends)


class _Inputs:
    """One set of tensors for all contenders of a race, made when the first of them asks."""

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan, self.device = plan, device

    @cached_property
    def features(self) -> tuple[Tensor, Tensor, Tensor]:
        plan = self.plan
        return peers.features(plan.n, plan.d, plan.dtype, plan.mode != "fwd", self.device)

    @cached_property
    def positive(self) -> tuple[Tensor, Tensor]:
        """Upstream gradients that make the scale's no sum that cancels."""
        random = torch.Generator(self.device).manual_seed(1)
        first, second = (
            torch.rand(self.plan.n, generator=random, device=self.device) for _ in range(2)
        )
        return first, second

    @cached_property
    def rows(self) -> Tensor:
        return torch.randn_like(self.features[0])


def _clip(plan: Plan, inputs: _Inputs, backends: list[str]) -> dict[str, Entry]:
    def of(loss: peers.Loss | Unavailable, learns_scale: bool = True) -> Any:
        if isinstance(loss, Unavailable):
            return loss
        image, text, scale = inputs.features
        scale = scale if learns_scale else scale.detach()
        return partial(peers.value_and_grads, loss, image, text, scale)

    def compiled() -> Any:
        if inputs.device == "cpu":
            return Unavailable("left out of smoke runs: compiling takes longer than all the rest")
        return of(peers.compiled_dense(plan.n, plan.d, plan.dtype, inputs.device))

    def from_package(peer: peers.CardPeer) -> Any:
        if inputs.device == "cpu":
            return Unavailable("needs a card")
        loss = peer.load()
        if isinstance(loss, Unavailable):
            return loss
        # a small batch first: a loss that is not what it says is not timed
        small = peers.features(1024, plan.d, plan.dtype, device=inputs.device)
        got, want = (peers.value_and_grads(f, *small[:2], small[2].detach())
                     for f in (loss, peer.definition))  # fmt: skip
        check_agreement(peer.package, got, want, TOLERANCE[_precision(peer, plan)])
        return of(loss, peer.learns_scale)

    # the value and the features' gradients; the scale's is too small a sum to trust bfloat16 with
    compared = 3
    # every backend is raced in its own op; here the one that a user gets
    table = {"mmfast": Entry(
        lambda: of(partial(mmfast.clip_loss, backend=backends[0])), own=True, compared=compared
    )}  # fmt: skip
    for name in ("dense", "dense, one product"):
        table[name] = Entry(lambda name=name: of(peers.find(name)), trusted=True, compared=compared)
    table[COMPILED] = Entry(compiled, compared=compared)
    table["torch chunked"] = Entry(lambda: of(peers.find("torch chunked")), compared=compared)
    for peer in peers.CARD_PEERS.values():
        table[peer.label] = Entry(
            partial(from_package, peer),
            compared=compared if peer.definition is peers.dense else 0,
            tolerance=_precision(peer, plan),
        )
    return table


def _precision(peer: peers.CardPeer, plan: Plan) -> str:
    """The type whose tolerance fits: TF32 has bfloat16's range of errors, not float32's."""
    return "bfloat16" if peer.tf32 else plan.dtype


def _lse(plan: Plan, inputs: _Inputs, backends: list[str]) -> dict[str, Entry]:
    def run(backend: str) -> tuple[Tensor, ...]:
        q, k, scale = inputs.features
        values = mmfast.pairwise_lse(q, k, scale, columns=True, backend=backend)
        if plan.mode == "fwd":
            return values
        return (*values, *torch.autograd.grad(values, (q, k, scale), inputs.positive))

    compared = 2 if plan.mode == "fwd" else 4
    return _by_backend(run, backends, compared)


def _slerp(plan: Plan, inputs: _Inputs, backends: list[str]) -> dict[str, Entry]:
    """Backward alone, from a graph that was built before: it is another pass over the rows."""

    def make(backend: str) -> Callable[[], tuple[Tensor, ...]]:
        a, b, _ = inputs.features
        lam = torch.tensor(0.3, device=inputs.device)
        if plan.mode == "fwd":
            return lambda: (mmfast.slerp(a, b, lam, backend=backend),)
        a, b = (x.detach().requires_grad_() for x in (a, b))
        out = mmfast.slerp(a, b, lam, backend=backend)
        return lambda: torch.autograd.grad(out, (a, b), inputs.rows, retain_graph=True)

    def copy() -> Callable[[], tuple[Tensor, ...]]:
        # half of the bytes are read, half are written
        count = (plan.bytes or 0) // 2
        source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=inputs.device)
        target = torch.empty_like(source)
        return lambda: (target.copy_(source),)

    compared = 1 if plan.mode == "fwd" else 2
    table = {name: Entry(partial(make, name), own=True, compared=compared) for name in backends}
    table["eager"] = Entry(partial(make, "eager"), trusted=True, compared=compared)
    table["copy"] = Entry(copy)
    return table


def _by_backend(
    run: Callable[[str], tuple[Tensor, ...]], backends: list[str], compared: int
) -> dict[str, Entry]:
    table = {
        name: Entry(lambda name=name: partial(run, name), own=True, compared=compared)
        for name in backends
    }
    table["eager"] = Entry(lambda: partial(run, "eager"), trusted=True, compared=compared)
    return table
