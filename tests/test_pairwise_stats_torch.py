import pytest
import torch

from mmfast import pairwise_stats
from mmfast.testing import random_pair, widest


@pytest.mark.parametrize("given", [False, True], ids=["bare", "all"])
def test_opcheck(given, compiled_backend):
    x, y = random_pair(17, 13, 5, dtype=torch.float32, requires_grad=False)
    edges = torch.linspace(-1, 1, 9, dtype=torch.float64) if given else None
    inputs = (x, y if given else None, edges, torch.tensor(0.0).double(), compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.pairwise_stats.default, inputs)


def test_no_gradient_and_inference_mode(backend):
    x, y = random_pair(9, 7, 4, dtype=widest(backend))
    stats = pairwise_stats(x, y, backend=backend)
    assert not stats.histogram.requires_grad
    with torch.inference_mode():
        again = pairwise_stats(x, y, backend=backend)
    assert again.moments == stats.moments


def test_autocast_casts_as_a_matmul(backend):
    x, y = random_pair(33, 40, 16, dtype=torch.float32)
    want = pairwise_stats(x.bfloat16(), y.bfloat16(), backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = pairwise_stats(x, y, backend=backend)
    assert got.moments == want.moments
    assert torch.equal(got.histogram, want.histogram)
