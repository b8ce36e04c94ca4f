"""info_nce and clip_loss against dense float64 forms, golden vectors and the laws they obey."""

import functools
import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmfast import clip_loss, info_nce, pairwise_lse
from mmfast.losses import _terms
from mmfast.testing import leaf, saved_bytes
from mmfast.testing import unit_rows as unit

GOLDEN = np.load(Path(__file__).parent / "golden" / "clip_infonce.npz")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN.files})

laws = settings(
    # the fixture only names a backend: it is the same for every example
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


def dense_info_nce(
    q, k, scale, negatives=None, hard_negatives=None, mixed=None, ids=None, same_id="exclude"
):
    """The definition over the explicit matrix [N, N + M + H]; accurate for tiny losses too."""
    n = len(q)
    ids = torch.arange(n) if ids is None else ids
    same, own = ids[:, None] == ids[None, :], torch.eye(n, dtype=torch.bool)
    positive = scale * (q * k).sum(1)
    others = scale * q @ (k if mixed is None else mixed).T
    others = others.masked_fill(same if same_id == "exclude" else own, -math.inf)
    if negatives is not None:
        others = torch.cat([others, scale * q @ negatives.T], 1)
    if hard_negatives is not None:
        others = torch.cat([others, scale * torch.einsum("nd,nhd->nh", q, hard_negatives)], 1)
    loss = torch.log1p((others - positive[:, None]).exp().sum(1))
    if same_id == "positive":
        picked = scale * q @ k.T
        loss = loss + positive - (picked * same).sum(1) / same.sum(1)
    return loss


def dense_clip_loss(image, text, scale, label_smoothing=0.0, ids=None, same_id="exclude"):
    """Both cross-entropies over explicit targets, row by row [B]."""
    n = len(image)
    ids = torch.arange(n) if ids is None else ids
    same, own = ids[:, None] == ids[None, :], torch.eye(n, dtype=torch.bool)
    remain = ~same | own if same_id == "exclude" else torch.ones_like(own)
    positives = (own if same_id == "exclude" else same).double()
    target = (1 - label_smoothing) * positives / positives.sum(1, keepdim=True)
    target = target + label_smoothing * remain.double() / remain.sum(1, keepdim=True)
    total = 0.0
    for a, b in ((image, text), (text, image)):
        log_p = (scale * a @ b.T).masked_fill(~remain, -math.inf).log_softmax(1)
        total = total - (target * log_p.masked_fill(~remain, 0.0)).sum(1)
    return total / 2


def gradients(loss, *inputs):
    return torch.autograd.grad(loss, inputs)


def relative(got, expected):
    return ((got.double() - expected).norm() / expected.norm()).item()


def golden_unit_rows(case):
    rows = (torch.from_numpy(GOLDEN[f"{case}.{name}"]) for name in ("x", "y"))
    return [leaf(x / x.norm(dim=1, keepdim=True)) for x in rows]


@pytest.mark.parametrize("case", CASES)
def test_golden_float64(case, level_backend):
    (u, v), tau = golden_unit_rows(case), leaf(torch.tensor(GOLDEN[f"{case}.tau"]))
    loss = clip_loss(u, v, 1 / tau, backend=level_backend)
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss"].item(), abs=1e-12)
    for name, got in zip(("u", "v", "tau"), gradients(loss, u, v, tau), strict=True):
        expected = GOLDEN[f"{case}.grad_{name}"]
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_golden_from_raw_rows(case, level_backend):
    x, y = (leaf(torch.from_numpy(GOLDEN[f"{case}.{name}"])) for name in ("x", "y"))
    scale = 1 / GOLDEN[f"{case}.tau"].item()
    u, v = x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True)
    loss = clip_loss(u, v, scale, backend=level_backend)
    for name, got in zip(("x", "y"), gradients(loss, x, y), strict=True):
        expected = GOLDEN[f"{case}.grad_{name}"]
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-10, err_msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith("tau0.01")])
def test_golden_float32_at_scale_100(case, level_backend):
    u, v = (leaf(x.float()) for x in golden_unit_rows(case))
    scale = torch.tensor(100.0, requires_grad=True)
    loss = clip_loss(u, v, scale, backend=level_backend)
    assert loss.dtype == torch.float32
    # the vectors take the positive from a sum over all: a loss of 6e-14 is known to 1e-15 there,
    # its gradients to scale times that
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss"].item(), rel=1e-5, abs=1e-15)
    *rows, got_scale = gradients(loss, u, v, scale)
    for name, got in zip("uv", rows, strict=True):
        expected = GOLDEN[f"{case}.grad_{name}"]
        worst = np.abs(got.numpy() - expected).max()
        assert worst <= 1e-4 * np.abs(expected).max() + 1e-14, name
    # d loss / d scale = -tau^2 d loss / d tau
    expected = -1e-4 * GOLDEN[f"{case}.grad_tau"].item()
    assert got_scale.item() == pytest.approx(expected, rel=1e-4, abs=1e-14)


