import math
import re

import numpy as np
import pytest
import torch

from mmfast import sample_negatives

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
        (ValueError, "scale must be finite, got nan", {"scale": math.nan}),
        (TypeError, "scale must be a number or a tensor, got str", {"scale": "1"}),
        (TypeError, "generator must be a torch.Generator or None, got int", {"generator": 0}),
        (ValueError, 'backend must be None or one of "cpp", "triton", "eager", got \'fast\'',
         {"backend": "fast"}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_errors(error, message, arguments):
    with pytest.raises(error, match="^" + re.escape("sample_negatives: " + message) + "$"):
        sample_negatives(**{"q": X, "k": Y, "scale": 1.0, **arguments})


def test_generator_of_another_device():
    class OnCard(torch.Generator):
        device = torch.device("cuda:0")

    message = "generator must be on cpu like q or on the CPU, got cuda:0"
    with pytest.raises(ValueError, match=f"^sample_negatives: {message}$"):
        sample_negatives(X, Y, 1.0, generator=OnCard())


def test_a_refused_call_draws_nothing():
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    with pytest.raises(ValueError, match="backend must be"):
        sample_negatives(X, Y, 1.0, generator=generator, backend="fast")
    assert torch.equal(generator.get_state(), before)


def test_triton_refuses_float64():
    pytest.importorskip("triton", reason="triton is not installed")
    message = 'backend="triton" cannot run here because its kernels compute in float32'
    with pytest.raises(
        RuntimeError, match=f"^sample_negatives: {message}, and the input is float64$"
    ):
        sample_negatives(X.double(), Y.double(), 1.0, backend="triton")


def test_options_are_named_only():
    with pytest.raises(TypeError, match="positional"):
        sample_negatives(X, Y, 1.0, IDS["q_ids"], IDS["k_ids"])
