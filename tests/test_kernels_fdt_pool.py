"""What the tests that all backends share do not see of the Triton kernels of fdt_pool."""

import math

import pytest
import torch

from mmfast.ops.fdt_pool import _pool_scores

triton = pytest.importorskip("triton")

from mmfast.kernels import _tiles as tiles  # noqa: E402
from mmfast.kernels import fdt_pool as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# all samples to one program; uneven shares; one for each program
@pytest.mark.parametrize("programs", [1, 8, 4096])
# one sample is several tiles, or a tile several samples that begin and end inside it
@pytest.mark.parametrize(("B", "N"), [(3, 75), (11, 7)])
def test_any_number_of_programs(B, N, programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    tokens, codebook = torch.randn(B, N, 5), torch.randn(70, 5)
    mask = torch.rand(B, N) < 0.7
    mask[1] = False
    scale = torch.tensor(0.5)
    inputs = (tokens.to(DEVICE), codebook.to(DEVICE), scale, mask.to(DEVICE), -0.1)
    best, winners = (x.cpu() for x in kernels.forward(*inputs))
    scores = 0.5 * tokens @ codebook.T
    torch.testing.assert_close(best, _pool_scores(scores, mask, "max", -0.1))
    won = scores.gather(1, winners.clamp(min=0).long().unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(torch.where(winners < 0, -0.1, won), best)
    assert (winners[1] == -1).all()


@pytest.mark.parametrize("part", [1, 7, 4096])
def test_products_by_parts(part, monkeypatch):
    monkeypatch.setattr(kernels, "PART", part)
    weights, codebook, g = torch.rand(3, 15), torch.randn(15, 4).bfloat16(), torch.randn(3, 4)
    torch.testing.assert_close(kernels.weighted(weights, codebook), weights @ codebook.float())
    torch.testing.assert_close(kernels.dots(g, codebook), g @ codebook.float().T)


def test_tiny_slopes_do_not_vanish_in_float16():
    # 1e-9 is below what float16 holds; the sample's largest is their unit
    slopes = torch.tensor([[1e-9, -2e-9, 3e-9]], device=DEVICE)
    tokens = torch.ones(1, 2, 4, dtype=torch.float16, device=DEVICE)
    codebook = torch.randn(3, 4, device=DEVICE).half()
    winners = torch.tensor([[0, 1, 0]], dtype=torch.int32, device=DEVICE)
    d_tokens, *_ = kernels.backward(
        None, slopes, slopes, tokens, codebook, torch.tensor(1e6), winners, True, False, False
    )
    won = torch.nn.functional.one_hot(winners.long(), 2).float().transpose(1, 2)
    want = 1e6 * (won * slopes.unsqueeze(1)) @ codebook.float()
    torch.testing.assert_close(d_tokens.float(), want, rtol=2e-3, atol=1e-6)


def test_every_kind_has_a_tile_for_every_architecture():
    for name in ("pool", "tokens"):
        for kind in ("half", "tf32", "ieee"):
            for arch in (80, 90, 100):
                ((largest, tile),) = kernels.TILES[name, kind, arch]
                assert largest == tiles.ANY
                # what a matrix product takes at least
                assert min(tile.n, tile.m, tile.d) >= 16
    assert math.log2(kernels.CODES["BLOCK_M"]).is_integer()
