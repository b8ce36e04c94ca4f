"""The losses against a queue: golden vectors, explicit matrices; the Module step by step."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import nn

from mmfast import mct_loss, moco_loss, tagged_moco_loss
from mmfast.losses._momentum import KeyQueue, random_keys
from mmfast.nn import MoCoLoss
from mmfast.testing import assert_within_budget, leaf, saved_bytes, unit_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "moco_mct.npz")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN.files})
DENOMINATORS = {
    "all": "tags_all_in_denominator",
    "negatives": "tags_one_positive_plus_negatives",
}

laws = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.parametrize("case", CASES)
def test_golden(case, level_backend):
    raw, key, queue = (
        torch.from_numpy(GOLDEN[f"{case}.{name}"])
        for name in ("query_raw", "key_unit", "queue_rows")
    )
    raw, tau = leaf(raw), GOLDEN[f"{case}.tau"].item()
    query = raw / raw.norm(dim=1, keepdim=True)
    if case.startswith("moco"):
        loss = moco_loss(query, key, queue, tau, backend=level_backend)
    else:
        (denominator,) = (d for d, prefix in DENOMINATORS.items() if case.startswith(prefix))
        positives = torch.from_numpy(GOLDEN[f"{case}.positive_mask_incl_own_key"])
        options = {"denominator": denominator, "backend": level_backend}
        loss = tagged_moco_loss(query, key, queue, positives, tau, **options)
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss"].item(), abs=1e-12)
    (got,) = torch.autograd.grad(loss, raw)
    np.testing.assert_allclose(got.numpy(), GOLDEN[f"{case}.grad_query_raw"], rtol=0, atol=1e-10)


def dense(query, key, queue, positives, temperature, denominator="all"):
    """The explicit logits [N, 1 + Q], row by row [N]."""
    own = (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.T], 1) / temperature
    positives = positives.clone()
    positives[:, 0] = True
    if denominator == "all":
        log_p = logits.log_softmax(1)
    else:
        negatives = logits.masked_fill(positives, -math.inf)
        alone = positives.all(1, keepdim=True)
        off = negatives.masked_fill(alone, 0.0).logsumexp(1, keepdim=True)
        log_p = logits - torch.logaddexp(off.masked_fill(alone, -math.inf), logits)
    return -(log_p * positives).sum(1) / positives.sum(1)


def problem(n, q, d, seed=0, share=0.3, dtype=torch.float64):
    query, key, queue = (unit_rows(rows, d, seed=seed + i, dtype=dtype) for i, rows in
                         enumerate((n, n, q)))  # fmt: skip
    mask = torch.rand(n, 1 + q, generator=torch.Generator().manual_seed(seed)) < share
    return leaf(query), key, queue, mask


shapes = given(
    n=st.integers(1, 9),
    q=st.integers(1, 12),
    d=st.integers(1, 8),
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.02, 2.0),
    share=st.floats(0.0, 1.0),
)


@laws
@shapes
def test_moco_is_cross_entropy(n, q, d, seed, temperature, share, backend):
    query, key, queue, _ = problem(n, q, d, seed)
    temperature = leaf(torch.tensor(temperature, dtype=torch.float64))
    got = moco_loss(query, key, queue, temperature, reduction="none", backend=backend)
    own = (query * key).sum(1, keepdim=True)
    logits = torch.cat([own, query @ queue.T], 1) / temperature
    expected = F.cross_entropy(logits, torch.zeros(n).long(), reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    for a, b in zip(
        torch.autograd.grad(got.sum(), (query, temperature)),
        torch.autograd.grad(expected.sum(), (query, temperature)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@laws
@shapes
@example(n=7, q=5, d=2, seed=0, temperature=0.1, share=0.5)  # four blocks of D rows, one ragged
@example(n=3, q=5, d=2, seed=0, temperature=0.1, share=1.0)  # no negatives
@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_tagged_is_the_dense_form(denominator, n, q, d, seed, temperature, share, backend):
    query, key, queue, positives = problem(n, q, d, seed, share)
    temperature = leaf(torch.tensor(temperature, dtype=torch.float64))
    options = {"denominator": denominator, "reduction": "none", "backend": backend}
    got = tagged_moco_loss(query, key, queue, positives, temperature, **options)
    expected = dense(query, key, queue, positives, temperature, denominator)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    upstream = torch.linspace(-1, 2, n, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((got * upstream).sum(), (query, temperature)),
        torch.autograd.grad((expected * upstream).sum(), (query, temperature)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_without_further_positives_it_is_moco(denominator, backend):
    query, key, queue, _ = problem(6, 9, 4)
    for column in (True, False):  # the own key counts whatever its column says
        positives = torch.zeros(6, 10, dtype=torch.bool)
        positives[:, 0] = column
        options = {"denominator": denominator, "backend": backend}
        got = tagged_moco_loss(query, key, queue, positives, 0.1, **options)
        torch.testing.assert_close(got, moco_loss(query, key, queue, 0.1, backend=backend))


@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)], ids=["f32", "bf16"]
)
@pytest.mark.parametrize("loss", ["moco", *DENOMINATORS])
def test_tiny_losses_keep_relative_accuracy(loss, dtype, budget, level_backend):
    query, _, queue, positives = problem(24, 60, 32, share=0.0, dtype=dtype)
    key = query.double() + 0.02 * unit_rows(24, 32, seed=9)
    key = (key / key.norm(dim=1, keepdim=True)).detach().to(dtype)
    exact = leaf(query.double())
    expected = dense(exact, key.double(), queue.double(), positives, 1 / 40).mean()
    assert 1e-10 < expected.item() < 1e-5
    if loss == "moco":
        got = moco_loss(query, key, queue, 1 / 40, backend=level_backend)
    else:
        options = {"denominator": loss, "backend": level_backend}
        got = tagged_moco_loss(query, key, queue, positives, 1 / 40, **options)
    assert got.item() == pytest.approx(expected.item(), rel=budget)
    (a,), (b,) = torch.autograd.grad(got, query), torch.autograd.grad(expected, exact)
    assert (a.double() - b).norm() < budget * b.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("loss", ["moco", *DENOMINATORS])
def test_low_precision_stays_within_budget(loss, dtype, compiled_backend):
    rows = problem(37, 90, 24, dtype=dtype)

    def run(query, key, queue, positives, backend):
        query, temperature = leaf(query), leaf(torch.tensor(0.1, dtype=torch.float64))
        if loss == "moco":
            value = moco_loss(query, key, queue, temperature, backend=backend)
        else:
            options = {"denominator": loss, "backend": backend}
            value = tagged_moco_loss(query, key, queue, positives, temperature, **options)
        return value, *torch.autograd.grad(value, (query, temperature))

    got, eager = run(*rows, compiled_backend), run(*rows, "eager")
    exact = run(*(x.double() for x in rows[:3]), rows[3], "eager")
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    for name, a, b, c in zip(("loss", "query", "temperature"), got, eager, exact, strict=True):
        # scores up to 10 are rounded before their exponential is taken
        assert_within_budget(name, a, b, c, eps=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("loss", ["moco", *DENOMINATORS])
def test_gradcheck(loss, backend):
    query, key, queue, positives = problem(5, 6, 3)
    temperature = leaf(torch.tensor(0.3, dtype=torch.float64))

    def run(query, temperature):
        if loss == "moco":
            return moco_loss(query, key, queue, temperature, backend=backend)
        options = {"denominator": loss, "backend": backend}
        return tagged_moco_loss(query, key, queue, positives, temperature, **options)

    assert torch.autograd.gradcheck(run, (query, temperature))
    if backend == "eager":
        assert torch.autograd.gradgradcheck(run, (query, temperature))


def test_keys_are_constants(backend):
    query, key, queue, positives = problem(4, 6, 3)
    key, queue = leaf(key), leaf(queue)
    losses = [
        moco_loss(query, key, queue, 0.1, backend=backend),
        *(
            tagged_moco_loss(query, key, queue, positives, 0.1, denominator=d, backend=backend)
            for d in DENOMINATORS
        ),
    ]
    sum(losses).backward()
    assert query.grad.any()
    assert key.grad is None
    assert queue.grad is None


@pytest.mark.parametrize("loss", ["moco", "mct", *DENOMINATORS])
def test_compiles_whole(loss, backend):
    torch._dynamo.reset()

    def run(query, key, queue, positives, temperature):
        if loss == "mct":
            tagged, plain = (query, key, queue, positives), (query, key, queue)
            return mct_loss(tagged, tagged, plain, plain, temperature, backend=backend)
        if loss == "moco":
            return moco_loss(query, key, queue, temperature, backend=backend)
        options = {"denominator": loss, "backend": backend}
        return tagged_moco_loss(query, key, queue, positives, temperature, **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for n in (5, 8):
        args = (*problem(n, 9, 4), torch.tensor(0.2))
        got, expected = compiled(*args), run(*args)
        torch.testing.assert_close(got, expected)
        (a,), (b,) = (torch.autograd.grad(x, args[0]) for x in (got, expected))
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("loss", ["moco", *DENOMINATORS])
def test_no_matrix_is_made(loss, compiled_backend, largest_tensor):
    n, q, d = 512, 1024, 64
    query, key, queue, positives = problem(n, q, d, dtype=torch.float32)
    with largest_tensor, saved_bytes(query, key, queue, positives) as saved:
        if loss == "moco":
            value = moco_loss(query, key, queue, 0.1, backend=compiled_backend)
        else:
            options = {"denominator": loss, "backend": compiled_backend}
            value = tagged_moco_loss(query, key, queue, positives, 0.1, **options)
        value.backward()
    # one bool for each pair would already be more
    assert saved.bytes < n * q
    assert largest_tensor.bytes <= q * d * 4


def test_reductions_and_autocast(backend):
    query, key, queue, positives = problem(7, 9, 16, dtype=torch.float32)
    low = [x.bfloat16() for x in (query, key, queue)]

    def losses(*rows, **options):
        yield moco_loss(*rows, 0.1, backend=backend, **options)
        for denominator in DENOMINATORS:
            options["denominator"] = denominator
            yield tagged_moco_loss(*rows, positives, 0.1, backend=backend, **options)

    each = list(losses(query, key, queue, reduction="none"))
    for got, x in zip(losses(query, key, queue), each, strict=True):
        assert x.shape == (7,)
        torch.testing.assert_close(got, x.mean())
    for got, x in zip(losses(query, key, queue, reduction="sum"), each, strict=True):
        torch.testing.assert_close(got, x.sum())
    with torch.autocast("cpu", torch.bfloat16):
        under = list(losses(query, key, queue))
    for got, expected in zip(under, losses(*low), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("denominator", DENOMINATORS)
def test_mct_is_the_weighted_sum_of_its_paths(denominator, backend):
    # paths inside a modality have widths and queues of their own
    paths = [problem(5, q, d, seed=d) for q, d in ((8, 4), (6, 3), (9, 6), (9, 6))]
    given = (paths[0], paths[1], paths[2][:3], paths[3][:3])
    options = {"reduction": "none", "backend": backend}
    got = mct_loss(*given, 0.1, weights=(0.5, 2.0, 0.0, 3.0), denominator=denominator, **options)
    tagged = [
        tagged_moco_loss(*path, 0.1, denominator=denominator, **options) for path in paths[:2]
    ]
    plain = moco_loss(*paths[3][:3], 0.1, **options)
    torch.testing.assert_close(got, 0.5 * tagged[0] + 2.0 * tagged[1] + 3.0 * plain)


# the Module


def views(step, n=4):
    return unit_rows(n, 5, seed=step), unit_rows(n, 5, seed=100 + step)


def module(size=10, **options):
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    return MoCoLoss(encoder, 3, size, **options).double()


def test_module_step_by_step():
    model = module(momentum=0.9, temperature=0.2)
    twin, slow = copy.deepcopy(model.encoder), copy.deepcopy(model.encoder)
    queue, pointer = model.queue.rows.clone(), 0
    torch.testing.assert_close(queue.norm(dim=1), torch.ones(10).double())
    optimizers = [torch.optim.SGD(x.parameters(), lr=0.5) for x in (model.encoder, twin)]
    for step in range(6):  # 4 keys a step into 10 places: it wraps in the middle of a batch
        query, key = views(step)
        got = model(query, key)
        with torch.no_grad():
            for a, b in zip(slow.parameters(), twin.parameters(), strict=True):
                a.copy_(0.9 * a + 0.1 * b)
            keys = F.normalize(slow(key), dim=1)
        q = F.normalize(twin(query), dim=1)
        logits = torch.cat([(q * keys).sum(1, keepdim=True), q @ queue.T], 1) / 0.2
        expected = F.cross_entropy(logits, torch.zeros(4).long())
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        for row in keys:
            queue = queue.clone()
            queue[pointer % 10] = row
            pointer += 1
        torch.testing.assert_close(model.queue.rows, queue)
        assert model.queue.pointer.item() == pointer % 10
        for loss, optimizer in zip((got, expected), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    assert all(p.grad is None for p in model.key_encoder.parameters())


def test_module_resumes_exactly():
    model = module()
    for step in range(3):
        model(*views(step))
    state = copy.deepcopy(model.state_dict())
    resumed = module()
    resumed.load_state_dict(state)
    for step in range(3, 6):
        assert torch.equal(resumed(*views(step)), model(*views(step)))
    for name, x in model.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def test_module_in_evaluation_moves_nothing():
    model = module()
    with torch.no_grad():
        model.encoder[0].weight.add_(1.0)
    before = copy.deepcopy(model.state_dict())
    model.eval()
    model(*views(0)).backward()
    for name, x in model.state_dict().items():
        assert torch.equal(before[name], x), name


def test_module_under_autocast():
    model = module().float()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*(x.float() for x in views(0)))
    loss.backward()
    assert loss.dtype == torch.float32
    assert model.queue.rows.dtype == torch.float32
    assert model.encoder[0].weight.grad.isfinite().all()


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("batches", [(2, 2, 2), (7, 1), (5, 9), (3,)])
def test_queue_keeps_the_last_keys(size, batches):
    queue = KeyQueue(random_keys(size, 2))
    pushed = list(queue.rows.clone())
    start = size  # the first rows stand for keys pushed before
    for i, n in enumerate(batches):
        keys = unit_rows(n, 2, seed=i, dtype=torch.float32)
        queue.push(keys)
        pushed += list(keys)
    for age, key in enumerate(reversed(pushed[-size:])):
        place = (len(pushed) - start - 1 - age) % size
        assert torch.equal(queue.rows[place], key)
    assert queue.pointer.item() == (len(pushed) - start) % size


# errors

Q, MASK = torch.zeros(5, 8), torch.zeros(5, 6, dtype=torch.bool)
ERRORS = [
    ({"query": Q[0]}, ValueError, "query must be [N, D], got [8]"),
    ({"key": Q[:4]}, ValueError, "key must be [5, 8] like query, got [4, 8]"),
    ({"key": Q.double()}, TypeError, "key must be float32 like query, got float64"),
    ({"queue": Q[:, :7]}, ValueError, "queue must be [Q, 8] like query, got [5, 7]"),
    ({"queue": Q[:0]}, ValueError, "queue must not be empty, got [0, 8]"),
    ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
    ({"temperature": math.nan}, ValueError, "temperature must be finite, got nan"),
    ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
]
GOOD = {"query": Q, "key": Q, "queue": Q, "temperature": 0.1}


@pytest.mark.parametrize(("options", "kind", "sentence"), ERRORS)
def test_errors(options, kind, sentence):
    for loss, more in ((moco_loss, {}), (tagged_moco_loss, {"positives": MASK})):
        with pytest.raises(kind) as raised:
            loss(**(GOOD | more | options))
        assert str(raised.value) == f"{loss.__name__}: {sentence}"


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"positives": MASK.long()}, TypeError, "positives must be bool, got int64"),
        ({"positives": None}, TypeError, "positives must be a torch.Tensor, got NoneType"),
        (
            {"positives": MASK[:, 1:]},
            ValueError,
            "positives must be [5, 6], one per query and key, got [5, 5]",
        ),
        (
            {"positives": MASK.to("meta")},
            ValueError,
            "positives must be on cpu like query, got meta",
        ),
        (
            {"denominator": "some"},
            ValueError,
            "denominator must be 'all' or 'negatives', got 'some'",
        ),
    ],
)
def test_errors_of_tags(options, kind, sentence):
    with pytest.raises(kind) as raised:
        tagged_moco_loss(**(GOOD | {"positives": MASK} | options))
    assert str(raised.value) == f"tagged_moco_loss: {sentence}"


@pytest.mark.parametrize(
    ("text", "options", "kind", "sentence"),
    [
        ((Q, Q), {}, ValueError,
         "text must be (query, key, queue) or (query, key, queue, positives), got 2 of them"),
        ((Q[:4], Q[:4], Q), {}, ValueError, "text must have 5 queries like image, got 4"),
        ((None, Q, Q), {}, TypeError, "the query of text must be a torch.Tensor, got NoneType"),
        ((Q, Q, Q), {"weights": (1.0,)}, ValueError, "weights must be 4 numbers, got 1"),
        ((Q, Q, Q), {"weights": (1, -2, 1, 1)}, ValueError,
         "weight of text must be positive or 0, got -2"),
    ],
)  # fmt: skip
def test_errors_of_mct(text, options, kind, sentence):
    path = (Q, Q, Q)
    with pytest.raises(kind) as raised:
        mct_loss(path, text, path, path, 0.1, **options)
    assert str(raised.value) == f"mct_loss: {sentence}"


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"momentum": 1.0}, ValueError, "momentum must be in [0, 1), got 1.0"),
        ({"momentum": None}, TypeError, "momentum must be a number, got NoneType"),
        ({"width": 0}, ValueError, "width must be a number from 1, got 0"),
        ({"queue_size": 2.5}, ValueError, "queue_size must be a number from 1, got 2.5"),
    ],
)
def test_errors_of_the_module(options, kind, sentence):
    with pytest.raises(kind) as raised:
        MoCoLoss(nn.Identity(), **({"width": 3} | options))
    assert str(raised.value) == f"MoCoLoss: {sentence}"
