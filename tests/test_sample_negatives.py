import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import sample_negatives
from mmfast.ops.sample_negatives import noisy_scores, philox, reference
from mmfast.testing import LAYOUTS, cases, find_case, random_pair, strided, widest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SEED = 0x1234567890ABCDEF


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def fixed(seed=0):
    return torch.Generator().manual_seed(seed)


def arguments(case, dtype):
    """q, k, scale, seed, q_ids and k_ids, as the op takes them."""
    made = case.inputs(dtype)
    q, k, scale = (made[name].detach() for name in ("q", "k", "scale"))
    ids = [made.get(f"{name}_ids", torch.arange(len(x))) for name, x in (("q", q), ("k", k))]
    return q, k, scale, torch.tensor(SEED), *ids


def draw(*inputs, backend):
    return reference(*inputs) if backend == "eager" else torch.ops.mmfast.sample_negatives(
        *inputs, backend
    )  # fmt: skip


# Random123's kat_vectors: counter, key, words
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, 0, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, -1, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], 0x299F31D0A4093822,
         [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
    ],
    ids=["zeros", "ones", "pi"],
)  # fmt: skip
def test_philox_gives_the_published_words(counter, key, expected):
    made = philox([torch.tensor(x) for x in counter], torch.tensor(key))
    assert [int(x) for x in made] == expected


