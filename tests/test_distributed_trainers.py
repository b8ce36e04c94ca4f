"""What a trainer does over two ranks: DDP, FSDP2, Modules, momentum queues, open_clip's own losses.

Run as a script, this file is the world of two ranks; the tests read what each rank found.
"""

import copy
import importlib.util
import itertools
import json
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import mmfast
from mmfast.testing import leaf, poisoned_memory, unit_rows
from mmfast.worlds import in_world

D, SIZES = 6, (3, 5)
N, W = sum(SIZES), len(SIZES)
FLAGS = list(itertools.product((False, True), repeat=2))
EXCHANGES = ("bidir", "shift", "reduce", "gather")


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(5, D), nn.Linear(4, D)
        self.scale, self.bias = (nn.Parameter(torch.tensor(x)) for x in (2.0, -3.0))
        self.double()

    def forward(self, image, text):
        image, text = F.normalize(self.image(image)), F.normalize(self.text(text))
        return image, text, self.scale.exp(), self.bias


def own_rows(sizes=SIZES):
    first = sum(sizes[: dist.get_rank()])
    return slice(first, first + sizes[dist.get_rank()])


def data(seed, n=N):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (5, 4)]


def close(name, got, expected, tolerance=1e-10):
    worst = (got - expected).abs().max().item()
    assert worst <= tolerance, f"{name} is off by {worst}"


def average(x):
    x = x.detach().clone()
    dist.all_reduce(x)
    return x / W


def m2_mix(image, text, scale, bias):
    # the bias takes part, or DDP would wait for it
    return mmfast.m2_mix_loss(image, text, scale, 0.3, group=group()) + 0.0 * bias


def group():
    return dist.group.WORLD if dist.is_initialized() else None


def placed(kind, **options):
    return lambda here: kind(**options, **here)


LOSSES = {
    "clip": placed(mmfast.nn.ClipLoss, local_loss=True, gather_with_grad=True),
    "siglip": placed(mmfast.nn.SigLipLoss),
    "m2_mix": lambda here: m2_mix if here else lambda i, t, s, b: mmfast.m2_mix_loss(i, t, s, 0.3),
}


def check_ddp(name):
    """Every parameter's gradient, of a step and of one gathered over three batches."""
    alone, shared = TwoTowers(), DistributedDataParallel(TwoTowers())
    whole_loss, own_loss = LOSSES[name]({}), LOSSES[name](place())
    for batches in ((1,), (2, 3, 4)):
        alone.zero_grad()
        shared.zero_grad()
        for seed in batches:
            image, text = data(seed)
            (whole_loss(*alone(image, text)) / len(batches)).backward()
            last = seed == batches[-1]
            with nullcontext() if last else shared.no_sync():
                rows = own_rows()
                (own_loss(*shared(image[rows], text[rows])) / len(batches)).backward()
        for (key, x), y in zip(alone.named_parameters(), shared.parameters(), strict=True):
            if x.grad is not None:
                close(key, y.grad, x.grad)


class OneScale(TwoTowers):
    """FSDP2 shards no parameter of dimension 0."""

    def __init__(self):
        super().__init__()
        self.scale, self.bias = (nn.Parameter(x.detach().view(1)) for x in (self.scale, self.bias))


