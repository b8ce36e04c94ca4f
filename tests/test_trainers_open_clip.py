"""mmfast.nn.ClipLoss and SigLipLoss in open_clip's place: its losses, its training loop."""

from argparse import Namespace

import pytest
import torch
import torch.nn.functional as F

import mmfast.nn

pytestmark = pytest.mark.usefixtures("one_thread")
B, D = 37, 24
TINY = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture
def open_clip(need):
    return need("open_clip")


@pytest.fixture
def train(need):
    need("open_clip")
    return need("open_clip_train.train")


def features(dtype=torch.float32):
    image, text = (F.normalize(torch.randn(B, D), dim=1).to(dtype) for _ in range(2))
    numbers = torch.tensor(14.3), torch.tensor(-9.0)
    return [x.requires_grad_() for x in (image, text, *numbers)]


def outcome(loss, inputs, **options):
    value = loss(*inputs, output_dict=True, **options)["contrastive_loss"]
    return value.detach(), torch.autograd.grad(value, inputs)


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_value_and_gradients(open_clip, name):
    inputs = features()
    value, gradients = outcome(getattr(mmfast.nn, name)(), inputs)
    expected, their_gradients = outcome(getattr(open_clip.loss, name)(), inputs)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(gradients, their_gradients, strict=True):
        if name == "ClipLoss" and ours.ndim == 0 and not ours:
            # a softmax does not see the bias: what they add up is rounding
            assert theirs.abs() < 1e-6
        else:
            assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


@pytest.mark.parametrize("name", ["ClipLoss", "SigLipLoss"])
def test_autocast_is_as_near_to_the_truth(open_clip, name):
    inputs = features()
    exact = [x.detach().bfloat16().double().requires_grad_() for x in inputs[:2]]
    exact += [x.detach().double().requires_grad_() for x in inputs[2:]]
    truth = outcome(getattr(open_clip.loss, name)(), exact)
    with torch.autocast("cpu", torch.bfloat16):
        ours = outcome(getattr(mmfast.nn, name)(), inputs)
        theirs = outcome(getattr(open_clip.loss, name)(), inputs)
    assert ours[0].dtype == torch.float32
    assert (ours[0] - truth[0]).abs() <= (theirs[0] - truth[0]).abs() + 1e-5
    for a, b, exact in zip(ours[1][:3], theirs[1][:3], truth[1][:3], strict=True):
        error, their_error = ((x - exact).norm() / exact.norm() for x in (a, b))
        assert error <= their_error + 4e-3


class Batches(list):
    """What the loop asks of a loader."""

    num_batches = property(len)
    num_samples = property(lambda self: sum(len(images) for images, _ in self))


def one_epoch(open_clip, train, loss, siglip=False, **options):
    """A fresh model after an epoch of open_clip's own loop, plain SGD: what the gradients were."""
    torch.manual_seed(0)
    model = open_clip.CLIP(
        **TINY, output_dict=True, **({"init_logit_bias": -10.0} if siglip else {})
    )
    batches = Batches((torch.randn(6, 3, 16, 16), torch.randint(1, 64, (6, 8))) for _ in range(4))
    data = {"train": Namespace(dataloader=batches, set_epoch=lambda epoch: None)}
    args = Namespace(
        **{"device": "cpu", "precision": "fp32", "accum_freq": 1, "distill": False} | options,
        skip_scheduler=True,
        grad_clip_norm=None,
        horovod=False,
        rank=0,
        local_rank=0,
        world_size=1,
        batch_size=6,
        log_every_n_steps=1,
        wandb=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train.train_one_epoch(model, data, loss, 0, optimizer, None, None, None, args)
    return model.state_dict()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("ClipLoss", {}),
        ("ClipLoss", {"accum_freq": 2}),
        ("SigLipLoss", {"siglip": True}),
        ("SigLipLoss", {"siglip": True, "accum_freq": 2}),
    ],
    ids=["clip", "clip, accumulated", "siglip", "siglip, accumulated"],
)
def test_the_same_training(open_clip, train, name, options):
    ours = one_epoch(open_clip, train, getattr(mmfast.nn, name)(), **options)
    theirs = one_epoch(open_clip, train, getattr(open_clip.loss, name)(), **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    start = one_epoch(open_clip, train, lambda **out: {"loss": 0 * out["logit_scale"]}, **options)
    assert all((ours[key] - start[key]).any() for key in ("visual.proj", "text_projection"))


def test_training_in_bfloat16_is_as_near_to_float32(open_clip, train):
    exact, theirs, ours = (
        torch.cat([x.flatten() for x in one_epoch(open_clip, train, loss(), **options).values()])
        for loss, options in (
            (open_clip.ClipLoss, {}),
            (open_clip.ClipLoss, {"precision": "amp_bf16"}),
            (mmfast.nn.ClipLoss, {"precision": "amp_bf16"}),
        )
    )
    # the towers' own rounding is alike in both
    assert (ours - exact).norm() <= 1.1 * (theirs - exact).norm()


def test_cached_gives_an_open_clip_model_its_whole_batch(open_clip):
    torch.manual_seed(0)
    model = open_clip.CLIP(**TINY, output_dict=True).double()
    images, tokens = torch.randn(7, 3, 16, 16).double(), torch.randint(1, 64, (7, 8))
    found = []
    for output in (model(images, tokens), mmfast.cached(model, images, tokens, chunk=3)):
        model.zero_grad()
        mmfast.nn.ClipLoss()(**output).backward()
        found.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)