OPTIONS = [
    pytest.param(
        {"negatives": m, "hard_negatives": h, "mixed": mixed, "ids": ids, "same_id": same_id},
        id=f"M={m}-H={h}-{'mixed' if mixed else 'plain'}-{'ids' if ids else 'rows'}-{same_id}",
    )
    for m, h, mixed, ids, same_id in itertools.product(
        (None, 5), (None, 0, 3), (False, True), (False, True), ("exclude", "positive")
    )
    if not (mixed and same_id == "positive")
]


@pytest.mark.parametrize("options", OPTIONS)
def test_info_nce_is_the_dense_form(options, backend):
    n, d, scale = 9, 5, torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    q, k = leaf(unit(n, d, seed=1)), leaf(unit(n, d, seed=2))
    inputs = {"q": q, "k": k, "scale": scale}
    kwargs = {"same_id": options["same_id"]}
    if options["negatives"] is not None:
        inputs["negatives"] = kwargs["negatives"] = leaf(unit(options["negatives"], d, seed=3))
    if options["hard_negatives"] is not None:
        hard = leaf(unit(n, options["hard_negatives"], d, seed=4))
        kwargs["hard_negatives"] = hard
        if options["hard_negatives"]:
            inputs["hard"] = hard
    if options["mixed"]:
        inputs["mixed"] = kwargs["mixed"] = leaf(unit(n, d, seed=5))
    if options["ids"]:
        kwargs["ids"] = torch.tensor([4, 1, 4, 7, -2, 1, 4, 0, 9])
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(6), dtype=torch.float64)

    got = info_nce(q, k, scale, reduction="none", backend=backend, **kwargs)
    expected = dense_info_nce(q, k, scale, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    ours = gradients((got * upstream).sum(), *inputs.values())
    dense = gradients((expected * upstream).sum(), *inputs.values())
    for name, a, b in zip(inputs, ours, dense, strict=True):
        torch.testing.assert_close(
            a, b, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.9])
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize(
    "ids",
    [None, [0, 1, 2, 3, 4, 5, 6], [5, 5, 0, -3, 0, 5, 2], [8] * 7],
    ids=["rows", "unique", "groups", "all-equal"],
)
def test_clip_loss_is_the_dense_form(ids, same_id, label_smoothing, backend):
    n, d, scale = 7, 6, torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    image, text = leaf(unit(n, d, seed=1)), leaf(unit(n, d, seed=2))
    ids = None if ids is None else torch.tensor(ids)
    kwargs = {"label_smoothing": label_smoothing, "ids": ids, "same_id": same_id}
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    got = clip_loss(image, text, scale, reduction="none", backend=backend, **kwargs)
    expected = dense_clip_loss(image, text, scale, **kwargs)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    ours = gradients((got * upstream).sum(), image, text, scale)
    dense = gradients((expected * upstream).sum(), image, text, scale)
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_clip_loss_is_two_cross_entropies(label_smoothing, backend):
    image, text = unit(11, 8, seed=1), unit(11, 8, seed=2)
    logits, labels = 20.0 * image @ text.T, torch.arange(11)
    expected = sum(
        F.cross_entropy(z, labels, label_smoothing=label_smoothing) for z in (logits, logits.T)
    )
    got = clip_loss(image, text, 20.0, label_smoothing=label_smoothing, backend=backend)
    torch.testing.assert_close(got, expected / 2, rtol=0, atol=1e-12)


