import functools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import PairwiseStats, pairwise_stats
from mmfast.testing import (
    LAYOUTS,
    cases,
    find_case,
    random_pair,
    strided,
    unit_rows,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def by_loops(x, y, bins=8, range=(-1.0, 1.0)):
    """Everything from a list of (product, row, column); x and y hold whole numbers."""
    pairs = [
        (float(x[i] @ (x if y is None else y)[j]), i, j)
        for i in np.arange(len(x))
        for j in np.arange(i + 1 if y is None else 0, len(x if y is None else y))
    ]
    values = np.array([s for s, _, _ in pairs])
    least, largest = min(pairs), min(pairs, key=lambda p: (-p[0], p[1], p[2]))
    histogram, edges = np.histogram(values, bins, range)
    mean = values.mean()
    return {
        "count": len(pairs),
        "mean": mean,
        "std": values.std(ddof=1) if len(pairs) > 1 else math.nan,
        "moments": [mean, *(((values - mean) ** p).mean() for p in (2, 3, 4))],
        "min": least[0],
        "max": largest[0],
        "argmin": least[1:],
        "argmax": largest[1:],
        "histogram": histogram,
        "edges": edges,
        "below": (values < range[0]).sum(),
        "above": (values > range[1]).sum(),
    }


def assert_same(got, want, rel=1e-12):
    for name, value in want.items():
        found = getattr(got, name)
        if name in ("mean", "std", "moments"):
            assert found == pytest.approx(value, rel=rel, abs=rel, nan_ok=True), name
        elif isinstance(value, np.ndarray):
            assert np.array_equal(found.numpy(), value), name
        else:
            assert found == value, name


# products fall on edges, and many are equal: ties and closed ends are decided
@pytest.mark.parametrize("both", [False, True], ids=["one set", "two sets"])
@pytest.mark.parametrize("shape", [(2, 3), (70, 41), (213, 390)], ids=str)
def test_is_the_definition(shape, both, level_backend):
    random = torch.Generator().manual_seed(1)
    x, y = (torch.randint(-2, 3, (n, 3), generator=random).float() for n in shape)
    y = y if both else None
    options = {"bins": 9, "range": (-4.5, 4.0)}
    got = pairwise_stats(x, y, **options, backend=level_backend)
    # a tile of its own is summed in float32 there
    assert_same(got, by_loops(x, y, **options), rel=1e-5 if level_backend == "triton" else 1e-12)
    assert got.nan == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("pairwise_stats", "full"), ids=name_of)
def test_matches_numpy(case, dtype, level_backend):
    made = case.inputs(dtype)
    x, y = (made[name].detach() for name in ("q", "k"))
    check_against_numpy(case, x, y, level_backend)
    check_against_numpy(case, x, None, level_backend)


def check_against_numpy(case, x, y, backend):
    got = pairwise_stats(x, y, backend=backend)
    products = (x.double() @ (x if y is None else y).double().T).numpy()
    values = products[np.triu_indices(len(x), 1)] if y is None else products.reshape(-1)
    assert got.count == len(values)
    assert got.histogram.sum() + got.below + got.above == got.count
    if not len(values):
        assert math.isnan(got.mean)
        assert (got.min, got.argmin, got.max, got.argmax) == (
            math.inf,
            (-1, -1),
            -math.inf,
            (-1, -1),
        )
        return
    # one product errs by this, and so does an extreme
    off = (1e-14 if x.dtype == torch.float64 else 1e-6) * case.norm**2 * math.sqrt(case.D)
    for name, place in (("min", got.argmin), ("max", got.argmax)):
        assert getattr(got, name) == pytest.approx(getattr(values, name)(), abs=off)
        assert products[place] == pytest.approx(getattr(got, name), abs=off)
    assert got.mean == pytest.approx(values.mean(), abs=off)
    centred, spread = values - values.mean(), float(np.abs(values - values.mean()).max())
    for p in (2, 3, 4):
        assert got.moments[p - 1] == pytest.approx(
            (centred**p).mean(), abs=p * off * spread ** (p - 1)
        )
    # bins may differ by what lies within the error of an edge
    edges = np.linspace(-1, 1, 257)
    assert np.array_equal(got.edges.numpy(), edges)
    low = np.searchsorted(np.sort(values), edges - off)
    high = np.searchsorted(np.sort(values), edges + off, side="right")
    ranks = np.concatenate([[0], got.histogram.cumsum(0).numpy()]) + got.below
    assert (low <= ranks).all()
    assert (ranks <= high).all()


