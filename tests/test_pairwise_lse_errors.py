import math
import re

import numpy as np
import pytest
import torch

from mmfast import pairwise_lse

X, Y = torch.ones(5, 3), torch.ones(4, 3)
IDS = {"q_ids": torch.arange(5), "k_ids": torch.arange(4)}
MASK = torch.ones(5, 4, dtype=torch.bool)


def on_meta(x):
    return x.to("meta")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a torch.Tensor, got ndarray", {"q": np.ones((5, 3))}),
        (TypeError, "k must be a torch.Tensor, got list", {"k": [[1.0]]}),
        (ValueError, "q must be 2-D [rows, D], got [3]", {"q": X[0]}),
        (ValueError, "k must be 2-D [rows, D], got [1, 4, 3]", {"k": Y[None]}),
        (ValueError, "k must have D=3 columns like q, got 2", {"k": Y[:, :2]}),
        (ValueError, "q must have no empty side, got [0, 3]", {"q": X[:0]}),
        (ValueError, "k must have no empty side, got [0, 3]", {"k": Y[:0]}),
        (ValueError, "q must have no empty side, got [5, 0]", {"q": X[:, :0], "k": Y[:, :0]}),
        (TypeError, "q must be float32, float64, bfloat16 or float16, got int64", {"q": X.long()}),
        (TypeError, "k must be float32, float64, bfloat16 or float16, got complex64",
         {"k": Y.to(torch.complex64)}),
        (TypeError, "k must be float32 like q, got bfloat16", {"k": Y.bfloat16()}),
        (ValueError, "k must be on cpu like q, got meta", {"k": on_meta(Y)}),
        (ValueError, "q_ids and k_ids must be given together, got no k_ids",
         {"q_ids": IDS["q_ids"]}),
        (ValueError, "q_ids and k_ids must be given together, got no q_ids",
         {"k_ids": IDS["k_ids"]}),
        (TypeError, "q_ids must be a torch.Tensor, got list", {**IDS, "q_ids": [1] * 5}),
        (TypeError, "k_ids must be int64, got int32", {**IDS, "k_ids": IDS["k_ids"].int()}),
        (TypeError, "q_ids must be int64, got float32", {**IDS, "q_ids": X[:, 0]}),
        (ValueError, "q_ids must be [N=5], got [4]", {**IDS, "q_ids": IDS["k_ids"]}),
        (ValueError, "k_ids must be [M=4], got [4, 1]", {**IDS, "k_ids": IDS["k_ids"][:, None]}),
        (ValueError, "q_ids must be on cpu like q, got meta",
         {**IDS, "q_ids": on_meta(IDS["q_ids"])}),
        (TypeError, "mask must be a torch.Tensor, got bool", {"mask": True}),
        (TypeError, "mask must be bool, got float32", {"mask": MASK.float()}),
        (ValueError, "mask must be [N=5, M=4], got [4, 5]", {"mask": MASK.T}),
        (ValueError, "mask must be on cpu like q, got meta", {"mask": on_meta(MASK)}),
        (ValueError, "scale must be finite, got nan", {"scale": math.nan}),
        (ValueError, "scale must be finite, got -inf", {"scale": -math.inf}),
        (TypeError, "scale must be a number or a tensor, got str", {"scale": "1"}),
        (TypeError, "scale must be a number or a tensor, got bool", {"scale": True}),
        (TypeError, "scale must be a number or a tensor, got complex", {"scale": 1j}),
        (ValueError, "scale must have one element, got [2]", {"scale": torch.ones(2)}),
        (ValueError, "scale must have one element, got [0]", {"scale": torch.ones(0)}),
        (TypeError, "scale must be floating point, got int64", {"scale": torch.tensor(1)}),
        (ValueError, "scale must be on cpu like q, got meta",
         {"scale": torch.ones((), device="meta")}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("pairwise_lse: " + message) + "$"):
        pairwise_lse(**{"q": X, "k": Y, **arguments})


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(RuntimeError, match=f"^pairwise_lse: {message}, and the input is float64$"):
        pairwise_lse(X.double(), Y.double(), backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        pairwise_lse(X, Y, 1.0, IDS["q_ids"], IDS["k_ids"])
