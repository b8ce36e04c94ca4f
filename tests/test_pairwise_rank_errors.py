import re

import numpy as np
import pytest
import torch

from mmfast import pairwise_rank

X, Y = torch.ones(5, 3), torch.ones(4, 3)
IDS = {"q_ids": torch.arange(5), "k_ids": torch.arange(4)}


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "q must be a torch.Tensor, got ndarray", {"q": np.ones((5, 3))}),
        (TypeError, "k must be a torch.Tensor, got list", {"k": [[1.0]]}),
        (ValueError, "q must be 2-D [rows, D], got [3]", {"q": X[0]}),
        (ValueError, "k must have D=3 columns like q, got 2", {"k": Y[:, :2]}),
        (ValueError, "k must have no empty side, got [0, 3]", {"k": Y[:0]}),
        (TypeError, "q must be float32, float64, bfloat16 or float16, got int64", {"q": X.long()}),
        (TypeError, "k must be float32 like q, got bfloat16", {"k": Y.bfloat16()}),
        (ValueError, "k must be on cpu like q, got meta", {"k": Y.to("meta")}),
        (ValueError, "q_ids and k_ids must be given together, got no k_ids",
         {"q_ids": IDS["q_ids"]}),
        (TypeError, "k_ids must be int64, got int32", {**IDS, "k_ids": IDS["k_ids"].int()}),
        (ValueError, "q_ids must be [N=5], got [4]", {**IDS, "q_ids": IDS["k_ids"]}),
        (TypeError, "threshold must be a torch.Tensor, got float", {"threshold": 0.5}),
        (TypeError, "threshold must be floating point, got int64", {"threshold": IDS["q_ids"]}),
        (ValueError, "threshold must be [N=5], got [4]", {"threshold": torch.ones(4)}),
        (ValueError, "threshold must be on cpu like q, got meta",
         {"threshold": torch.ones(5, device="meta")}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("pairwise_rank: " + message) + "$"):
        pairwise_rank(**{"q": X, "k": Y, **arguments})


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(RuntimeError, match=f"^pairwise_rank: {message}, and the input is float64$"):
        pairwise_rank(X.double(), Y.double(), backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        pairwise_rank(X, Y, torch.ones(5))