def products_of(x, backend):
    """Every product of x as the sweep has it: the extremes of single pairs."""
    N = len(x)
    return [pairwise_stats(x[i : i + 1], x[j : j + 1], bins=0, backend=backend).max
            for i in range(N) for j in range(i + 1, N)]  # fmt: skip


@pytest.mark.parametrize(
    ("bins", "range"),
    [(256, (-1, 1)), (7, (-0.3, 0.41)), (1, (0, 0.5)), (1000, (0.1, 0.2)), (65536, (-1.0, 0.0))],
    ids=str,
)
def test_bins_are_numpys_to_the_last_one(bins, range, level_backend):
    if level_backend.startswith(("eager", "triton")):
        pytest.skip("their products depend on the shape; whole numbers are exact for all")
    x = unit_rows(24, 40, dtype=torch.float32)
    got = pairwise_stats(x, bins=bins, range=range, backend="cpp")
    histogram, edges = np.histogram(np.array(products_of(x, "cpp")), bins, range)
    assert np.array_equal(got.edges.numpy(), edges)
    assert np.array_equal(got.histogram.numpy(), histogram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)
def test_numbers_on_and_beside_every_edge(dtype, level_backend):
    # products with 1 are the numbers themselves
    edges = torch.linspace(-0.7, 0.3, 51, dtype=torch.float64)
    near = edges.to(dtype)
    values = torch.cat([near, *(torch.nextafter(near, near + s) for s in (1, -1))])
    options = {"bins": 50, "range": (-0.7, 0.3), "backend": level_backend}
    got = pairwise_stats(values[:, None], torch.ones(1, 1, dtype=dtype), **options)
    histogram, edges = np.histogram(values.double().numpy(), 50, (-0.7, 0.3))
    assert np.array_equal(got.histogram.numpy(), histogram)
    assert got.below == (values.double() < -0.7).sum()
    assert got.above == (values.double() > 0.3).sum()


@pytest.mark.parametrize("both", [False, True], ids=["one set", "two sets"])
def test_blocks_add_up_to_the_whole(both):
    x = unit_rows(331, 20, dtype=torch.float32)
    y = unit_rows(280, 20, seed=1, dtype=torch.float32) if both else None
    whole = pairwise_stats(x, y, backend="cpp")
    for cuts in ([100, 231], [1, 64, 266], [331]):
        rows = list(zip(np.cumsum([0, *cuts]), x.split(cuts), strict=False))
        if both:
            columns = list(zip((0, 33), y.split([33, 247]), strict=True))
            blocks = [(a, b, i, j) for i, a in rows for j, b in columns]
        else:
            blocks = [(a, None, i, 0) for i, a in rows]
            blocks += [(a, b, i, j) for i, a in rows for j, b in rows if i < j]
        parts = [
            pairwise_stats(a, b, row_offset=int(i), column_offset=int(j), backend="cpp")
            for a, b, i, j in blocks
        ]
        for order in (parts, parts[::-1]):
            got = functools.reduce(PairwiseStats.merge, order)
            assert_same(got, {**vars(whole), "histogram": whole.histogram.numpy(),
                              "edges": whole.edges.numpy()})  # fmt: skip


@pytest.mark.parametrize("both", [False, True], ids=["one set", "two sets"])
def test_more_rows_than_are_packed_at_once(both):
    # of 64 * 192; equal extremes on both sides of the border
    x = torch.randint(-3, 4, (12_600, 2), generator=torch.Generator().manual_seed(0)).float()
    x[[100, 12_400]] = 5
    y = x[:300].flip(0) if both else None
    whole = pairwise_stats(x, y, backend="cpp")
    a, b = x.split([7000, 5600])
    parts = [
        pairwise_stats(a, y, backend="cpp"),
        pairwise_stats(b, y, row_offset=7000, backend="cpp"),
    ]
    if not both:
        parts.append(pairwise_stats(a, b, column_offset=7000, backend="cpp"))
    want = functools.reduce(PairwiseStats.merge, parts)
    assert_same(whole, {**vars(want), "histogram": want.histogram.numpy(),
                        "edges": want.edges.numpy()})  # fmt: skip
    assert whole.argmax == ((100, 199) if both else (100, 12_400))


