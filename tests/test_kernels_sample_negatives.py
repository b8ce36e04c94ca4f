"""What the tests that all backends share do not see of the Triton kernel of sample_negatives."""

import math

import pytest
import torch

from mmfast.ops.sample_negatives import philox, reference
from mmfast.testing import random_pair

triton = pytest.importorskip("triton")
tl = triton.language

from mmfast.kernels import _tiles as tiles  # noqa: E402
from mmfast.kernels import sample_negatives as kernels  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_noise_is_exact_in_its_tail_and_finite_everywhere():
    @triton.jit
    def kernel(X, OUT, SIZE: tl.constexpr):
        o = tl.arange(0, SIZE)
        tl.store(OUT + o, kernels.gumbel(tl.load(X + o).to(tl.uint32, bitcast=True)))

    powers = [2**i for i in range(32)]
    words = torch.tensor([x + d for x in powers for d in (-1, 0, 1, 2)])
    out = torch.empty(128, device=DEVICE)
    with kernels.guard(out):
        kernel[(1,)](words.to(torch.int32).to(DEVICE), out, 128)
        v = (words.double() + 0.5) / 2**32
        torch.testing.assert_close(
            out.cpu().double(), -torch.log(-torch.log1p(-v)), rtol=2e-6, atol=2e-6
        )
        # the largest word, whose v float32 rounds to 1
        kernel[(1,)](torch.full((128,), -1, dtype=torch.int32, device=DEVICE), out, 128)
    torch.testing.assert_close(out[0].cpu(), torch.tensor(-math.log(33 * math.log(2))))


def test_philox_is_ours():
    @triton.jit
    def kernel(SEED, OUT, SIZE: tl.constexpr):
        o = tl.arange(0, SIZE)
        b_words = tl.philox(tl.load(SEED), o[None, :] + 7, o[:, None] + 3, 0, 0)
        for i in tl.static_range(4):
            p = OUT + i * SIZE * SIZE + o[:, None] * SIZE + o[None, :]
            tl.store(p, b_words[i].to(tl.int64))

    seed = torch.tensor(-0x123456789ABCDEF, device=DEVICE)
    out = torch.empty(4, 16, 16, dtype=torch.int64, device=DEVICE)
    with kernels.guard(out):
        kernel[(1,)](seed, out, 16)
    row, column = torch.arange(16)[:, None] + 3, torch.arange(16) + 7
    zero = torch.zeros(1, dtype=torch.int64)
    assert torch.equal(out.cpu(), torch.stack(philox((column, row, zero, zero), seed.cpu())))


# one program a row block; several of unequal size; one for each tile
@pytest.mark.parametrize("limits", [(1, 1), (2, 6), (64, 4096)], ids=str)
def test_any_number_of_splits(limits, monkeypatch):
    monkeypatch.setattr(tiles, "SPLITS", limits[0])
    monkeypatch.setattr(tiles, "PROGRAMS", limits[1])
    q, k = random_pair(70, 150, 8, dtype=torch.float32, requires_grad=False)
    inputs = [q, k, torch.tensor(2.0), torch.tensor(11), torch.arange(70), torch.arange(150)]
    got = kernels.sample(*(x.to(DEVICE) for x in inputs))
    assert torch.equal(got.cpu(), reference(*inputs))


def test_every_kind_has_a_tile_for_every_architecture():
    for kind in ("half", "tf32", "ieee"):
        for arch in (80, 90, 100):
            ((largest, tile),) = kernels.TILES["sample", kind, arch]
            assert largest == tiles.ANY
            assert tile.m % 4 == 0
