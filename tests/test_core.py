"""The border of mmfast._C: what memory safety asks of arrays, and which instruction set runs."""

import math
import os
import subprocess
import sys

import pytest
import torch

from mmfast import _dispatch
from mmfast.testing import cpu_level

pytestmark = pytest.mark.skipif(_dispatch.core_error is not None, reason="no compiled core here")
core = getattr(_dispatch, "core", None)


def forward(**changes):
    given = {
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "scale": 1.0,
        "q_ids": None,
        "k_ids": None,
        "mask": None,
        "rows": torch.empty(4),
        "columns": torch.empty(5),
        "threads": 1,
    }
    core.pairwise_lse_forward(**{**given, **changes})


def backward(**changes):
    given = {
        "g_rows": torch.ones(4),
        "g_columns": torch.ones(5),
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "scale": 1.0,
        "q_ids": None,
        "k_ids": None,
        "mask": None,
        "rows": torch.ones(4),
        "columns": torch.ones(5),
        "dq": torch.empty(4, 3),
        "dk": torch.empty(5, 3),
        "need_scale": True,
        "threads": 1,
    }
    return core.pairwise_lse_backward(**{**given, **changes})


def test_arguments_that_fit():
    rows, columns = torch.empty(4), torch.empty(5)
    forward(rows=rows, columns=columns)
    assert backward(rows=rows, columns=columns) == pytest.approx(3 * 9)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"q": torch.ones(4)}, ValueError, "q must have 2 dimensions, got 1"),
        ({"q": None}, ValueError, "q and k must be given, and not empty"),
        ({"k": torch.ones(5, 2)}, ValueError, "k must have 3 columns like q, got 2"),
        ({"k": torch.ones(0, 3)}, ValueError, "q and k must be given, and not empty"),
        ({"q": torch.ones(3, 4).T}, ValueError, "q and k must have inner stride 1"),
        ({"k": torch.ones(5, 3).double()}, TypeError, "q and k must share one floating type"),
        (
            {"q": torch.ones(4, 3, dtype=torch.int32)},
            TypeError,
            "q and k must share one floating type",
        ),
        ({"q": torch.ones(4, 3, dtype=torch.int16)}, TypeError, "q: this element type is not"),
        ({"q_ids": torch.arange(4)}, ValueError, "q_ids and k_ids must be given together"),
        (
            {"q_ids": torch.arange(3), "k_ids": torch.arange(5)},
            ValueError,
            "q_ids must have 4 elements, got 3",
        ),
        (
            {"q_ids": torch.arange(4.0), "k_ids": torch.arange(5)},
            TypeError,
            "q_ids has the wrong element type",
        ),
        ({"mask": torch.ones(5, 4, dtype=torch.bool)}, ValueError, r"mask must be \[N, M\]"),
        ({"mask": torch.ones(4, 5)}, TypeError, "mask must be bool"),
        ({"rows": torch.empty(5)}, ValueError, "rows must have 4 elements, got 5"),
        ({"columns": torch.empty(5).double()}, TypeError, "columns has the wrong element type"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
    ],
)
def test_forward_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        forward(**changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"g_rows": torch.ones(3)}, ValueError, "g_rows must have 4 elements, got 3"),
        ({"rows": None}, ValueError, "g_rows needs rows"),
        ({"columns": None}, ValueError, "g_columns needs columns"),
        ({"dq": torch.empty(4, 2)}, ValueError, r"dq must be \[4, 3\], got \[4, 2\]"),
        ({"dk": torch.empty(5, 3).double()}, TypeError, "dk has the wrong element type"),
        ({"dk": torch.empty(5, 6)[:, :3]}, ValueError, "dk must be contiguous"),
    ],
)
def test_backward_refuses(changes, error, message):
    with pytest.raises(error, match=message):
        backward(**changes)


def softplus(**changes):
    given = {
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "scale": 1.0,
        "bias": -3.0,
        "q_ids": None,
        "k_ids": None,
        "dq": torch.empty(4, 3),
        "dk": torch.empty(5, 3),
        "need_scale": True,
        "need_bias": True,
        "threads": 1,
    }
    return core.pairwise_softplus(**{**given, **changes})


