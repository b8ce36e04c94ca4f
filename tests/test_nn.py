"""The Modules against dense twins of the classes they stand in for."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmfast.nn


class DenseClipLoss(nn.Module):
    """What ClipLoss replaces, for one process: both logit matrices and two cross-entropies."""

    def forward(self, image_features, text_features, logit_scale, logit_bias=None):
        image_logits = logit_scale * image_features @ text_features.T
        text_logits = logit_scale * text_features @ image_features.T
        if logit_bias is not None:
            image_logits, text_logits = image_logits + logit_bias, text_logits + logit_bias
        labels = torch.arange(len(image_features))
        return (F.cross_entropy(image_logits, labels) + F.cross_entropy(text_logits, labels)) / 2


class DenseSigLipLoss(nn.Module):
    """What SigLipLoss replaces, for one process: the logit matrix against a matrix of signs."""

    def forward(self, image_features, text_features, logit_scale, logit_bias=None):
        logits = logit_scale * image_features @ text_features.T
        if logit_bias is not None:
            logits = logits + logit_bias
        signs = 2 * torch.eye(len(logits), dtype=logits.dtype) - 1
        return -F.logsigmoid(signs * logits).sum() / len(logits)


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(12, 16, generator=generator, dtype=torch.float64), dim=1)
        for _ in range(2)
    )
    scale = torch.tensor(14.0, dtype=torch.float64)
    return [x.requires_grad_() for x in (image, text, scale)]


@pytest.mark.parametrize("bias", [None, -3.0])
@pytest.mark.parametrize(
    ("ours", "twin"),
    [(mmfast.nn.ClipLoss, DenseClipLoss), (mmfast.nn.SigLipLoss, DenseSigLipLoss)],
    ids=["clip", "siglip"],
)
def test_losses_are_their_dense_twins(batch, bias, ours, twin):
    bias = None if bias is None else torch.tensor(bias, dtype=torch.float64, requires_grad=True)
    got, expected = ours()(*batch, bias), twin()(*batch, bias)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(got, batch), torch.autograd.grad(expected, batch), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_learnable_bias_takes_part_with_gradient_zero(batch):
    # a parameter that no gradient reaches would stall DistributedDataParallel
    bias = nn.Parameter(torch.tensor([-10.0]))
    loss = mmfast.nn.ClipLoss()(*batch, logit_bias=bias)
    loss.backward()
    assert bias.grad.tolist() == [0.0]
    assert loss.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (mmfast.nn.ClipLoss, {"local_loss": True, "gather_with_grad": True}),
        (mmfast.nn.SigLipLoss, {"dist_impl": "reduce"}),
    ],
    ids=["clip", "siglip"],
)
def test_call_by_keyword_as_a_trainer_does(batch, make, options):
    image, text, scale = batch
    module = make(cache_labels=True, rank=0, world_size=1, **options)
    losses = module(
        image_features=image,
        text_features=text,
        logit_scale=scale,
        logit_bias=0.0,
        output_dict=True,
    )
    assert list(losses) == ["contrastive_loss"]
    torch.testing.assert_close(losses["contrastive_loss"], module(image, text, scale, None))
    assert not list(module.parameters())
    assert not module.state_dict()


def test_what_it_refuses():
    expected = "SigLipLoss: dist_impl must be None, 'bidir', 'shift', 'reduce' or 'gather', got 'x'"
    with pytest.raises(ValueError, match=expected):
        mmfast.nn.SigLipLoss(dist_impl="x")
    with pytest.raises(ValueError, match="ClipLoss: use_horovod must be False, got True"):
        mmfast.nn.ClipLoss(use_horovod=True)


def test_every_module_is_one():
    assert mmfast.nn.__all__
    for name in mmfast.nn.__all__:
        assert issubclass(getattr(mmfast.nn, name), nn.Module)
