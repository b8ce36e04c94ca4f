import math
import re

import numpy as np
import pytest
import torch

from mmfast import pairwise_stats

X, Y = torch.ones(5, 3), torch.ones(4, 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor, got ndarray", {"x": np.ones((5, 3))}),
        (TypeError, "y must be a torch.Tensor, got list", {"y": [[1.0]]}),
        (ValueError, "x must be 2-D [rows, D], got [3]", {"x": X[0]}),
        (ValueError, "y must have D=3 columns like x, got 2", {"y": Y[:, :2]}),
        (ValueError, "y must have no empty side, got [0, 3]", {"y": Y[:0]}),
        (TypeError, "x must be float32, float64, bfloat16 or float16, got int64", {"x": X.long()}),
        (TypeError, "y must be float32 like x, got bfloat16", {"y": Y.bfloat16()}),
        (ValueError, "y must be on cpu like x, got meta", {"y": Y.to("meta")}),
        (TypeError, "row_offset must be an int, got float", {"row_offset": 1.0}),
        (TypeError, "column_offset must be an int, got bool", {"column_offset": True}),
        (ValueError, "row_offset must not be negative, got -1", {"row_offset": -1}),
        (ValueError, "column_offset needs y; row_offset is that of both sides",
         {"y": None, "column_offset": 3}),
        (TypeError, "bins must be an int or None, got float", {"bins": 8.0}),
        (ValueError, "bins must be from 0 to 65536, got -1", {"bins": -1}),
        (ValueError, "bins must be from 0 to 65536, got 65537", {"bins": 65537}),
        (TypeError, "range must be two numbers, got (1,)", {"range": (1,)}),
        (TypeError, "range must be two numbers, got 1", {"range": 1}),
        (TypeError, "range must be a number or a tensor, got str", {"range": (0, "1")}),
        (ValueError, "range must be finite, got inf", {"range": (0, math.inf)}),
        (ValueError, "range must increase, got (1.0, 1.0)", {"range": (1, 1)}),
        (ValueError, "bins of width 1e-06 are too fine for float32 products from 0.9 to 0.90001",
         {"bins": 10, "range": (0.9, 0.90001)}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("pairwise_stats: " + message) + "$"):
        pairwise_stats(**{"x": X, "y": Y, **arguments})


@pytest.mark.parametrize(
    ("message", "call"),
    [
        ("p must be from 0 to 1, got 1.5", lambda s: s.quantile(1.5)),
        ("p must be from 0 to 1, got nan", lambda s: s.quantile_bounds(math.nan)),
        ("quantiles need a histogram, and there is none",
         lambda s: pairwise_stats(X, bins=0).quantile(0.5)),
        ("no quantile of no products", lambda s: pairwise_stats(X[:1]).quantile(0.5)),
        ("only histograms over the same edges can be merged",
         lambda s: s + pairwise_stats(X, bins=8)),
        ("only histograms over the same edges can be merged",
         lambda s: s.merge(pairwise_stats(X, bins=None))),
    ],
)  # fmt: skip
def test_errors_of_the_result(message, call):
    with pytest.raises(ValueError, match=f"^PairwiseStats: {message}$"):
        call(pairwise_stats(X))


def test_the_result_is_frozen():
    with pytest.raises(AttributeError):
        pairwise_stats(X).count = 3


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(
        RuntimeError, match=f"^pairwise_stats: {message}, and the input is float64$"
    ):
        pairwise_stats(X.double(), backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        pairwise_stats(X, Y, 8)
