from dataclasses import FrozenInstanceError

import pytest
import torch

from mmfast import Landscape, shift_landscape
from mmfast.testing import find_case

GIVEN = {"shifts": [-0.5, 0.5], "temperatures": [1.0, 0.1]}


@pytest.fixture(autouse=True)
def _no_compiled_code_of_another_test():
    torch.compiler.reset()


def pair():
    made = find_case("shift_landscape", "chunks").inputs()
    return made["x"], made["y"]


def test_opcheck(compiled_backend):
    x, y = pair()
    side = [torch.rand(70) + 0.5, torch.randn(2, 70), torch.rand(2, 70) + 0.5]
    inputs = (x, *side, y, *side, [1.0, 3.0, 4.0], 30, compiled_backend)
    torch.library.opcheck(torch.ops.mmfast.shift_landscape.default, inputs)


# what the interpreter's maximum says of a row of NaN
@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")
def test_compile_without_graph_breaks(backend):
    x, y = pair()

    def best(x, y):
        found = shift_landscape(2 * x, y, **GIVEN, chunk=30, backend=backend)
        return found.symmetric, found.distance

    compiled = torch.compile(best, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, y), best(x, y), rtol=1e-6, atol=1e-6)
    # values are not looked at: no row of zeros is refused
    x[5] = 0
    assert compiled(x, y)[0].isnan().all()


def test_no_gradient_and_inference_mode(backend):
    x, y = (side.requires_grad_() for side in pair())
    got = shift_landscape(x, y, **GIVEN, backend=backend)
    assert not got.symmetric.requires_grad
    with torch.inference_mode():
        again = shift_landscape(x, y, **GIVEN, backend=backend)
    assert torch.equal(again.symmetric, got.symmetric)


def test_autocast_casts_as_a_matmul(backend):
    x, y = pair()
    want = shift_landscape(x.bfloat16(), y.bfloat16(), **GIVEN, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        got = shift_landscape(x, y, **GIVEN, backend=backend)
    assert torch.equal(got.symmetric, want.symmetric)
    assert torch.equal(got.distance, want.distance)


def test_a_landscape_is_frozen():
    one = torch.ones(1)
    found = Landscape(one, one, torch.tensor([[1.0]]), torch.tensor([[3.0]]), one)
    assert found.symmetric.item() == 2
    with pytest.raises(FrozenInstanceError):
        found.distance = one
