"""Gap, alignment, uniformity, relative alignment, cosines and Procrustes' map."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import mmfast
from mmfast import (
    _dispatch,
    alignment,
    cosine_stats,
    modality_gap,
    procrustes,
    relative_alignment,
    uniformity,
)
from mmfast.testing import leaf, saved_bytes, unit_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "align_uniform.npz")
CASES = sorted({key.rpartition(".")[0] for key in GOLDEN.files})
GAP = np.load(Path(__file__).parent / "golden" / "modality_gap.npz")


def golden(case, *names):
    return [leaf(torch.from_numpy(GOLDEN[f"{case}.{name}"])) for name in names]


def assert_golden(case, loss, **inputs):
    """Value and gradients, in which the rows are free, not tied to the sphere."""
    assert loss.dtype == torch.float64
    assert loss.item() == pytest.approx(GOLDEN[f"{case}.loss"].item(), abs=1e-12)
    for (name, _), got in zip(
        inputs.items(), torch.autograd.grad(loss, inputs.values()), strict=True
    ):
        expected = GOLDEN[f"{case}.grad_{name}"]
        np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("align_")])
def test_alignment_golden(case):
    u, v = golden(case, "u", "v")
    alpha = GOLDEN[f"{case}.alpha"].item()
    assert_golden(case, alignment(u, v, alpha, normalize=False), u=u, v=v)
    assert alignment(3 * u, v / 2, alpha).item() == pytest.approx(GOLDEN[f"{case}.loss"].item())


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("uniform_B")])
def test_uniformity_golden(case, level_backend):
    (u,) = golden(case, "u")
    t = GOLDEN[f"{case}.t"].item()
    assert_golden(case, uniformity(u, t, normalize=False, backend=level_backend), u=u)
    unit = uniformity(7 * u, t, backend=level_backend)
    assert unit.item() == pytest.approx(GOLDEN[f"{case}.loss"].item(), abs=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("uniform_union")])
def test_uniformity_of_both_modalities_golden(case):
    u, v = golden(case, "u", "v")
    assert_golden(case, uniformity(torch.cat([u, v]), normalize=False), u=u, v=v)
    doubled = case.replace("union", "doubled_image")
    expected = GOLDEN[f"{doubled}.loss"].item()
    assert uniformity(torch.cat([u, u])).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("rel_align_")])
def test_relative_alignment_golden(case, level_backend):
    text, image = golden(case, "first", "second")
    loss = relative_alignment(text, image, normalize=False, backend=level_backend)
    assert_golden(case, loss, first=text, second=image)
    unit = relative_alignment(5 * text, image, backend=level_backend)
    assert unit.item() == pytest.approx(loss.item(), abs=1e-12)


LALIGN = [case for case in CASES if case.startswith("rel_lalign_")]


@pytest.mark.parametrize("case", LALIGN)
def test_options_of_the_published_relative_alignment(case):
    """It writes 10,000 in the place of own pairs and goes on as if that were a distance: where it
    takes the mean of a row (k = -1) or the k largest, that number is most of the value. Only the
    nearest one (k = 1) is free of it."""
    text, image = (torch.from_numpy(GOLDEN[f"{case}.{name}"]) for name in ("first", "second"))
    kind, k = case.split("_")[2], int(case.split("_")[3][1:])
    squares = torch.cdist(text, image).square()
    positive, others = squares.diagonal(), squares.clone().fill_diagonal_(10_000)
    if k == 1:
        negative = others.amin(1)
        found = relative_alignment(text, image, normalize=False)
        assert found.item() == pytest.approx((positive - negative).mean().item(), abs=1e-12)
    else:
        negative = others.mean(1) if k == -1 else others.topk(k, dim=1).values.mean(1)
        assert negative.min() > 10_000 / max(k, len(text)) - 1e-9
    published = positive - negative if kind == "diff" else positive / negative
    assert GOLDEN[f"{case}.loss"].item() == pytest.approx(published.mean().item(), rel=1e-9)


def test_gap_golden():
    x, y = (GAP[f"synth_n100_D24.{name}"] for name in "xy")
    gap = modality_gap(x, y)
    for name, got in (
        ("gap_vector", gap.vector),
        ("gap_norm", gap.distance),
        ("direction", gap.direction),
    ):
        np.testing.assert_allclose(got.numpy(), GAP[f"synth_n100_D24.{name}"], rtol=0, atol=1e-12)
    assert not modality_gap(x, x[::-1].copy()).distance > 1e-15
    assert not modality_gap(x, x).direction.any()


@pytest.mark.parametrize("case", ["cone_B2_D3", "cone_B7_D13"])
def test_cosine_stats_golden(case, level_backend):
    stats = cosine_stats(GAP[f"{case}.z"], bins=10_000, backend=level_backend)
    for name in ("mean", "min", "max"):
        expected = GAP[f"{case}.{name}"].item()
        assert getattr(stats, name) == pytest.approx(expected, abs=1e-12), name
    n = stats.count
    if n > 1:
        # published over ordered pairs, each pair twice
        ordered = stats.std * math.sqrt((n - 1) / n * 2 * n / (2 * n - 1))
        assert ordered == pytest.approx(GAP[f"{case}.std_ddof1"].item(), abs=1e-12)
        assert stats.quantile(0.5) == pytest.approx(GAP[f"{case}.median"].item(), abs=1e-4)


def test_cosine_stats_of_two_sets():
    x, y = 3 * unit_rows(9, 5), unit_rows(4, 5, seed=1) / 7
    stats = cosine_stats(x, y)
    cosines = F.normalize(x, dim=1) @ F.normalize(y, dim=1).T
    assert (stats.count, stats.argmax) == (36, divmod(int(cosines.argmax()), 4))
    assert stats.mean == pytest.approx(float(cosines.mean()))
    assert cosine_stats(x, y, normalize=False).max == pytest.approx(float((x @ y.T).max()))


@given(
    n=st.integers(2, 12),
    d=st.integers(2, 9),  # of two neighbours equally near only one has our gradient
    seed=st.integers(0, 10_000),
    t=st.floats(0.1, 5.0),
    length=st.floats(0.1, 3.0),
    far=st.sampled_from([0.0, 50.0]),
)
def test_is_the_dense_form(n, d, seed, t, length, far):
    x, y = (leaf(length * unit_rows(n, d, seed=s) + far) for s in (seed, seed + 1))
    squares = (x[:, None] - x).square().sum(2)[~torch.eye(n, dtype=torch.bool)]
    dense = squares.mul(-t).exp().mean().log()
    others = (x[:, None] - y).square().sum(2)
    nearest = (others + torch.eye(n) * 1e9).amin(1)
    relative = (others.diagonal() - nearest).mean()
    for got, expected, inputs in (
        (uniformity(x, t, normalize=False), dense, (x,)),
        (relative_alignment(x, y, normalize=False), relative, (x, y)),
    ):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        ours, theirs = (torch.autograd.grad(v, inputs, allow_unused=True) for v in (got, expected))
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


@given(n=st.integers(1, 9), d=st.integers(1, 6), seed=st.integers(0, 10_000))
def test_procrustes_undoes_a_rotation(n, d, seed):
    x = unit_rows(n, d, seed=seed)
    turn = torch.linalg.qr(unit_rows(d, d, seed=seed + 1)).Q
    found = procrustes(x, x @ turn)
    identity = torch.eye(d, dtype=torch.float64)
    torch.testing.assert_close(found.rotation @ found.rotation.T, identity)
    torch.testing.assert_close(found.aligned, x)
    assert found.residual < 1e-24
    # of rows that no rotation aligns: not worse than any other
    y = unit_rows(n, d, seed=seed + 2)
    assert procrustes(x, y).residual <= (x - y @ turn).square().sum(1).mean() + 1e-12


def test_equal_and_opposite_rows():
    row = unit_rows(1, 6)
    assert uniformity(row.expand(5, 6)).item() == pytest.approx(0, abs=1e-12)
    assert uniformity(torch.cat([row, -row]), 3.0).item() == pytest.approx(-12)
    x = leaf(row.expand(4, 6))
    torch.autograd.backward(alignment(x, row.expand(4, 6), 1, normalize=False))
    assert not x.grad.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_widened_and_autocast_stays_out(dtype):
    x, y = unit_rows(40, 24, dtype=dtype), unit_rows(40, 24, seed=1, dtype=dtype)
    measures = {
        "alignment": lambda a, b: alignment(a, b),
        "uniformity": lambda a, b: uniformity(a),
        "relative_alignment": relative_alignment,
        "distance": lambda a, b: modality_gap(a, b).distance,
        "residual": lambda a, b: procrustes(a, b).residual,
        "mean": lambda a, b: torch.tensor(cosine_stats(a, b).mean, dtype=torch.float32),
    }
    for name, measure in measures.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = measure(x, y)
        assert got.dtype == torch.float32
        torch.testing.assert_close(
            got.double(), measure(x.double(), y.double()).double(), rtol=1e-5, atol=1e-6, msg=name
        )


def test_rows_far_from_zero_keep_their_accuracy():
    # their squares are 20,000 times as large as their distances
    x, y = (50 + unit_rows(30, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    for measure in (lambda a, b: uniformity(a, normalize=False),
                    lambda a, b: relative_alignment(a, b, normalize=False)):  # fmt: skip
        exact = measure(x.double(), y.double()).item()
        assert measure(x, y).item() == pytest.approx(exact, rel=1e-5)


def test_read_only_memmaps(tmp_path):
    rows = unit_rows(2 * 30, 8).numpy().reshape(2, 30, 8)
    np.save(tmp_path / "rows.npy", rows)
    x, y = np.load(tmp_path / "rows.npy", mmap_mode="r")
    assert uniformity(x).item() == uniformity(torch.from_numpy(rows[0])).item()
    assert modality_gap(x, y, normalize=False).x_mean.numpy() == pytest.approx(rows[0].mean(0))


@pytest.mark.skipif(_dispatch.core_error is not None, reason=str(_dispatch.core_error))
def test_linear_memory(largest_tensor):
    N, D = 1200, 4
    x, y = (leaf(unit_rows(N, D, seed=seed, dtype=torch.float32)) for seed in (0, 1))
    with saved_bytes(x, y) as saved, largest_tensor:
        loss = uniformity(x) + uniformity(x, normalize=False)
        (loss + relative_alignment(x, y)).backward()
        cosine_stats(x, y)
    # the matrix would be 5.8 MB
    assert saved.bytes < 40 * 4 * N * D
    assert largest_tensor.bytes < 20 * 4 * N * D
    assert x.grad.isfinite().all()


def test_losses_trace():
    x, y = leaf(unit_rows(9, 5)), leaf(unit_rows(9, 5, seed=1))

    def loss(x, y):
        return alignment(x, y) + uniformity(x) + relative_alignment(x, y)

    torch.testing.assert_close(
        torch.compile(loss, fullgraph=True, backend="eager")(x, y), loss(x, y)
    )


ROWS = torch.ones(3, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: modality_gap([1], ROWS), TypeError,
         "modality_gap: x must be a tensor or a numpy array, got list"),
        (lambda: modality_gap(ROWS, ROWS.double()), TypeError,
         "modality_gap: y must be float32 like x, got float64"),
        (lambda: modality_gap(ROWS, torch.ones(3, 4)), ValueError,
         r"modality_gap: y must be \[M, 2\] like x, got \[3, 4\]"),
        (lambda: modality_gap(ROWS.long(), ROWS), TypeError, "x must be float32, float64"),
        (lambda: alignment(ROWS, ROWS[:2]), ValueError,
         r"alignment: y must be \[3, 2\] like x, got \[2, 2\]"),
        (lambda: alignment(ROWS, ROWS, 0), ValueError, "alignment: alpha must be positive, got 0"),
        (lambda: uniformity(ROWS[:1]), ValueError, "uniformity: x must have 2 rows or more, got 1"),
        (lambda: uniformity(ROWS, -1), ValueError, "uniformity: t must be positive, got -1"),
        (lambda: uniformity(ROWS, backend="x"), ValueError, "pairwise_lse: backend must be None"),
        (lambda: relative_alignment(ROWS[:1], ROWS[:1]), ValueError,
         "relative_alignment: x must have 2 rows or more, got 1"),
        (lambda: cosine_stats(ROWS[0]), ValueError, r"cosine_stats: x must be \[N, D\], got \[2\]"),
        (lambda: procrustes(ROWS, ROWS[:2]), ValueError, r"procrustes: y must be \[3, 2\] like x"),
        (lambda: mmfast.no_such_name, AttributeError, "'mmfast' has no attribute 'no_such_name'"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
