"""How a call finds its backend, and how an op becomes known to torch.

An op lists its backends, fastest first, in a table. The public function calls `choose` once and
hands the name down as a string; nothing below looks at devices or at the environment again.
"""

import os
import re
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import mmfast._C

    core = mmfast._C
    core_error: str | None = None
except ModuleNotFoundError as error:
    # a core that is there but does not load is a broken install: let that error out
    if error.name != "mmfast._C":
        raise
    core_error = (
        "the compiled core mmfast._C is not installed: install mmfast again with a C++ compiler "
        "and without MMFAST_NO_EXT"
    )

# without a card Triton's kernels run on CPU tensors in its interpreter, slowly: for tests
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def _why_no_triton() -> str | None:
    """Why no kernel of Triton's can run, told without importing it."""
    if find_spec("triton") is None:
        return 'triton is not installed (pip install "mmfast[triton]")'
    try:
        version = metadata.version("triton")
    except metadata.PackageNotFoundError:
        # a build under another name, which comes with its torch
        return None
    if tuple(map(int, re.findall(r"\d+", version)[:2])) < (3, 6):
        return f"its kernels need triton 3.6 or newer, and {version} is installed"
    return None


_no_triton = _why_no_triton()

_library: Any = torch.library.Library("mmfast", "DEF")  # type: ignore[no-untyped-call]
_warned: set[str] = set()


class Backend(NamedTuple):
    """One way to compute an op.

    devices: the device types it is written for; empty means any.
    why_not: given the op's tensors, None if it can run and otherwise the reason, as a clause
        that reads well after "because".
    evidence: what stands behind it, as `mmfast info` says it.
    """

    name: str
    devices: tuple[str, ...]
    why_not: Callable[..., str | None]
    evidence: str

    def refusal(self, *inputs: Tensor) -> str | None:
        """None if this backend can take `inputs`, otherwise the reason it cannot."""
        device = inputs[0].device.type
        if self.devices and device not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, and the input is on {device}"
        return self.why_not(*inputs)


def cpp_missing(*inputs: Tensor) -> str | None:
    """`why_not` of every op whose C++ takes all inputs that pass the public function's checks."""
    return core_error


def cuda_missing(*inputs: Tensor) -> str | None:
    """`why_not` of every op whose CUDA C++ takes all inputs that pass the function's checks."""
    if core_error is not None:
        return core_error
    if core.build_info()["cuda"] == "no":
        return "mmfast._C was built without CUDA: no nvcc from 11.8 on, or MMFAST_CUDA=OFF"
    return _too_old(inputs[0])


def triton_missing(*inputs: Tensor) -> str | None:
    """`why_not` of every Triton kernel: also refuses float64, which none of them takes."""
    if _no_triton is not None:
        return _no_triton
    if inputs[0].dtype == torch.float64:
        return "its kernels compute in float32, and the input is float64"
    return None if INTERPRETED else _too_old(inputs[0])


def _too_old(x: Tensor) -> str | None:
    if not x.is_cuda:
        return None
    card = torch.cuda.get_device_properties(x.device)  # torch.compile folds it to a constant
    if card.major >= 8:
        return None
    return f"it needs compute capability >= 8.0, got {card.major}.{card.minor}"


def kernels(stem: str) -> Any:
    """The Triton file of that stem; imported at the first use, and triton with it."""
    return import_module(f"mmfast.kernels.{stem}")


def always(*inputs: Tensor) -> None:
    """`why_not` of a backend that takes everything."""
    return None