def test_spread_beside_a_large_mean(level_backend):
    # cosines of a cone as narrow as that of a deep random network: about 1 - 1e-5
    wide = unit_rows(1, 64, dtype=torch.float64) + 3e-4 * unit_rows(300, 64, seed=2)
    x = torch.nn.functional.normalize(wide, dim=1).to(widest(level_backend.partition("-")[0]))
    got = pairwise_stats(x, bins=0, backend=level_backend)
    products = (x.double() @ x.double().T).numpy()[np.triu_indices(300, 1)]
    # float32 products have a rounding of their own
    off = 2e-7 if x.dtype == torch.float32 else 1e-15
    assert got.mean == pytest.approx(products.mean(), abs=off)
    assert got.std == pytest.approx(products.std(ddof=1), abs=4 * off)
    if x.dtype == torch.float64:
        for p in (2, 3, 4):
            want = ((products - products.mean()) ** p).mean()
            assert got.moments[p - 1] == pytest.approx(want, rel=1e-7)


@given(st.integers(1, 130), st.integers(1, 130), st.integers(0, 2**31))
def test_laws(N, M, seed):
    random = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, 4, generator=random) for n in (N, M))
    stats = pairwise_stats(x, y, bins=20, range=(-2, 3))
    turned = pairwise_stats(y, x, bins=20, range=(-2, 3))
    shuffled = pairwise_stats(x[torch.randperm(N, generator=random)], y, bins=20, range=(-2, 3))
    for other in (turned, shuffled):
        assert torch.equal(other.histogram, stats.histogram)
        assert (other.below, other.above, other.count) == (stats.below, stats.above, N * M)
        assert (other.min, other.max) == (stats.min, stats.max)
        assert other.moments == pytest.approx(stats.moments, rel=1e-11, abs=1e-11)
    assert turned.argmin == stats.argmin[::-1]
    # of one set: with itself, every pair twice, and itself
    one = pairwise_stats(x, bins=20, range=(-2, 3))
    assert one.count == N * (N - 1) // 2
    full = pairwise_stats(x, x, bins=20, range=(-2, 3))
    own = torch.tensor([pairwise_stats(r[None], r[None], bins=0).max for r in x])
    counts = torch.histogram(own.double(), torch.linspace(-2, 3, 21, dtype=torch.float64)).hist
    assert torch.equal(2 * one.histogram + counts.long(), full.histogram)
    # moments by the closed forms of Gram matrices
    wide_x, wide_y = x.double(), y.double()
    mean = wide_x.mean(0) @ wide_y.mean(0)
    second = ((wide_x.T @ wide_x) * (wide_y.T @ wide_y)).sum() / (N * M)
    assert stats.mean == pytest.approx(float(mean), rel=1e-5, abs=1e-5)
    assert stats.moments[1] == pytest.approx(float(second - mean**2), rel=1e-5, abs=1e-4)