def test_everything_equal_leaves_nothing_to_tell_apart(backend):
    q, k = leaf(unit(6, 4, seed=1)), leaf(unit(6, 4, seed=2))
    ids = torch.full((6,), 3)
    for loss in (
        info_nce(q, k, 50.0, ids=ids, backend=backend),
        clip_loss(q, k, 50.0, ids=ids, label_smoothing=0.3, backend=backend),
    ):
        assert loss.item() == 0.0
        for gradient in gradients(loss, q, k):
            torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


@pytest.mark.parametrize("loss", [info_nce, clip_loss])
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_one_pair_alone(loss, same_id, backend):
    q, k = leaf(unit(1, 4, seed=1)), leaf(unit(1, 4, seed=2))
    scale = torch.tensor(100.0, requires_grad=True)
    ids = torch.tensor([7])
    value = loss(q, k, scale, ids=ids, same_id=same_id, backend=backend)
    assert value.item() == 0.0
    for gradient in gradients(value, q, k, scale):
        assert (gradient == 0).all()


def test_row_without_negatives_but_with_hard_ones(backend):
    # the in-batch term of each row is empty: the sum of terms must not meet -inf - -inf
    q, k, hard = leaf(unit(3, 4, seed=1)), leaf(unit(3, 4, seed=2)), leaf(unit(3, 2, 4, seed=3))
    ids = torch.zeros(3, dtype=torch.int64)
    got = info_nce(q, k, 5.0, ids=ids, hard_negatives=hard, backend=backend)
    dense = dense_info_nce(q, k, 5.0, hard_negatives=hard, ids=ids).mean()
    torch.testing.assert_close(got, dense)
    for a, b in zip(gradients(got, q, k, hard), gradients(dense, q, k, hard), strict=True):
        torch.testing.assert_close(a, b)


# tiny losses


@functools.cache
def pairs_with_loss(target, dtype):
    """Rows in `dtype` and a float32 scale at which the symmetric loss is about `target`."""
    n, d = 24, 32
    image = unit(n, d, seed=1)
    text = F.normalize(image + 0.05 * unit(n, d, seed=2), dim=1).to(dtype)
    image = image.to(dtype)
    low, high = 0.0, 400.0
    for _ in range(40):
        middle = (low + high) / 2
        loss = tiny_truth(image.double(), text.double(), middle)
        low, high = (middle, high) if loss > target else (low, middle)
    return image, text, torch.tensor(middle)


def tiny_truth(image, text, scale, **kwargs):
    return (
        dense_info_nce(image, text, scale, **kwargs) + dense_info_nce(text, image, scale, **kwargs)
    ).mean() / 2


@pytest.mark.parametrize("target", [10.0**-i for i in range(1, 11)])
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("same_id", ["exclude", "positive"])
def test_tiny_losses_keep_relative_accuracy(target, dtype, budget, same_id, level_backend):
    image, text, scale = pairs_with_loss(target, dtype)
    # one id for each row: both meanings of ids must be as exact as no ids at all
    kwargs = {"ids": torch.arange(len(image)) * 3, "same_id": same_id}
    exact = [leaf(x.double()) for x in (image, text, scale)]
    expected = tiny_truth(*exact, **kwargs)
    assert expected.item() == pytest.approx(target, rel=0.1)
    inputs = [leaf(x) for x in (image, text, scale)]
    loss = clip_loss(*inputs, backend=level_backend, **kwargs)
    assert relative(loss.detach(), expected.detach()) < budget
    names = ("image", "text", "scale")
    for name, a, b in zip(
        names, gradients(loss, *inputs), gradients(expected, *exact), strict=True
    ):
        assert relative(a, b) < budget, name


