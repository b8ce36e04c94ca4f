"""Batches whose activations do not fit: encode in chunks, and once more for the gradient.

A contrastive loss needs all embeddings at once, [B, D], but no activations of the encoders: given
dL/d(embeddings) the chain rule takes each row by itself. So rows are encoded in chunks without a
graph; the loss makes the gradient of the embeddings; then each chunk is encoded again, with the
random numbers of its first time, and sent backward. One chunk's activations live at a time, for
one more forward pass; the gradient is that of the whole batch.

Source: Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup, 2021
(arXiv 2101.06983).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Pack = Callable[[Sequence[Tensor]], Any]


def cached(encoder: Callable[..., Any], /, *inputs: Any, chunk: int, **named: Any) -> Any:
    """encoder(*inputs, **named), with the activations of `chunk` rows at a time.

    What comes back goes into any loss, whose backward pass then runs the encoder again:

        image = mmfast.cached(image_encoder, images, chunk=64)
        text = mmfast.cached(text_encoder, chunk=64, **tokens)
        mmfast.clip_loss(image, text, logit_scale.exp()).backward()

    The gradients are those of encoder(...) in one piece, dropout included, whose masks are drawn
    a chunk at a time, on the CPU and on the CUDA devices of its inputs and parameters. They go to
    `.grad`: use backward(), not torch.autograd.grad. Layers that look across rows (BatchNorm) see a
    chunk, and twice. Autocast counts as it is at the call.

    Under DistributedDataParallel pass the wrapped module: gradients travel with the last chunk
    alone (its `no_sync` serves the others). DDP counts what its forward returns, so let that
    return the learned scale as well.

    Args:
        encoder: a Module or function. Returns a tensor, or a tuple or dict of them: [rows, ...],
            or 0-dim, such as a learned scale, and then the same for every chunk.
        inputs, named: each with B rows along its first axis (tensors, lists, ...), or None.
            Tensors among them do not require grad.
        chunk: rows at a time, from 1.

    Returns:
        What encoder returns for all B rows: a tensor, tuple or dict.

    Raises:
        ValueError: chunk, the rows of an input or of an output do not fit, an input requires grad,
            a 0-dim output or the number of outputs differs between chunks.
        TypeError: chunk is no int, an input has no rows, an output is no tensor.
    """
    chunks = _Chunks(encoder, inputs, named, chunk)
    if torch.is_grad_enabled() and _learns(encoder):
        # a Function's result requires grad only if one of its inputs does
        anchor = torch.zeros(0, requires_grad=True)
        apply: Any = _EncodedTwice.apply
        parts = apply(anchor, chunks)
    else:
        with torch.no_grad():
            parts = chunks.encode()
    return chunks.pack(parts)


class _EncodedTwice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchor: Tensor, chunks: "_Chunks") -> tuple[Tensor, ...]:
        ctx.chunks = chunks
        ctx.set_materialize_grads(False)
        parts = chunks.encode()
        ctx.mark_non_differentiable(*(part for part in parts if not part.is_floating_point()))
        return parts

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[None, None]:
        ctx.chunks.send_back(upstream)
        return None, None


class _Chunks:
    """An encoder and its inputs, row by row: the pass without a graph, and the one with it."""

    def __init__(
        self, encoder: Callable[..., Any], inputs: Sequence[Any], named: dict[str, Any], chunk: int
    ) -> None:
        if not isinstance(chunk, int):
            raise TypeError(f"cached: chunk must be an int, got {type(chunk).__name__}")
        if chunk < 1:
            raise ValueError(f"cached: chunk must be from 1, got {chunk}")
        self.encoder, self.inputs, self.named = encoder, inputs, named
        rows = _count_rows({**{str(i): x for i, x in enumerate(inputs)}, **named})
        self.slices = [slice(a, min(a + chunk, rows)) for a in range(0, rows, chunk)]
        self.autocast = _autocast()
        self.devices = _cuda_devices([*inputs, *named.values(), *_parameters(encoder)])
        self.width: int | None = None
        self.random: list[_Random] = []
        self.pack: Pack = tuple

    def encode(self) -> tuple[Tensor, ...]:
        """The outputs for all rows; there is no graph."""
        made = []
        for rows in self.slices:
            self.random.append(_Random(self.devices))
            made.append(self._run(rows))
        return tuple(_join(parts) for parts in zip(*made, strict=True))

    def send_back(self, upstream: Sequence[Tensor | None]) -> None:
        """Each chunk once more, backward from its rows of the gradient of every output."""
        for rows, random in zip(self.slices, self.random, strict=True):
            last = rows is self.slices[-1]
            sync = nullcontext if last else getattr(self.encoder, "no_sync", nullcontext)
            with sync(), random.again(), torch.enable_grad():
                pairs = [
                    (part, gradient[rows] if part.ndim else gradient)
                    for part, gradient in zip(self._run(rows), upstream, strict=True)
                    # a 0-dim output is the same in every chunk, so its gradient goes to one
                    if gradient is not None and part.requires_grad and (part.ndim or last)
                ]
                if pairs:
                    ends, gradients = zip(*pairs, strict=True)
                    torch.autograd.backward(ends, gradients)

    def _run(self, rows: slice) -> tuple[Tensor, ...]:
        inputs = [_take(x, rows) for x in self.inputs]
        named = {name: _take(x, rows) for name, x in self.named.items()}
        with self.autocast():
            parts, self.pack = _unpack(self.encoder(*inputs, **named))
        self.width = self.width or len(parts)
        if len(parts) != self.width:
            raise ValueError(
                "cached: encoder must return as many tensors for every chunk, got "
                f"{len(parts)} after {self.width}"
            )
        count = rows.stop - rows.start
        for part in parts:
            if part.ndim and len(part) != count:
                raise ValueError(
                    f"cached: encoder must return a row for each of {count} rows, or a 0-dim "
                    f"tensor, got {list(part.shape)}"
                )
        return parts


class _Random:
    """The state of the random generators, of the CPU and of CUDA devices by their numbers."""

    def __init__(self, devices: list[int]) -> None:
        self.cpu = torch.get_rng_state()
        self.devices = devices
        self.cuda = [torch.cuda.get_rng_state(device) for device in self.devices]

    @contextmanager
    def again(self) -> Iterator[None]:
        """The same numbers inside; what comes after is not disturbed."""
        with torch.random.fork_rng(self.devices):
            torch.set_rng_state(self.cpu)
            for device, state in zip(self.devices, self.cuda, strict=True):
                torch.cuda.set_rng_state(state, device)
            yield


def _autocast() -> Callable[[], Any]:
    """Makes contexts with autocast as it is now, on the CPU and on CUDA."""
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    found = {
        kind: (torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)) for kind in kinds
    }

    @contextmanager
    def again() -> Iterator[None]:
        # no cache: it may hold a weight that was cast without a graph, whose gradient is lost
        made = [torch.autocast(kind, *state, cache_enabled=False) for kind, state in found.items()]
        with made[0], made[-1] if len(made) > 1 else nullcontext():
            yield

    return again


def _cuda_devices(values: Sequence[Any]) -> list[int]:
    """Where an encoder may draw random numbers: the current device, and those of its tensors."""
    found = {x.device.index for x in values if isinstance(x, Tensor) and x.is_cuda}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        found.add(torch.cuda.current_device())
    return sorted(found)


def _parameters(encoder: Callable[..., Any]) -> list[Tensor]:
    return list(encoder.parameters()) if isinstance(encoder, torch.nn.Module) else []


def _learns(encoder: Callable[..., Any]) -> bool:
    """Whether a gradient may reach anything; a function's parameters are not known."""
    if not isinstance(encoder, torch.nn.Module):
        return True
    return any(p.requires_grad for p in _parameters(encoder))