def test_reference_is_the_definition():
    q, k = random_pair(6, 9, 3, requires_grad=False)
    q_ids, k_ids = torch.tensor([0, 1, 2, 3, 3, 9]), torch.tensor([3, 1, 4, 1, 5, 9, 2, 6, 5])
    best = []
    for i in range(6):
        sums = []
        for j in range(9):
            counter = [torch.tensor(x) for x in (j // 4, i, 0, 0)]
            v = (int(philox(counter, torch.tensor(SEED))[j % 4]) + 0.5) / 2**32
            s = 1.7 * sum(float(q[i, d]) * float(k[j, d]) for d in range(3))
            sums.append(-math.inf if q_ids[i] == k_ids[j] else s - math.log(-math.log1p(-v)))
        best.append(int(np.argmax(sums)))
    got = reference(q, k, 1.7, torch.tensor(SEED), q_ids, k_ids)
    assert got.tolist() == best


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("case", cases("sample_negatives", "full"), ids=name_of)
def test_draws_the_best_within_rounding(case, dtype, level_backend):
    inputs = arguments(case, dtype)
    index = draw(*inputs, backend=level_backend)
    assert (index.dtype, index.shape) == (torch.int64, (case.N,))
    q, k, scale, *others = inputs
    q, k = q.double(), k.double()
    sums = noisy_scores(q, k, scale, *others)
    short = sums.amax(1) - sums.gather(1, index[:, None]).squeeze(1)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    size = float((scale * (q.abs() @ k.abs().T)).max())
    assert short.max() <= 8 * eps * (size + 10)
    if dtype == torch.float32:
        # and it is the same column, but for the rare tie within rounding
        assert (index != reference(*inputs)).sum() <= 1


@pytest.mark.parametrize("shape", [(4000, 12), (1500, 90)], ids=str)
def test_frequencies_are_those_of_the_softmax(shape, backend):
    N, M = shape
    q, k = torch.ones(N, 1), torch.randn(M, 1, generator=fixed())
    # a third of the columns is out for a part of the rows
    q_ids, k_ids = torch.arange(N) % 2, torch.arange(M) % 3
    options = {"q_ids": q_ids, "k_ids": k_ids, "generator": fixed(1), "backend": backend}
    index = sample_negatives(q, k, 1.5, **options)
    for id in (0, 1):
        kept = k_ids != id
        p = (1.5 * k[kept, 0].double()).softmax(0)
        counts = torch.bincount(index[q_ids == id], minlength=M)
        assert counts[~kept].sum() == 0
        expected = p * counts.sum()
        chi_square = ((counts[kept] - expected) ** 2 / expected).sum()
        freedom = len(p) - 1
        assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
def test_rare_candidates_are_drawn_as_often_as_they_should(backend):
    # 4000 columns of a millionth each beside one that has the rest: 12 of 3000 rows take one
    k = torch.zeros(4001, 1)
    k[1234] = math.log(1e6)
    options = {"q_ids": torch.full((3000,), -1), "k_ids": torch.arange(4001)}
    index = sample_negatives(torch.ones(3000, 1), k, 1.0, **options, generator=fixed())
    assert 3 <= (index != 1234).sum() <= 27


def test_reproducible_and_advancing(backend):
    q, k = random_pair(40, 60, 5, dtype=widest(backend))
    generator = fixed(3)
    first, second = (
        sample_negatives(q, k, 1.0, generator=generator, backend=backend) for _ in range(2)
    )
    assert not torch.equal(first, second)
    generator.manual_seed(3)
    again = [sample_negatives(q, k, 1.0, generator=generator, backend=backend) for _ in range(2)]
    assert torch.equal(again[0], first)
    assert torch.equal(again[1], second)
    torch.manual_seed(3)
    assert torch.equal(sample_negatives(q, k, 1.0, backend=backend), first)
    assert not torch.equal(sample_negatives(q, k, 1.0, backend=backend), first)


def test_same_draws_for_any_number_of_threads():
    before = torch.get_num_threads()
    inputs = arguments(find_case("sample_negatives", "many_lanes"), torch.float32)
    q, k, scale, seed, q_ids, k_ids = inputs
    try:
        for sides in (inputs, (k, q, scale, seed, k_ids, q_ids)):
            draws = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                draws.append(draw(*sides, backend="cpp"))
            assert torch.equal(draws[0], draws[1])
            assert torch.equal(draws[0], draws[2])
    finally:
        torch.set_num_threads(before)


def test_a_row_draws_the_same_in_any_company(level_backend):
    # 300 rows lie along the lanes, 20 of them across: the sides swap roles
    q, k = random_pair(300, 100, 8, dtype=torch.float32, requires_grad=False)
    inputs = (k, torch.tensor(2.0), torch.tensor(SEED))
    ids = torch.arange(300), torch.arange(100)
    rows = draw(q, *inputs, *ids, backend=level_backend)
    few = draw(q[:20], *inputs, ids[0][:20], ids[1], backend=level_backend)
    assert torch.equal(few, rows[:20])


@given(st.integers(1, 70), st.integers(2, 70), st.integers(-(2**63), 2**63 - 1), st.data())
def test_equal_ids_are_never_drawn(N, M, base, data):
    random = fixed(data.draw(st.integers(0, 2**31)))
    q, k = torch.randn(N, 3, generator=random), torch.randn(M, 3, generator=random)
    # any int64 is an id: those near the ends of the range wrap around
    q_ids, k_ids = (torch.randint(0, 3, (n,), generator=random) + base for n in (N, M))
    scale = data.draw(st.sampled_from([1.0, -1.0, 0.0]))
    index = sample_negatives(q, k, scale, q_ids=q_ids, k_ids=k_ids, allow_empty=True)
    candidates = q_ids[:, None] != k_ids
    assert torch.equal(index >= 0, candidates.any(1))
    assert candidates[torch.arange(N), index][index >= 0].all()


def test_own_pair_is_left_out_by_default(backend):
    q, _ = random_pair(50, 1, 4, dtype=widest(backend), requires_grad=False)
    # without it every row would draw itself
    index = sample_negatives(q, q, 1e4, backend=backend)
    scores = (q @ q.T).fill_diagonal_(-math.inf)
    assert torch.equal(index, scores.argmax(1))


@pytest.mark.parametrize("N", [3, 200], ids=["across", "along"])
def test_rows_without_a_candidate(N, level_backend):
    q, k = torch.ones(N, 2), torch.ones(70, 2)
    q_ids, k_ids = torch.arange(N) % 3, torch.ones(70, dtype=torch.int64)
    options = {"q_ids": q_ids, "k_ids": k_ids, "backend": level_backend}
    index = sample_negatives(q, k, 1.0, **options, allow_empty=True)
    assert torch.equal(index < 0, q_ids == 1)
    assert index.min() == -1
    message = (
        "sample_negatives: row 1 has no candidate: its ids leave every pair out, or its scores "
        "are NaN or -inf; pass allow_empty=True to get -1 there"
    )
    with pytest.raises(ValueError, match=f"^{message}$"):
        sample_negatives(q, k, 1.0, **options)


@pytest.mark.parametrize("N", [3, 200], ids=["across", "along"])
def test_scores_that_are_no_numbers(N, level_backend):
    q, k = torch.ones(N, 2), torch.ones(70, 2)
    k[5, 0], k[7, 1], q[2, 0] = math.nan, -math.inf, math.nan
    ids = {"q_ids": torch.full((N,), -1), "k_ids": torch.arange(70)}
    options = {**ids, "allow_empty": True, "backend": level_backend}
    index = sample_negatives(q, k, 1.0, **options)
    assert index[2] == -1
    assert (index >= 0).sum() == N - 1
    assert not torch.isin(index, torch.tensor([5, 7])).any()
    # +inf wins, the lowest column of several
    k[[40, 33], 0] = math.inf
    index = sample_negatives(q, k, 1.0, **options)
    assert index[2] == -1
    assert (index == 33).sum() == N - 1
    assert sample_negatives(q, k, torch.tensor(math.nan), **options).eq(-1).all()


@pytest.mark.parametrize("scale", [1e6, -1e6, 1e30], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_coldest_temperatures_take_the_hardest(scale, dtype, level_backend):
    # whole numbers are exact in every type, and no two columns are alike
    q, k = torch.ones(70, 1, dtype=dtype), torch.arange(-40.0, 40.0)[:, None].to(dtype)
    ids = {"q_ids": torch.full((70,), -1), "k_ids": torch.arange(80)}
    index = sample_negatives(q, k, scale, **ids, backend=level_backend)
    assert index.eq(79 if scale > 0 else 0).all()


def test_one_candidate(level_backend):
    q, k = torch.randn(40, 1), torch.randn(1, 1)
    ids = {"q_ids": torch.arange(1, 41), "k_ids": torch.zeros(1, dtype=torch.int64)}
    assert sample_negatives(q, k, 3.0, **ids, backend=level_backend).eq(0).all()


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    q, k = random_pair(50, 70, 24, dtype=torch.float32, requires_grad=False)
    q_ids, k_ids = torch.arange(100)[::2], torch.arange(70).flip(0)
    options = {"q_ids": q_ids, "k_ids": k_ids, "backend": backend}
    want = sample_negatives(q, k, 2.0, **options, generator=fixed())
    views = [strided(x, how) for x in (q, k)]
    assert torch.equal(sample_negatives(*views, 2.0, **options, generator=fixed()), want)
