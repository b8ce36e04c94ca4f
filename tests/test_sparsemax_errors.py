import re

import numpy as np
import pytest
import torch

from mmfast import sparsemax
from mmfast.ops import BACKENDS

X = torch.ones(5, 3)
NAMES = ", ".join(f'"{row.name}"' for row in BACKENDS["sparsemax"])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor, got ndarray", {"x": np.ones((5, 3))}),
        (TypeError, "x must be float32, float64, bfloat16 or float16, got int64", {"x": X.long()}),
        (TypeError, "x must be float32, float64, bfloat16 or float16, got complex64",
         {"x": X.to(torch.complex64)}),
        (ValueError, "x must have at least one dimension, got a scalar", {"x": X[0, 0]}),
        (TypeError, "dim must be an int, got float", {"dim": 1.0}),
        (TypeError, "dim must be an int, got bool", {"dim": True}),
        (TypeError, "dim must be an int, got NoneType", {"dim": None}),
        (ValueError, "dim must be in [-2, 1] for x [5, 3], got 2", {"dim": 2}),
        (ValueError, "dim must be in [-2, 1] for x [5, 3], got -3", {"dim": -3}),
        (ValueError, "x must not be empty along dim -1, got [5, 0]", {"x": X[:, :0]}),
        (ValueError, "x must not be empty along dim 0, got [0, 3]", {"x": X[:0], "dim": 0}),
        (ValueError, f"backend must be None or one of {NAMES}, got 'triton'",
         {"backend": "triton"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("sparsemax: " + message) + "$"):
        sparsemax(**{"x": X, **arguments})


def test_backend_is_named_only():
    with pytest.raises(TypeError, match="positional"):
        sparsemax(X, -1, "eager")


@pytest.mark.parametrize(
    ("error", "message", "changes"),
    [
        (ValueError, "p must be given, and not empty", {"p": X[:0]}),
        (ValueError, "p must have inner stride 1", {"p": torch.ones(3, 5).T}),
        (TypeError, "p must be of a floating type", {"p": X.long(), "dx": X.long()}),
        (ValueError, "dx must be given", {"dx": None}),
        (ValueError, "dx must be [5, 3], got [5, 2]", {"dx": torch.ones(5, 2)}),
        (ValueError, "dx must be contiguous", {"dx": torch.ones(5, 4)[:, :3]}),
        (TypeError, "dx has the wrong element type", {"dx": X.double()}),
        (ValueError, "g must be given", {"g": None}),
        (ValueError, "g must be [5, 3], got [3]", {"g": X[0]}),
        (ValueError, "g must be [5, 3], got [4, 3]", {"g": X[:4]}),
        (ValueError, "g must have inner stride 1", {"g": torch.ones(3, 5).T}),
        (TypeError, "g has the wrong element type", {"g": X.bfloat16()}),
        (ValueError, "threads must be at least 1", {"threads": 0}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_border_of_the_core(error, message, changes):
    core = pytest.importorskip("mmfast._C")
    if message.endswith("got [3]"):
        message = "g must have 2 dimensions"
    with pytest.raises(error, match=re.escape(message)):
        core.sparsemax_backward(**{"g": X, "p": X, "dx": X.clone(), "threads": 1, **changes})


def test_forward_border_of_the_core():
    core = pytest.importorskip("mmfast._C")
    with pytest.raises(ValueError, match="x must be given, and not empty"):
        core.sparsemax_forward(None, X, 1)
    with pytest.raises(ValueError, match="out must be given"):
        core.sparsemax_forward(X, None, 1)
