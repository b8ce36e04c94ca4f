import math
import re

import numpy as np
import pytest
import torch

from mmfast import fdt_pool

X, CODES = torch.ones(4, 3, 5), torch.ones(6, 5)
MASK, LENGTHS = torch.ones(4, 3, dtype=torch.bool), torch.full((4,), 3)


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "tokens must be a torch.Tensor, got ndarray", {"tokens": np.ones((4, 3, 5))}),
        (TypeError, "codebook must be a torch.Tensor, got list", {"codebook": [[1.0]]}),
        (ValueError, "tokens must be 3-D [B, N, D], got [3, 5]", {"tokens": X[0]}),
        (ValueError, "tokens must have no empty side, got [4, 0, 5]", {"tokens": X[:, :0]}),
        (ValueError, "tokens must have no empty side, got [0, 3, 5]", {"tokens": X[:0]}),
        (TypeError, "tokens must be float32, float64, bfloat16 or float16, got int64",
         {"tokens": X.long()}),
        (ValueError, "codebook must be 2-D [C, D], got [5]", {"codebook": CODES[0]}),
        (ValueError, "codebook must have no empty side, got [0, 5]", {"codebook": CODES[:0]}),
        (ValueError, "codebook must have D=5 columns like tokens, got 4",
         {"codebook": CODES[:, :4]}),
        (TypeError, "codebook must be float32 like tokens, got bfloat16",
         {"codebook": CODES.bfloat16()}),
        (ValueError, "codebook must be on cpu like tokens, got meta",
         {"codebook": CODES.to("meta")}),
        (TypeError, "temperature must be a number or a tensor, got str", {"temperature": "1"}),
        (ValueError, "temperature must have one element, got [2]",
         {"temperature": torch.ones(2)}),
        (ValueError, "temperature must be finite, got inf", {"temperature": math.inf}),
        (ValueError, "temperature must be above 0, got 0", {"temperature": 0.0}),
        (ValueError, "temperature must be above 0, got -2.5", {"temperature": -2.5}),
        (ValueError, "temperature must be above 0, got nan",
         {"temperature": torch.tensor(math.nan)}),
        (TypeError, "mask must be a torch.Tensor, got list", {"mask": [[True]]}),
        (TypeError, "mask must be bool, got float32", {"mask": MASK.float()}),
        (ValueError, "mask must be [B=4, N=3], got [4, 2]", {"mask": MASK[:, :2]}),
        (ValueError, "mask must be on cpu like tokens, got meta", {"mask": MASK.to("meta")}),
        (TypeError, "lengths must be int64, got int32", {"lengths": LENGTHS.int()}),
        (ValueError, "lengths must be [B=4], got [3]", {"lengths": LENGTHS[:3]}),
        (ValueError, "lengths must be from 0 to N=3, got 2 to 4",
         {"lengths": torch.tensor([2, 3, 4, 2])}),
        (ValueError, "lengths must be from 0 to N=3, got -1 to 3",
         {"lengths": torch.tensor([2, 3, -1, 2])}),
        (ValueError, "mask and lengths are two ways to say one thing, got both",
         {"mask": MASK, "lengths": LENGTHS}),
        (ValueError, 'pool must be one of "max", "mean", "sum", got \'min\'', {"pool": "min"}),
        (ValueError, 'normalize must be one of "sparsemax", "softmax", "sigmoid", got None',
         {"normalize": None}),
        (TypeError, "padded_score must be a number or a tensor, got str", {"padded_score": "0"}),
        (ValueError, "padded_score must be finite, got inf", {"padded_score": math.inf}),
        (ValueError, "padded_score must be finite, got nan", {"padded_score": math.nan}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("fdt_pool: " + message) + "$"):
        fdt_pool(**{"tokens": X, "codebook": CODES, **arguments})


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(RuntimeError, match=f"^fdt_pool: {message}, and the input is float64$"):
        fdt_pool(X.double(), CODES.double(), backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        fdt_pool(X, CODES, 1.0, MASK)
