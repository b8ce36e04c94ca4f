import pytest
import torch

from mmfast import sample_negatives
from mmfast.testing import random_pair, widest


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


def test_opcheck(compiled_backend):
    q, k = random_pair(17, 13, 5, dtype=torch.float32, requires_grad=False)
    scale, seed = torch.tensor(2.0), torch.tensor(5)
    inputs = (q, k, scale, seed, torch.arange(17), torch.arange(13), compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.sample_negatives.default, inputs)


def test_compile_without_graph_breaks(backend):
    check_compiled(backend, "aot_eager")


def test_inductor_draws_as_the_definition():
    # of the others it makes one call
    check_compiled("eager", "inductor")


def check_compiled(backend, compiler):
    q, k = random_pair(40, 60, 5, dtype=torch.float32)

    def hardest(q, k, scale):
        return k[sample_negatives(2 * q, k, scale, backend=backend)]

    compiled = torch.compile(hardest, fullgraph=True, backend=compiler)
    for scale in (1.0, torch.tensor(2.5)):
        # so cold that the noise does not matter: compiled code may draw its seed otherwise
        scores = (q @ k.T).fill_diagonal_(-torch.inf)
        assert torch.equal(compiled(q, k, 1e5 * scale), k[scores.argmax(1)])
    # and each call draws anew
    first, second = compiled(q, k, 1.0), compiled(q, k, 1.0)
    assert not torch.equal(first, second)
    assert first.requires_grad


def test_compiled_code_lets_empty_rows_through(backend):
    x = torch.ones(3, 2)
    ids = torch.zeros(3, dtype=torch.int64)
    compiled = torch.compile(
        lambda x: sample_negatives(x, x, 1.0, q_ids=ids, k_ids=ids, backend=backend),
        fullgraph=True,
        backend="aot_eager",
    )
    assert compiled(x).eq(-1).all()


def test_no_gradient_and_inference_mode(backend):
    q, k = random_pair(9, 7, 4, dtype=widest(backend))
    scale = torch.tensor(2.0, requires_grad=True)
    torch.manual_seed(1)
    index = sample_negatives(q, k, scale, backend=backend)
    assert not index.requires_grad
    torch.manual_seed(1)
    with torch.inference_mode():
        assert torch.equal(sample_negatives(q, k, scale, backend=backend), index)


def test_func_grad_passes_by(backend):
    q, k = random_pair(9, 7, 4, dtype=widest(backend), requires_grad=False)

    def loss(q, k):
        return (q * k[sample_negatives(q, k, 1e4, backend=backend)]).sum()

    index = (q @ k.T).fill_diagonal_(-torch.inf).argmax(1)
    assert torch.equal(torch.func.grad(loss)(q, k), k[index])


def test_autocast_casts_as_a_matmul(backend):
    q, k = random_pair(33, 40, 16, dtype=torch.float32)
    torch.manual_seed(1)
    want = sample_negatives(q.bfloat16(), k.bfloat16(), 3.0, backend=backend)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        got = sample_negatives(q, k, 3.0, backend=backend)
    assert torch.equal(got, want)
