import math
import re

import numpy as np
import pytest
import torch

from mmfast import shift_landscape

X = torch.tensor([[1.0, 0, 0], [0, 1, 0], [1, 1, 0]])
Y = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 0, 1]])
ZERO = torch.tensor([1.0, 0, 1])[:, None]


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "x must be a torch.Tensor, got ndarray", {"x": np.ones((3, 3))}),
        (TypeError, "y must be a torch.Tensor, got list", {"y": [[1.0]]}),
        (ValueError, "x must be 2-D [N, D], got [3]", {"x": X[0]}),
        (ValueError, "y must have no empty side, got [0, 3]", {"y": Y[:0]}),
        (ValueError, "y must be [3, 3] like x, got [2, 3]", {"y": Y[:2]}),
        (TypeError, "x must be float32, float64, bfloat16 or float16, got int64", {"x": X.long()}),
        (TypeError, "y must be float32 like x, got bfloat16", {"y": Y.bfloat16()}),
        (ValueError, "y must be on cpu like x, got meta", {"y": Y.to("meta")}),
        (ValueError, "shifts must hold at least one number, got none", {"shifts": []}),
        (ValueError, "shifts must be finite, got inf", {"shifts": [0.0, math.inf]}),
        (ValueError, "shifts must be 1-D, got [1, 2]", {"shifts": torch.ones(1, 2)}),
        (TypeError, "shifts must be numbers in a row, got float", {"shifts": 1.0}),
        (TypeError, "shifts must be numbers in a row, got str", {"shifts": "1"}),
        (TypeError, "shifts must be a number or a tensor, got str", {"shifts": ["1"]}),
        (ValueError, "temperatures must hold at least one number, got none", {"temperatures": ()}),
        (ValueError, "temperatures must be above 0, got 0.0", {"temperatures": [0.1, 0]}),
        (ValueError, "temperatures must be above 0, got -1.0", {"temperatures": [-1.0]}),
        (ValueError, 'convention must be "unit" or "paper", got \'code\'', {"convention": "code"}),
        (ValueError, 'sides must be "both", "x" or "y", got \'z\'', {"sides": "z"}),
        (ValueError, "chunk must be at least 1, got 0", {"chunk": 0}),
        (TypeError, "chunk must be an int or None, got float", {"chunk": 2.0}),
        (TypeError, "direction must be a torch.Tensor, got list", {"direction": [1.0, 0, 0]}),
        (TypeError, "direction must be floating point, got int64", {"direction": X[0].long()}),
        (ValueError, "direction must be [D=3], got [2]", {"direction": X[0, :2]}),
        (ValueError, "direction must be on cpu like x, got meta", {"direction": X[0].to("meta")}),
        (ValueError, "direction must not be zero, which has no unit vector",
         {"direction": torch.zeros(3)}),
        (ValueError, "the unit rows of x and y have the same mean, so that there is no gap to "
         "shift along; pass a direction", {"y": X[[2, 0, 1]]}),
        (ValueError, "row 1 of x is zero, which cannot be normalised", {"x": ZERO * X}),
        (ValueError, "row 1 of y is zero, which cannot be normalised", {"y": ZERO * Y}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    given = {"x": X, "y": Y, "shifts": [0.0], "temperatures": [1.0], **arguments}
    with pytest.raises(error, match="^" + re.escape("shift_landscape: " + message) + "$"):
        shift_landscape(**given)


def test_the_paper_may_shift_by_nothing():
    got = shift_landscape(X, X[[2, 0, 1]], [0.0, 3.0], [1.0], convention="paper")
    torch.testing.assert_close(got.symmetric[1], got.symmetric[0])


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(
        RuntimeError, match=f"^shift_landscape: {message}, and the input is float64$"
    ):
        shift_landscape(X.double(), Y.double(), [0.0], [1.0], backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        shift_landscape(X, Y, [0.0], [1.0], X[0])
