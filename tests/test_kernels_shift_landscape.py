"""What the tests that all backends share do not see of the Triton kernel of shift_landscape."""

import pytest
import torch

from mmfast.testing import find_case

pytest.importorskip("triton")

from mmfast.kernels import _tiles as tiles
from mmfast.kernels import shift_landscape as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def problem(N=40, L=2):
    """Arguments of `log_sums` with any terms, and the scores in float64 [L, N, N]."""
    made = find_case("shift_landscape", "chunks").inputs()
    x, y = made["x"][:N], made["y"][:N]
    torch.manual_seed(0)
    sides = [[torch.rand(N) + 0.5, torch.randn(L, N), torch.rand(L, N) + 0.5] for _ in range(2)]
    inputs = [x, *sides[0], y, *sides[1]]
    (a, a_offset, a_factor), (b, b_offset, b_factor) = (
        [z.double() for z in side] for side in sides
    )
    s = a[:, None] * b * (x.double() @ y.double().T)
    z = s + a_offset[:, :, None] + b_offset[:, None, :]
    z = z * a_factor[:, :, None] * b_factor[:, None, :]
    return [t.to(DEVICE) for t in inputs], z


# one program; several of unequal size, with ones that a short chunk leaves idle; one for each tile
@pytest.mark.parametrize("limits", [(1, 1), (2, 4), (64, 4096)], ids=str)
@pytest.mark.parametrize("chunk", [40, 25])
def test_any_number_of_programs(limits, chunk, monkeypatch):
    monkeypatch.setattr(tiles, "SPLITS", limits[0])
    monkeypatch.setattr(tiles, "GROUPS", limits[0])
    monkeypatch.setattr(tiles, "PROGRAMS", limits[1])
    monkeypatch.setattr(tiles, "_interpreted", lambda N, M: tiles.Tile(16, 16, 32, 1, 1, 1, ""))
    inputs, z = problem()
    scales = [1.0, 20.0]
    rows, columns = (x.cpu().double() for x in kernels.log_sums(*inputs, scales, chunk))
    number = torch.arange(40)
    out = (number[:, None] // chunk != number // chunk) | (number[:, None] == number)
    for t, scale in enumerate(scales):
        s = (scale * z).masked_fill(out, -torch.inf)
        torch.testing.assert_close(rows[:, t], s.logsumexp(2), rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(columns[:, t], s.logsumexp(1), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("limits", [(1, 1 << 28), (2, 1 << 28), (8, 1)], ids=str)
def test_any_number_of_launches(limits, monkeypatch):
    inputs, _ = problem(L=3)
    want = kernels.log_sums(*inputs, [3.0], 40)
    monkeypatch.setattr(kernels, "SHIFTS", limits[0])
    monkeypatch.setattr(kernels, "WORKSPACE_BYTES", limits[1])
    got = kernels.log_sums(*inputs, [3.0], 40)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_every_kind_has_a_tile_for_every_architecture():
    for kind in ("half", "tf32", "ieee"):
        for arch in (80, 90, 100):
            ((largest, _),) = kernels.TILES["landscape", kind, arch]
            assert largest == tiles.ANY
