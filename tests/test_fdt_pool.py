"""fdt_pool against its definition, exact vectors, a float64 judge, and the laws it obeys."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import fdt_pool
from mmfast.ops._inputs import SCORE_TYPE
from mmfast.ops.fdt_pool import NORMALIZATIONS, POOLS, _pool_scores, reference
from mmfast.testing import (
    assert_within_budget,
    cases,
    find_case,
    in_double,
    pool_magnitudes,
    saved_bytes,
    widest,
)

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
NAMES = ("tokens", "codebook", "temperature")
GOLDEN = np.load(Path(__file__).parent / "golden" / "fdt.npz")
POOLED = sorted({key.rpartition(".")[0] for key in GOLDEN if key.startswith("pool_B7")})


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


def random_case(
    B=3, N=5, C=7, D=4, *, dtype=torch.float64, requires_grad=True, padded=False, seed=0
):
    random = torch.Generator().manual_seed(seed)
    tokens = torch.randn(B, N, D, generator=random, dtype=torch.float64).to(dtype)
    codebook = torch.randn(C, D, generator=random, dtype=torch.float64).to(dtype)
    made = {"tokens": tokens, "codebook": codebook}
    for x in made.values():
        x.requires_grad_(requires_grad)
    if padded:
        made["mask"] = torch.rand(B, N, generator=random) < 0.6
        made["mask"][0], made["mask"][1] = False, True
    return made


def defined_by_loops(tokens, codebook, temperature, mask, pool, normalize, padded_score):
    """pooled and weights, element by element from the formula."""
    B, N, D = tokens.shape
    pooled, weights = np.zeros((B, D)), np.zeros((B, len(codebook)))
    for b in range(B):
        z = []
        for code in codebook:
            places = [
                float(tokens[b, n] @ code) / (math.sqrt(D) * temperature)
                if mask[b, n]
                else padded_score
                for n in range(N)
                if mask[b, n] or padded_score > -math.inf
            ]
            if not places:
                break
            z.append({"max": max, "sum": sum, "mean": np.mean}[pool](places))
        if not z:
            continue  # nothing is left of it
        z = np.array(z)
        if normalize == "sparsemax":
            # the threshold by bisection
            low, high = z.max() - 1, z.max()
            for _ in range(100):
                middle = (low + high) / 2
                low, high = (middle, high) if (z - middle).clip(0).sum() > 1 else (low, middle)
            w = (z - low).clip(0)
        else:
            w = np.exp(z) / np.exp(z).sum() if normalize == "softmax" else 1 / (1 + np.exp(-z))
        weights[b], pooled[b] = w, w @ codebook.numpy()
        if normalize == "sigmoid":
            pooled[b] /= w.sum()
    return pooled, weights


@pytest.mark.parametrize("padded_score", [-math.inf, 0.0, 0.7])
@pytest.mark.parametrize(("pool", "normalize"), [*product(POOLS, NORMALIZATIONS)])
def test_reference_is_the_definition(pool, normalize, padded_score):
    made = random_case(4, requires_grad=False, padded=True)
    options = {"pool": pool, "normalize": normalize, "padded_score": padded_score}
    got = reference(**made, temperature=0.6, **options)
    want = defined_by_loops(**made, temperature=0.6, **options)
    np.testing.assert_allclose(got[0], want[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "cpp"])
@pytest.mark.parametrize("case", POOLED)
def test_golden(case, backend):
    def stored(name):
        return torch.from_numpy(np.array(GOLDEN[f"{case}.{name}"]))

    tokens, codebook = (stored(name).requires_grad_() for name in ("q", "sd"))
    mask = stored("valid").bool() if f"{case}.valid" in GOLDEN else None
    _, _, _, _, _, normalize, pool, *_ = case.split("_")
    pooled, weights = fdt_pool(
        tokens,
        codebook,
        float(stored("temperature")),
        mask=mask,
        pool=pool,
        normalize=normalize,
        padded_score=0.0,
        backend=backend,
    )
    torch.testing.assert_close(pooled, stored("att_ft"), rtol=0, atol=1e-12)
    torch.testing.assert_close(weights, stored("att_weight"), rtol=0, atol=1e-12)
    assert torch.equal(weights > 0, stored("att_weight") > 0)
    got = torch.autograd.grad(pooled, (tokens, codebook), stored("upstream"))
    for grad, name in zip(got, ("grad_q", "grad_sd"), strict=True):
        torch.testing.assert_close(grad, stored(name), rtol=0, atol=1e-10)


def reordered(tokens, codebook, temperature, **options):
    """The definition, summed in another order: in float64 its error is not zero by identity."""
    pooled, weights = reference(tokens.flip(2), codebook.flip(0, 1), temperature, **options)
    return pooled.flip(1), weights.flip(1)


def results(function, made, upstream, **options):
    outs = function(**made, **options)
    g = [up.to(x.dtype) for up, x in zip(upstream, outs, strict=True)]
    grads = torch.autograd.grad(outs, [made[name] for name in NAMES], g)
    names = ("pooled", "weights", *(f"d{name}" for name in NAMES))
    return dict(zip(names, (*outs, *grads), strict=True))


# float16 goes the way of the others but for its reading and writing
@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (case, dtype)
        for case in cases("fdt_pool", "full")
        for dtype in DTYPES
        if dtype != torch.float16 or "quick" in case.tags
    ],
    ids=name_of,
)
def test_matches_reference(case, dtype, level_backend):
    made = case.inputs(dtype)
    double = in_double(made)
    wide = SCORE_TYPE[dtype]
    shapes = ((case.B, case.D), dtype), ((case.B, case.C), wide)
    upstream = [torch.randn(shape).to(kind).double() for shape, kind in shapes]
    got = results(fdt_pool, made, upstream, backend=level_backend)
    eager = results(reordered, made, upstream)
    exact = results(reference, double, upstream)
    sizes = pool_magnitudes(double, exact["weights"], upstream)
    types = {"weights": wide, "dtemperature": torch.float64}
    for name, x in got.items():
        assert x.dtype == types.get(name, dtype)
        eps = torch.finfo(wide if name in types else dtype).eps
        eps *= 4 if dtype == torch.float64 else 1  # its judge is float64 too, and errs as much
        assert_within_budget(name, x, eager[name], exact[name], eps=eps, magnitude=sizes[name])


def winners_of(tokens, codebook, mask, padded_score, backend):
    """Who wins of each sample and code, int64 [B, C]: -1 for a padded place."""
    if backend == "eager":
        # the definition has no winners, but its gradient has
        tokens = tokens.detach().requires_grad_()
        numbered = torch.arange(1.0, tokens.shape[1] + 1).to(tokens.dtype)
        s = tokens @ codebook.T
        z = _pool_scores(s, mask, "max", padded_score)
        (won,) = torch.autograd.grad(z.sum(), s)
        return (won.transpose(1, 2) @ numbered).long() - 1
    inputs = (tokens, codebook, torch.tensor(0.5), mask, "softmax", padded_score, backend)
    return torch.ops.mmfast.fdt_pool_fwd(*inputs)[2].long()


def test_whoever_wins_is_the_best_within_rounding(level_backend):
    tokens, codebook = torch.randn(7, 60, 30), torch.randn(150, 30)
    mask = torch.rand(7, 60) < 0.8
    winners = winners_of(tokens, codebook, mask, -math.inf, level_backend)
    scores = (tokens.double() @ codebook.double().T).masked_fill(~mask.unsqueeze(2), -math.inf)
    short = scores.amax(1) - scores.gather(1, winners.unsqueeze(1)).squeeze(1)
    assert short.max() <= 1e-5


@pytest.mark.parametrize("padded_score", [-math.inf, 0.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_ties_go_to_the_lowest_token_and_never_to_padding(dtype, padded_score, level_backend):
    # whole numbers: every product is exact in every type, and most scores have equals
    tokens = torch.randint(-2, 3, (40, 9, 4)).to(dtype)
    codebook = torch.randint(-2, 3, (70, 4)).to(dtype)
    mask = torch.rand(40, 9) < 0.7
    mask[0] = False
    # sqrt(D) * temperature is 1
    scores = tokens.double() @ codebook.double().T
    expected = torch.full((40, 70), -1)
    best = torch.full((40, 70), -math.inf, dtype=torch.float64)
    for n in range(9):
        better = mask[:, n, None] & (scores[:, n] > best)
        best, expected = torch.where(better, scores[:, n], best), expected.masked_fill(better, n)
    expected[(best < padded_score) & ~mask.all(1, keepdim=True)] = -1
    assert torch.equal(winners_of(tokens, codebook, mask, padded_score, level_backend), expected)


def test_equal_tokens_send_their_gradient_to_the_first(backend):
    tokens = torch.ones(2, 4, 3, requires_grad=True)
    mask = torch.tensor([[True] * 4, [False, False, True, True]])
    codebook = torch.randn(5, 3)
    pooled, _ = fdt_pool(tokens, codebook, mask=mask, padded_score=-100.0, backend=backend)
    pooled.square().sum().backward()
    assert tokens.grad.abs().sum(2).gt(0).int().tolist() == [[1, 0, 0, 0], [0, 0, 1, 0]]


@pytest.mark.parametrize(("pool", "normalize"), [*product(POOLS[1:], NORMALIZATIONS)])
@pytest.mark.parametrize("padded_score", [None, -math.inf, 0.3])
def test_mean_and_sum_are_pooled_before_the_product(padded_score, pool, normalize, backend):
    made = random_case(dtype=widest(backend), padded=padded_score is not None)
    options = {"pool": pool, "normalize": normalize}
    if padded_score is not None:
        options["padded_score"] = padded_score
    leaves = [made["tokens"], made["codebook"]]
    got, want = fdt_pool(**made, **options, backend=backend), reference(**made, **options)
    torch.testing.assert_close(got, want)
    grads = (torch.autograd.grad([x.square().sum() for x in out], leaves) for out in (got, want))
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("padded_score", [None, -math.inf, 0.1])
def test_gradcheck(normalize, padded_score, backend):
    made = random_case(2, 2, 3, 2, padded=padded_score is not None)
    options = {"normalize": normalize, "mask": made.get("mask"), "backend": backend}
    if padded_score is not None:
        options["padded_score"] = padded_score
    temperature = torch.tensor([0.7], dtype=torch.float64, requires_grad=True)

    def function(*leaves):
        return fdt_pool(*leaves, **options)

    leaves = (made["tokens"], made["codebook"], temperature)
    assert torch.autograd.gradcheck(function, leaves)
    if backend == "eager" and padded_score == -math.inf:
        assert torch.autograd.gradgradcheck(function, leaves)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=name_of)
def test_gradient_of_temperature_has_its_shape_and_dtype(shape, dtype, backend):
    made = random_case(dtype=torch.float32)
    temperature = torch.full(shape, 0.5, dtype=dtype, requires_grad=True)
    fdt_pool(**made, temperature=temperature, backend=backend)[0].square().sum().backward()
    exact = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    reference(**in_double(made), temperature=exact)[0].square().sum().backward()
    assert temperature.grad.shape == shape
    assert temperature.grad.dtype == dtype
    tolerance = max(torch.finfo(dtype).eps, 1e-5)
    got = temperature.grad.double().reshape(())
    torch.testing.assert_close(got, exact.grad, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("asked", [("tokens",), ("codebook",), ("temperature",), NAMES[:2]])
@pytest.mark.parametrize("output", ["pooled", "weights"])
def test_only_asked_gradients(asked, output, backend):
    made = find_case("fdt_pool", "ragged").inputs()
    for name in NAMES:
        made[name].requires_grad_(name in asked)
    fdt_pool(**made, backend=backend)[output == "weights"].square().sum().backward()
    expected = in_double(made)
    reference(**expected)[output == "weights"].square().sum().backward()
    for name in NAMES:
        if name in asked:
            want = expected[name].grad.to(made[name].dtype)
            torch.testing.assert_close(made[name].grad, want, rtol=1e-4, atol=1e-4)
        else:
            assert made[name].grad is None


@pytest.mark.parametrize("id", ["all_survive"])
def test_memory_is_linear(id, compiled_backend, largest_tensor):
    case = find_case("fdt_pool", id)
    made = case.inputs()
    with saved_bytes(*(made[name] for name in NAMES)) as saved, largest_tensor:
        pooled, weights = fdt_pool(**made, backend=compiled_backend)
        (pooled.sum() + weights.square().sum()).backward()
    # the weights, and who won
    assert saved.bytes == 8 * case.B * case.C
    assert largest_tensor.bytes <= 4 * max(made["codebook"].numel(), case.B * case.C) + 4096


sizes = st.integers(1, 12)


@given(sizes, sizes, st.integers(1, 60), st.integers(0, 2**31))
def test_order_of_tokens_and_codes_does_not_matter(B, N, C, seed):
    made = random_case(B, N, C, requires_grad=False, seed=seed)
    pooled, weights = fdt_pool(**made)
    rows, codes = torch.randperm(N), torch.randperm(C)
    pooled_2, weights_2 = fdt_pool(made["tokens"][:, rows], made["codebook"][codes])
    torch.testing.assert_close(pooled_2, pooled, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(weights_2, weights[:, codes], rtol=1e-12, atol=1e-12)


@given(sizes, st.integers(0, 12), st.sampled_from(POOLS), st.sampled_from(NORMALIZATIONS))
def test_padding_is_not_looked_at(N, more, pool, normalize):
    made = random_case(4, N, 9, requires_grad=False)
    longer = torch.cat([made["tokens"], torch.full((4, more, 4), math.nan).double()], 1)
    options = {"pool": pool, "normalize": normalize}
    want = fdt_pool(**made, **options)
    got = fdt_pool(longer, made["codebook"], lengths=torch.full((4,), N), **options)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@given(sizes, st.integers(1, 60), st.floats(0.02, 50), st.integers(0, 2**31))
def test_weights_are_a_distribution_that_cold_makes_sparse(N, C, temperature, seed):
    made = random_case(3, N, C, requires_grad=False, seed=seed)
    _, weights = fdt_pool(**made, temperature=temperature)
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(3).double(), rtol=1e-12, atol=0)
    _, colder = fdt_pool(**made, temperature=temperature / 2)
    assert ((colder > 0).sum(1) <= (weights > 0).sum(1)).all()