def check_fsdp(name):
    """FSDP2 shards the parameters and hands the loss plain features."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone, shared = OneScale(), OneScale()
    fully_shard(shared, mesh=init_device_mesh("cpu", (W,)))
    image, text = data(1)
    LOSSES[name]({})(*alone(image, text)).sum().backward()
    rows = own_rows()
    LOSSES[name](place())(*shared(image[rows], text[rows])).sum().backward()
    for (key, x), y in zip(alone.named_parameters(), shared.parameters(), strict=True):
        if x.grad is not None:
            close(key, y.grad.full_tensor(), x.grad)


class Normed(TwoTowers):
    """With buffers, which DDP sends at every forward pass that may."""

    def __init__(self):
        super().__init__()
        self.text = nn.Sequential(self.text, nn.BatchNorm1d(D).double())
        del self.bias
        self.eval()

    def forward(self, image, text):
        return self.image(image), self.text(text), self.scale.exp()


def check_cached():
    """Gradients of chunks, which differ in number between ranks, travel once, with the last one."""
    sent = []

    def hook(_, bucket):
        sent.append(1)
        done = dist.all_reduce(bucket.buffer().div_(W), async_op=True).get_future()
        return done.then(lambda future: future.value()[0])

    alone, shared = Normed(), DistributedDataParallel(Normed())
    shared.register_comm_hook(None, hook)
    sizes = (7, 11)
    rows = own_rows(sizes)
    batches = [[x[rows] for x in data(seed, sum(sizes))] for seed in (1, 2)]

    def gradients(encode):
        shared.zero_grad()
        sent.clear()
        with shared.no_sync():
            mmfast.clip_loss(*encode(*batches[0])).backward()
        assert not sent
        mmfast.clip_loss(*encode(*batches[1])).backward()
        return [p.grad.clone() for p in shared.parameters()], len(sent)

    with poisoned_memory():
        expected, _ = gradients(shared)
        for _ in range(2):
            got, times = gradients(lambda *x: mmfast.cached(shared, *x, chunk=3))
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
            # the first step rebuilds buckets, so a later one is counted
            assert times == 1, times
    mmfast.clip_loss(*alone(*data(3, sum(sizes)))).backward()
    shared.zero_grad()
    own = mmfast.cached(shared, *(x[rows] for x in data(3, sum(sizes))), chunk=3)
    mmfast.clip_loss(*own, group=dist.group.WORLD).backward()
    for (key, x), y in zip(alone.named_parameters(), shared.parameters(), strict=True):
        close(key, y.grad, x.grad)


def place():
    return {"rank": dist.get_rank(), "world_size": W}


def features(sizes):
    n, rows = sum(sizes), own_rows(sizes)
    whole = [leaf(unit_rows(n, D, seed=seed)) for seed in (1, 2)]
    whole += [leaf(torch.tensor(9.0).double()), leaf(torch.tensor(-4.0).double())]
    return whole, [leaf(x[rows]) for x in whole[:2]] + [leaf(x) for x in whole[2:]], rows


def check_module(make, options):
    """Whatever the flags, one process with the whole batch."""
    whole, own, rows = features(SIZES)
    expected, got = make()(*whole), make(**options, **place())(*own)
    close("average", average(got), expected, 1e-12)
    expected.backward()
    got.backward()
    for x, y in zip(whole[:2], own[:2], strict=True):
        close("features", y.grad, W * x.grad[rows])
    for x, y in zip(whole[2:], own[2:], strict=True):
        close("number", average(y.grad), x.grad)


def theirs():
    """The file of open_clip's losses, without the package around it."""
    found = importlib.util.find_spec("open_clip")
    if found is None:
        return None
    path = Path(found.origin).with_name("loss.py")
    spec = importlib.util.spec_from_file_location("open_clip_loss", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def both(make_theirs, make_ours, options):
    """(loss, gradients of image, text and scale) of open_clip's loss and of ours, equal batches."""
    results = []
    for make in (make_theirs, make_ours):
        _, own, _ = features((4, 4))
        loss = make(**options, **place())(*own)
        loss.backward()
        results.append((loss.detach(), *(x.grad for x in own[:2]), average(own[2].grad)))
    return results


def check_open_clip(local_loss, gather_with_grad):
    """The table in ClipLoss."""
    flags = {"local_loss": local_loss, "gather_with_grad": gather_with_grad}
    (loss, image, text, scale), ours = both(theirs().ClipLoss, mmfast.nn.ClipLoss, flags)
    close("value", loss, ours[0] if local_loss else average(ours[0]), 1e-12)
    close("scale", scale, ours[3])
    if gather_with_grad:
        close("image", image, ours[1])
        close("text", text, ours[2])
    elif not local_loss:
        close("image", W * image, ours[1])
        close("text", W * text, ours[2])
    else:
        whole, _, rows = features((4, 4))
        logits = whole[2] * whole[0] @ whole[1].detach().T
        part = F.cross_entropy(logits, torch.arange(8)) / 2
        close("image as query", image, W * torch.autograd.grad(part, whole[0])[0][rows])
        assert (image - ours[1]).abs().max() > 1e-3


def check_open_siglip(dist_impl):
    found, ours = both(theirs().SigLipLoss, mmfast.nn.SigLipLoss, {"dist_impl": dist_impl})
    for name, x, y in zip(("value", "image", "text", "scale"), found, ours, strict=True):
        close(name, x, y)


def check_moco():
    """Two steps: queue, momentum encoder and gradients."""
    models = []
    for shared in (None, group()):
        torch.manual_seed(3)
        encoder = nn.Linear(5, D).double()
        models.append(mmfast.nn.MoCoLoss(encoder, D, 2 * N + 1, momentum=0.5, group=shared))
    alone, ours = (model.double() for model in models)
    for seed in (1, 2):
        (x, _), (y, _), rows = data(seed), data(seed + 9), own_rows()
        expected, got = alone(x, y), ours(x[rows], y[rows])
        close("average", average(got), expected, 1e-12)
        for a, b in zip(
            torch.autograd.grad(expected, alone.encoder.parameters()),
            torch.autograd.grad(got, ours.encoder.parameters()),
            strict=True,
        ):
            close("encoder", average(b), a)
        close("queue", ours.queue.rows, alone.queue.rows, 1e-15)
        assert ours.queue.pointer == alone.queue.pointer


def check_momentum_itc():
    torch.manual_seed(3)
    alone = mmfast.nn.MomentumITC(nn.Linear(1, 1), D, 2 * N + 1, alpha=0.4).double()
    ours = copy.deepcopy(alone)
    ours.group = group()
    for step in range(2):
        rows = [unit_rows(N, D, seed=10 * step + i) for i in range(4)]
        ids = torch.arange(N) % 3 if step else None
        whole, own = [[leaf(x) for x in rows[:2]] for _ in range(2)]
        mine = own_rows()
        expected = alone(*whole, *rows[2:], ids)
        parts = [x[mine] for x in (*own, *rows[2:])]
        got = ours(*parts, None if ids is None else ids[mine])
        close("average", average(got), expected, 1e-12)
        a, b = (torch.autograd.grad(loss, x) for loss, x in ((expected, whole), (got, own)))
        for x, y in zip(a, b, strict=True):
            close("features", y[mine], W * x[mine])
    for name, x in alone.state_dict().items():
        close(name, ours.state_dict()[name].double(), x.double(), 1e-15)


def check_compile():
    """The loss is left outside of the graph; a graph of all is refused in words."""

    def step(image, text):
        return mmfast.clip_loss(2 * image, text, 3.0, group=dist.group.WORLD)

    _, (image, text, *_), _ = features(SIZES)
    close("compiled", torch.compile(step, backend="eager")(image, text), step(image, text), 0.0)
    torch.compiler.reset()
    with pytest.raises(Exception, match="group= cannot be compiled"):
        torch.compile(step, backend="eager", fullgraph=True)(image, text)


CHECKS = {
    **{f"ddp-{name}": (check_ddp, name) for name in LOSSES},
    **{
        f"clip-{local:d}{grad:d}": (
            check_module,
            mmfast.nn.ClipLoss,
            {"local_loss": local, "gather_with_grad": grad},
        )
        for local, grad in FLAGS
    },
    **{
        f"siglip-{impl}": (check_module, mmfast.nn.SigLipLoss, {"dist_impl": impl})
        for impl in EXCHANGES
    },
    **{f"fsdp-{name}": (check_fsdp, name) for name in LOSSES},
    "cached": (check_cached,),
    "moco": (check_moco,),
    "momentum_itc": (check_momentum_itc,),
    "compile": (check_compile,),
    **{f"open_clip-{local:d}{grad:d}": (check_open_clip, local, grad) for local, grad in FLAGS},
    **{f"open_clip-{impl}": (check_open_siglip, impl) for impl in EXCHANGES},
}


def run_checks():
    found = {}
    for name, (check, *given) in CHECKS.items():
        if name.startswith("open_clip") and theirs() is None:
            continue
        try:
            check(*given)
            found[name] = ""
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
            if isinstance(error, RuntimeError):
                break  # the ranks are no longer at the same check
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_two_ranks(as_script, name):
    if name.startswith("open_clip") and theirs() is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch")
    for rank in range(W):
        assert isinstance(as_script[rank], dict), as_script[rank]
        assert as_script[rank].get(name, "not reached") == "", f"rank {rank}"


@pytest.mark.parametrize("kind", ["ClipLoss", "SigLipLoss"])
def test_open_clip_in_one_process(kind):
    if theirs() is None:
        pytest.skip("open_clip is not installed: pip install --no-deps open_clip_torch")
    inputs = [unit_rows(7, D, seed=1), unit_rows(7, D, seed=2), torch.tensor(9.0), -4.0]
    results = []
    for module in (theirs(), mmfast.nn):
        x = [leaf(inputs[0]), leaf(inputs[1]), leaf(inputs[2])]
        loss = getattr(module, kind)()(*x, inputs[3])
        results.append([loss, *torch.autograd.grad(loss, x)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


if __name__ == "__main__":
    print(json.dumps(in_world(W, run_checks)))