def test_tiny_loss_with_every_kind_of_negative(level_backend):
    q, k, scale = pairs_with_loss(1e-8, torch.float32)
    negatives = unit(40, 32, seed=3, dtype=torch.float32)
    hard = unit(24, 3, 32, seed=4, dtype=torch.float32)
    mixed = F.normalize(k + unit(24, 32, seed=5, dtype=torch.float32), dim=1)
    exact = [leaf(x.double()) for x in (q, k, scale, negatives, hard, mixed)]
    expected = dense_info_nce(*exact).mean()
    inputs = [leaf(x) for x in (q, k, scale, negatives, hard, mixed)]
    q, k, scale, negatives, hard, mixed = inputs
    loss = info_nce(
        q, k, scale, negatives=negatives, hard_negatives=hard, mixed=mixed, backend=level_backend
    )
    assert relative(loss.detach(), expected.detach()) < 1e-4
    for a, b in zip(gradients(loss, *inputs), gradients(expected, *exact), strict=True):
        assert relative(a, b) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softplus_is_exact_on_both_sides(dtype):
    x = leaf(torch.linspace(-85, 120, 4001, dtype=torch.float64).to(dtype))
    exact = x.detach().double()
    value = torch.where(exact > 0, exact, 0.0) + torch.log1p(torch.exp(-exact.abs()))
    slope = torch.where(exact > 0, 1.0, exact.exp()) / (1 + torch.exp(-exact.abs()))
    got = _terms.softplus(x)
    (gradient,) = gradients(got.sum(), x)
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(got.double(), value, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=0)
    assert _terms.softplus(torch.tensor(-math.inf, dtype=dtype)) == 0


def test_log_sum_exp_of_nothing():
    scores = torch.tensor([[-math.inf, -math.inf], [-math.inf, 1.0], [math.inf, 0.0]])
    scores.requires_grad_()
    got = _terms.log_sum_exp(scores, 1)
    assert got.tolist() == [-math.inf, 1.0, math.inf]
    (gradient,) = gradients(got[:2].sum(), scores)
    assert gradient[:2].tolist() == [[0.0, 0.0], [0.0, 1.0]]


def test_row_scores_are_the_diagonal_that_the_sweep_would_see():
    q, k = unit(6, 32, seed=1, dtype=torch.float32), unit(6, 32, seed=2, dtype=torch.float32)
    for a, b in ((q, k), (q.bfloat16(), k.bfloat16())):
        got = _terms.row_scores(a, b, 100.0)
        assert got.dtype == torch.float32
        exact = 100.0 * (a.double() * b.double()).sum(1)
        torch.testing.assert_close(got.double(), exact, rtol=0, atol=5e-5)
    low = got
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(_terms.row_scores(q, k, 100.0), low, rtol=0, atol=0)


# laws

sizes = st.integers(1, 12)
seeds = st.integers(0, 10_000)
scales = st.floats(0.1, 100.0)


@laws
@given(n=sizes, seed=seeds, scale=scales)
def test_permuting_the_batch_permutes_the_losses(n, seed, scale, backend):
    q, k, hard = unit(n, 6, seed=seed), unit(n, 6, seed=seed + 1), unit(n, 2, 6, seed=seed + 2)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 4, (n,), generator=generator)
    order = torch.randperm(n, generator=generator)
    for same_id in ("exclude", "positive"):
        kwargs = {"same_id": same_id, "reduction": "none", "backend": backend}
        plain = info_nce(q, k, scale, hard_negatives=hard, ids=ids, **kwargs)
        moved = info_nce(
            q[order], k[order], scale, hard_negatives=hard[order], ids=ids[order], **kwargs
        )
        torch.testing.assert_close(moved, plain[order], rtol=1e-12, atol=1e-12)


@laws
@given(n=sizes, m=sizes, h=st.integers(0, 4), seed=seeds, scale=scales)
def test_one_more_negative_never_lowers_the_loss(n, m, h, seed, scale, backend):
    q, k = unit(n, 6, seed=seed), unit(n, 6, seed=seed + 1)
    negatives, hard = unit(m + 1, 6, seed=seed + 2), unit(n, h + 1, 6, seed=seed + 3)

    def loss(m, h):
        extra = {"negatives": negatives[:m], "hard_negatives": hard[:, :h]}
        return info_nce(q, k, scale, reduction="none", backend=backend, **extra)

    fewer, slack = loss(m, h), 1e-12
    assert (loss(m + 1, h) >= fewer - slack).all()
    assert (loss(m, h + 1) >= fewer - slack).all()


