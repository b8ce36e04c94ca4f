"""ALBEF's losses: golden vectors, explicit target matrices; the Module step by step."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from mmfast import itc_loss, itm_loss, mlm_loss
from mmfast.losses._momentum import follow
from mmfast.nn import MomentumITC
from mmfast.testing import assert_within_budget, leaf, saved_bytes, unit_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "albef.npz")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN.files} - {"ema"})
PRE = [case for case in CASES if case.startswith("pre")]

laws = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def golden(case, *names):
    return [torch.from_numpy(np.asarray(GOLDEN[f"{case}.{name}"])) for name in names]


def features(case):
    """Raw rows of image, text, image_m, text_m and the queues, as rows."""
    rows = golden(case, "image_raw", "text_raw", "image_m_raw", "text_m_raw")
    return leaf(rows[0]), leaf(rows[1]), rows[2], rows[3], *queues(case)


def queues(case, when=""):
    return [x.T.contiguous() for x in golden(case, f"image_queue{when}", f"text_queue{when}")]


def ids_of(case):
    if case in PRE:
        return {}
    return dict(zip(("image_ids", "queue_ids"), golden(case, "idx", "idx_queue"), strict=True))


@pytest.mark.parametrize("case", CASES)
def test_golden(case, level_backend):
    image, text, *constants = features(case)
    (temperature,) = golden(case, "temp_after_clamp" if case in PRE else "temp")
    temperature = leaf(temperature)
    alpha = 0.0 if case.endswith("False") else GOLDEN[f"{case}.alpha"].item()
    unit = [F.normalize(x, dim=1) for x in (image, text, *constants)]
    loss = itc_loss(*unit, temperature, alpha, **ids_of(case), backend=level_backend)
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss_itc"].item(), rel=1e-13, abs=1e-12)
    names = ("grad_image_raw", "grad_text_raw", "grad_temp")
    gradients = torch.autograd.grad(loss, (image, text, temperature))
    for name, got in zip(names, gradients, strict=True):
        np.testing.assert_allclose(got, GOLDEN[f"{case}.{name}"], rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_golden_module(case):
    image, text, image_m, text_m, *rows = features(case)
    pointer, temperature = golden(case, "queue_ptr", "temp")
    model = MomentumITC(
        nn.Identity(),
        image.shape[1],
        len(rows[0]),
        alpha=0.0 if case.endswith("False") else GOLDEN[f"{case}.alpha"].item(),
        limits=(0.001, 0.5) if case in PRE else None,
    ).double()
    with torch.no_grad():
        model.temperature.copy_(temperature)
    fifos = dict(zip((model.image_queue, model.text_queue), rows, strict=True))
    if case not in PRE:
        fifos[model.id_queue] = golden(case, "idx_queue")[0]
    for fifo, x in fifos.items():
        fifo.rows.copy_(x)
        fifo.pointer.copy_(pointer)
    loss = model(image, text, image_m, text_m, ids_of(case).get("image_ids"))
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss_itc"].item(), rel=1e-13, abs=1e-12)
    after = queues(case, "_after")
    if case in PRE:
        assert model.temperature.item() == GOLDEN[f"{case}.temp_after_clamp"]
    else:
        after += golden(case, "idx_queue_after")
    for fifo, x in zip(fifos, after, strict=True):
        torch.testing.assert_close(fifo.rows, x.reshape(fifo.rows.shape), rtol=0, atol=1e-15)
        assert fifo.pointer.item() == GOLDEN[f"{case}.queue_ptr_after"].item()


@pytest.mark.parametrize("case", PRE)
def test_golden_matching(case):
    image, text, *_ = features(case)
    images, texts, w, b = golden(
        case, "itm_neg_image_rows", "itm_neg_text_rows", "itm_head_w", "itm_head_b"
    )
    positive, negative = (F.linear(x + 0.5 * y, w, b) for x, y in ((text, image), (texts, images)))
    got = itm_loss(positive, negative)
    assert got.item() == pytest.approx(GOLDEN[f"{case}.loss_itm"].item(), abs=1e-14)


def test_golden_average():
    slow, fast, after = (
        nn.ParameterList(golden("ema", name))
        for name in ("momentum_before", "online", "momentum_after")
    )
    for _ in range(GOLDEN["ema.steps"].item()):
        follow(slow, fast, GOLDEN["ema.m"].item())
    torch.testing.assert_close(slow[0], after[0], rtol=1e-14, atol=1e-15)


def dense(
    image, text, image_m, text_m, image_queue, text_queue, temperature, alpha,
    image_ids=None, queue_ids=None,
):  # fmt: skip
    """Both target matrices [B, B + Q], row by row [B]."""
    loss = 0.0
    for query, teacher, key, queue in (
        (image, image_m, text_m, text_queue),
        (text, text_m, image_m, image_queue),
    ):
        keys = torch.cat([key, queue])
        target = torch.eye(len(query), len(keys), dtype=query.dtype)
        if image_ids is not None:
            equal = (image_ids[:, None] == torch.cat([image_ids, queue_ids])).to(query.dtype)
            target = equal / equal.sum(1, keepdim=True)
        target = (1 - alpha) * target + alpha * (teacher @ keys.T / temperature.detach()).softmax(1)
        loss = loss - (target * (query @ keys.T / temperature).log_softmax(1)).sum(1)
    return loss / 2


def problem(b, q, d, seed=0, dtype=torch.float64):
    rows = [unit_rows(n, d, seed=seed + i, dtype=dtype) for i, n in enumerate((b, b, b, b, q, q))]
    return leaf(rows[0]), leaf(rows[1]), *rows[2:]


def ids(b, q, kinds, seed=0):
    random = torch.Generator().manual_seed(seed)
    # some of the queue belong to no row of the batch, on either side of its range
    image_ids = torch.randint(0, kinds, (b,), generator=random)
    return {
        "image_ids": image_ids,
        "queue_ids": torch.randint(-2, kinds + 2, (q,), generator=random),
    }


@laws
@given(
    b=st.integers(1, 9),
    q=st.integers(1, 12),
    d=st.integers(1, 8),
    kinds=st.integers(0, 5),
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.02, 2.0),
    alpha=st.floats(0.0, 1.0),
)
def test_itc_is_the_dense_form(b, q, d, kinds, seed, temperature, alpha, backend):
    rows = problem(b, q, d, seed)
    more = ids(b, q, kinds, seed) if kinds else {}
    temperature = leaf(torch.tensor(temperature, dtype=torch.float64))
    got = itc_loss(*rows, temperature, alpha, **more, reduction="none", backend=backend)
    expected = dense(*rows, temperature, alpha, **more)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-11)
    upstream, inputs = torch.linspace(-1, 2, b, dtype=torch.float64), (*rows[:2], temperature)
    for x, y in zip(
        torch.autograd.grad((got * upstream).sum(), inputs),
        torch.autograd.grad((expected * upstream).sum(), inputs),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)


def test_gradcheck(backend):
    image, text, *constants = problem(4, 6, 3)

    def run(image, text):
        return itc_loss(image, text, *constants, 0.3, 0.4, **ids(4, 6, 2), backend=backend)

    assert torch.autograd.gradcheck(run, (image, text))
    if backend == "eager":
        assert torch.autograd.gradgradcheck(run, (image, text))


def test_keys_and_targets_are_constants(backend):
    rows = [leaf(x) for x in problem(4, 6, 3, dtype=torch.float32)]
    alpha = leaf(torch.tensor(0.4))
    itc_loss(*rows, 0.1, alpha, **ids(4, 6, 2), backend=backend).backward()
    assert all(x.grad.any() for x in rows[:2])
    assert all(x.grad is None for x in (*rows[2:], alpha))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
@pytest.mark.parametrize(
    ("dtype", "budget"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)], ids=["f32", "bf16"]
)
def test_tiny_losses_keep_relative_accuracy(alpha, dtype, budget, level_backend):
    *_, image_queue, text_queue = problem(24, 60, 32, dtype=dtype)
    near = unit_rows(24, 32, seed=7)
    image, text, image_m, text_m = (
        F.normalize(near + 0.02 * unit_rows(24, 32, seed=10 + i), dim=1).to(dtype) for i in range(4)
    )
    rows = (leaf(image), leaf(text), image_m, text_m, image_queue, text_queue)
    exact = [x.double() for x in rows]
    temperature = torch.tensor(1 / 40, dtype=torch.float64)
    expected = dense(*exact, temperature, alpha).mean()
    assert 1e-10 < expected.item() < 1e-5
    got = itc_loss(*rows, temperature, alpha, backend=level_backend)
    assert got.item() == pytest.approx(expected.item(), rel=budget)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_within_budget(dtype, compiled_backend):
    rows = problem(37, 90, 24, dtype=dtype)

    def run(rows, backend):
        image, text = leaf(rows[0]), leaf(rows[1])
        temperature = leaf(torch.tensor(0.1, dtype=torch.float64))
        more = ids(37, 90, 20)
        value = itc_loss(image, text, *rows[2:], temperature, 0.4, **more, backend=backend)
        return value, *torch.autograd.grad(value, (image, text, temperature))

    got, eager = run(rows, compiled_backend), run(rows, "eager")
    exact = run([x.double() for x in rows], "eager")
    assert got[0].dtype == torch.float32
    assert got[1].dtype == dtype
    for name, a, b, c in zip(
        ("loss", "image", "text", "temperature"), got, eager, exact, strict=True
    ):
        # scores up to 10 are rounded before their exponential is taken
        assert_within_budget(name, a, b, c, eps=8 * torch.finfo(dtype).eps)


def test_no_matrix_is_made(compiled_backend, largest_tensor):
    b, q, d = 256, 512, 16
    rows, more = problem(b, q, d, dtype=torch.float32), ids(b, q, 200)
    with largest_tensor, saved_bytes(*rows) as saved:
        itc_loss(*rows, 0.1, 0.4, **more, backend=compiled_backend).backward()
    # one bool for each pair of the batch with the queue would already be more
    assert saved.bytes < b * q
    assert largest_tensor.bytes <= q * d * 4


def test_reductions_and_autocast(backend):
    rows = problem(7, 9, 16, dtype=torch.float32)
    each = itc_loss(*rows, 0.1, 0.4, reduction="none", backend=backend)
    assert each.shape == (7,)
    for reduction in ("mean", "sum"):
        got = itc_loss(*rows, 0.1, torch.tensor(0.4), reduction=reduction, backend=backend)
        torch.testing.assert_close(got, getattr(each, reduction)())
    with torch.autocast("cpu", torch.bfloat16):
        got = itc_loss(*rows, 0.1, 0.4, backend=backend)
    low = [x.bfloat16() for x in rows]
    torch.testing.assert_close(got, itc_loss(*low, 0.1, 0.4, backend=backend))


def test_compiles_whole(backend):
    torch._dynamo.reset()

    def run(rows, more, temperature, logits, labels):
        loss = itc_loss(*rows, temperature, 0.4, **more, backend=backend)
        return loss + itm_loss(logits, -logits) + mlm_loss(logits, labels, -logits, 0.4)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    rows, more = problem(5, 9, 4, dtype=torch.float32), ids(5, 9, 3)
    args = rows, more, torch.tensor(0.2), leaf(torch.randn(5, 2)), torch.tensor([0, 1, -100, 1, 0])
    got, expected = compiled(*args), run(*args)
    torch.testing.assert_close(got, expected)
    inputs = (*rows[:2], args[3])
    for a, b in zip(
        torch.autograd.grad(got, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(a, b)


# matching and masked language modelling


@laws
@given(
    sizes=st.lists(st.integers(1, 5), max_size=2),
    words=st.integers(1, 7),
    alpha=st.floats(0.0, 1.0),
    seed=st.integers(0, 1000),
    labelled=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_mlm_is_the_definition(sizes, words, alpha, seed, labelled):
    random = torch.Generator().manual_seed(seed)
    logits, teacher = (
        leaf(3 * torch.randn(*sizes, words, generator=random, dtype=torch.float64))
        for _ in range(2)
    )
    labels = torch.randint(0, words, sizes, generator=random)
    labels = labels.where(torch.rand(sizes, generator=random) < labelled, -100)
    log_p, p = logits.log_softmax(-1).reshape(-1, words), teacher.softmax(-1).reshape(-1, words)
    terms = [
        -(1 - alpha) * log_p[i, y] - alpha * (p[i].detach() * log_p[i]).sum()
        for i, y in enumerate(labels.flatten())
        if y != -100
    ]
    expected = sum(terms) / len(terms) if terms else 0.0 * logits.sum()
    got = mlm_loss(logits, labels, teacher, alpha)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got.backward()
    (gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(logits.grad, gradient, rtol=1e-12, atol=1e-12)
    assert teacher.grad is None


def test_mlm_without_teacher_is_cross_entropy():
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[:, 2:] = -100
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(mlm_loss(logits, labels), expected)
    masked = labels != -100
    torch.testing.assert_close(mlm_loss(logits[masked], labels[masked]), expected)
    none = masked & False
    assert mlm_loss(logits[none], labels[none], logits[none], 0.4).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_losses_of_logits_widen_and_ignore_autocast(dtype):
    logits, labels = leaf(30 * torch.randn(9, 2, dtype=dtype)), torch.randint(0, 2, (9,))
    wide = leaf(logits.double())
    for run in (
        lambda x: itm_loss(x[:4], x[4:]),
        lambda x: mlm_loss(x, labels, x.flip(0), 0.4),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            got = run(logits)
        assert got.dtype == torch.float32
        torch.testing.assert_close(got.double(), run(wide), rtol=1e-6, atol=1e-6)
        (a,), (b,) = torch.autograd.grad(got, logits), torch.autograd.grad(run(wide), wide)
        torch.testing.assert_close(a.double(), b, rtol=0, atol=torch.finfo(dtype).eps)


def test_itm_keeps_the_accuracy_of_tiny_losses():
    sure = torch.tensor([[0.0, 40.0]])
    assert itm_loss(sure, sure.flip(1)).item() == pytest.approx(math.exp(-40), rel=1e-6)


# the Module


class Towers(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(5, 3), nn.Linear(6, 3)

    def forward(self, image, text):
        return self.image(image), self.text(text)


def batch(step, n=4):
    return unit_rows(n, 5, seed=step), unit_rows(n, 6, seed=100 + step)


def make(**options):
    torch.manual_seed(0)
    model = Towers().double()
    return model, MomentumITC(model, 3, **({"queue_size": 10} | options)).double()


def advance(model, itc, step, image_ids=None):
    slow = itc.follow(model)
    with torch.no_grad():
        keys = slow(*batch(step))
    return itc(*model(*batch(step)), *keys, image_ids)


def test_module_step_by_step():
    model, itc = make(momentum=0.9, temperature=0.6, alpha=0.8, ramp=3)
    twin, slow = copy.deepcopy(model), copy.deepcopy(model)
    rows = [itc.image_queue.rows.clone(), itc.text_queue.rows.clone(), torch.full((10,), -100)]
    temperature, place = leaf(itc.temperature), 0
    optimizers = [
        torch.optim.SGD(x, lr=0.1)
        for x in ([*model.parameters(), *itc.parameters()], [*twin.parameters(), temperature])
    ]
    for step in range(6):  # 4 keys a step into 10 places: it wraps in the middle of a batch
        # every other call knows no ids
        image_ids = torch.tensor([7, step, 7, 3]) if step % 2 else None
        got = advance(model, itc, step, image_ids)
        with torch.no_grad():
            temperature.clamp_(0.001, 0.5)
            for a, b in zip(slow.parameters(), twin.parameters(), strict=True):
                a.copy_(0.9 * a + 0.1 * b)
            keys = [F.normalize(x, dim=1) for x in slow(*batch(step))]
        pair = [F.normalize(x, dim=1) for x in twin(*batch(step))]
        more = {} if image_ids is None else {"image_ids": image_ids, "queue_ids": rows[2]}
        alpha = 0.8 * min(1.0, step / 3)
        expected = dense(*pair, *keys, *rows[:2], temperature, alpha, **more).mean()
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
        rows = [x.clone() for x in rows]
        for row in range(4):
            numbers = torch.full((4,), -100) if image_ids is None else image_ids
            for fifo, new in zip(rows, (*keys, numbers), strict=True):
                fifo[place % 10] = new[row]
            place += 1
        for fifo, x in zip((itc.image_queue, itc.text_queue, itc.id_queue), rows, strict=True):
            torch.testing.assert_close(fifo.rows, x)
        for loss, optimizer in zip((got, expected), optimizers, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        torch.testing.assert_close(itc.temperature, temperature, rtol=1e-10, atol=0)
    assert [name for name, p in itc.named_parameters() if p.requires_grad] == ["temperature"]


def test_module_resumes_exactly():
    model, itc = make(ramp=5)
    for step in range(3):
        advance(model, itc, step)
    other, resumed = make(ramp=5)
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    resumed.load_state_dict(copy.deepcopy(itc.state_dict()))
    for step in range(3, 6):
        assert torch.equal(advance(other, resumed, step), advance(model, itc, step))
    for name, x in itc.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], x), name


def test_module_in_evaluation_moves_nothing():
    model, itc = make(temperature=0.9)
    with torch.no_grad():
        model.image.weight.add_(1.0)
    before = copy.deepcopy(itc.state_dict())
    itc.eval()
    advance(model, itc, 0).backward()
    for name, x in itc.state_dict().items():
        assert torch.equal(before[name], x), name


def test_module_under_autocast():
    model, itc = make()
    model, itc = model.float(), itc.float()
    rows = [x.float() for x in batch(0)]
    with torch.autocast("cpu", torch.bfloat16):
        loss = itc(*model(*rows), *itc.follow(model)(*rows))
    loss.backward()
    assert loss.dtype == itc.image_queue.rows.dtype == torch.float32
    assert model.image.weight.grad.isfinite().all()
    assert itc.temperature.grad.isfinite()


# errors

X, IDS = torch.zeros(5, 8), torch.zeros(5, dtype=torch.int64)
GOOD = {
    **dict.fromkeys(("image", "text", "image_m", "text_m"), X),
    **dict.fromkeys(("image_queue", "text_queue"), torch.zeros(6, 8)),
    "temperature": 0.1,
    "alpha": 0.4,
}


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"image": X[0]}, ValueError, "image must be [B, D], got [8]"),
        ({"text": X[:4]}, ValueError, "text must be [5, 8] like image, got [4, 8]"),
        ({"image_m": X.double()}, TypeError, "image_m must be float32 like image, got float64"),
        ({"text_m": None}, TypeError, "text_m must be a torch.Tensor, got NoneType"),
        ({"image_queue": X[:0]}, ValueError, "image_queue must not be empty, got [0, 8]"),
        ({"image_queue": X[:, 1:]}, ValueError,
         "image_queue must be [Q, 8] like image, got [5, 7]"),
        ({"text_queue": X}, ValueError, "text_queue must be [6, 8] like image_queue, got [5, 8]"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"temperature": -1}, ValueError, "temperature must be positive, got -1"),
        ({"alpha": 1.5}, ValueError, "alpha must be in [0, 1], got 1.5"),
        ({"alpha": math.nan}, ValueError, "alpha must be in [0, 1], got nan"),
        ({"alpha": "0.4"}, TypeError, "alpha must be a number, got str"),
        ({"alpha": X}, ValueError, "alpha must have one element, got [5, 8]"),
        ({"image_ids": IDS}, ValueError, "image_ids and queue_ids must come together, got no "
         "queue_ids"),
        ({"queue_ids": IDS}, ValueError, "image_ids and queue_ids must come together, got no "
         "image_ids"),
        ({"image_ids": IDS, "queue_ids": IDS}, ValueError,
         "queue_ids must be [6], one per row of image_queue, got [5]"),
        ({"image_ids": X, "queue_ids": IDS}, TypeError, "image_ids must be int64, got float32"),
        ({"reduction": "avg"}, ValueError, "reduction must be 'mean', 'sum' or 'none', got 'avg'"),
        ({"group": 3}, TypeError,
         "group must be a torch.distributed process group or None, got int"),
    ],
)  # fmt: skip
def test_errors_of_itc(options, kind, sentence):
    with pytest.raises(kind) as raised:
        itc_loss(**(GOOD | options))
    assert str(raised.value) == f"itc_loss: {sentence}"


Z, WORDS = torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("loss", "args", "kind", "sentence"),
    [
        (itm_loss, (Z, Z[:, :2]), ValueError, "logits_positive must be [B, 2], got [3, 4]"),
        (itm_loss, (Z[:, :2], Z[:, 0]), ValueError,
         "logits_negative must be [M, 2] like logits_positive, got [3]"),
        (itm_loss, (Z[:, :2], None), TypeError,
         "logits_negative must be a torch.Tensor, got NoneType"),
        (mlm_loss, (Z[0, 0], WORDS), ValueError, "logits must be [V], got []"),
        (mlm_loss, (Z[:, :0], WORDS), ValueError, "logits must not be empty, got [3, 0]"),
        (mlm_loss, (WORDS, WORDS), TypeError,
         "logits must be float32, float64, bfloat16 or float16, got int64"),
        (mlm_loss, (Z, Z), TypeError, "labels must be int64, got float32"),
        (mlm_loss, (Z, WORDS[:2]), ValueError, "labels must be [3] like logits, got [2]"),
        (mlm_loss, (Z, WORDS.to("meta")), ValueError,
         "labels must be on cpu like logits, got meta"),
        (mlm_loss, (Z, WORDS + 4), ValueError, "labels must be in [0, 4) or -100, got 4"),
        (mlm_loss, (Z, WORDS - 1), ValueError, "labels must be in [0, 4) or -100, got -1"),
        (mlm_loss, (Z, WORDS, Z[:2], 0.4), ValueError,
         "teacher_logits must be [3, 4] like logits, got [2, 4]"),
        (mlm_loss, (Z, WORDS, Z, -0.1), ValueError, "alpha must be in [0, 1], got -0.1"),
        (mlm_loss, (Z, WORDS, None, 0.4), ValueError,
         "alpha must be 0 without teacher_logits, got 0.4"),
    ],
)  # fmt: skip
def test_errors_of_logits(loss, args, kind, sentence):
    with pytest.raises(kind) as raised:
        loss(*args)
    assert str(raised.value) == f"{loss.__name__}: {sentence}"


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"width": 0}, ValueError, "width must be a number from 1, got 0"),
        ({"queue_size": 2.5}, ValueError, "queue_size must be a number from 1, got 2.5"),
        ({"momentum": 1.0}, ValueError, "momentum must be in [0, 1), got 1.0"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"alpha": -0.4}, ValueError, "alpha must be in [0, 1], got -0.4"),
        ({"ramp": -1}, ValueError, "ramp must be positive or 0, got -1"),
        ({"limits": (0.5, 0.1)}, ValueError,
         "limits must be two numbers, 0 < low <= high, got (0.5, 0.1)"),
    ],
)  # fmt: skip
def test_errors_of_the_module(options, kind, sentence):
    with pytest.raises(kind) as raised:
        MomentumITC(nn.Identity(), **({"width": 3, "queue_size": 4} | options))
    assert str(raised.value) == f"MomentumITC: {sentence}"