def _count_rows(inputs: Mapping[str, Any]) -> int:
    counts = {}
    for name, x in inputs.items():
        if x is None:
            continue
        if not hasattr(x, "__len__") or isinstance(x, (str, Mapping)) or getattr(x, "ndim", 1) == 0:
            raise TypeError(f"cached: input {name} must have rows, got {type(x).__name__}")
        elements = x if isinstance(x, (list, tuple)) else (x,)
        if any(isinstance(element, Tensor) and element.requires_grad for element in elements):
            raise ValueError(
                f"cached: input {name} must not require grad; what made it belongs to the encoder"
            )
        counts[name] = len(x)
    if len(set(counts.values())) != 1 or 0 in counts.values():
        said = ", ".join(f"{count} in input {name}" for name, count in counts.items()) or "none"
        raise ValueError(f"cached: inputs must have the same number of rows, not 0; got {said}")
    return next(iter(counts.values()))


def _take(x: Any, rows: slice) -> Any:
    return None if x is None else x[rows]


def _unpack(output: Any) -> tuple[tuple[Tensor, ...], Pack]:
    """The tensors of an encoder's output, and what makes such an output of others."""
    pack: Pack = tuple
    if isinstance(output, Mapping):
        pack = partial(_named, list(output))
        output = tuple(output.values())
    elif not isinstance(output, (tuple, list)):
        output, pack = (output,), itemgetter(0)
    for part in output:
        if not isinstance(part, Tensor):
            raise TypeError(f"cached: encoder must return tensors, got {type(part).__name__}")
    return tuple(output), pack


def _named(names: list[str], parts: Sequence[Tensor]) -> dict[str, Tensor]:
    return dict(zip(names, parts, strict=True))


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    if parts[0].ndim:
        return torch.cat(parts)
    values = torch.stack(parts)
    if not torch.allclose(values, values[:1], rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            "cached: a 0-dim output of the encoder must be the same for every chunk, got from "
            f"{values.min():g} to {values.max():g}"
        )
    return values[-1].clone()
