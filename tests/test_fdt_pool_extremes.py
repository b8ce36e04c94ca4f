"""fdt_pool where numbers end: samples without tokens, scores that are no numbers, any layout."""

import math

import pytest
import torch

from mmfast import fdt_pool
from mmfast.ops.fdt_pool import NORMALIZATIONS, POOLS, reference
from mmfast.testing import leaf, widest


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("pool", POOLS)
def test_a_sample_without_a_token_is_nothing(pool, normalize, backend):
    tokens, codebook = leaf(torch.randn(2, 3, 4)), leaf(torch.randn(5, 4))
    temperature = torch.tensor(0.5, requires_grad=True)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    options = {"mask": mask, "pool": pool, "normalize": normalize, "backend": backend}
    outs = fdt_pool(tokens, codebook, temperature, **options)
    grads = torch.autograd.grad(outs, (tokens, codebook, temperature), [x + 1 for x in outs])
    for x in (*outs, *grads):
        assert x.eq(0).all()
    # a score of 0 everywhere is one of its own: every code alike
    pooled, weights = fdt_pool(tokens, codebook, padded_score=0.0, **options)
    torch.testing.assert_close(pooled, codebook.mean(0).expand(2, 4))
    assert weights.eq(0.5 if normalize == "sigmoid" else 0.2).all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_stay_in_their_sample(value, normalize, level_backend):
    tokens, codebook = torch.randn(6, 60, 8), torch.randn(90, 8)
    codebook[:, 3] = codebook[:, 3].abs()
    clean = fdt_pool(tokens, codebook, normalize=normalize, backend=level_backend)
    tokens[2, 31, 3] = value
    tokens.requires_grad_()
    outs = fdt_pool(tokens, codebook, normalize=normalize, backend=level_backend)
    others = [0, 1, 3, 4, 5]
    for got, want in zip(outs, clean, strict=True):
        assert torch.equal(got[others], want[others])
    want = reference(tokens, codebook, normalize=normalize)
    torch.testing.assert_close(outs, want, rtol=1e-4, atol=1e-5, equal_nan=True)
    (grad,) = torch.autograd.grad(outs[0].sum(), tokens)
    assert grad[others].isfinite().all()


def test_nan_of_an_early_strip_is_kept(level_backend):
    # 300 tokens: more than one strip of scores
    tokens, codebook = torch.randn(2, 300, 4), torch.randn(70, 4)
    tokens[1, 5] = math.nan
    pooled, weights = fdt_pool(tokens, codebook, backend=level_backend)
    assert pooled[1].isnan().all()
    assert weights[1].isnan().all()
    assert pooled[0].isfinite().all()


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e6])
def test_hottest_and_coldest(temperature, normalize, backend):
    tokens, codebook = torch.randn(4, 7, 8), torch.randn(50, 8)
    options = {"normalize": normalize, "backend": backend}
    pooled, weights = fdt_pool(tokens, codebook, temperature, **options)
    assert pooled.isfinite().all()
    best = (tokens @ codebook.T).amax(1)
    if temperature == 1e6:
        hot = torch.full_like(weights, 0.5 if normalize == "sigmoid" else 1 / 50)
        torch.testing.assert_close(weights, hot, rtol=1e-3, atol=0)
    elif normalize == "sigmoid":
        torch.testing.assert_close(weights, (best > 0).float())
    else:
        torch.testing.assert_close(pooled, codebook[best.argmax(1)])


def test_gates_that_are_all_shut_pool_to_nothing(level_backend):
    tokens, codebook = leaf(torch.ones(2, 3, 1)), leaf(-torch.arange(1.0, 40.0)[:, None])
    outs = fdt_pool(tokens, codebook, 1e-3, normalize="sigmoid", backend=level_backend)
    grads = torch.autograd.grad(outs, (tokens, codebook), [torch.ones_like(x) for x in outs])
    for x in (*outs, *grads):
        assert x.eq(0).all()


LAYOUTS = {
    "behind a class token": lambda x: x.new_full((5, 8, 6), math.nan)[:, 1:],
    "samples second": lambda x: x.new_full((7, 5, 6), math.nan).transpose(0, 1),
    "wider rows": lambda x: x.new_full((5, 7, 9), math.nan)[:, :, 1:7],
    "every other column": lambda x: x.new_full((5, 7, 12), math.nan)[:, :, ::2],
    "features before places": lambda x: x.new_full((5, 6, 7), math.nan).transpose(1, 2),
}


@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, backend):
    dtype = widest(backend)
    tokens, codebook = torch.randn(5, 7, 6, dtype=dtype), torch.randn(11, 6, dtype=dtype)
    mask = torch.rand(7, 5).T < 0.7
    results = []
    for x, codes in (
        (tokens, codebook),
        (LAYOUTS[how](tokens).copy_(tokens), codebook.T.contiguous().T),
    ):
        leaves = [x.requires_grad_(), codes.requires_grad_()]
        pooled, weights = fdt_pool(*leaves, mask=mask, backend=backend)
        # an upstream gradient that is one number in memory
        grads = torch.autograd.grad(pooled.sum() + weights.square().sum(), leaves)
        results.append((pooled, weights, *grads))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_lengths_are_a_mask(backend):
    tokens, codebook = torch.randn(4, 6, 3), torch.randn(9, 3)
    lengths = torch.tensor([0, 6, 2, 5])
    mask = torch.arange(6) < lengths[:, None]
    got = fdt_pool(tokens, codebook, lengths=lengths, padded_score=0.0, backend=backend)
    want = fdt_pool(tokens, codebook, mask=mask, padded_score=0.0, backend=backend)
    assert torch.equal(got[0], want[0])
    assert torch.equal(got[1], want[1])


def test_a_list_of_winners_that_is_not_ours_reads_nothing_outside(compiled_backend):
    tokens, codebook = torch.randn(2, 3, 4), torch.randn(5, 4)
    weights = torch.full((2, 5), 0.2)
    winners = torch.tensor([[3, -1, 2**31 - 1, -(2**31), 1]] * 2, dtype=torch.int32)
    dtokens, dcodebook, _ = torch.ops.mmfast.fdt_pool_bwd(
        torch.ones(2, 4), None, tokens, codebook, torch.tensor(1.0), weights, winners,
        "sparsemax", True, True, False, compiled_backend,
    )  # fmt: skip
    assert dtokens[:, [0, 2]].eq(0).all()
    assert dcodebook.isfinite().all()
