"""mmfast's loss beside the dense one: time, and memory that belongs to the loss alone.

Started as a program (`python compare.py mmfast 512 2`) it measures one loss, of LOSSES or RECIPES,
in a fresh process and prints how far the resident memory rose, in bytes.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from heads import WIDTH, FirstColumns
from recipes import RECIPES
from torch import Tensor

import mmfast

Loss = Callable[..., Tensor]
Inputs = tuple[Tensor, ...]
CLEAR_REFS, STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


def dense_clip_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """The usual form, as in open_clip: two [B, B] matrices of logits, two cross-entropies."""
    own = torch.arange(len(image), device=image.device)
    per_image = logit_scale * image @ text.T
    per_text = logit_scale * text @ image.T
    return (F.cross_entropy(per_image, own) + F.cross_entropy(per_text, own)) / 2


LOSSES: dict[str, Loss] = {"mmfast": mmfast.clip_loss, "dense": dense_clip_loss}


def loss_inputs(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows [batch, WIDTH] of both modalities and a scale, as two trained heads give them."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, WIDTH, generator=generator)
    image = text + torch.randn(batch, WIDTH, generator=generator)
    scale = torch.tensor(1 / 0.07, requires_grad=True)
    image, text = (F.normalize(rows).requires_grad_() for rows in (image, text))
    return image, text, scale


def subject(name: str, batch: int) -> tuple[Loss, Inputs]:
    """A loss and its inputs; of a recipe the loss alone, on rows as its heads would give them."""
    image, text, scale = loss_inputs(batch)
    if name in LOSSES:
        return LOSSES[name], (image, text, scale)
    return RECIPES[name](make_head=FirstColumns).loss, (image, text)


def forward_backward(loss: Loss, inputs: Inputs) -> None:
    """The loss and all of its gradients, once."""
    torch.autograd.grad(loss(*inputs), inputs)


def median_ms(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median milliseconds of each action; they take turns, so a noisy second hits all alike."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            # the first turn warms up
            if turn > 0:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def saved_bytes(loss: Loss, inputs: Inputs) -> int:
    """Bytes that autograd keeps until backward, beyond the inputs, which exist anyway."""
    storages: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    # the value keeps the graph alive, so that no address is given out twice while it is counted
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        value = loss(*inputs)
    for tensor in inputs:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    del value
    return sum(storages.values())


def peak_bytes(names: Iterable[str], batch: int, threads: int) -> dict[str, int | None]:
    """Rise of the peak resident memory over one forward and backward, each in its own process.

    Counts everything: what is saved, temporaries, workspaces inside compiled code, and the two
    gradients (2·batch·WIDTH floats) that every loss must return. None without Linux's /proc.
    """
    if not os.access(CLEAR_REFS, os.W_OK):
        return dict.fromkeys(names)
    command = [sys.executable, __file__]
    children = {
        name: subprocess.Popen(
            [*command, name, str(batch), str(threads)], stdout=subprocess.PIPE, text=True
        )
        for name in names
    }
    peaks: dict[str, int | None] = {}
    for name, child in children.items():
        answer, _ = child.communicate()
        if child.returncode != 0:
            raise RuntimeError(f"measuring the memory of {name} failed, its error stands above")
        peaks[name] = int(answer)
    return peaks


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (peak) of this process, in bytes."""
    lines = STATUS.read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def measure_own_peak(name: str, batch: int, threads: int) -> int:
    """peak_bytes' child: how far one forward and backward lifts this process."""
    torch.set_num_threads(threads)
    # a small call first: starting threads and loading code is not the loss's memory
    forward_backward(*subject(name, 64))
    loss, inputs = subject(name, batch)
    # "5" sets the kernel's high-water mark back to the present
    CLEAR_REFS.write_text("5")
    before = resident("VmRSS")
    forward_backward(loss, inputs)
    return resident("VmHWM") - before


if __name__ == "__main__":
    print(measure_own_peak(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