@laws
@given(n=sizes, m=sizes, seed=seeds, scale=scales)
def test_is_cross_entropy_over_the_explicit_matrix(n, m, seed, scale, backend):
    q, k, queue = unit(n, 6, seed=seed), unit(n, 6, seed=seed + 1), unit(m, 6, seed=seed + 2)
    logits = scale * q @ torch.cat([k, queue]).T
    expected = F.cross_entropy(logits, torch.arange(n), reduction="none")
    got = info_nce(q, k, scale, negatives=queue, reduction="none", backend=backend)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@laws
@given(n=sizes, m=sizes, h=sizes, seed=seeds, scale=scales)
def test_equal_rows_give_the_log_of_their_number(n, m, h, seed, scale, backend):
    row = unit(6, seed=seed)
    got = info_nce(
        row.expand(n, 6),
        row.expand(n, 6),
        scale,
        negatives=row.expand(m, 6),
        hard_negatives=row.expand(n, h, 6),
        reduction="none",
        backend=backend,
    )
    torch.testing.assert_close(got, torch.full_like(got, math.log(n + m + h)), rtol=0, atol=1e-12)


# dtypes, autocast, compile, memory

# dynamo makes an instance of each autograd.Function it traces, and torch warns of that
tracing = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.mark.parametrize("loss", [info_nce, clip_loss])
@pytest.mark.parametrize(
    ("dtype", "result"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_result_and_gradient_dtypes(loss, dtype, result, backend):
    q, k = leaf(unit(5, 8, seed=1, dtype=dtype)), leaf(unit(5, 8, seed=2, dtype=dtype))
    scale = torch.tensor([30.0], requires_grad=True)
    value = loss(q, k, scale, backend=backend)
    assert value.dtype == result
    assert value.shape == ()
    dq, dk, dscale = gradients(value, q, k, scale)
    assert dq.dtype == dk.dtype == dtype
    assert dscale.shape == (1,)
    dense = dense_info_nce(q.double(), k.double(), 30.0)
    if loss is clip_loss:
        dense = (dense + dense_info_nce(k.double(), q.double(), 30.0)) / 2
    assert relative(value.detach(), dense.detach().mean()) < (1e-4 if dtype.itemsize > 2 else 1e-2)


def test_reductions(backend):
    q, k = unit(5, 8, seed=1), unit(5, 8, seed=2)
    for loss in (info_nce, clip_loss):
        each = loss(q, k, 10.0, reduction="none", backend=backend)
        assert each.shape == (5,)
        torch.testing.assert_close(loss(q, k, 10.0, backend=backend), each.mean())
        torch.testing.assert_close(loss(q, k, 10.0, reduction="sum", backend=backend), each.sum())


def test_autocast_compares_what_a_matmul_would(backend):
    q, k, hard = (unit(*shape, dtype=torch.float32) for shape in ((9, 16), (9, 16), (9, 2, 16)))
    k = F.normalize(k + 0.3 * unit(9, 16, seed=2, dtype=torch.float32), dim=1)
    low = [x.bfloat16() for x in (q, k, hard)]
    a, b = leaf(q), leaf(k)
    ids = torch.tensor([0, 1, 2, 3, 3, 4, 5, 5, 5])
    kwargs = {"label_smoothing": 0.1, "ids": ids, "same_id": "positive", "backend": backend}
    with torch.autocast("cpu", torch.bfloat16):
        one = info_nce(a, b, 100.0, hard_negatives=hard, backend=backend)
        two = clip_loss(a, b, 100.0, **kwargs)
        mixed_types = info_nce(a, low[1], 100.0, hard_negatives=hard, backend=backend)
    torch.testing.assert_close(
        one, info_nce(*low[:2], 100.0, hard_negatives=low[2], backend=backend)
    )
    torch.testing.assert_close(two, clip_loss(*low[:2], 100.0, **kwargs))
    torch.testing.assert_close(mixed_types, one)
    assert one.dtype == two.dtype == torch.float32
    assert [x.dtype for x in gradients(one + two, a, b)] == [torch.float32] * 2


@tracing
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"label_smoothing": 0.1},
        {"ids": True, "same_id": "positive"},
        {"ids": True, "label_smoothing": 0.1},
    ],
    ids=str,
)
def test_clip_loss_compiles_whole(kwargs, backend):
    torch._dynamo.reset()
    compiled = torch.compile(clip_loss, fullgraph=True, backend="aot_eager")
    for n, scale in ((6, 20.0), (9, 30.0)):
        image, text = leaf(unit(n, 8, seed=1)), leaf(unit(n, 8, seed=2))
        options = dict(kwargs)
        if "ids" in options:
            options["ids"] = torch.arange(n) // 2
        got = compiled(image, text, torch.tensor(scale), backend=backend, **options)
        expected = clip_loss(image, text, torch.tensor(scale), backend=backend, **options)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(got, image, text), gradients(expected, image, text), strict=True):
            torch.testing.assert_close(a, b)


