"""What the tests that all backends share do not see of the Triton kernels of pairwise_lse."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast.ops.pairwise_lse import reference
from mmfast.testing import find_case

triton = pytest.importorskip("triton")
tl = triton.language

from mmfast.kernels import _tile, pairwise_lse  # noqa: E402
from mmfast.kernels import _tiles as tiles  # noqa: E402

# in the interpreter where there is no card (conftest.py asks for it)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL = (True, True, True)
TINY = 1  # bytes: chunks as small as they come


def name_of(value):
    return str(value).removeprefix("torch.")


def problem(id, dtype=torch.float32):
    """q, k, scale, q_ids, k_ids and mask of a case, and upstream gradients of both sides."""
    made = find_case("pairwise_lse", id).inputs(dtype, device=DEVICE)
    made["scale"] = made["scale"].to(DEVICE)
    names = ("q", "k", "scale", "q_ids", "k_ids", "mask")
    inputs = [None if made.get(name) is None else made[name].detach() for name in names]
    return inputs, [torch.randn(len(x), device=DEVICE) for x in inputs[:2]]


def gradients(inputs, g, needs=ALL, **options):
    sums = pairwise_lse.forward(*inputs, columns=True)
    return pairwise_lse.backward(*g, *inputs, *sums, *needs, **options)


def exact(inputs, g):
    """dq, dk and dscale of the definition in float64; an entry of `g` may be None."""
    leaves = [x.double().requires_grad_() for x in inputs[:3]]
    q_ids, k_ids, mask = inputs[3:]
    sums = reference(*leaves, q_ids=q_ids, k_ids=k_ids, mask=mask, columns=True)
    asked = [i for i in (0, 1) if g[i] is not None]
    return torch.autograd.grad([sums[i] for i in asked], leaves, [g[i].double() for i in asked])


def assert_close(got, want, tolerance):
    for x, y in zip(got, want, strict=True):
        largest = float(y.abs().max())
        torch.testing.assert_close(x.double(), y.double(), rtol=0, atol=tolerance * largest)


# one program; several of unequal size; one for each tile
@pytest.mark.parametrize("limits", [(1, 1, 1), (3, 2, 6), (64, 64, 4096)], ids=str)
def test_any_number_of_groups_and_splits(limits, monkeypatch):
    for name, value in zip(("GROUPS", "SPLITS", "PROGRAMS"), limits, strict=True):
        monkeypatch.setattr(tiles, name, value)
    inputs, _ = problem("mask_and_ids")
    rows, columns = pairwise_lse.forward(*inputs, columns=True)
    q, k, scale, q_ids, k_ids, mask = inputs
    want = reference(
        q.double(), k.double(), scale, q_ids=q_ids, k_ids=k_ids, mask=mask, columns=True
    )
    torch.testing.assert_close((rows.double(), columns.double()), want, rtol=1e-6, atol=1e-6)
    alone, nothing = pairwise_lse.forward(*inputs, columns=False)
    assert nothing is None
    assert torch.equal(alone, rows)


@given(st.integers(1, 600), st.integers(1, 600))
def test_every_block_has_a_program(row_blocks, column_tiles):
    for columns in (False, True):
        blocks, width = tiles.shares(row_blocks, column_tiles, columns)
        groups, splits = -(-row_blocks // blocks), -(-column_tiles // width)
        # no program without work: its partial sums would stay unwritten
        assert (groups - 1) * blocks < row_blocks <= groups * blocks
        assert (splits - 1) * width < column_tiles <= splits * width
        if columns:
            assert groups <= max(tiles.GROUPS, tiles.PROGRAMS // splits)
    assert tiles.shares(row_blocks, column_tiles, False)[1] == width


@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(1, 4_000_000))
def test_chunks_keep_to_their_memory(N, M, elements):
    R, C = tiles.chunk(N, M, elements)
    assert 1 <= R <= N
    assert 1 <= C <= M
    assert R == N or R % tiles.CHUNK == 0
    assert C == M or C % tiles.CHUNK == 0
    least = tiles.CHUNK * tiles.CHUNK
    assert max(elements, least) >= R * C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=name_of)
def test_every_way_to_the_gradients_agrees(dtype):
    inputs, g = problem("repeated", dtype)
    want = exact(inputs, g)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for options in (
        {"flash": True},
        {"flash": False, "library": False},
        {"flash": False, "library": False, "workspace_bytes": 128 * 128 * dtype.itemsize},
    ):
        assert_close(gradients(inputs, g, **options), want, tolerance)


def test_chunks_multiplied_by_the_library():
    # what aten multiplies on a CPU is float32; bfloat16 into float32 needs a card
    inputs, g = problem("mask_and_ids")
    options = {"flash": False, "workspace_bytes": TINY}
    assert_close(gradients(inputs, g, library=True, **options), exact(inputs, g), 2e-6)


@pytest.mark.skipif(DEVICE == "cpu", reason="aten adds half products into float32 on a card only")
def test_half_chunks_multiplied_by_the_library():
    inputs, g = problem("own", torch.bfloat16)
    got = gradients(inputs, g, flash=False, library=True, workspace_bytes=TINY)
    assert_close(got, exact(inputs, g), 1e-2)


@pytest.mark.parametrize("flash", [True, False])
def test_same_bits_every_time(flash):
    inputs, g = problem("ragged")
    first, second = (gradients(inputs, g, flash=flash, library=False) for _ in range(2))
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize("side", [0, 1], ids=["rows", "columns"])
def test_upstream_gradient_of_one_side(side, flash):
    inputs, g = problem("odd_width")
    g[1 - side] = None
    assert_close(gradients(inputs, g, flash=flash), exact(inputs, g), 3e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=name_of)
def test_an_empty_upstream_gradient_is_none(dtype):
    # as torch.compile passes that of columns which were not computed
    inputs, g = problem("odd_width", dtype)
    rows, _ = pairwise_lse.forward(*inputs, columns=False)
    want = pairwise_lse.backward(g[0], None, *inputs, rows, None, *ALL)
    got = pairwise_lse.backward(g[0], g[1][:0], *inputs, rows, rows[:0], *ALL)
    assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize(
    ("id", "flash"), [("odd_width", True), ("odd_width", False), ("mask_and_ids", False)]
)
def test_gradient_of_scale_whoever_else_is_asked(id, flash):
    inputs, g = problem(id)
    want = exact(inputs, g)
    for need_q, need_k in ((True, True), (True, False), (False, True), (False, False)):
        got = gradients(inputs, g, (need_q, need_k, True), flash=flash, workspace_bytes=TINY)
        assert [x is not None for x in got] == [need_q, need_k, True]
        kept = [i for i, x in enumerate(got) if x is not None]
        assert_close([got[i] for i in kept], [want[i] for i in kept], 2e-5)


@pytest.mark.parametrize("flash", [True, False])
@pytest.mark.parametrize(("g", "scale"), [(1e-6, 1e6), (1e6, 1e-6)], ids=["small", "large"])
def test_float16_holds_upstream_gradients_of_any_size(g, scale, flash):
    # q = 0, so every weight is 1 / M: G is 1e-9 and dk's terms lost, or its g beyond float16
    q = torch.zeros(40, 8, dtype=torch.float16, device=DEVICE)
    k = torch.ones(1000, 8, dtype=torch.float16, device=DEVICE)
    scale = torch.tensor(scale, device=DEVICE)
    up = [torch.full((40,), g, device=DEVICE), None]
    dq, _, _ = gradients([q, k, scale, None, None, None], up, (True, False, False), flash=flash)
    torch.testing.assert_close(dq, torch.ones_like(dq), rtol=2e-3, atol=0)


def test_a_scale_on_either_device_and_of_any_type():
    inputs, g = problem("odd_width")
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for device in {"cpu", DEVICE}:
            inputs[2] = torch.tensor(8.0, dtype=dtype, device=device)
            *_, dscale = gradients(inputs, g)
            assert dscale.shape == ()
            assert (dscale.dtype, dscale.device.type) == (dtype, device)


def test_flash_with_a_mask_is_refused():
    inputs, g = problem("mask")
    with pytest.raises(ValueError, match="flash takes D <= 128 and no mask"):
        gradients(inputs, g, flash=True)


def test_rounding_and_products_of_half_types():
    # the interpreter alone would cut bfloat16 off and multiply its bits
    @triton.jit
    def kernel(X, Y, OUT, ROUNDED, SIZE: tl.constexpr):
        o = tl.arange(0, SIZE)
        p = o[:, None] * SIZE + o[None, :]
        b_x = tl.load(X + p)
        tl.store(ROUNDED + p, _tile.to_type(b_x, ROUNDED.dtype.element_ty))
        b_half = tl.load(Y + p)
        b_out = _tile.dot(b_half, b_half, tl.zeros([SIZE, SIZE], tl.float32), "half")
        tl.store(OUT + p, b_out)

    x = torch.randn(32, 32, device=DEVICE)
    x[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1 + 2**-8, 1 + 3 * 2**-8])
    for dtype in (torch.bfloat16, torch.float16):
        half = torch.randn(32, 32, device=DEVICE).to(dtype)
        out, rounded = torch.empty_like(x), torch.empty_like(half)
        kernel[(1,)](x, half, out, rounded, 32)
        torch.testing.assert_close(rounded, x.to(dtype), rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(out, half.float() @ half.float(), rtol=1e-5, atol=1e-5)


def test_tiles_fit_together():
    kinds, architectures = ("half", "tf32", "ieee"), (80, 90, 100)
    for kind in kinds:
        for arch in architectures:
            for kernel in ("forward", "gradient", "product", "flash"):
                depths = [largest for largest, _ in tiles.TILES[kernel, kind, arch]]
                assert depths == sorted(depths)
                assert depths[-1] >= (pairwise_lse.LARGEST_FLASH_D if kernel == "flash" else 2**20)
    for (kernel, kind, arch), rows in tiles.TILES.items():
        for _, tile in rows:
            assert tile.decided
            if kernel.startswith("gradient"):
                # it writes G in whole tiles, which a product reads in its own
                for _, product in tiles.TILES["product", kind, arch]:
                    assert tile.n % product.d == tile.m % product.d == 0
                    assert tiles.LARGEST % product.n == tiles.LARGEST % product.d == 0


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((12, 0), 80)],
)
def test_architecture_of_a_card(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert _tile.architecture(torch.device("cuda")) == arch


def test_precision_follows_torch():
    before = torch.get_float32_matmul_precision()
    try:
        for asked, got in (("highest", "ieee"), ("high", "tf32")):
            torch.set_float32_matmul_precision(asked)
            assert tiles.kind_of(torch.float32) == got
            assert tiles.kind_of(torch.bfloat16) == "half"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(DEVICE == "cpu", reason="a CUDA graph needs a card")
@pytest.mark.parametrize("flash", [True, False])
def test_cuda_graph(flash):
    inputs, g = problem("own", torch.bfloat16)
    want = gradients(inputs, g, flash=flash)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = gradients(inputs, g, flash=flash)
    graph.replay()
    for x, y in zip(got, want, strict=True):
        assert torch.equal(x, y)
