import math
import re

import numpy as np
import pytest
import torch

from mmfast import slerp
from mmfast.ops import BACKENDS
from mmfast.ops.slerp import _as_lam

X, Y = torch.ones(5, 3), torch.ones(5, 3)
NAMES = ", ".join(f'"{row.name}"' for row in BACKENDS["slerp"])


def on_meta(x):
    return x.to("meta")


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (TypeError, "a must be a torch.Tensor, got ndarray", {"a": np.ones((5, 3))}),
        (TypeError, "b must be a torch.Tensor, got list", {"b": [[1.0]]}),
        (ValueError, "a must be 2-D [N, D], got [3]", {"a": X[0]}),
        (ValueError, "b must be 2-D [N, D], got [1, 5, 3]", {"b": Y[None]}),
        (ValueError, "b must be [N=5, D=3] like a, got [5, 2]", {"b": Y[:, :2]}),
        (ValueError, "b must be [N=5, D=3] like a, got [4, 3]", {"b": Y[:4]}),
        (ValueError, "a must have no empty side, got [0, 3]", {"a": X[:0]}),
        (ValueError, "b must have no empty side, got [5, 0]", {"b": Y[:, :0]}),
        (TypeError, "a must be float32, float64, bfloat16 or float16, got int64", {"a": X.long()}),
        (TypeError, "b must be float32, float64, bfloat16 or float16, got complex64",
         {"b": Y.to(torch.complex64)}),
        (TypeError, "b must be float32 like a, got bfloat16", {"b": Y.bfloat16()}),
        (ValueError, "b must be on cpu like a, got meta", {"b": on_meta(Y)}),
        (ValueError, "lam must be finite, got nan", {"lam": math.nan}),
        (ValueError, "lam must be finite, got -inf", {"lam": -math.inf}),
        (TypeError, "lam must be a number or a tensor, got str", {"lam": "1"}),
        (TypeError, "lam must be a number or a tensor, got bool", {"lam": True}),
        (TypeError, "lam must be a number or a tensor, got complex", {"lam": 1j}),
        (TypeError, "lam must be a number or a tensor, got list", {"lam": [0.5] * 5}),
        (ValueError, "lam must have one element or be [N=5], got [2]", {"lam": torch.ones(2)}),
        (ValueError, "lam must have one element or be [N=5], got [0]", {"lam": torch.ones(0)}),
        (ValueError, "lam must have one element or be [N=5], got [5, 1]",
         {"lam": torch.ones(5, 1)}),
        (TypeError, "lam must be floating point, got int64", {"lam": torch.tensor(1)}),
        (ValueError, "lam must be on cpu like a, got meta", {"lam": torch.ones(5, device="meta")}),
        (ValueError, "lam must be on cpu like a, got meta", {"lam": torch.ones((), device="meta")}),
        (ValueError, f"backend must be None or one of {NAMES}, got 'fast'", {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("slerp: " + message) + "$"):
        slerp(**{"a": X, "b": Y, "lam": 0.5, **arguments})


def test_backend_is_named_only():
    with pytest.raises(TypeError, match="positional"):
        slerp(X, Y, 0.5, "eager")


def test_lam_of_many_rows_must_be_where_they_are():
    # a single number on the CPU may meet any device; a vector would wait for it
    with pytest.raises(ValueError, match="lam must be on meta like a, got cpu"):
        _as_lam(on_meta(X), torch.ones(5))
    assert _as_lam(on_meta(X), torch.tensor(0.5)).device.type == "meta"
