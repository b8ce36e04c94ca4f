import pytest
import torch

import mmfast
from mmfast import _dispatch
from mmfast.ops import BACKENDS
from mmfast.testing import (
    CASES,
    assert_within_budget,
    cases,
    cpu_level,
    poisoned_memory,
    saved_bytes,
)

EPS = torch.finfo(torch.float32).eps


def test_every_op_has_named_cases_with_reasons():
    assert CASES.keys() == BACKENDS.keys()
    for group in CASES.values():
        assert len({case.id for case in group}) == len(group)
        assert all(case.why for case in group)


@pytest.mark.parametrize("tag", ["quick", "full", "bench"])
def test_cases_by_tag(tag):
    assert cases("pairwise_lse", tag)
    assert all(tag in case.tags for case in cases("pairwise_lse", tag))


def test_inputs_are_reproducible_and_as_described():
    case = next(case for case in CASES["pairwise_lse"] if case.id == "mask")
    made, again, other = case.inputs(seed=1), case.inputs(seed=1), case.inputs(seed=2)
    assert torch.equal(made["q"], again["q"])
    assert not torch.equal(made["q"], other["q"])
    assert made["k"].stride(0) > case.D
    torch.testing.assert_close(made["q"].norm(dim=1), torch.full((case.N,), case.norm))
    assert made["mask"].shape == (case.N, case.M)
    assert (~made["mask"].any(1)).sum() >= 1
    assert (~made["mask"].any(0)).sum() >= 1
    assert all(made[name].is_leaf and made[name].requires_grad for name in ("q", "k", "scale"))


@pytest.fixture
def exact():
    return torch.randn(4096, dtype=torch.float64)


def test_budget_accepts_what_rounding_does(exact):
    eager = exact.float()
    got = exact * (1 + EPS * (torch.rand_like(exact) - 0.5))
    assert_within_budget("x", got, eager, exact, eps=EPS)


def test_budget_refuses_one_wrong_entry(exact):
    got = exact.clone()
    got[7] += 1e-3
    with pytest.raises(AssertionError, match="x: largest error"):
        assert_within_budget("x", got, exact.float(), exact, eps=EPS)


def test_budget_refuses_errors_everywhere(exact):
    # each below the largest one allowed, together too much
    got = exact + 1.5 * EPS * exact.abs().max() * torch.randn_like(exact).sign()
    with pytest.raises(AssertionError, match="x: norm of the error"):
        assert_within_budget("x", got, exact, exact, eps=EPS)


def test_budget_refuses_a_bias(exact):
    # as long as the error allowed, but of one sign: what a lost tile looks like
    got = exact + 1.5 * EPS * exact.norm() / exact.numel() ** 0.5
    with pytest.raises(AssertionError, match="x: mean error"):
        assert_within_budget("x", got, exact, exact, eps=EPS)


def test_budget_scales_with_eager(exact):
    noise = 1e-2 * torch.randn_like(exact)
    assert_within_budget("x", exact - 1.5 * noise, exact + noise, exact, eps=EPS)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget("x", exact - 3 * noise, exact + noise, exact, eps=EPS)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_budget_refuses_what_is_not_finite(exact, wrong):
    got = exact.clone()
    got[3] = wrong
    with pytest.raises(AssertionError, match="x: not finite"):
        assert_within_budget("x", got, exact, exact, eps=EPS)


@pytest.mark.parametrize("right", [torch.nan, torch.inf, -torch.inf])
def test_budget_wants_infinities_in_place(exact, right):
    exact[3] = right
    assert_within_budget("x", exact.float(), exact.float(), exact, eps=EPS)
    got = exact.clone()
    got[3] = 0.0
    with pytest.raises(AssertionError, match="x: an infinity or NaN is missing"):
        assert_within_budget("x", got, exact, exact, eps=EPS)


def test_budget_refuses_another_shape(exact):
    with pytest.raises(AssertionError, match="x: shape"):
        assert_within_budget("x", exact[:1], exact, exact, eps=EPS)


def _as_if_in_mmfast(expression):
    return eval(expression, {"torch": torch, "__name__": "mmfast.somewhere"})


@pytest.mark.parametrize(
    "expression",
    ["torch.empty(3)", "torch.empty_like(torch.ones(3))", "torch.ones(3).new_empty(3)"],
)
def test_poison_reaches_memory_of_mmfast_only(expression):
    with poisoned_memory():
        assert _as_if_in_mmfast(expression).isnan().all()
        # memory of this test is left alone
        x = torch.ones(4)
        assert torch.empty(4, out=x) is x
        assert x.eq(1).all()


def test_poison_ends(monkeypatch):
    from torch._C import TensorBase, _VariableFunctions

    monkeypatch.setattr(torch, "empty", _VariableFunctions.empty)
    monkeypatch.setattr(torch.Tensor, "new_empty", TensorBase.new_empty)
    with poisoned_memory():
        assert torch.empty is not _VariableFunctions.empty
    assert torch.empty is _VariableFunctions.empty
    assert torch.Tensor.new_empty is TensorBase.new_empty


def test_poison_of_integers():
    with poisoned_memory():
        x = _as_if_in_mmfast("torch.empty(3, dtype=torch.int64)")
    assert x.eq(torch.iinfo(torch.int64).min).all()


@pytest.mark.skipif(_dispatch.core_error is not None, reason=str(_dispatch.core_error))
def test_cpu_level_switches_and_comes_back():
    before = _dispatch.core.isa()
    for level in _dispatch.core.isa_levels():
        with cpu_level(level):
            assert _dispatch.core.isa() == level
        assert _dispatch.core.isa() == before
    with pytest.raises(ValueError, match="mmx"), cpu_level("mmx"):
        pass
    assert _dispatch.core.isa() == before


def test_saved_bytes_counts_each_storage_once():
    x = torch.randn(100, requires_grad=True)
    with saved_bytes() as saved:
        y = x.exp()
        (y * y).sum()
    # exp saves its result, which the product saves twice more
    assert saved.bytes == 400


def test_saved_bytes_leaves_inputs_out():
    x = torch.randn(100, requires_grad=True)
    with saved_bytes(x) as saved:
        (x * x).sum()
    assert saved.bytes == 0


def test_saved_bytes_sees_a_dense_loss():
    x = torch.randn(64, 4, requires_grad=True)
    with saved_bytes(x) as saved:
        mmfast.pairwise_lse(x, x.detach(), backend="eager")
    assert saved.bytes >= 64 * 64 * 4
