"""Losses over a process group against one process with the whole batch.

Run as a script, this file is a world of four ranks that makes every check in every group of
GROUPS; the tests read what each rank found.
"""

import itertools
import json
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import mmfast
from mmfast._ring import Ring
from mmfast.testing import leaf, saved_bytes, unit_rows
from mmfast.worlds import in_world

WORLD = 4
D, H, Q = 6, 2, 7
# ranks of the world, and rows of each: groups of one to four, no batch like the next
GROUPS = {1: {2: 5}, 2: {1: 3, 3: 5}, 3: {0: 4, 2: 1, 3: 3}, 4: {0: 2, 1: 5, 2: 3, 3: 4}}


def batch(n):
    """Leaves that have a row for each pair, and those that all pairs share."""
    names = ("image", "text", "image_m", "text_m", "mixed")
    rows = {name: leaf(unit_rows(n, D, seed=seed)) for seed, name in enumerate(names)}
    rows["hard"] = leaf(unit_rows(n, H, D, seed=9))
    rows["ids"] = torch.arange(n) % max(n // 2, 1)
    shared = {
        "scale": torch.tensor(7.0),
        "bias": torch.tensor(-2.0),
        "lam": torch.tensor(0.3),
        "tau": torch.tensor(0.2),
        "alpha": torch.tensor(0.4),
    }
    shared = {name: leaf(x.double()) for name, x in shared.items()}
    shared["queue"] = leaf(unit_rows(Q, D, seed=10))
    shared["text_queue"] = unit_rows(Q, D, seed=11)
    shared["queue_ids"] = torch.arange(Q) % 3
    return rows, shared


def clip(**options):
    return lambda x, kw: mmfast.clip_loss(x.image, x.text, x.scale, **options, **kw)


def clip_ids(**options):
    return lambda x, kw: mmfast.clip_loss(x.image, x.text, x.scale, ids=x.ids, **options, **kw)


def itc(x, kw, **options):
    inputs = (x.image, x.text, x.image_m, x.text_m, x.queue, x.text_queue, x.tau)
    return mmfast.itc_loss(*inputs, options.pop("alpha", x.alpha), **options, **kw)


LOSSES = {
    "clip": clip(),
    "clip-eager": clip(backend="eager"),
    "clip-smooth": clip(label_smoothing=0.1),
    "clip-ids": clip_ids(label_smoothing=0.1),
    "clip-positives": clip_ids(same_id="positive", label_smoothing=0.1),
    "clip-frozen-text": lambda x, kw: mmfast.clip_loss(x.image, x.text.detach(), x.scale, **kw),
    "clip-frozen-image": lambda x, kw: mmfast.clip_loss(x.image.detach(), x.text, x.scale, **kw),
    "clip-number": lambda x, kw: mmfast.clip_loss(x.image, x.text, 7.0, **kw),
    "info_nce": lambda x, kw: mmfast.info_nce(x.image, x.text, x.scale, **kw),
    "info_nce-all": lambda x, kw: mmfast.info_nce(
        x.image, x.text, x.scale, negatives=x.queue, hard_negatives=x.hard, mixed=x.mixed,
        ids=x.ids, **kw,
    ),
    "info_nce-positives": lambda x, kw: mmfast.info_nce(
        x.image, x.text, x.scale, ids=x.ids, same_id="positive", **kw
    ),
    "info_nce-constant-k": lambda x, kw: mmfast.info_nce(x.image, x.text_m.detach(), x.scale, **kw),
    "info_nce-eager": lambda x, kw: mmfast.info_nce(
        x.image, x.text, x.scale, backend="eager", **kw
    ),
    "m2_mix": lambda x, kw: mmfast.m2_mix_loss(x.image, x.text, x.scale, x.lam, **kw),
    "m2_mix-ids": lambda x, kw: mmfast.m2_mix_loss(x.image, x.text, x.scale, 0.3, ids=x.ids, **kw),
    "itc": itc,
    "itc-plain": lambda x, kw: itc(x, kw, alpha=0.0),
    "itc-ids": lambda x, kw: itc(x, kw, image_ids=x.ids, queue_ids=x.queue_ids),
}  # fmt: skip
# one number only: no terms of samples
SUMS = {
    "siglip": lambda x, kw: mmfast.siglip_loss(x.image, x.text, x.scale, x.bias, **kw),
    "siglip-eager": lambda x, kw: mmfast.siglip_loss(
        x.image, x.text, x.scale, x.bias, backend="eager", **kw
    ),
    "siglip-ids": lambda x, kw: mmfast.siglip_loss(
        x.image, x.text, x.scale, x.bias, ids=x.ids, **kw
    ),
    "siglip-positives": lambda x, kw: mmfast.siglip_loss(
        x.image, x.text, x.scale, x.bias, ids=x.ids, same_id="positive", **kw
    ),
    "siglip-frozen-text": lambda x, kw: mmfast.siglip_loss(
        x.image, x.text.detach(), x.scale, -2.0, **kw
    ),
}


class Place:
    """A group of this rank, its sizes and its slice of the whole batch."""

    def __init__(self, group, members):
        self.group, self.sizes = group, list(members.values())
        self.rank, self.size, self.n = dist.get_rank(group), len(members), sum(self.sizes)
        first = sum(self.sizes[: self.rank])
        self.own = slice(first, first + self.sizes[self.rank])

    def sum(self, x):
        x = x.detach().clone()
        dist.all_reduce(x, group=self.group)
        return x

    def inputs(self):
        """(whole, own): the same batch, and this rank's rows of it."""
        rows, shared = batch(self.n)
        own = {
            name: leaf(x[self.own]) if x.is_floating_point() else x[self.own]
            for name, x in rows.items()
        }
        copies = {name: leaf(x) if x.requires_grad else x for name, x in shared.items()}
        return (rows, shared), (own, copies)


def close(name, got, expected, tolerance):
    worst = (got - expected).abs().max().item() if got.numel() else 0.0
    assert worst <= tolerance, f"{name} is off by {worst}"


def backward(loss, rows, shared):
    for x in (*rows.values(), *shared.values()):
        x.grad = None
    loss.backward()


def check_gradients(place, whole, own):
    (rows, shared), (own_rows, own_shared) = whole, own
    for name, x in rows.items():
        if x.grad is not None:
            close(name, own_rows[name].grad, place.size * x.grad[place.own], 1e-10)
        elif x.requires_grad:
            assert own_rows[name].grad is None, name
    for name, x in shared.items():
        if x.grad is not None:
            close(name, place.sum(own_shared[name].grad) / place.size, x.grad, 1e-10)


def check_loss(place, loss):
    whole, own = place.inputs()
    x, y = (SimpleNamespace(**rows, **shared) for rows, shared in (whole, own))
    expected = loss(x, {})
    got = loss(y, {"group": place.group})
    close("average", place.sum(got) / place.size, expected, 1e-12)
    assert not got.isnan()
    backward(expected, *whole)
    backward(got, *own)
    check_gradients(place, whole, own)


def check_terms(place, loss):
    """Each term, the two ways to add them up, and weights of samples."""
    whole, own = place.inputs()
    x, y = (SimpleNamespace(**rows, **shared) for rows, shared in (whole, own))
    with torch.no_grad():
        terms = loss(x, {"reduction": "none"})
    shared = {"group": place.group}
    got = loss(y, {"reduction": "none", **shared})
    close("terms", got, terms[place.own], 1e-12)
    with torch.no_grad():
        mean = place.size / place.n * terms[place.own].sum()
        close("mean", loss(y, shared), mean, 1e-12)
        close("sum", loss(y, {"reduction": "sum", **shared}), mean * place.n, 1e-10)
    weights = torch.linspace(0.1, 2.0, place.n, dtype=torch.float64)
    backward((loss(x, {"reduction": "none"}) * weights).sum(), *whole)
    backward(place.size * (got * weights[place.own]).sum(), *own)
    check_gradients(place, whole, own)


def check_tiny(place):
    """A loss of 1e-8 in float32 keeps its relative accuracy, and so do its gradients."""
    image = unit_rows(place.n, D, seed=1, dtype=torch.float32)
    exact = [leaf(image.double()), leaf(image.double()), leaf(torch.tensor(150.0).double())]
    expected = mmfast.clip_loss(*exact)
    own = [leaf(image[place.own]), leaf(image[place.own]), leaf(torch.tensor(150.0))]
    got = mmfast.clip_loss(*own, group=place.group)
    expected.backward()
    got.backward()
    assert expected.item() < 1e-6
    close("value", place.sum(got.double()) / place.size / expected, torch.ones(()), 1e-4)
    for x, y in zip(own[:2], exact[:2], strict=True):
        part = place.size * y.grad[place.own]
        close("gradient", x.grad.double(), part, 1e-4 * y.grad.abs().max().item() * place.size)


def check_half(place):
    """bfloat16 errs as one process in bfloat16 does."""
    image, text = (unit_rows(place.n, D, seed=s, dtype=torch.bfloat16) for s in (1, 2))
    results = []
    for dtype, rows, group in (
        (torch.float64, slice(None), None),
        (torch.bfloat16, slice(None), None),
        (torch.bfloat16, place.own, place.group),
    ):
        inputs = [leaf(x.to(dtype)[rows]) for x in (image, text)]
        mmfast.clip_loss(*inputs, 20.0, group=group).backward()
        results.append([x.grad.double() for x in inputs])
    for exact, alone, got in zip(*results, strict=True):
        error = (got / place.size - exact[place.own]).norm()
        assert error <= 2 * (alone - exact).norm() + 2**-8 * exact.norm()


def check_same_bits(place):
    found = []
    for _ in range(2):
        _, (rows, shared) = place.inputs()
        x = SimpleNamespace(**rows, **shared)
        loss = clip_ids(same_id="positive", label_smoothing=0.1)(x, {"group": place.group})
        backward(loss, rows, shared)
        found.append([loss, x.image.grad, x.text.grad, x.scale.grad])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def check_no_grad(place):
    whole, own = place.inputs()
    x, y = (SimpleNamespace(**rows, **shared) for rows, shared in (whole, own))
    for name, loss in {**LOSSES, **SUMS}.items():
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                got = loss(y, {"group": place.group})
                close(name, place.sum(got) / place.size, loss(x, {}), 1e-12)


def check_memory(place):
    """What is saved is a rank's own rows and vectors, whatever the number of ranks."""
    for loss in ("clip", "info_nce", "info_nce-constant-k", "m2_mix", "siglip"):
        _, (rows, shared) = place.inputs()
        x = SimpleNamespace(**rows, **shared)
        given = [y for y in (*rows.values(), *shared.values()) if isinstance(y, torch.Tensor)]
        with saved_bytes(*given) as saved:
            {**LOSSES, **SUMS}[loss](x, {"group": place.group})
        b = place.own.stop - place.own.start
        # at most five arrays of [b, D] and a few vectors and numbers
        assert saved.bytes <= 8 * b * (5 * D + 20) + 200, (loss, saved.bytes)


def check_volume(place):
    """k and its ids go to all other ranks, columns and dk come home with them: no byte more."""
    sent = {"exchange of sizes": 0, "forward pass": 0, "backward pass": 0}
    exchange = Ring._exchange

    def counted(self, phase, step, leaving, coming):
        sent[phase] += sum(x.nbytes for x in leaving)
        return exchange(self, phase, step, leaving, coming)

    Ring._exchange = counted
    try:
        _, (rows, shared) = place.inputs()
        clip()(SimpleNamespace(**rows, **shared), {"group": place.group}).backward()
    finally:
        Ring._exchange = exchange
    if place.size == 1:
        assert not any(sent.values())
        return
    after = place.sizes[(place.rank + 1) % place.size]
    # rows that pass through here: all but those that start next door; and all
    on, every = place.n - after, place.n
    assert sent["exchange of sizes"] == 7 * 8 * (place.size - 1)
    assert sent["forward pass"] == 8 * (on * (D + 1) + every)
    assert sent["backward pass"] == 8 * (on * (D + 3) + every * D)


CHECKS = {
    **{f"loss-{name}": lambda p, f=f: check_loss(p, f) for name, f in {**LOSSES, **SUMS}.items()},
    **{f"terms-{name}": lambda p, f=f: check_terms(p, f) for name, f in LOSSES.items()},
    "tiny": check_tiny,
    "half": check_half,
    "same bits": check_same_bits,
    "no_grad": check_no_grad,
    "memory": check_memory,
    "volume": check_volume,
}


def complain(check, *given):
    try:
        check(*given)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def run_checks():
    """By group and check what this rank has to complain about."""
    found = {}
    for size, members in GROUPS.items():
        group = dist.new_group(list(members))
        if dist.get_rank() not in members:
            continue
        for name, check in CHECKS.items():
            found[f"{size}-{name}"] = complaint = complain(check, Place(group, members))
            if complaint.startswith("RuntimeError"):
                break  # the ranks are no longer at the same check
    return found


@pytest.mark.parametrize(("size", "name"), list(itertools.product(GROUPS, CHECKS)))
def test_one_process_with_the_whole_batch(as_script, size, name):
    for rank in GROUPS[size]:
        assert isinstance(as_script[rank], dict), as_script[rank]
        assert as_script[rank].get(f"{size}-{name}", "not reached") == "", f"global rank {rank}"


if __name__ == "__main__":
    print(json.dumps(in_world(WORLD, run_checks)))
