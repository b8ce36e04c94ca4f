"""What the tests that all backends share do not see of the Triton kernel of pairwise_stats."""

import numpy as np
import pytest
import torch

from mmfast.ops.pairwise_stats import reference

pytest.importorskip("triton")

from mmfast.kernels import _tiles as tiles
from mmfast.kernels import pairwise_stats as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def whole_numbers(*shape, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=random).float()


# a tile of one half and of two, one copy of the histogram and more than programs, several passes
@pytest.mark.parametrize(
    ("halves", "copies", "widest", "bins"),
    [(1, 64, 1024, 30), (2, 1, 1024, 30), (2, 3, 16, 50), (1, 1, 8, 6)],
    ids=str,
)
@pytest.mark.parametrize("distinct", [False, True], ids=["two sets", "one set"])
def test_any_tile_and_any_histogram(halves, copies, widest, bins, distinct, monkeypatch):
    tile = kernels.Tile(32, 64, 32, halves, 4, 1, "this test")
    monkeypatch.setattr(tiles, "pick", lambda *args: tile)
    monkeypatch.setattr(kernels, "COPIES", copies)
    monkeypatch.setattr(kernels, "WIDEST", widest)
    x, y = whole_numbers(70, 4), whole_numbers(90, 4, seed=1)
    # products fall on every other edge
    edges = torch.linspace(-15, 15, bins + 1, dtype=torch.float64)
    inputs = [x, None if distinct else y, edges, torch.tensor(0.5).double()]
    got = kernels.stats(*(None if t is None else t.to(DEVICE) for t in inputs))
    counts, powers, extremes, places = (t.cpu() for t in got)
    want = reference(*inputs)
    assert torch.equal(counts, want[0])
    assert torch.equal(extremes, want[2])
    assert torch.equal(places, want[3])
    torch.testing.assert_close(powers, want[1], rtol=1e-5, atol=1.0)


def test_a_number_is_not_below_an_edge_where_float32_says_so():
    edges = torch.linspace(-0.7, 0.3, 1000, dtype=torch.float64)
    rounded = kernels.not_below(edges).double()
    assert (rounded >= edges).all()
    before = np.nextafter(rounded.float().numpy(), np.float32(-np.inf)).astype(np.float64)
    assert (torch.from_numpy(before) < edges).all()


@pytest.mark.parametrize(
    ("bins", "slots"), [(1, (4, 1)), (254, (256, 1)), (256, (512, 1)), (4096, (1024, 5))]
)
def test_slots_hold_every_bin(bins, slots):
    assert kernels.passes(bins) == slots
