"""shift_landscape against its definition: values, laws, extremes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast import shift_landscape
from mmfast.testing import (
    LAYOUTS,
    assert_within_budget,
    cases,
    find_case,
    in_double,
    landscape_magnitude,
    strided,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
LOSSES = ("image_to_text", "text_to_image")
GOLDEN = Path(__file__).parent / "golden" / "modality_gap.npz"


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def pair(N=40, D=8, *, seed=0, dtype=torch.float64):
    made = find_case("shift_landscape", "ragged").inputs(torch.float64, seed=seed)
    return (made[name][:N, :D].to(dtype) for name in ("x", "y"))


def by_hand(x, y, shift, temperature, *, unit, sides, chunk):
    """One point of the landscape in plain loops: both directions and the signed distance."""

    def normal(rows):
        return [[c / math.sqrt(sum(e * e for e in row)) for c in row] for row in rows]

    def mean(rows):
        return [sum(column) / len(rows) for column in zip(*rows, strict=True)]

    def length(v):
        return math.sqrt(sum(c * c for c in v))

    u, v = normal(x), normal(y)
    d = [a - b for a, b in zip(mean(u), mean(v), strict=True)]
    if unit:
        d = [c / length(d) for c in d]
    step = shift / 2 if unit and sides == "both" else shift
    if sides in ("both", "x"):
        u = normal([[c - step * e for c, e in zip(row, d, strict=True)] for row in u])
    if sides in ("both", "y"):
        v = normal([[c + step * e for c, e in zip(row, d, strict=True)] for row in v])
    rows = columns = 0.0
    for i in range(len(u)):
        mates = range(i // chunk * chunk, min(len(u), (i // chunk + 1) * chunk))

        def score(a, b):
            return sum(c * e for c, e in zip(u[a], v[b], strict=True)) / temperature

        rows += math.log(sum(math.exp(score(i, j) - score(i, i)) for j in mates))
        columns += math.log(sum(math.exp(score(j, i) - score(i, i)) for j in mates))
    left = [a - b for a, b in zip(mean(u), mean(v), strict=True)]
    sign = -1 if sum(a * b for a, b in zip(left, d, strict=True)) < 0 else 1
    return rows / len(u), columns / len(u), sign * length(left)


@pytest.mark.parametrize("sides", ["both", "x", "y"])
@pytest.mark.parametrize("convention", ["unit", "paper"])
def test_reference_is_the_definition(convention, sides):
    x, y = pair(7, 5)
    shifts, temperatures = [-0.7, 0.0, 1.9], [1.0, 0.3]
    options = {"convention": convention, "sides": sides, "chunk": 3}
    got = shift_landscape(x, y, shifts, temperatures, **options, backend="eager")
    for i, shift in enumerate(shifts):
        for j, temperature in enumerate(temperatures):
            want = by_hand(
                x.tolist(), y.tolist(), shift, temperature,
                unit=convention == "unit", sides=sides, chunk=3,
            )  # fmt: skip
            found = got.image_to_text[i, j], got.text_to_image[i, j], got.distance[i]
            assert [float(z) for z in found] == pytest.approx(want, rel=1e-12, abs=1e-13)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_golden(backend):
    data = np.load(GOLDEN)

    def golden(key):
        return torch.tensor(data["synth_n100_D24." + key])

    x, y, taus = golden("x"), golden("y"), 1 / golden("logit_scales")
    # the definition takes its time
    few = slice(1, None, 10 if backend == "eager" else 1)
    shifts = golden("deltas")[few]
    got = shift_landscape(x, y, shifts, taus, chunk=50, backend=backend)
    # what the published code calls the loss of both directions; it adds 1e-12 to lengths
    published = golden("loss_reference_i2t_only_batch50")[few]
    torch.testing.assert_close(got.image_to_text, published, rtol=0, atol=1e-11)
    assert (got.symmetric - published).abs().max() > 1e-3
    symmetric = golden("loss_symmetric_batch50")[few]
    torch.testing.assert_close(got.symmetric, symmetric, rtol=0, atol=1e-12)
    signed = (golden("distance") * golden("distance_sign"))[few]
    torch.testing.assert_close(got.distance, signed, rtol=0, atol=1e-12)
    one = shift_landscape(x, y, golden("onesided_deltas"), [1.0], sides="x", backend=backend)
    torch.testing.assert_close(one.distance.abs(), golden("onesided_distance"), rtol=0, atol=1e-12)
    # the paper's convention: lambda = 1/2 is a shift as long as the gap
    paper = shift_landscape(x, y, [0.5], taus, convention="paper", backend=backend)
    same = shift_landscape(x, y, [golden("gap_norm").item()], taus, backend=backend)
    torch.testing.assert_close(paper.symmetric, same.symmetric, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("shift_landscape", "full"), ids=name_of)
def test_matches_reference(case, dtype, level_backend):
    made = case.inputs(dtype)
    double = {**in_double(made), "backend": "eager"}
    got = shift_landscape(**made, backend=level_backend)
    flipped = {name: made[name].flip(1) for name in ("x", "y")}
    eager = shift_landscape(**{**made, **flipped}, backend="eager")
    exact = shift_landscape(**double)
    result = torch.float64 if dtype == torch.float64 else torch.float32
    eps = torch.finfo(result).eps
    # float64 judges itself
    eps *= 4 if dtype == torch.float64 else 1
    size = landscape_magnitude(**double)
    for name in LOSSES:
        values = [getattr(z, name) for z in (got, eager, exact)]
        assert values[0].dtype == result
        # in units of a cosine, whose rounding a cold temperature makes larger
        values = [z.double() * made["temperatures"] for z in values]
        assert_within_budget(name, *values, eps=eps, magnitude=size)
    distances = [z.distance for z in (got, eager, exact)]
    assert_within_budget("distance", *distances, eps=eps, magnitude=size)
    assert torch.equal(got.shifts, made["shifts"])
    assert torch.equal(got.temperatures, made["temperatures"])


def test_chunks_are_landscapes_of_their_own(backend):
    x, y = pair(95, 8, dtype=widest(backend))
    d, shifts, taus = torch.ones(8), [-0.4, 0.9], [0.3, 0.05]
    whole = shift_landscape(x, y, shifts, taus, direction=d, chunk=40, backend=backend)
    parts = [
        shift_landscape(a, b, shifts, taus, direction=d, backend=backend)
        for a, b in zip(x.split(40), y.split(40), strict=True)
    ]
    # every pair counts alike, so that a short chunk counts less
    want = sum(len(a) * part.symmetric for a, part in zip(x.split(40), parts, strict=True)) / 95
    torch.testing.assert_close(whole.symmetric, want, rtol=2e-6, atol=1e-7)


def test_at_rest_it_is_the_loss_of_clip(backend):
    x, y = pair(70, 8, dtype=widest(backend))
    got = shift_landscape(x, y, [0.0], [0.05], backend=backend)
    want = mmfast.clip_loss(*(F.normalize(z, dim=1) for z in (x, y)), 20.0, backend=backend)
    torch.testing.assert_close(got.symmetric.squeeze(), want, rtol=3e-6, atol=0)
    gap = F.normalize(x.double(), dim=1).mean(0) - F.normalize(y.double(), dim=1).mean(0)
    torch.testing.assert_close(got.distance[0].double(), gap.norm(), rtol=1e-6, atol=0)


@given(st.integers(2, 30), st.floats(-3, 3), st.floats(0.02, 2), st.data())
def test_laws(N, shift, temperature, data):
    random = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    x, y = (torch.randn(N, 4, generator=random, dtype=torch.float64) for _ in range(2))
    d = torch.randn(4, generator=random, dtype=torch.float64)
    got = shift_landscape(x, y, [shift], [temperature], direction=d)
    close = {"rtol": 1e-9, "atol": 1e-9}
    order = torch.randperm(N, generator=random)
    lengths = torch.rand(N, 1, generator=random, dtype=torch.float64) + 0.1
    other = shift_landscape(lengths * x[order], 7 * y[order], [shift], [temperature], direction=d)
    torch.testing.assert_close(other.symmetric, got.symmetric, **close)
    # sides may swap, and the direction with them
    swapped = shift_landscape(y, x, [shift], [temperature], direction=-3 * d)
    torch.testing.assert_close(swapped.text_to_image, got.image_to_text, **close)
    torch.testing.assert_close(swapped.image_to_text, got.text_to_image, **close)
    torch.testing.assert_close(swapped.distance, got.distance, **close)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_temperatures_do_not_know_of_each_other(backend):
    x, y = pair(100, 8, dtype=torch.float32)
    # given in any order and more than once, shared by sums, or alone
    taus = [0.01, 1.0, 1 / 30, 0.05, 0.1, 0.02, 0.02, 0.7]
    together = shift_landscape(x, y, [-0.5, 0.5], taus, backend=backend)
    for t, tau in enumerate(taus):
        alone = shift_landscape(x, y, [-0.5, 0.5], [tau], backend=backend)
        for name in LOSSES:
            got, want = getattr(together, name)[:, t], getattr(alone, name)[:, 0]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6 / tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_tiny_losses_keep_their_accuracy(dtype, compiled_backend):
    x = torch.eye(60, dtype=dtype)
    x[:, 0] += 0.5
    y = x.clone()
    y[:, 1] -= 0.25
    for tau in (0.06, 0.03):
        got = shift_landscape(x, y, [0.3], [tau], backend=compiled_backend)
        u, v = (F.normalize(side.double(), dim=1) for side in (x, y))
        step = 0.15 * F.normalize(u.mean(0) - v.mean(0), dim=0)
        s = F.normalize(u - step, dim=1) @ F.normalize(v + step, dim=1).T
        s = ((s - s.diagonal()[:, None]) / tau).fill_diagonal_(-math.inf)
        want = s.exp().sum(1).log1p().mean()
        assert want < 1e-3
        torch.testing.assert_close(got.image_to_text.squeeze().double(), want, rtol=1e-4, atol=0)


@pytest.mark.parametrize("tau", [1e-4, 1e-7])
def test_coldest_temperatures_are_exact(tau, level_backend):
    # some pairs match, others are antipodal: scores span 2 / tau
    x = torch.tensor([[1.0, 0], [-1, 0], [0, 1], [0, -1]]).repeat(50, 1)
    y = x.clone()
    y[1::4] *= -1
    options = {"direction": torch.tensor([1.0, 1.0]), "backend": level_backend}
    got = shift_landscape(x, y, [0.0], [tau], **options)
    assert float(got.image_to_text) == pytest.approx(rows_of(x, y, tau), rel=2e-6)
    assert float(got.text_to_image) == pytest.approx(rows_of(y, x, tau), rel=2e-6)


def rows_of(x, y, tau):
    s = x.double() @ y.double().T / tau
    return float((s.logsumexp(1) - s.diagonal()).mean())


# what the interpreter's maximum says of a row of NaN
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_wrong_values_make_everything_nan(value, level_backend):
    x, y = pair(70, 8, dtype=torch.float32)
    y[3, 2] = value
    for chunk in (None, 30):
        got = shift_landscape(x, y, [0.0, 0.5], [1.0, 0.01], chunk=chunk, backend=level_backend)
        for name in (*LOSSES, "symmetric", "distance"):
            assert getattr(got, name).isnan().all()


def test_a_row_that_lands_on_zero_spoils_its_shift_alone(level_backend):
    x, y = torch.eye(3)[[0, 1, 2, 1]], torch.eye(3)[[0, 1, 0, 0]]
    options = {"direction": torch.eye(3)[0], "sides": "x", "backend": level_backend}
    got = shift_landscape(x, y, [0.5, 1.0, 1.5], [0.1], **options)
    spoiled = torch.tensor([False, True, False])
    for name in (*LOSSES, "distance"):
        assert torch.equal(getattr(got, name).isnan().flatten(), spoiled)


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    made = find_case("shift_landscape", "many_lanes").inputs()
    try:
        # a sweep; chunks that take a thread each; fewer chunks than threads
        for chunk in (None, 30, 140):
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(shift_landscape(**made, chunk=chunk, backend="cpp"))
            for name in LOSSES:
                first, *others = (getattr(result, name) for result in results)
                assert all(torch.equal(first, other) for other in others)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    x, y = pair(50, 24, dtype=torch.float32)
    want = shift_landscape(x, y, [0.3], [0.1], backend=backend)
    got = shift_landscape(strided(x, how), strided(y, how), [0.3], [0.1], backend=backend)
    torch.testing.assert_close(got.symmetric, want.symmetric, rtol=1e-6, atol=0)


def test_numbers_come_in_any_form(backend):
    x, y = pair(20, 8, dtype=widest(backend))
    want = shift_landscape(x, y, [-0.5, 0.0], [1.0, 0.5], backend=backend)
    for shifts, taus in (
        (torch.tensor([-0.5, 0.0]), torch.tensor([1.0, 0.5])),
        (np.arange(-0.5, 0.1, 0.5), (1, 0.5)),
    ):
        got = shift_landscape(x, y, shifts, taus, backend=backend)
        assert torch.equal(got.symmetric, want.symmetric)


def test_memory_is_linear(compiled_backend, largest_tensor):
    made = find_case("shift_landscape", "many_lanes").inputs()
    with largest_tensor:
        shift_landscape(**made, backend=compiled_backend)
    # float64 copies of the rows, and a float64 loss of every row, shift and temperature
    assert largest_tensor.bytes <= 8 * 260 * 32