@given(st.lists(st.floats(-2, 2), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_between_their_bounds(values, p):
    x = torch.tensor(values, dtype=torch.float64)
    stats = pairwise_stats(x[:, None], torch.ones(1, 1, dtype=torch.float64), bins=16)
    ordered = np.sort(np.array(values))
    exact = ordered[max(1, math.ceil(p * len(values))) - 1]
    low, high = stats.quantile_bounds(p)
    assert low <= exact <= high
    assert low <= stats.quantile(p) <= high
    if -1 <= exact <= 1:
        assert abs(stats.quantile(p) - exact) <= 1 / 16 + 1e-12
    assert stats.quantile(0) == ordered[0]
    assert stats.quantile(1) == ordered[-1]


def test_moments_of_a_normal_sample_and_bins_for_quantiles():
    x = torch.randn(4000, 1, dtype=torch.float64)
    stats = pairwise_stats(x, torch.ones(1, 1, dtype=torch.float64), bins=4000, range=(-5, 5))
    for p in (0.05, 0.5, 0.999):
        want = np.quantile(x.numpy(), p, method="inverted_cdf")
        assert stats.quantile(p) == pytest.approx(want, abs=0.5 * 10 / 4000 + 1e-12)


@pytest.mark.parametrize("both", [False, True], ids=["one set", "two sets"])
def test_products_that_are_no_numbers(both, level_backend):
    x, y = torch.ones(90, 2), torch.full((75, 2), 0.25)
    x[40, 0], x[3, 0] = math.nan, math.inf
    got = pairwise_stats(x, y if both else None, range=(0, 3), backend=level_backend)
    pairs, nan = (90 * 75, 75) if both else (90 * 89 // 2, 89)
    infinite = 75 if both else 88
    assert (got.count, got.nan) == (pairs - nan, nan)
    assert (got.above, got.below) == (infinite, 0)
    assert got.histogram.sum() == pairs - nan - infinite
    assert (got.min, got.argmin) == ((0.5, (0, 0)) if both else (2.0, (0, 1)))
    assert (got.max, got.argmax) == (math.inf, (3, 0) if both else (0, 3))
    assert not math.isfinite(got.mean)
    y[:] = math.nan
    none = pairwise_stats(x, y, backend=level_backend)
    assert (none.count, none.nan, none.argmin, none.argmax) == (0, 90 * 75, (-1, -1), (-1, -1))
    assert math.isnan(none.mean)
    assert math.isnan(none.std)
    # and merging them changes nothing
    ones = pairwise_stats(torch.ones(3, 1), backend="eager")
    for merged in (ones + none, none + ones):
        assert merged.nan == 90 * 75
        assert merged.moments == ones.moments
        assert (merged.min, merged.argmin, merged.argmax) == (1, (0, 1), (0, 1))


def test_without_a_histogram(backend):
    x = unit_rows(90, 12, dtype=widest(backend))
    full = pairwise_stats(x, backend=backend)
    for bins in (0, None):
        bare = pairwise_stats(x, bins=bins, backend=backend)
        assert bare.histogram is None
        assert bare.edges is None
        assert (bare.count, bare.min, bare.argmax) == (full.count, full.min, full.argmax)
        assert bare.moments == full.moments
        assert (bare + bare).count == 2 * full.count


def test_same_bits_for_any_number_of_threads():
    before = torch.get_num_threads()
    made = find_case("pairwise_stats", "many_lanes").inputs()
    try:
        for x, y in ((made["q"], made["k"]), (made["k"], None)):
            got = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                stats = pairwise_stats(x, y, backend="cpp")
                got.append((*stats.moments, *stats.histogram.tolist(), stats.argmin, stats.max))
            assert got[0] == got[1] == got[2]
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    x, y = random_pair(50, 70, 24, dtype=torch.float32, requires_grad=False)
    want = pairwise_stats(x, y, backend=backend)
    got = pairwise_stats(strided(x, how), strided(y, how), backend=backend)
    assert (got.argmin, got.argmax, got.count) == (want.argmin, want.argmax, want.count)
    assert got.moments == pytest.approx(want.moments, rel=1e-5)


def test_offsets_move_places(backend):
    x, y = random_pair(9, 7, 3, dtype=widest(backend), requires_grad=False)
    bare = pairwise_stats(x, y, backend=backend)
    got = pairwise_stats(x, y, row_offset=100, column_offset=2000, backend=backend)
    assert got.argmin == (bare.argmin[0] + 100, bare.argmin[1] + 2000)
    own = pairwise_stats(x, row_offset=100, backend=backend)
    assert own.argmax == tuple(at + 100 for at in pairwise_stats(x, backend=backend).argmax)


def test_no_tensor_of_pairs(largest_tensor):
    x, _ = random_pair(600, 1, 8, dtype=torch.float32)
    with largest_tensor:
        pairwise_stats(x, backend="cpp")
    assert largest_tensor.bytes <= 600 * 8 * 8
