"""The border of the CUDA functions in mmfast._C, on machines without a card: what is refused.

`Pretend` makes arrays that say they are on a card: CPU tensors whose DLPack capsule is rewritten.
They are stopped by a check or by the launch, before anybody reads them.
"""

import ctypes

import pytest
import torch

from mmfast import _dispatch

core = getattr(_dispatch, "core", None)
HAS_CUDA = core is not None and core.build_info()["cuda"] != "no"
pytestmark = [
    pytest.mark.skipif(core is None, reason="no compiled core here"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a card would run into these arrays"),
]
built = pytest.mark.skipif(not HAS_CUDA, reason="this build has no CUDA")
CPU, CUDA = 1, 2


class Pretend:
    def __init__(self, tensor, device=0, kind=CUDA, exported=CUDA):
        self.tensor, self.device, self.kind, self.exported = tensor, device, kind, exported
        self.streams = []

    def __dlpack_device__(self):
        return self.kind, self.device

    def __dlpack__(self, *, stream=None):
        self.streams.append(stream)
        capsule = self.tensor.__dlpack__()
        address = ctypes.pythonapi.PyCapsule_GetPointer
        address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
        # the capsule begins with the data's address, then the kind of device and its number
        where = (ctypes.c_int32 * 2).from_address(address(capsule, b"dltensor") + 8)
        where[:] = self.exported, self.device
        return capsule


def forward(**changes):
    given = {
        "a": Pretend(torch.ones(4, 3)),
        "b": Pretend(torch.ones(4, 3)),
        "lam": Pretend(torch.ones(1)),
        "out": Pretend(torch.empty(4, 3)),
        "stream": 0,
    }
    core.slerp_cuda_forward(**{**given, **changes})


def backward(**changes):
    given = {name: Pretend(torch.ones(4, 3)) for name in ("g", "a", "b", "da", "db")}
    given |= {"lam": Pretend(torch.ones(4)), "dlam": Pretend(torch.empty(4)), "stream": 0}
    core.slerp_cuda_backward(**{**given, **changes})


def project(**changes):
    given = {"x": Pretend(torch.ones(4, 3)), "out": Pretend(torch.empty(4, 3)), "stream": 0}
    core.sparsemax_cuda_forward(**{**given, **changes})


def project_backward(**changes):
    given = {name: Pretend(torch.ones(4, 3)) for name in ("g", "p", "dx")}
    core.sparsemax_cuda_backward(**{**given, "stream": 0, **changes})


@pytest.mark.skipif(HAS_CUDA, reason="this build has CUDA")
def test_build_without_cuda():
    for function in (forward, backward, project, project_backward):
        with pytest.raises(RuntimeError, match=r"^this build of mmfast\._C has no CUDA$"):
            function()


@built
def test_launch_without_a_card_names_op_and_shape():
    with pytest.raises(RuntimeError, match=r"^slerp: CUDA launch failed for \[4, 3\] float32: \w+"):
        forward()
    expected = r"^slerp backward: CUDA launch failed for \[4, 3\] float32: \w+"
    for missing in ({}, {"da": None, "db": None}, {"dlam": None}):
        with pytest.raises(RuntimeError, match=expected):
            backward(**missing)


@built
def test_sparsemax_is_launched_or_refused():
    with pytest.raises(RuntimeError, match=r"^sparsemax: CUDA launch failed for \[4, 3\] float32"):
        project()
    expected = r"^sparsemax backward: CUDA launch failed for \[4, 3\] float32"
    with pytest.raises(RuntimeError, match=expected):
        project_backward()
    with pytest.raises(ValueError, match="out must be on a CUDA device"):
        project(out=torch.ones(4, 3))
    for name in ("g", "dx"):
        with pytest.raises(ValueError, match="all arrays must be on one device"):
            project_backward(**{name: Pretend(torch.ones(4, 3), 1)})


@built
def test_arrays_are_taken_without_waiting_for_a_stream():
    arrays = {name: Pretend(torch.ones(4, 3)) for name in ("a", "b", "out")}
    with pytest.raises(RuntimeError, match="launch failed"):
        forward(**arrays)
    assert all(array.streams == [-1] for array in arrays.values())


@built
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"a": torch.ones(4, 3)}, ValueError, "a must be on a CUDA device"),
        ({"out": torch.ones(4, 3)}, ValueError, "out must be on a CUDA device"),
        ({"a": Pretend(torch.ones(4, 3), exported=CPU)}, ValueError, "a must be on a CUDA device"),
        ({"a": None}, ValueError, "a must be given, and not empty"),
        ({"out": None}, ValueError, "out must be given"),
        ({"b": Pretend(torch.ones(4, 3), 1)}, ValueError, "all arrays must be on one device"),
        ({"lam": Pretend(torch.ones(1), 1)}, ValueError, "all arrays must be on one device"),
        ({"b": Pretend(torch.ones(4, 2))}, ValueError, r"b must be \[4, 3\], got \[4, 2\]"),
        ({"b": Pretend(torch.ones(4, 3).double())}, TypeError, "b has the wrong element type"),
        ({"lam": Pretend(torch.ones(3))}, ValueError, "lam must have 4 elements, got 3"),
        ({"lam": Pretend(torch.ones(4).half())}, TypeError, "lam has the wrong element type"),
        ({"a": Pretend(torch.ones(3, 4).T)}, ValueError, "a must have inner stride 1"),
        ({"stream": -1}, TypeError, "incompatible function arguments"),
    ],
)
def test_refused_arrays(changes, error, message):
    with pytest.raises(error, match=message):
        forward(**changes)


@built
def test_refused_gradients():
    with pytest.raises(ValueError, match="dlam must have 4 elements, got 1"):
        backward(dlam=Pretend(torch.empty(1)))
    with pytest.raises(ValueError, match="all arrays must be on one device"):
        backward(da=Pretend(torch.ones(4, 3), 1))
    with pytest.raises(ValueError, match="g must be given"):
        backward(g=None)


def test_arrays_of_a_card_are_refused_by_the_cpu_functions():
    x = torch.ones(4, 3)
    with pytest.raises(ValueError, match="b must be on the CPU"):
        core.slerp_forward(x, Pretend(x), torch.ones(1), torch.empty(4, 3), 1)
