import math

import pytest
import torch

from mmfast import fdt_pool
from mmfast.testing import find_case, leaf, widest

NAMES = ("tokens", "codebook", "temperature")


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


def pair(dtype=torch.float32, *, requires_grad=True):
    tokens, codebook = torch.randn(4, 6, 5, dtype=dtype), torch.randn(9, 5, dtype=dtype)
    return tokens.requires_grad_(requires_grad), codebook.requires_grad_(requires_grad)


def test_opcheck(compiled_backend):
    made = find_case("fdt_pool", "odd_width").inputs()
    leaves = [made[name].detach() for name in NAMES]
    normalize = made["normalize"]
    inputs = (*leaves, made["mask"], normalize, made["padded_score"], compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.fdt_pool_fwd.default, inputs)
    pooled, weights, winners = torch.ops.mmfast.fdt_pool_fwd(*inputs)
    for g_weights, *needs in (
        (torch.randn_like(weights), True, True, True),
        (None, True, False, True),
    ):
        g = torch.randn_like(pooled), g_weights
        torch.library.opcheck(
            torch.ops.mmfast.fdt_pool_bwd.default,
            (*g, *leaves, weights, winners, normalize, *needs, compiled_backend),
        )


@pytest.mark.parametrize("pool", ["max", "mean"])
def test_compile_without_graph_breaks(pool, backend):
    made = find_case("fdt_pool", "odd_width").inputs()
    # NaN would be cut out of the gradient of 2 * tokens only where it is not looked at
    made["tokens"] = leaf(made["tokens"].nan_to_num(1.0))
    made["logarithm"] = made.pop("temperature").detach().log().requires_grad_()

    def loss(tokens, codebook, logarithm, **options):
        pooled, weights = fdt_pool(
            2 * tokens, codebook, logarithm.exp(), pool=pool, backend=backend, **options
        )
        return pooled.square().sum() + weights.square().mean()

    leaves = [made[name] for name in ("tokens", "codebook", "logarithm")]
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(**made)
    torch.testing.assert_close(value, loss(**made))
    want = torch.autograd.grad(loss(**made), leaves)
    torch.testing.assert_close(torch.autograd.grad(value, leaves), want, rtol=1e-5, atol=1e-5)


def test_inductor():
    # of the others it makes one call
    tokens, codebook = pair()

    def loss(tokens, codebook):
        return fdt_pool(2 * tokens, codebook, backend="cpp")[0].square().sum()

    value = torch.compile(loss, fullgraph=True)(tokens, codebook)
    got = torch.autograd.grad(value, (tokens, codebook))
    want = torch.autograd.grad(loss(tokens, codebook), (tokens, codebook))
    torch.testing.assert_close(got, want)


def test_compile_takes_a_changing_temperature_and_size(backend):
    compiled = torch.compile(
        lambda x, codes, t, lengths: fdt_pool(x, codes, t, lengths=lengths, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    for N, temperature in ((5, 1.0), (6, 0.5), (7, 2.0)):
        tokens, codebook = torch.randn(3, N, 4), torch.randn(N + 3, 4)
        lengths = torch.tensor([1, 2, N])
        want = fdt_pool(tokens, codebook, temperature, lengths=lengths, backend="eager")
        torch.testing.assert_close(compiled(tokens, codebook, temperature, lengths), want)


def test_autocast_casts_as_a_matmul(backend):
    tokens, codebook = pair()
    with torch.autocast("cpu", torch.bfloat16):
        pooled, weights = fdt_pool(tokens, codebook, 0.3, backend=backend)
        double = fdt_pool(tokens.double(), codebook.double(), backend="eager")
    assert (pooled.dtype, weights.dtype) == (torch.bfloat16, torch.float32)
    assert double[0].dtype == torch.float64
    want = fdt_pool(tokens.bfloat16(), codebook.bfloat16(), 0.3, backend=backend)
    assert torch.equal(pooled, want[0])
    assert torch.equal(weights, want[1])
    (grad,) = torch.autograd.grad(pooled.sum(), codebook)
    assert grad.dtype == torch.float32
    assert grad.abs().sum() > 0


def test_func_grad(backend):
    tokens, codebook = pair(widest(backend), requires_grad=False)
    temperature = torch.tensor(0.5, dtype=torch.float64)

    def loss(*leaves):
        pooled, weights = fdt_pool(*leaves, backend=backend)
        return pooled.square().sum() + weights.square().sum()

    got = torch.func.grad(loss, argnums=(0, 1, 2))(tokens, codebook, temperature)
    leaves = [leaf(x) for x in (tokens, codebook, temperature)]
    loss(*leaves).backward()
    torch.testing.assert_close(got, tuple(x.grad for x in leaves))


def test_double_backward_is_refused_only_when_it_happens(compiled_backend):
    tokens, codebook = pair()
    pooled, _ = fdt_pool(tokens, codebook, backend=compiled_backend)
    (grad,) = torch.autograd.grad(pooled.sum(), tokens, create_graph=True)
    assert grad.isfinite().all()
    expected = f'backend="{compiled_backend}" has no second derivative; pass backend="eager"'
    with pytest.raises(NotImplementedError, match=expected):
        grad.sum().backward()


def test_no_gradient_and_inference_mode(backend):
    tokens, codebook = pair(requires_grad=False)
    want = fdt_pool(tokens, codebook, backend=backend)
    assert not want[0].requires_grad
    with torch.inference_mode():
        got = fdt_pool(tokens, codebook, backend=backend)
    assert got[0].is_inference()
    assert torch.equal(got[0].clone(), want[0])
    assert torch.equal(got[1].clone(), want[1])


@pytest.mark.parametrize("id", ["many_codes", "all_survive", "few_codes"])
def test_same_bits_for_any_number_of_threads(id):
    pytest.importorskip("mmfast._C")
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            made = find_case("fdt_pool", id).inputs(torch.bfloat16)
            outs = fdt_pool(**made, backend="cpp")
            leaves = [made[name] for name in NAMES]
            results.append((*outs, *torch.autograd.grad(outs, leaves, [x.detach() for x in outs])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for x, y in zip(results[0], other, strict=True):
            assert torch.equal(x, y)


@pytest.mark.parametrize("normalize", ["sparsemax", "softmax", "sigmoid"])
def test_one_output_alone_has_a_gradient(normalize, backend):
    tokens, codebook = pair(widest(backend))
    options = {"normalize": normalize, "padded_score": -math.inf}
    for i in range(2):
        got, want = (
            torch.autograd.grad(
                fdt_pool(tokens, codebook, **options, backend=name)[i].square().sum(),
                (tokens, codebook),
            )
            for name in (backend, "eager")
        )
        torch.testing.assert_close(got, want)
