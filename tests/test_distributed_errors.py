"""Ranks that die, stay away or disagree: an error in words on all others, and never a hang.

Run as a script, this file is the worlds of three ranks; the tests read what each rank found.
"""

import functools
import json
import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import mmfast
from mmfast._ring import Ring
from mmfast.testing import leaf, unit_rows
from mmfast.worlds import in_world

W, B, D = 3, 4, 5
LOST = (
    "clip_loss: rank {peer} (global rank {peer}) did not answer rank {rank} (global rank {rank}) "
    "in step {step} of 3 of the {phase}: it died, raised, made another call or waits for a rank "
    "that did ("
)
DEATHS = {
    "exchange of sizes": ("exchange of sizes", 0),
    "forward": ("forward pass", 1),
    "home": ("forward pass", 3),
    "backward": ("backward pass", 2),
}


def inputs(dtype=torch.float64, width=D):
    return [leaf(unit_rows(B, width, seed=seed, dtype=dtype)) for seed in (1, 2)]


def complaint(call):
    """The text of what `call` raises, with its type."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def die(phase, step):
    """Rank 1 is killed when it comes to that step; what the others have to say, and how soon."""
    # a rank that is still connecting would say so in gloo's words
    dist.barrier()
    exchange = Ring._exchange

    def until_then(self, *where_and_what):
        if where_and_what[:2] == (phase, step) and self.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return exchange(self, *where_and_what)

    Ring._exchange = until_then
    started = time.monotonic()
    text = complaint(lambda: mmfast.clip_loss(*inputs(), 9.0, group=dist.group.WORLD).backward())
    return text, time.monotonic() - started


def stay_away():
    """Rank 1 lives, and does not call."""
    group = dist.new_group(timeout=timedelta(seconds=1))
    if dist.get_rank() == 1:
        time.sleep(4)
        return "", 0.0
    started = time.monotonic()
    text = complaint(lambda: mmfast.clip_loss(*inputs(), 9.0, group=group))
    return text, time.monotonic() - started


def one_differs(usual, other, at=1):
    return other if dist.get_rank() == at else usual


def clip(rows=None, scale=9.0, **options):
    return mmfast.clip_loss(*(rows or inputs()), scale, group=dist.group.WORLD, **options)


def dtensors():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (W,))
    return [DTensor.from_local(x.detach(), mesh, [Shard(0)]) for x in inputs()]


def siglip(image, text):
    return mmfast.siglip_loss(image, text, 9.0, -3.0, group=dist.group.WORLD)


def constant_keys(q, k):
    return mmfast.info_nce(q, k.detach(), 9.0, group=dist.group.WORLD)


def twice(loss):
    q, k = inputs()
    (slope,) = torch.autograd.grad(loss(q, k), q, create_graph=True)
    torch.autograd.grad(slope.sum(), q)


ON = "{} on rank 0 (global rank 0) and {} on rank 1 (global rank 1)"
NO_SECOND = "NotImplementedError: {}: a loss with group= has no second derivative"
ALIKE = "must be alike on all ranks, got "
CALLS = {
    "D": (lambda: clip(inputs(width=one_differs(D, 7))), f"ValueError: clip_loss: D {ALIKE}5 on"),
    "dtype": (
        lambda: clip(inputs(one_differs(torch.float64, torch.float32))),
        f"ValueError: clip_loss: dtype {ALIKE}{ON.format('float64', 'float32')}",
    ),
    "scale": (
        lambda: clip(scale=one_differs(9.0, 8.5)),
        f"ValueError: clip_loss: logit_scale {ALIKE}{ON.format(9.0, 8.5)}",
    ),
    "requires_grad": (
        lambda: clip([x.detach().requires_grad_(one_differs(True, False)) for x in inputs()]),
        f"ValueError: clip_loss: requires_grad of image {ALIKE}{ON.format(True, False)}",
    ),
    "options": (
        lambda: clip(label_smoothing=one_differs(0.0, 0.1)),
        "ValueError: clip_loss: all ranks must call the same loss with the same options, but those "
        "of rank 0 (global rank 0) and rank 1 (global rank 1) differ",
    ),
    "mixed": (
        lambda: mmfast.info_nce(
            *inputs(), 9.0, mixed=one_differs(None, inputs()[0]), group=dist.group.WORLD
        ),
        "ValueError: info_nce: all ranks must call the same loss with the same options, but those "
        "of rank 0 (global rank 0) and rank 1 (global rank 1) differ",
    ),
    "lam": (
        lambda: mmfast.m2_mix_loss(*inputs(), 9.0, one_differs(0.5, 0.25), group=dist.group.WORLD),
        f"ValueError: m2_mix_loss: lam {ALIKE}{ON.format(0.5, 0.25)}",
    ),
    "upstream": (
        lambda: (siglip(*inputs()) * one_differs(0.5, 1.0)).backward(),
        f"ValueError: siglip_loss: the upstream gradient {ALIKE}{ON.format(0.125, 0.25)}",
    ),
    "world_size": (
        lambda: mmfast.nn.ClipLoss(rank=dist.get_rank(), world_size=2)(*inputs(), 9.0),
        "ValueError: ClipLoss: rank and world_size must be 0 and 3 as torch.distributed has them, "
        "got 0 and 2",
    ),
    "DTensor": (
        lambda: clip(dtensors()),
        "TypeError: clip_loss: group= takes each rank's own rows as a plain tensor, got a DTensor; "
        "pass x.to_local()",
    ),
    **{
        f"twice-{name}": (functools.partial(twice, loss), NO_SECOND.format(op))
        for name, loss, op in (
            ("clip", lambda q, k: clip((q, k)), "pairwise_lse"),
            ("constant k", constant_keys, "pairwise_lse"),
            ("siglip", siglip, "pairwise_softplus"),
        )
    },
}


def disagree():
    found = {name: complaint(call) for name, (call, _) in CALLS.items()}
    pair = dist.new_group([0, 2])
    if dist.get_rank() == 1:
        found["outside"] = complaint(lambda: mmfast.clip_loss(*inputs(), 9.0, group=pair))
    return found


WORLDS = {
    **{name: functools.partial(die, *where) for name, where in DEATHS.items()},
    "away": stay_away,
    "disagree": disagree,
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_rank_dies(as_script, death):
    phase, step = DEATHS[death]
    found = as_script[death]
    assert found[1] is None
    # rank 2 receives from the dead one; rank 0 sends to it, and receives from rank 2
    for rank, peers in (
        (2, ("1 (global rank 1)",)),
        (0, ("1 (global rank 1)", "2 (global rank 2)")),
    ):
        text, _ = found[rank]
        assert text.startswith("RuntimeError: clip_loss: rank "), text
        named, _, where = text.removeprefix("RuntimeError: clip_loss: ").partition(
            " did not answer "
        )
        assert any(f"rank {peer}" in named for peer in peers), text
        assert re.match(
            rf"rank {rank} \(global rank {rank}\) in step [{step}{step + 1}] of 3 of the {phase}: "
            r"it died, raised, made another call or waits for a rank that did \(",
            where,
        ), text
    assert all(seconds < 10 for _, seconds in (found[0], found[2]))


def test_a_rank_stays_away(as_script):
    found = as_script["away"]
    for rank, peers in ((0, (1, 2)), (2, (1,))):
        text, seconds = found[rank]
        begins = [LOST.format(peer=p, rank=rank, step=0, phase="exchange of sizes") for p in peers]
        assert text.startswith(tuple("RuntimeError: " + x for x in begins)), text
        assert seconds < 4


@pytest.mark.parametrize("name", CALLS)
def test_ranks_disagree(as_script, name):
    for found in as_script["disagree"]:
        if name != "world_size":
            assert found[name].startswith(CALLS[name][1]), found[name]
    assert as_script["disagree"][0][name].startswith(CALLS[name][1])


def test_not_in_the_group(as_script):
    assert as_script["disagree"][1]["outside"] == (
        "ValueError: clip_loss: this process (global rank 1) is not in the group it was given"
    )


@pytest.mark.parametrize("kind", [mmfast.nn.ClipLoss, mmfast.nn.SigLipLoss])
def test_without_init_process_group(kind):
    expected = f"{kind.__name__}: world_size=2 needs torch.distributed.init_process_group first"
    with pytest.raises(ValueError, match=expected):
        kind(world_size=2)(*inputs(), 9.0, None)


if __name__ == "__main__":
    print(json.dumps({name: in_world(W, run, seconds=10.0) for name, run in WORLDS.items()}))
