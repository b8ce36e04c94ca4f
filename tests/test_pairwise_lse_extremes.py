import math

import pytest
import torch

from mmfast import pairwise_lse
from mmfast.ops.pairwise_lse import reference
from mmfast.testing import LAYOUTS, random_pair, strided, widest


def name_of(value):
    return getattr(value, "id", str(value).removeprefix("torch."))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("D", [1, 24])
@pytest.mark.parametrize("how", LAYOUTS)
def test_layouts_do_not_matter(how, D, dtype, backend):
    q, k = random_pair(50, 70, D, dtype=dtype, requires_grad=False)
    mask = torch.rand(70, 50).T < 0.5
    q_ids, k_ids = torch.arange(100)[::2], torch.arange(70).flip(0)
    options = {"scale": 2.0, "columns": True, "backend": backend}
    want = pairwise_lse(q, k, q_ids=q_ids.clone(), k_ids=k_ids, mask=mask.contiguous(), **options)
    views = [strided(x, how).requires_grad_() for x in (q, k)]
    got = pairwise_lse(*views, q_ids=q_ids, k_ids=k_ids, mask=mask, **options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    sum(x.sum() for x in got).backward()
    plain = [x.clone().requires_grad_() for x in (q, k)]
    sum(
        x.sum() for x in pairwise_lse(*plain, q_ids=q_ids, k_ids=k_ids, mask=mask, **options)
    ).backward()
    for view, x in zip(views, plain, strict=True):
        torch.testing.assert_close(view.grad, x.grad, rtol=1e-5, atol=1e-6)


def test_expanded_rows_and_mask(backend):
    q, k = torch.randn(1, 8).expand(20, 8), torch.randn(30, 8)
    mask = (torch.arange(30) % 3 > 0).expand(20, 30)
    rows = pairwise_lse(q, k, mask=mask, backend=backend)
    torch.testing.assert_close(rows, reference(q, k, mask=mask))
    assert torch.equal(rows, rows[:1].expand(20))


def test_expanded_upstream_gradient(backend):
    q, k = random_pair(6, 7, dtype=widest(backend))
    rows = pairwise_lse(q, k, backend=backend)
    rows.backward(torch.ones(1, dtype=q.dtype).expand(6))
    torch.testing.assert_close(q.grad, torch.autograd.grad(reference(q, k).sum(), q)[0])


def test_one_tensor_as_both_sides(backend):
    x, _ = random_pair(9, 1, 4, dtype=widest(backend))
    ids = torch.arange(9)
    pairwise_lse(x, x, 2.0, q_ids=ids, k_ids=ids, backend=backend).sum().backward()
    y = x.detach().clone().requires_grad_()
    reference(y, y, 2.0, q_ids=ids, k_ids=ids).sum().backward()
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("sign", [1, -1], ids=["identical", "antipodal"])
@pytest.mark.parametrize("scale", [1000.0, 1e6], ids=str)
def test_coldest_temperatures(scale, sign, dtype, level_backend):
    q = torch.zeros(70, 4, dtype=dtype)
    q[:, 0] = 1.0
    rows, columns = pairwise_lse(q, sign * q, scale, columns=True, backend=level_backend)
    want = torch.full((70,), sign * scale + math.log(70))
    torch.testing.assert_close(rows, want)
    torch.testing.assert_close(columns, want)


def test_rows_of_one_tile_far_apart(level_backend):
    # a maximum shared by a tile would leave all rows but the loudest with a sum of zero
    q = torch.diag(torch.tensor([1e-3, 1.0, 1e2, 1e4]))
    k = torch.cat([torch.ones(20, 4), -torch.ones(20, 4)])
    rows, columns = pairwise_lse(q, k, columns=True, backend=level_backend)
    exact = reference(q.double(), k.double(), columns=True)
    torch.testing.assert_close((rows.double(), columns.double()), exact, rtol=1e-6, atol=1e-6)


def test_very_different_halves_of_a_row(level_backend):
    q = torch.ones(3, 1)
    k = torch.cat([torch.full((300, 1), -1e4), torch.full((300, 1), 1e4)])
    for keys in (k, k.flip(0)):
        rows = pairwise_lse(q, keys, backend=level_backend)
        torch.testing.assert_close(rows, torch.full((3,), 1e4 + math.log(300)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_long_sums_do_not_drift(dtype, level_backend):
    # partial sums of a row meet at every tile: a factor near one, but not one, would add up
    q, k = (torch.ones(size, 1, dtype=dtype) for size in (6001, 6000))
    rows, columns = pairwise_lse(q, k, columns=True, backend=level_backend)
    for sums, terms in ((rows, 6000), (columns, 6001)):
        want = torch.full_like(sums, 1 + math.log(terms))
        torch.testing.assert_close(sums, want, rtol=0, atol=3e-6)


def test_zero_rows(level_backend):
    q = torch.zeros(5, 7, requires_grad=True)
    rows = pairwise_lse(q, torch.ones(9, 7), 100.0, backend=level_backend)
    torch.testing.assert_close(rows, torch.full((5,), math.log(9)))
    rows.sum().backward()
    torch.testing.assert_close(q.grad, torch.full((5, 7), 100.0))


def test_zero_scale(level_backend):
    q, k = random_pair(5, 9, dtype=torch.float32)
    scale = torch.tensor(0.0, requires_grad=True)
    rows = pairwise_lse(q, k, scale, backend=level_backend)
    torch.testing.assert_close(rows, torch.full((5,), math.log(9)))
    rows.sum().backward()
    torch.testing.assert_close(scale.grad, (q @ k.T).mean(1).sum())
    assert q.grad.eq(0).all()


def test_negative_scale(level_backend):
    q, k = random_pair(17, 33, 5, dtype=widest(level_backend))
    torch.testing.assert_close(
        pairwise_lse(q, k, -3.0, columns=True, backend=level_backend),
        pairwise_lse(-q, k, 3.0, columns=True, backend=level_backend),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=name_of)
def test_largest_values_of_half_types(dtype, level_backend):
    # bfloat16 squares leave float32's range, float16 squares do not
    large = torch.finfo(dtype).max if dtype == torch.float16 else 1e18
    q = torch.full((3, 2), large, dtype=dtype)
    k = torch.tensor([[1.0, 0.0], [0.5, 0.25]], dtype=dtype)
    rows = pairwise_lse(q, k, backend=level_backend)
    torch.testing.assert_close(rows, q[:, 0].float())


@pytest.mark.parametrize("how", ["ids", "mask"])
def test_everything_left_out(how, level_backend):
    q, k = random_pair(20, 20, 4, dtype=torch.float32)
    scale = torch.tensor(2.0, requires_grad=True)
    same = torch.zeros(20, dtype=torch.int64)
    options = {"q_ids": same, "k_ids": same} if how == "ids" else {"mask": torch.zeros(20, 20) > 0}
    rows, columns = pairwise_lse(q, k, scale, columns=True, backend=level_backend, **options)
    assert rows.eq(-math.inf).all()
    assert columns.eq(-math.inf).all()
    torch.autograd.backward((rows, columns), (torch.ones(20), torch.ones(20)))
    assert q.grad.eq(0).all()
    assert k.grad.eq(0).all()
    assert scale.grad == 0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_a_wrong_row_keeps_to_itself(value, dtype, level_backend):
    q, k = random_pair(70, 90, 8, dtype=dtype, requires_grad=False)
    mask = torch.ones(70, 90, dtype=torch.bool)
    # row 33 is wrong, and columns 10, 50 and 89 do not look at it
    mask[33, [10, 50, 89]] = False
    options = {"mask": mask, "columns": True, "backend": level_backend}
    rows, columns = pairwise_lse(q, k, 2.0, **options)
    q[33, 3] = value
    got_rows, got_columns = pairwise_lse(q, k, 2.0, **options)
    others = torch.arange(70) != 33
    # up to rounding: their tile may be summed with more care than before
    torch.testing.assert_close(got_rows[others], rows[others])
    torch.testing.assert_close(got_columns[[10, 50, 89]], columns[[10, 50, 89]])
    want_rows, want_columns = reference(q, k, 2.0, mask=mask, columns=True)
    torch.testing.assert_close(got_rows[33], want_rows[33], equal_nan=True)
    torch.testing.assert_close(got_columns, want_columns, equal_nan=True)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf], ids=str)
def test_a_wrong_key_keeps_to_itself(value, level_backend):
    q, k = random_pair(70, 90, 8, dtype=torch.float32, requires_grad=False)
    q_ids, k_ids = torch.arange(70) % 2, torch.arange(90) % 2
    options = {"q_ids": q_ids, "k_ids": k_ids, "columns": True, "backend": level_backend}
    rows, columns = pairwise_lse(q, k, 2.0, **options)
    k[41, 3] = value
    got_rows, got_columns = pairwise_lse(q, k, 2.0, **options)
    # rows with an odd id leave every odd key out
    torch.testing.assert_close(got_rows[1::2], rows[1::2])
    others = torch.arange(90) != 41
    torch.testing.assert_close(got_columns[others], columns[others])
    want = reference(q, k, 2.0, q_ids=q_ids, k_ids=k_ids, columns=True)
    torch.testing.assert_close((got_rows, got_columns), want, equal_nan=True)


def test_nan_scale_flows(backend):
    q, k = random_pair(dtype=widest(backend))
    assert pairwise_lse(q, k, torch.tensor(math.nan), backend=backend).isnan().all()
