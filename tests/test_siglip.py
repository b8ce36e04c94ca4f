"""siglip_loss against the explicit matrix: values, gradients, tiny losses, memory, messages."""

import math

import pytest
import torch
import torch.nn.functional as F

from mmfast import siglip_loss
from mmfast.testing import saved_bytes

# rows of B and D, scale, bias: as it is initialised; as it is learned; without a temperature
SETTINGS = [(11, 8, 10.0, -10.0), (37, 24, 117.3, -12.9), (1, 5, 3.0, 2.0), (64, 16, 1.0, 0.0)]


def leaf(x, dtype=torch.float64):
    return x.detach().to(dtype).clone().requires_grad_()


def batch(B, D, scale, bias, dtype=torch.float64, noise=0.5):
    """image, text, logit_scale and logit_bias as leaves; own pairs lie closer than the others."""
    random = torch.Generator().manual_seed(B)
    image, other = (torch.randn(B, D, generator=random, dtype=torch.float64) for _ in range(2))
    image = F.normalize(image, dim=1)
    text = F.normalize(image + noise * F.normalize(other, dim=1), dim=1)
    numbers = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias))
    return leaf(image, dtype), leaf(text, dtype), *numbers


def dense(image, text, scale, bias):
    """The definition over the explicit matrix; accurate for tiny losses too."""
    labels = 2 * torch.eye(len(image), dtype=torch.float64) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def dense_with_ids(image, text, scale, bias, ids, same_id):
    same, own = ids[:, None] == ids, torch.eye(len(image), dtype=torch.bool)
    together = same if same_id == "positive" else own
    terms = -F.logsigmoid(torch.where(together, 1, -1) * (scale * image @ text.T + bias))
    return terms.masked_fill(same & ~together, 0.0).sum() / len(image)


def relative(got, exact):
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_is_the_explicit_matrix(setting, backend):
    inputs = batch(*setting)
    got, want = siglip_loss(*inputs, backend=backend), dense(*inputs)
    torch.testing.assert_close(got, want, rtol=1e-13, atol=0)
    gradients = torch.autograd.grad(2.5 * got, inputs)
    for a, b in zip(gradients, torch.autograd.grad(2.5 * want, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_duplicates_are_the_explicit_matrix(setting, same_id, backend):
    inputs = batch(*setting)
    for kinds in (1, 4, len(inputs[0])):
        ids = torch.arange(len(inputs[0])) % kinds - 2
        got = siglip_loss(*inputs, ids=ids, same_id=same_id, backend=backend)
        want = dense_with_ids(*inputs, ids, same_id)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=0)
        gradients = torch.autograd.grad(got, inputs)
        for a, b in zip(gradients, torch.autograd.grad(want, inputs), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "budget"),
    [(torch.float32, 2e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=["f32", "bf16", "f16"],
)
def test_narrow_types_against_float64(setting, dtype, budget, level_backend):
    inputs = batch(*setting, dtype)
    exact = [leaf(x) for x in inputs]
    loss, want = siglip_loss(*inputs, backend=level_backend), dense(*exact)
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert relative(loss.detach(), want.detach()) < 2e-5
    got = torch.autograd.grad(loss, inputs)
    assert [x.dtype for x in got] == [dtype, dtype, torch.float64, torch.float64]
    for a, b in zip(got, torch.autograd.grad(want, exact), strict=True):
        assert relative(a, b) < budget


@pytest.mark.parametrize("target", [1e-2, 1e-4, 1e-8, 1e-12, 1e-20])
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"]
)
def test_tiny_losses_keep_relative_accuracy(target, dtype, budget, level_backend):
    image, text, *_ = batch(24, 32, 1.0, 0.0, dtype, noise=0.05)
    # halfway between the best stranger and the worst own pair, and then the scale
    products = image.detach().double() @ text.detach().double().T
    own = torch.eye(24, dtype=torch.bool)
    middle = (products[own].min() + products[~own].max()).item() / 2
    low, high = 0.0, 400.0
    for _ in range(50):
        scale = (low + high) / 2
        loss = dense(image.double(), text.double(), scale, -scale * middle)
        low, high = (scale, high) if loss > target else (low, scale)
    inputs = (image, text, *(torch.tensor(x, requires_grad=True) for x in (scale, -scale * middle)))
    exact = [leaf(x) for x in inputs]
    want = dense(*exact)
    assert want.item() == pytest.approx(target, rel=0.1)
    loss = siglip_loss(*inputs, backend=level_backend)
    assert relative(loss.detach(), want.detach()) < budget
    for a, b in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(want, exact), strict=True
    ):
        assert relative(a, b) < budget


def test_autocast_compares_what_a_matmul_would(backend):
    inputs = batch(9, 16, 30.0, -10.0, torch.float32)
    low = [inputs[0].bfloat16(), inputs[1].bfloat16(), *inputs[2:]]
    with torch.autocast("cpu", torch.bfloat16):
        loss = siglip_loss(*inputs, backend=backend)
    assert torch.equal(loss, siglip_loss(*low, backend=backend))
    assert torch.autograd.grad(loss, inputs[0])[0].dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiles_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(siglip_loss, fullgraph=True, backend="aot_eager")
    for B in (6, 9):
        inputs = batch(B, 8, 20.0, -5.0, torch.float32)
        got, want = (f(*inputs, backend=backend) for f in (compiled, siglip_loss))
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs)
        )


def test_second_derivatives_of_the_definition():
    inputs = batch(4, 3, 3.0, -1.0)
    assert torch.autograd.gradgradcheck(lambda *x: siglip_loss(*x, backend="eager"), inputs)


def test_no_matrix_is_saved(backend):
    B, D = 256, 4
    inputs = batch(B, D, 10.0, -10.0, torch.float32)
    with saved_bytes(*inputs) as saved:
        siglip_loss(*inputs, backend=backend)
    # gradients of both sides, what own pairs need by rows, and numbers
    linear = 4 * B * (4 * D + 8)
    assert (saved.bytes > linear) == (backend == "eager")


Q = torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("changes", "kind", "sentence"),
    [
        ({"image": Q[0]}, ValueError, "image must be [B, D], got [8]"),
        ({"image": Q[:0]}, ValueError, "image must not be empty, got [0, 8]"),
        ({"text": Q[:4]}, ValueError, "text must be [5, 8] like image, got [4, 8]"),
        ({"text": [1.0]}, TypeError, "text must be a torch.Tensor, got list"),
        ({"text": Q.bfloat16()}, TypeError, "text must be float32 like image, got bfloat16"),
        ({"text": Q.to("meta")}, ValueError, "text must be on cpu like image, got meta"),
        ({"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
        ({"logit_bias": "1"}, TypeError, "logit_bias must be a number or a tensor, got str"),
        ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias must have one element, got [2]"),
        ({"ids": torch.arange(4)}, ValueError, "ids must be [5], one per row of image, got [4]"),
        ({"same_id": "both"}, ValueError, "same_id must be 'exclude' or 'positive', got 'both'"),
        (
            {"group": object()},
            TypeError,
            "group must be a torch.distributed process group or None, got object",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors(changes, kind, sentence):
    given = {"image": Q, "text": Q, "logit_scale": 1.0, "logit_bias": 0.0, **changes}
    with pytest.raises(kind) as raised:
        siglip_loss(**given)
    assert str(raised.value) == "siglip_loss: " + sentence