def test_second_derivatives_of_the_definition():
    image, text, hard = leaf(unit(4, 3, seed=1)), leaf(unit(4, 3, seed=2)), leaf(unit(4, 2, 3))
    ids = torch.tensor([0, 1, 0, 2])

    def loss(image, text, hard):
        kwargs = {"ids": ids, "same_id": "positive", "backend": "eager"}
        smooth = clip_loss(image, text, 3.0, label_smoothing=0.2, **kwargs)
        return smooth + info_nce(image, text, 3.0, hard_negatives=hard, **kwargs)

    assert torch.autograd.gradgradcheck(loss, (image, text, hard))


@tracing
def test_info_nce_compiles_whole(backend):
    torch._dynamo.reset()
    compiled = torch.compile(info_nce, fullgraph=True, backend="aot_eager")
    q, k, queue, hard, mixed = (
        leaf(unit(*shape, seed=i))
        for i, shape in enumerate([(6, 8), (6, 8), (4, 8), (6, 2, 8), (6, 8)])
    )
    kwargs = {"negatives": queue, "hard_negatives": hard, "mixed": mixed, "backend": backend}
    for scale in (10.0, 20.0, 30.0):
        got, expected = compiled(q, k, scale, **kwargs), info_nce(q, k, scale, **kwargs)
        torch.testing.assert_close(got, expected)
        for a, b in zip(gradients(got, q, k, hard), gradients(expected, q, k, hard), strict=True):
            torch.testing.assert_close(a, b)


def test_no_matrix_is_saved(backend):
    n, d = 256, 4
    image, text = (leaf(unit(n, d, seed=seed, dtype=torch.float32)) for seed in (1, 2))
    ids = torch.arange(n)

    with saved_bytes(image, text) as swept:
        pairwise_lse(image, text, 10.0, q_ids=ids, k_ids=ids, columns=True, backend=backend)
    with saved_bytes(image, text) as ours:
        clip_loss(
            image, text, 10.0, label_smoothing=0.1, ids=ids, same_id="positive", backend=backend
        )
    # the eager definition holds the matrix; nothing around the sweep adds another
    assert ours.bytes - swept.bytes < n * n * 4 / 2
    assert (swept.bytes > n * n * 4 / 2) == (backend == "eager")


# errors