EAGER = Backend("eager", (), always, "the definition; every other backend is tested against it")
CPP_EVIDENCE = (
    "run at all five levels on an Intel Xeon with AMX, under sanitizers too; "
    "the generic level compiles for AArch64, too"
)
# no card has run these kernels yet
TRITON_EVIDENCE = (
    "values checked in the interpreter, code compiled for sm_80, sm_90 and sm_100; "
    "not yet run on a card"
)
CUDA_EVIDENCE = (
    "run in an emulator on the CPU, code compiled for sm_80, sm_90 and sm_100; "
    "not yet run on a card"
)
TRITON_DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def choose(op: str, backend: str | None, table: Sequence[Backend], *inputs: Tensor) -> str:
    """The name of the first backend that can run, or of `backend` itself.

    Raises:
        ValueError: `backend` names none of the table.
        RuntimeError: `backend` cannot run here, or none can; with the reasons.
    """
    refused: list[tuple[Backend, str]] = []
    for row in table:
        if backend is not None and row.name != backend:
            continue
        if backend is None and row.name == "triton" and not inputs[0].is_cuda:
            continue  # the interpreter runs only when asked for by name
        reason = row.refusal(*inputs)
        if reason is None:
            if backend is None and row.name == "eager" and refused:
                _warn_slow(op, refused, inputs[0].device.type)
            return row.name
        refused.append((row, reason))
    if backend is None:
        reasons = "; ".join(f"{row.name} cannot because {reason}" for row, reason in refused)
        raise RuntimeError(f"{op}: no backend can run here: {reasons}")
    if refused:
        raise RuntimeError(f'{op}: backend="{backend}" cannot run here because {refused[0][1]}')
    names = ", ".join(f'"{row.name}"' for row in table)
    raise ValueError(f"{op}: backend must be None or one of {names}, got {backend!r}")


def _warn_slow(op: str, refused: list[tuple[Backend, str]], device: str) -> None:
    # only a backend made for this device is a loss worth a warning
    reasons = [
        f"{row.name} cannot run because {why}" for row, why in refused if device in row.devices
    ]
    if not reasons or op in _warned or torch.compiler.is_compiling():
        return
    _warned.add(op)
    warnings.warn(
        f"mmfast: {op} falls back to plain torch, which is slower and keeps more in memory: "
        f'{"; ".join(reasons)}. Pass backend="eager" to choose this without a warning.',
        stacklevel=4,
    )


def define(
    schema: str, fake: Callable[..., Any], implementations: dict[str, Callable[..., Any]]
) -> Any:
    """Register `mmfast::<schema>`, whose last argument is `str backend`, and return the op.

    fake: takes every argument; makes outputs of the right shape, dtype and strides.
    implementations: by backend name; each takes every argument but the backend.
    """
    name = schema.partition("(")[0]

    def run(*args: Any) -> Any:
        *inputs, backend = args
        if backend not in implementations:
            raise ValueError(f"mmfast::{name} has no backend {backend!r}")
        return implementations[backend](*inputs)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"mmfast::{name}", fake, lib=_library)
    return getattr(torch.ops.mmfast, name).default


def transformed(op: str) -> bool:
    """Whether torch.compile or torch.func is at work around a call of a compiled backend.

    Raises:
        NotImplementedError: both, torch.func inside: dynamo then forgets the backward pass, and
            gradients would be 0.
    """
    compiling = torch.compiler.is_compiling()
    inside: bool = torch._C._are_functorch_transforms_active()
    if compiling and inside:
        raise NotImplementedError(
            f'{op}: only backend="eager" runs under a transform of torch.func that torch.compile '
            "traces; or compile what is inside the transform"
        )
    return compiling or inside


ONLY_EAGER = 'backend="{}" has no second derivative; pass backend="eager" to differentiate twice'


def once(op: str, run: Callable[..., Any], why: str = ONLY_EAGER) -> Callable[..., Any]:
    """`run`, a backward op whose last argument is its backend, for use inside a backward pass.

    Under create_graph its results must know that they cannot be differentiated again: trying to
    raises NotImplementedError that says `why`, with the backend's name for {}. It must be given the
    inputs of the forward pass: nothing asks a node that does not depend on them.
    """

    class Once(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            return run(*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.backend = inputs[-1]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError(f"{op}: {why.format(ctx.backend)}")

    apply: Any = Once.apply
    return lambda *inputs: (apply if torch.is_grad_enabled() else run)(*inputs)


def without_binding(function: Any) -> Any:
    """`function`, an autograd Function with setup_context, for calls that nothing transforms.

    That form binds its arguments at every call. After a forward has turned over the caches it costs
    0.13 ms, 1 % of one of pairwise_lse at N=2048.
    """

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = function.forward(*inputs)
            function.setup_context(ctx, inputs, output)
            return output

        backward = function.backward

    return Eager
