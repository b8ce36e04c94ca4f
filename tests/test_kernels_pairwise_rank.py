"""What the tests that all backends share do not see of the Triton kernel of pairwise_rank."""

import pytest
import torch

from mmfast.ops.pairwise_rank import reference

pytest.importorskip("triton")

from mmfast.kernels import _tiles as tiles
from mmfast.kernels import pairwise_rank as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# one program a row block; several of unequal size; one for each tile; whole tiles and halves
@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("limits", [(1, 1), (2, 6), (64, 4096)], ids=str)
def test_any_number_of_splits(limits, halves, monkeypatch):
    tile = kernels.tiles.Tile(32, 32, 32, halves, 4, 1, "this test")
    monkeypatch.setattr(tiles, "pick", lambda *args: tile)
    monkeypatch.setattr(tiles, "SPLITS", limits[0])
    monkeypatch.setattr(tiles, "PROGRAMS", limits[1])
    random = torch.Generator().manual_seed(0)
    # whole numbers: many tie, within a tile and across
    q, k = (torch.randint(-2, 3, (n, 3), generator=random).float() for n in (70, 150))
    inputs = [q, k, torch.randn(70, generator=random), torch.arange(70), torch.arange(150)]
    got = kernels.rank(*(x.to(DEVICE) for x in inputs))
    for x, want in zip(got, reference(*inputs), strict=True):
        assert torch.equal(x.cpu(), want)