def test_softplus_holds_gradients_as_wide_as_it_sums():
    # every score is 0
    assert softplus() == pytest.approx((20 * math.log(2), 30, 10))
    half = {"q": torch.ones(4, 3).bfloat16(), "k": torch.ones(5, 3).bfloat16()}
    assert softplus(**half) == pytest.approx((20 * math.log(2), 30, 10))
    with pytest.raises(TypeError, match="dq has the wrong element type"):
        softplus(**half, dq=torch.empty(4, 3).bfloat16())
    with pytest.raises(ValueError, match=r"dk must be \[5, 3\], got \[4, 3\]"):
        softplus(dk=torch.empty(4, 3))
    with pytest.raises(ValueError, match="k must have 3 columns like q, got 2"):
        softplus(k=torch.ones(5, 2))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"indices": None}, ValueError, "indices must be given"),
        ({"indices": torch.arange(5)}, ValueError, "indices must have 4 elements, got 5"),
        ({"indices": torch.empty(4)}, TypeError, "indices has the wrong element type"),
    ],
)
def test_sample_negatives_refuses(changes, error, message):
    given = {
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "scale": 1.0,
        "seed": 0,
        "q_ids": torch.arange(4),
        "k_ids": torch.arange(5),
        "indices": torch.arange(4),
        "threads": 1,
    }
    with pytest.raises(error, match=message):
        core.sample_negatives(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"counts": None}, ValueError, "counts must be given"),
        ({"counts": torch.arange(4)}, ValueError, "counts must have 5 elements, got 4"),
        ({"edges": None}, ValueError, "counts must have 1 elements, got 5"),
        ({"edges": torch.zeros(1).double()}, ValueError, "edges must have 2 elements at least"),
        ({"edges": torch.zeros(4)}, TypeError, "edges has the wrong element type"),
        ({"y": torch.ones(5, 2)}, ValueError, "k must have 3 columns like q, got 2"),
    ],
)
def test_pairwise_stats_refuses(changes, error, message):
    given = {
        "x": torch.ones(4, 3),
        "y": None,
        "edges": torch.linspace(-1, 1, 4).double(),
        "pivot": 0.0,
        "counts": torch.arange(5),
        "threads": 1,
    }
    with pytest.raises(error, match=message):
        core.pairwise_stats(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"above": None}, ValueError, "largest, index and above must be given"),
        ({"index": torch.arange(3)}, ValueError, "index must have 4 elements, got 3"),
        ({"above": torch.empty(4)}, TypeError, "above has the wrong element type"),
        ({"threshold": torch.ones(4).double()}, TypeError, "threshold has the wrong element type"),
        ({"k_ids": None}, ValueError, "q_ids and k_ids must be given together"),
    ],
)
def test_pairwise_rank_refuses(changes, error, message):
    given = {
        "q": torch.ones(4, 3),
        "k": torch.ones(5, 3),
        "threshold": torch.ones(4),
        "q_ids": torch.arange(4),
        "k_ids": torch.arange(5),
        "largest": torch.ones(4),
        "index": torch.arange(4),
        "above": torch.arange(4),
        "threads": 1,
    }
    with pytest.raises(error, match=message):
        core.pairwise_rank(**{**given, **changes})


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": None}, ValueError, "x must be given, and not empty"),
        ({"y": torch.ones(0, 3)}, ValueError, "y must be given, and not empty"),
        ({"x": torch.ones(3, 4).T}, ValueError, "x must have inner stride 1"),
        ({"y": torch.ones(4, 3).long()}, TypeError, "y must be of a floating type"),
        ({"x_offsets": None}, ValueError, "x_inverse, x_offsets and x_factors must be given"),
        ({"x_inverse": torch.ones(5)}, ValueError, "x_inverse must have 4 elements, got 5"),
        ({"x_offsets": torch.ones(2, 5)}, ValueError, r"x_offsets must be \[2, 4\], got \[2, 5\]"),
        ({"y_factors": torch.ones(3, 4)}, ValueError, r"y_factors must be \[2, 4\], got \[3, 4\]"),
        ({"y": torch.ones(4, 2)}, ValueError, r"y must be \[4, 3\], got \[4, 2\]"),
        ({"y_offsets": torch.ones(1, 4), "y_factors": torch.ones(1, 4)}, ValueError,
         r"y_offsets must be \[2, 4\], got \[1, 4\]"),
        ({"scales": []}, ValueError, "scales must not be empty, and chunk at least 1"),
        ({"chunk": 0}, ValueError, "scales must not be empty, and chunk at least 1"),
        ({"rows": None}, ValueError, "rows and columns must be given"),
        ({"columns": torch.empty(4, 4)}, ValueError, r"columns must be \[2, 4\], got \[4, 4\]"),
        ({"rows": torch.empty(2, 4).double()}, TypeError, "rows has the wrong element type"),
    ],
)  # fmt: skip
def test_shift_landscape_refuses(changes, error, message):
    given = {"scales": [1.0], "chunk": 4, "threads": 1}
    for side in "xy":
        given |= {side: torch.ones(4, 3), f"{side}_inverse": torch.ones(4)}
        given |= {f"{side}_offsets": torch.zeros(2, 4), f"{side}_factors": torch.ones(2, 4)}
    given |= {"rows": torch.empty(2, 4), "columns": torch.empty(2, 4)}
    core.shift_landscape(**given)
    # three scores of 3
    assert given["rows"].tolist() == [pytest.approx([3 + math.log(3)] * 4)] * 2
    with pytest.raises(error, match=message):
        core.shift_landscape(**{**given, **changes})


def test_rates_are_positive():
    assert core.multiply_add_rate(0.001, 1) > 0
    with pytest.raises(ValueError, match="threads must be at least 1"):
        core.multiply_add_rate(0.001, 0)
    for dtype in ("float32", "float64", "bfloat16"):
        assert core.tile_rate(dtype, 0.001, 1) > 0
    with pytest.raises(ValueError, match="dtype must be float32, float64 or bfloat16, got int8"):
        core.tile_rate("int8", 0.001, 1)


def test_level_in_process():
    before = core.isa()
    with cpu_level("generic"):
        assert core.isa() == "generic"
    assert core.isa() == before
    with pytest.raises(ValueError, match="CPU level 'mmx' cannot run here; this machine has gen"):
        core.set_isa("mmx")
    with pytest.raises(ValueError, match="CPU level must be named"):
        core.set_isa("")


def level_at_import(name):
    return subprocess.run(
        [sys.executable, "-c", "import torch, mmfast._C as C; print(C.isa())"],
        env={**os.environ, "MMFAST_CPU_ISA": name},
        capture_output=True,
        text=True,
        check=False,
    )


def test_level_from_the_environment():
    assert level_at_import("generic").stdout.strip() == "generic"
    assert level_at_import("").stdout.strip() == core.isa_levels()[-1]
    refused = level_at_import("mmx")
    assert refused.returncode != 0
    assert "CPU level 'mmx' cannot run here; this machine has generic" in refused.stderr