Q, IDS = torch.zeros(5, 8), torch.arange(5)
ERRORS = [
    # what is given after q: k, logit_scale (1.0 where it is not the point), options
    ((Q[:, :7],), {}, ValueError, "{k} must be [5, 8] like {q}, got [5, 7]"),
    ((Q[:4],), {}, ValueError, "{k} must be [5, 8] like {q}, got [4, 8]"),
    ((Q[0],), {}, ValueError, "{k} must be [5, 8] like {q}, got [8]"),
    (([1.0],), {}, TypeError, "{k} must be a torch.Tensor, got list"),
    (
        (Q.long(),),
        {},
        TypeError,
        "{k} must be float32, float64, bfloat16 or float16, got int64",
    ),
    ((Q.bfloat16(),), {}, TypeError, "{k} must be float32 like {q}, got bfloat16"),
    ((Q.to("meta"),), {}, ValueError, "{k} must be on cpu like {q}, got meta"),
    ((Q, math.nan), {}, ValueError, "logit_scale must be finite, got nan"),
    ((Q, "20"), {}, TypeError, "logit_scale must be a number or a tensor, got str"),
    ((Q, torch.ones(2)), {}, ValueError, "logit_scale must have one element, got [2]"),
    ((Q, torch.tensor(1)), {}, TypeError, "logit_scale must be floating point, got int64"),
    ((Q,), {"ids": IDS[:4]}, ValueError, "ids must be [5], one per row of {q}, got [4]"),
    ((Q,), {"ids": IDS.int()}, TypeError, "ids must be int64, got int32"),
    ((Q,), {"ids": [0, 1, 2, 3, 4]}, TypeError, "ids must be a torch.Tensor, got list"),
    ((Q,), {"ids": IDS.to("meta")}, ValueError, "ids must be on cpu like {q}, got meta"),
    (
        (Q,),
        {"reduction": "avg"},
        ValueError,
        "reduction must be 'mean', 'sum' or 'none', got 'avg'",
    ),
    (
        (Q,),
        {"same_id": "drop"},
        ValueError,
        "same_id must be 'exclude' or 'positive', got 'drop'",
    ),
    (
        (Q,),
        {"group": object()},
        TypeError,
        "group must be a torch.distributed process group or None, got object",
    ),
]


@pytest.mark.parametrize("loss", [info_nce, clip_loss])
@pytest.mark.parametrize(("given_after_q", "kwargs", "kind", "sentence"), ERRORS)
def test_errors(loss, given_after_q, kwargs, kind, sentence):
    q, k = ("q", "k") if loss is info_nce else ("image", "text")
    k_given, scale = (*given_after_q, 1.0)[:2]
    with pytest.raises(kind) as raised:
        loss(Q, k_given, scale, **kwargs)
    assert str(raised.value) == f"{loss.__name__}: " + sentence.format(q=q, k=k)


@pytest.mark.parametrize(("loss", "letters"), [(info_nce, "q=N"), (clip_loss, "image=B")])
def test_errors_of_the_first_argument(loss, letters):
    name, rows = letters.split("=")
    for first, kind, sentence in (
        (Q[0], ValueError, f"must be [{rows}, D], got [8]"),
        (Q[:0], ValueError, "must not be empty, got [0, 8]"),
        (Q[:, :0], ValueError, "must not be empty, got [5, 0]"),
        (Q.numpy(), TypeError, "must be a torch.Tensor, got ndarray"),
    ):
        with pytest.raises(kind) as raised:
            loss(first, Q, 1.0)
        assert str(raised.value) == f"{loss.__name__}: {name} {sentence}"


@pytest.mark.parametrize(
    ("kwargs", "sentence"),
    [
        ({"negatives": Q[:3, :7]}, "negatives must be [M, 8] like q, got [3, 7]"),
        ({"negatives": Q[:0]}, "negatives must not be empty, got [0, 8]"),
        (
            {"hard_negatives": torch.zeros(4, 2, 8)},
            "hard_negatives must be [5, H, 8] like q, got [4, 2, 8]",
        ),
        ({"mixed": Q[:4]}, "mixed must be [5, 8] like q, got [4, 8]"),
        (
            {"mixed": Q, "same_id": "positive"},
            "mixed cannot be joined with same_id='positive', whose further positives "
            "are rows of k, not mixtures; expected mixed=None",
        ),
    ],
)
def test_errors_of_info_nce(kwargs, sentence):
    with pytest.raises(ValueError, match="info_nce") as raised:
        info_nce(Q, Q, 1.0, **kwargs)
    assert str(raised.value) == "info_nce: " + sentence


@pytest.mark.parametrize("label_smoothing", [1.0, -0.1, math.nan])
def test_label_smoothing_out_of_range(label_smoothing):
    with pytest.raises(ValueError, match=r"clip_loss: label_smoothing must be in \[0, 1\), got"):
        clip_loss(Q, Q, 1.0, label_smoothing=label_smoothing)


def test_label_smoothing_of_another_type():
    with pytest.raises(TypeError, match="clip_loss: label_smoothing must be a number, got str"):
        clip_loss(Q, Q, 1.0, label_smoothing="0.1")
