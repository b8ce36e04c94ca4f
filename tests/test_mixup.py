"""The mixes and hcl_loss against golden vectors, explicit matrices and their limits."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from mmfast import (
    clip_loss,
    hcl_loss,
    info_nce,
    l_mix_loss,
    m2_mix_loss,
    slerp,
    v_mix_loss,
    vl_mix_loss,
)
from mmfast.testing import assert_within_budget, leaf, saved_bytes, unit_rows

GOLDEN = {
    name: np.load(Path(__file__).parent / "golden" / f"{name}.npz")
    for name in ("m2mix", "unimix", "hcl")
}
UNI = {"v": v_mix_loss, "l": l_mix_loss, "vl": vl_mix_loss}
MIXES = {"m2": m2_mix_loss, **UNI}

laws = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def golden_cases(name, prefix=""):
    cases = sorted({key.rpartition(".")[0] for key in GOLDEN[name].files})
    return [case for case in cases if case.startswith(prefix)]


def golden(name, case, *keys):
    return [torch.from_numpy(GOLDEN[name][f"{case}.{key}"]) for key in keys]


def assert_golden(name, case, loss, **inputs):
    assert loss.item() == pytest.approx(GOLDEN[name][f"{case}.loss"].item(), abs=1e-12)
    got = torch.autograd.grad(loss, list(inputs.values()), retain_graph=True)
    for key, gradient in zip(inputs, got, strict=True):
        expected = GOLDEN[name][f"{case}.grad_{key}"]
        # at a gradient of 839 the last digit of float64 alone is 1e-13
        np.testing.assert_allclose(gradient.numpy(), expected, rtol=1e-12, atol=1e-10, err_msg=key)


@pytest.mark.parametrize("case", golden_cases("m2mix", "B"))
def test_golden_m2(case, level_backend):
    x, y, tau, lam = (leaf(a) for a in golden("m2mix", case, "x", "y", "tau2", "lam"))
    u, v = (a / a.norm(dim=1, keepdim=True) for a in (x, y))
    loss = m2_mix_loss(u, v, 1 / tau, lam, backend=level_backend)
    assert_golden("m2mix", case, loss, x=x, y=y, u=u, v=v, tau2=tau)


@pytest.mark.parametrize("case", golden_cases("unimix"))
def test_golden_uni(case, level_backend):
    u, v, lam, tau = golden("unimix", case, "u", "v", "lam", "tau")
    u, v = leaf(u), leaf(v)
    kind = case.removeprefix("limit_").partition("mix")[0]
    options = {"original_neg": "origneg" in case, "backend": level_backend}
    assert_golden("unimix", case, UNI[kind](u, v, 1 / tau, lam, **options), u=u, v=v)


# the vectors are the baseline of Oh et al.; without a correction the versions agree
@pytest.mark.parametrize(
    ("case", "version"),
    [*((case, "mixup") for case in golden_cases("hcl")), ("B7_D13_tp0.0_b0.5", "hcl")],
)
def test_golden_hcl(case, version, level_backend):
    u, v, tau_plus, beta = golden("hcl", case, "u", "v", "tau_plus", "beta")
    u, v = leaf(u), leaf(v)
    options = {"tau_plus": tau_plus.item(), "beta": beta, "version": version}
    assert_golden("hcl", case, hcl_loss(u, v, **options, backend=level_backend), u=u, v=v)


# explicit matrices


def dense_m2(image, text, scale, lam, ids=None, **_):
    """Both directions over matrices whose diagonal is the unmixed pair, row by row [B]."""
    n = len(image)
    ids = torch.arange(n) if ids is None else ids
    own, same = torch.eye(n, dtype=torch.bool), ids[:, None] == ids[None, :]
    mixed = slerp(image, text, lam, backend="eager")
    loss = 0.0
    for anchor in (image, text):
        logits = torch.where(own, scale * image @ text.T, scale * anchor @ mixed.T)
        loss = loss - logits.masked_fill(same & ~own, -math.inf).log_softmax(1).diagonal()
    return loss


def dense_uni(kind, image, text, scale, lam, ids=None, original_neg=False):
    """Half of the soft cross-entropies of rows and columns, row by row [B]."""
    n = len(image)
    ids = torch.arange(n) if ids is None else ids
    same = (ids[:, None] == ids[None, :]).double()
    same = same / same.sum(1, keepdim=True)
    shares = (1.0, 1.0) if kind == "vl" else (lam, 1 - lam)
    target = shares[0] * same + shares[1] * same.flip(0)
    q = slerp(image, image.flip(0), lam, backend="eager") if "v" in kind else image
    k = slerp(text, text.flip(0), lam, backend="eager") if "l" in kind else text
    logits = scale * q @ k.T
    if original_neg:
        logits = torch.where(target > 0, logits, scale * image @ text.T)
    rows, columns = (
        -(t * z.log_softmax(1)).sum(1) for t, z in ((target, logits), (target.T, logits.T))
    )
    return (rows + columns) / 2


def dense_hcl(image, text, scale=2.0, tau_plus=0.1, beta=1.0, ids=None, version="hcl"):
    """Row by row [B], as printed: exponentials, sums and means."""
    n = len(image)
    ids = torch.arange(n) if ids is None else ids
    others = (ids[:, None] != ids[None, :]).double()
    count = others.sum(1)
    e = (scale * image @ text.T).exp()
    positive, importance = e.diagonal(), e**beta * others
    alone = count == 0
    mean = torch.where(alone, 1.0, importance.sum(1)) / count.clamp(min=1)
    reweighted = (importance * e).sum(1) / mean
    correction = tau_plus * positive * (count if version == "hcl" else n)
    negative = (reweighted - correction) / (1 - tau_plus)
    if version == "hcl":
        negative = torch.maximum(negative, count * torch.exp(-torch.as_tensor(scale)))
    negative = negative.masked_fill(alone, 0.0)
    return -(positive / (positive + negative)).log()


def dense_mix(kind, *args, **kwargs):
    return dense_m2(*args, **kwargs) if kind == "m2" else dense_uni(kind, *args, **kwargs)


def assert_is_dense(got, expected, *inputs, rtol=1e-9, atol=1e-10):
    torch.testing.assert_close(got, expected, rtol=rtol, atol=1e-11)
    upstream = torch.linspace(-1, 2, len(got), dtype=torch.float64)
    ours, dense = (torch.autograd.grad((x * upstream).sum(), inputs) for x in (got, expected))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


batches = given(
    n=st.integers(1, 11),
    d=st.integers(2, 9),
    seed=st.integers(0, 10_000),
    scale=st.floats(0.5, 60.0),
    lam=st.floats(0.02, 0.98),
    grouped=st.booleans(),
)


@laws
@batches
@example(n=1, d=2, seed=0, scale=10.0, lam=0.5, grouped=True)
@example(n=2, d=3, seed=0, scale=10.0, lam=0.25, grouped=False)
@example(n=7, d=3, seed=0, scale=100.0, lam=0.25, grouped=False)
@pytest.mark.parametrize("kind", MIXES)
def test_mixes_are_the_dense_forms(kind, n, d, seed, scale, lam, grouped, backend):
    image, text = leaf(unit_rows(n, d, seed=seed)), leaf(unit_rows(n, d, seed=seed + 1))
    scale, lam = (leaf(torch.tensor(x, dtype=torch.float64)) for x in (scale, lam))
    ids = None
    if grouped:
        ids = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))
    got = MIXES[kind](image, text, scale, lam, ids=ids, reduction="none", backend=backend)
    expected = dense_mix(kind, image, text, scale, lam, ids=ids)
    # next to antipodal rows the weights of a mixture are large, and so are their derivatives
    assert_is_dense(got, expected, image, text, scale, lam, rtol=1e-7, atol=1e-8)


@laws
@batches
@pytest.mark.parametrize("kind", UNI)
def test_original_negatives_are_the_dense_form(kind, n, d, seed, scale, lam, grouped, backend):
    image, text = leaf(unit_rows(n, d, seed=seed)), leaf(unit_rows(n, d, seed=seed + 1))
    options = {"original_neg": True}
    got = UNI[kind](image, text, scale, lam, **options, reduction="none", backend=backend)
    expected = dense_uni(kind, image, text, scale, lam, **options)
    assert_is_dense(got, expected, image, text, rtol=1e-7, atol=1e-8)


@laws
@batches
@pytest.mark.parametrize("version", ["hcl", "mixup"])
def test_hcl_is_the_dense_form(version, n, d, seed, scale, lam, grouped, backend):
    image, text = leaf(unit_rows(n, d, seed=seed)), leaf(unit_rows(n, d, seed=seed + 1))
    scale = leaf(torch.tensor(scale / 10, dtype=torch.float64))
    beta, tau_plus = leaf(torch.tensor(2 * lam, dtype=torch.float64)), 0.3 * lam
    ids = None
    if grouped:
        ids = torch.randint(0, 4, (n,), generator=torch.Generator().manual_seed(seed))
    got = hcl_loss(
        image, text, logit_scale=scale, tau_plus=tau_plus, beta=beta, version=version, ids=ids,
        reduction="none", backend=backend,
    )  # fmt: skip
    dense = dense_hcl(image, text, scale, tau_plus, beta, ids, version)
    assert (got.isnan() == dense.isnan()).all()
    there = ~dense.isnan()
    assert version == "mixup" or there.all()
    assert_is_dense(got[there], dense[there], image, text, scale, beta, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("tau_plus", [0.0, 0.1, 0.6])
def test_gradients_of_hcl(tau_plus, backend):
    image, text = leaf(unit_rows(9, 5, seed=1)), leaf(unit_rows(9, 5, seed=2))
    scale, beta = (leaf(torch.tensor(x, dtype=torch.float64)) for x in (2.0, 0.7))
    options = {"tau_plus": tau_plus, "reduction": "none", "backend": backend}
    got = hcl_loss(image, text, logit_scale=scale, beta=beta, **options)
    expected = dense_hcl(image, text, scale, tau_plus, beta)
    assert_is_dense(got, expected, image, text, scale, beta)
    at_floor = expected - torch.log1p(8 * torch.exp(-scale - scale * (image * text).sum(1)))
    # each branch is there: no row, some or most at the floor
    assert ((at_floor.abs() < 1e-12).sum() > 0) == (tau_plus == 0.6)


def test_hcl_at_a_scale_that_would_overflow(backend):
    image = leaf(unit_rows(6, 8, seed=1, dtype=torch.float32))
    text = unit_rows(6, 8, seed=2, dtype=torch.float32)
    # half of the positives far above all negatives, half below some
    text[:3] = image.detach()[:3]
    got = hcl_loss(image, text, logit_scale=200.0, reduction="none", backend=backend)
    exact = leaf(image.double())
    expected = dense_hcl(exact, text.double(), 200.0)
    assert expected.min() < 1e-20
    assert expected.max() > 50
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=0)
    (a,), (b,) = torch.autograd.grad(got.sum(), image), torch.autograd.grad(expected.sum(), exact)
    assert (a.double() - b).norm() < 1e-4 * b.norm()


# limits


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*MIXES, "hcl"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_equal_rows_give_no_nan(kind, n, dtype, backend):
    # a mix of equal rows is 0/0 in the published form: here all rows of a side are equal, and
    # the two sides as well
    row = unit_rows(1, 8, seed=3, dtype=dtype)
    image, text = leaf(row.expand(n, 8)), leaf(row.expand(n, 8))
    if kind == "hcl":
        loss = hcl_loss(image, text, backend=backend)
    else:
        loss = MIXES[kind](image, text, 20.0, 0.3, backend=backend)
    gradients = torch.autograd.grad(loss, (image, text))
    assert all(g.isfinite().all() for g in gradients)
    expected = {"m2": 2 * math.log(n), "vl": 2 * math.log(n)}.get(kind, math.log(n))
    if kind != "hcl":
        tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 0.2}[dtype]
        assert loss.item() == pytest.approx(expected, abs=tolerance)
    if n == 1:
        assert loss.item() == 0
        assert not any(g.any() for g in gradients)


@pytest.mark.parametrize("kind", MIXES)
def test_one_group_for_all_leaves_nothing_to_tell_apart(kind, backend):
    image, text = leaf(unit_rows(6, 4, seed=1)), leaf(unit_rows(6, 4, seed=2))
    options = {"ids": torch.full((6,), 3), "reduction": "none", "backend": backend}
    got = MIXES[kind](image, text, 5.0, 0.3, **options)
    if kind == "m2":
        assert not got.any()
    else:
        assert_is_dense(got, dense_uni(kind, image, text, 5.0, 0.3, options["ids"]), image, text)


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_a_mixture_of_one_alone_is_the_plain_loss(lam, backend):
    image, text = unit_rows(6, 4, seed=1), unit_rows(6, 4, seed=2)
    plain = clip_loss(image, text, 9.0, backend=backend)
    for loss in (v_mix_loss, l_mix_loss):
        torch.testing.assert_close(loss(image, text, 9.0, lam, backend=backend), plain)
    negatives = image if lam else text
    directions = ((image, text), (text, image))
    m2 = sum(info_nce(a, b, 9.0, mixed=negatives, backend=backend) for a, b in directions)
    torch.testing.assert_close(m2_mix_loss(image, text, 9.0, lam, backend=backend), m2)


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("kind", ["m2", "v", "l"])
def test_tiny_losses_keep_relative_accuracy(kind, dtype, budget, level_backend):
    # lam = 1 mixes nothing in: with images next to their texts hardly a loss is left
    image = unit_rows(24, 32, seed=1, dtype=dtype)
    text = unit_rows(24, 32, seed=2) * 0.02 + image.double()
    text = (text / text.norm(dim=1, keepdim=True)).to(dtype)
    exact = [leaf(x.double()) for x in (image, text)]
    expected = dense_mix(kind, *exact, 40.0, 1.0).mean()
    inputs = [leaf(x) for x in (image, text)]
    loss = MIXES[kind](*inputs, 40.0, 1.0, backend=level_backend)
    assert 1e-10 < expected.item() < 1e-4
    assert loss.item() == pytest.approx(expected.item(), rel=budget)
    for a, b in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, exact), strict=True
    ):
        assert (a.double() - b).norm() < budget * b.norm()


# dtypes, second derivatives, compile, memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [*MIXES, "hcl"])
def test_low_precision_stays_within_budget(kind, dtype, compiled_backend):
    n, d = 37, 24
    rows = [unit_rows(n, d, seed=seed, dtype=dtype) for seed in (1, 2)]

    def run(x, **options):
        x = [leaf(a) for a in x]
        scale = leaf(torch.tensor(2.0 if kind == "hcl" else 14.0, dtype=torch.float64))
        if kind == "hcl":
            loss = hcl_loss(*x, logit_scale=scale, **options)
        else:
            loss = MIXES[kind](*x, scale, 0.3, **options)
        return loss, *torch.autograd.grad(loss, (*x, scale))

    got = run(rows, backend=compiled_backend)
    eager = run(rows, backend="eager")
    exact = run([x.double() for x in rows], backend="eager")
    assert got[0].dtype == torch.float32
    assert got[1].dtype == got[2].dtype == dtype
    for name, a, b, c in zip(("loss", "image", "text", "scale"), got, eager, exact, strict=True):
        # scores up to 14 are rounded before their exponential is taken
        assert_within_budget(name, a, b, c, eps=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("kind", [*MIXES, "hcl"])
def test_gradcheck(kind, backend):
    # an even batch: in the middle of an odd one a step to either side leaves the limit
    inputs = [leaf(unit_rows(4, 3, seed=seed)) for seed in (1, 2)]
    scale, lam = (leaf(torch.tensor(x, dtype=torch.float64)) for x in (3.0, 0.3))

    def loss(image, text, scale, lam):
        if kind == "hcl":
            return hcl_loss(image, text, logit_scale=scale, beta=lam, backend=backend)
        return MIXES[kind](image, text, scale, lam, backend=backend)

    assert torch.autograd.gradcheck(loss, (*inputs, scale, lam))
    if backend == "eager":
        assert torch.autograd.gradgradcheck(loss, (*inputs, scale, lam), atol=1e-4)


@pytest.mark.parametrize("kind", [*MIXES, "hcl"])
def test_compiles_whole(kind, compiled_backend):
    torch._dynamo.reset()
    compiled = torch.compile(MIXES.get(kind, hcl_loss), fullgraph=True, backend="aot_eager")
    for n, number in ((6, 0.3), (9, 0.6)):
        inputs = [leaf(unit_rows(n, 8, seed=seed)) for seed in (1, 2)]
        options = {"ids": torch.arange(n) // 2, "backend": compiled_backend}
        given = torch.tensor(number)
        if kind == "hcl":
            options["beta"], args = given, inputs
        else:
            args = (*inputs, torch.tensor(10.0), given)
        got = compiled(*args, **options)
        expected = MIXES.get(kind, hcl_loss)(*args, **options)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
        ):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", [*MIXES, "hcl"])
def test_no_matrix_is_made(kind, compiled_backend, largest_tensor):
    n, d = 512, 4
    image, text = (leaf(unit_rows(n, d, seed=seed, dtype=torch.float32)) for seed in (1, 2))
    ids = torch.arange(n) // 2
    with largest_tensor, saved_bytes(image, text) as saved:
        if kind == "hcl":
            loss = hcl_loss(image, text, ids=ids, backend=compiled_backend)
        else:
            loss = MIXES[kind](image, text, 10.0, 0.3, ids=ids, backend=compiled_backend)
        loss.backward()
    # one bool for each pair would already be more
    assert saved.bytes < n * n
    assert largest_tensor.bytes <= 2 * n * d * 4


def test_reductions_and_autocast(backend):
    image, text = (unit_rows(7, 16, seed=seed, dtype=torch.float32) for seed in (1, 2))
    low = image.bfloat16(), text.bfloat16()
    for loss in (*(lambda *x, f=f, **o: f(*x, 9.0, 0.3, **o) for f in MIXES.values()), hcl_loss):
        each = loss(image, text, reduction="none", backend=backend)
        assert each.shape == (7,)
        torch.testing.assert_close(loss(image, text, backend=backend), each.mean())
        torch.testing.assert_close(loss(image, text, reduction="sum", backend=backend), each.sum())
        with torch.autocast("cpu", torch.bfloat16):
            got = loss(image, text, backend=backend)
        torch.testing.assert_close(got, loss(*low, backend=backend))


# errors

Q, IDS = torch.zeros(5, 8), torch.arange(5)
ERRORS = [
    ((Q[0], Q), {}, ValueError, "image must be [B, D], got [8]"),
    ((Q[:0], Q), {}, ValueError, "image must not be empty, got [0, 8]"),
    ((Q, Q[:4]), {}, ValueError, "text must be [5, 8] like image, got [4, 8]"),
    ((Q, Q.double()), {}, TypeError, "text must be float32 like image, got float64"),
    ((Q, Q), {"logit_scale": math.nan}, ValueError, "logit_scale must be finite, got nan"),
    ((Q, Q), {"ids": IDS[:4]}, ValueError, "ids must be [5], one per row of image, got [4]"),
    (
        (Q, Q),
        {"reduction": "avg"},
        ValueError,
        "reduction must be 'mean', 'sum' or 'none', got 'avg'",
    ),
]
OF_LAM = [
    ("0.5", TypeError, "lam must be a number or a tensor, got str"),
    (math.inf, ValueError, "lam must be finite, got inf"),
    (torch.ones(5), ValueError, "lam must have one element, got [5]"),
    (torch.tensor(1), TypeError, "lam must be floating point, got int64"),
]


@pytest.mark.parametrize("loss", [*MIXES.values(), hcl_loss])
@pytest.mark.parametrize(("rows", "options", "kind", "sentence"), ERRORS)
def test_errors(loss, rows, options, kind, sentence):
    needed = {} if loss is hcl_loss else {"logit_scale": 1.0, "lam": 0.5}
    with pytest.raises(kind) as raised:
        loss(*rows, **(needed | options))
    assert str(raised.value) == f"{loss.__name__}: {sentence}"


@pytest.mark.parametrize("loss", [*MIXES.values(), hcl_loss])
def test_group(loss):
    needed = {} if loss is hcl_loss else {"logit_scale": 1.0, "lam": 0.5}
    kind, sentence = ValueError, "group= is not supported yet, expected None, got object"
    if loss is m2_mix_loss:
        kind, sentence = TypeError, "group must be a torch.distributed process group or None"
    with pytest.raises(kind, match=f"{loss.__name__}: {sentence}"):
        loss(Q, Q, **needed, group=object())


@pytest.mark.parametrize("loss", MIXES.values())
@pytest.mark.parametrize(("lam", "kind", "sentence"), OF_LAM)
def test_errors_of_lam(loss, lam, kind, sentence):
    with pytest.raises(kind) as raised:
        loss(Q, Q, 1.0, lam)
    assert str(raised.value) == f"{loss.__name__}: {sentence}"


@pytest.mark.parametrize("loss", UNI.values())
def test_original_negatives_with_ids(loss):
    with pytest.raises(ValueError, match="mix_loss") as raised:
        loss(Q, Q, 1.0, 0.5, ids=IDS, original_neg=True)
    assert str(raised.value) == (
        f"{loss.__name__}: original_neg cannot be joined with ids, whose further targets would "
        "not be mixtures; expected ids=None"
    )


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"tau_plus": 1.0}, ValueError, "tau_plus must be in [0, 1), got 1.0"),
        ({"tau_plus": "0"}, TypeError, "tau_plus must be a number, got str"),
        ({"beta": None}, TypeError, "beta must be a number or a tensor, got NoneType"),
        ({"version": "paper"}, ValueError, "version must be 'hcl' or 'mixup', got 'paper'"),
    ],
)
def test_errors_of_hcl(options, kind, sentence):
    with pytest.raises(kind) as raised:
        hcl_loss(Q, Q, **options)
    assert str(raised.value) == f"hcl_loss: {sentence}"
