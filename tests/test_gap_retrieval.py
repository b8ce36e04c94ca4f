"""Recall and calibration against golden vectors, dense definitions and hand-made ties."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from mmfast import (
    _dispatch,
    calibration_error,
    retrieval_calibration_error,
    retrieval_recall,
)
from mmfast.gap import retrieval
from mmfast.testing import unit_rows

FOLDER = Path(__file__).parent / "golden"
ECE, GAP, RECALL = (np.load(FOLDER / f"{x}.npz") for x in ("ece", "modality_gap", "retrieval"))


def test_recall_golden(level_backend):
    u, v = (RECALL[f"B7_D13.{name}"] for name in "uv")
    found = retrieval_recall(u, v, backend=level_backend)
    assert found.x_ranks.tolist() == RECALL["B7_D13.rank_i2t"].tolist()
    assert list(found.x_to_y.values()) == pytest.approx(RECALL["B7_D13.i2t"] / 100)
    assert list(found.y_to_x.values()) == pytest.approx(RECALL["B7_D13.t2i"] / 100)


def test_recall_of_the_gap_code_golden():
    case = "retrieval_B7_D13"
    found = retrieval_recall(GAP[f"{case}.u"], GAP[f"{case}.v"])
    for k in (1, 5, 10):
        assert found.x_to_y[k] == pytest.approx(GAP[f"{case}.Text_R{k}"].item())
        assert found.y_to_x[k] == pytest.approx(GAP[f"{case}.Image_R{k}"].item())


def dense_ranks(s, right):
    best = s.masked_fill(~right, -math.inf).amax(1, keepdim=True)
    return ((s > best) & ~right).sum(1)


@given(
    n=st.integers(1, 9),
    m=st.integers(1, 12),
    d=st.integers(1, 5),
    groups=st.integers(1, 4),
    seed=st.integers(0, 10_000),
    pairs=st.sampled_from([1, 8192]),
)
def test_recall_with_several_captions_is_the_dense_form(n, m, d, groups, seed, pairs):
    random = torch.Generator().manual_seed(seed)
    # every id on both sides, in no order
    x_ids, y_ids = (
        torch.cat([torch.arange(groups), torch.randint(0, groups, (rows,), generator=random)])
        for rows in (n, m)
    )
    x_ids, y_ids = x_ids.flip(0), y_ids[torch.randperm(len(y_ids), generator=random)]
    # few different rows: ties everywhere
    x, y = (
        torch.randint(-1, 2, (len(ids), d), generator=random).double() + 0.5
        for ids in (x_ids, y_ids)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(retrieval, "PAIRS", pairs)
        found = retrieval_recall(x, y, ks=[1, 3], x_ids=x_ids, y_ids=y_ids, normalize=False)
    s, right = x @ y.T, x_ids[:, None] == y_ids
    for ranks, recall, expected in (
        (found.x_ranks, found.x_to_y, dense_ranks(s, right)),
        (found.y_ranks, found.y_to_x, dense_ranks(s.T, right.T)),
    ):
        assert ranks.tolist() == expected.tolist()
        assert recall == {k: pytest.approx((expected < k).double().mean().item()) for k in (1, 3)}


@pytest.mark.parametrize("normalize", [True, False])
def test_ties_do_not_push_back_whatever_the_rounding(normalize, level_backend):
    # the same captions under other ids: every query ties with wrong ones
    D = 96 if level_backend == "triton" else 512
    x = unit_rows(40, D, dtype=torch.float32) * 3
    y = (x + unit_rows(40, D, seed=1, dtype=torch.float32)) * 2
    twice = torch.cat([y, y])
    ids, y_ids = torch.arange(40), torch.arange(80)
    options = {"x_ids": torch.cat([ids, ids + 40]), "y_ids": y_ids, "normalize": normalize}
    found = retrieval_recall(torch.cat([x, x]), twice, (1,), **options, backend=level_backend)
    assert found.x_to_y == found.y_to_x == {1: 1.0}


def test_rows_of_nan_are_not_found():
    x, y = unit_rows(6, 4), unit_rows(6, 4)
    x[2] = math.nan
    y[4] = math.nan
    found = retrieval_recall(x, y, ks=(1, 5))
    assert found.x_ranks.tolist() == [0, 0, 6, 0, 6, 0]
    assert found.y_ranks.tolist() == [0, 0, 6, 0, 6, 0]
    assert found.x_to_y == {1: 4 / 6, 5: 4 / 6}


@pytest.mark.parametrize("bins", [10, 15])
def test_calibration_golden(bins):
    case = f"n7_C3_bins{bins}"
    logits, labels = (ECE[f"{case}.{name}"] for name in ("logits", "labels"))
    found = calibration_error(logits, labels.astype(np.int32), bins=bins)
    assert found.error == pytest.approx(ECE[f"{case}.ece"].item(), abs=1e-12)
    expected = ECE[f"{case}.bins_count_acc_conf"].T
    for got, column in zip((found.count, found.accuracy, found.confidence), expected, strict=True):
        np.testing.assert_allclose(got.nan_to_num(), column, rtol=0, atol=1e-12)
    filled = expected[0] > 0
    assert found.accuracy.isnan().tolist() == (~filled).tolist()
    assert found.maximum == pytest.approx(np.abs(expected[1] - expected[2]).max())


@pytest.mark.parametrize("tau", ["0.01", "0.1", "1.0"])
def test_retrieval_calibration_golden(tau, level_backend):
    case = f"retrieval_tau{tau}"
    u, v = (ECE[f"{case}.{name}"] for name in "uv")
    expected = ECE[f"{case}.ece"].item()
    found = retrieval_calibration_error(u, v, 1 / float(tau), backend=level_backend)
    assert found.error == pytest.approx(expected, abs=1e-12)
    # 6e-9 at tau 0.01, from float32 rows, too
    single = retrieval_calibration_error(u.astype("f4"), v.astype("f4"), 1 / float(tau))
    assert single.error == pytest.approx(expected, rel=1e-4)


def test_retrieval_calibration_of_classes_is_that_of_their_logits():
    x, y = unit_rows(50, 6), unit_rows(4, 6, seed=1)
    labels = torch.arange(50) % 4
    scale = torch.tensor([3.0])
    found = retrieval_calibration_error(x, y, scale, x_ids=labels, y_ids=torch.arange(4), bins=5)
    dense = calibration_error(3 * x @ y.T, labels, bins=5)
    assert found.error == pytest.approx(dense.error)
    assert found.maximum == pytest.approx(dense.maximum)
    assert found.count.tolist() == dense.count.tolist()


def test_confidence_on_an_edge_belongs_to_the_bin_below():
    # softmax of (log 3, 0) is 3/4, and of equal logits 1/2
    logits = torch.tensor([[math.log(3), 0.0], [0.0, 0.0], [800.0, 0.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 0])
    assert calibration_error(logits, labels, bins=4).count.tolist() == [0, 1, 1, 1]
    assert calibration_error(logits, labels, bins=1).error == pytest.approx(1 / 4)


@pytest.mark.skipif(_dispatch.core_error is not None, reason=str(_dispatch.core_error))
def test_linear_memory(largest_tensor):
    N, D = 3000, 2
    x, y = unit_rows(N, D), unit_rows(N, D, seed=1)
    ids = torch.arange(N) // 5
    with largest_tensor:
        retrieval_recall(x, y, x_ids=ids, y_ids=ids)
        retrieval_calibration_error(x, y, 10.0)
    # 15,000 pairs in two blocks; the matrix would be 72 MB
    assert largest_tensor.bytes < 300_000


ROWS, IDS = F.normalize(torch.ones(3, 2)), torch.arange(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: retrieval_recall(ROWS, ROWS[:2]), ValueError,
         r"retrieval_recall: y must be \[3, 2\] like x, got \[2, 2\]"),
        (lambda: retrieval_recall(ROWS, ROWS, (1, 0)), ValueError,
         "retrieval_recall: ks must be positive whole numbers, got 0"),
        (lambda: retrieval_recall(ROWS, ROWS, (True,)), ValueError, "numbers, got True"),
        (lambda: retrieval_recall(ROWS, ROWS, x_ids=IDS), ValueError,
         "x_ids and y_ids must be given together, got no y_ids"),
        (lambda: retrieval_recall(ROWS, ROWS, y_ids=IDS), ValueError, "got no x_ids"),
        (lambda: retrieval_recall(ROWS, ROWS, x_ids=IDS, y_ids=IDS[:2]), ValueError,
         r"y_ids must be \[3\], one per row of y, got \[2\]"),
        (lambda: retrieval_recall(ROWS, ROWS, x_ids=IDS, y_ids=IDS.float()), TypeError,
         "y_ids must be int64, got float32"),
        (lambda: retrieval_recall(ROWS, ROWS, x_ids=IDS, y_ids=IDS // 2), ValueError,
         "retrieval_recall: 1 rows of x have no row of y of their id"),
        (lambda: calibration_error(ROWS[0], IDS), ValueError,
         r"calibration_error: logits must be \[N, C\], got \[2\]"),
        (lambda: calibration_error(ROWS, IDS), ValueError,
         "labels must be from 0 to 1, and 1 are not"),
        (lambda: calibration_error(ROWS, IDS // 2, bins=0), ValueError,
         "bins must be a positive whole number, got 0"),
        (lambda: calibration_error(ROWS * math.nan, IDS // 2), ValueError,
         "calibration_error: the confidences of 3 rows are NaN"),
        (lambda: retrieval_calibration_error(ROWS, ROWS, 0.0), ValueError,
         "retrieval_calibration_error: logit_scale must be positive, got 0.0"),
        (lambda: retrieval_calibration_error(ROWS * math.nan, ROWS, 1.0), ValueError,
         "the confidences of 3 rows are NaN"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
