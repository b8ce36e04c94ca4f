import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from mmfast import _dispatch
from mmfast._dispatch import Backend, always, choose

X = torch.ones(1, 1)
FAST = Backend("fast", ("cpu",), lambda x: None if x.shape[0] < 8 else "it holds 7 rows", "")
FAR = Backend("far", ("cuda",), always, "")
EAGER = Backend("eager", (), always, "")


@pytest.fixture(autouse=True)
def _nothing_warned_yet(monkeypatch):
    monkeypatch.setattr(_dispatch, "_warned", set())


def test_first_that_can_run():
    assert choose("op", None, (FAR, FAST, EAGER), X) == "fast"
    assert choose("op", None, (EAGER, FAST), X) == "eager"


def test_by_name():
    assert choose("op", "eager", (FAST, EAGER), X) == "eager"


def test_by_name_gives_its_reason():
    expected = re.escape('op: backend="fast" cannot run here because it holds 7 rows')
    with pytest.raises(RuntimeError, match=expected):
        choose("op", "fast", (FAST, EAGER), torch.ones(8, 1))


def test_device_is_a_reason():
    expected = "op: .*far.* it runs on cuda, and the input is on cpu"
    with pytest.raises(RuntimeError, match=expected):
        choose("op", "far", (FAR, EAGER), X)


def test_rules_for_absent_devices():
    assert FAST.refusal(torch.ones(2, 2, device="meta")) is not None
    assert EAGER.refusal(torch.ones(2, 2, device="meta")) is None


def test_none_can_run_lists_every_reason():
    expected = "no backend can run here: fast cannot because it holds 7 rows; far cannot because"
    with pytest.raises(RuntimeError, match=expected):
        choose("op", None, (FAST, FAR), torch.ones(8, 1))


def test_unknown_name():
    expected = re.escape('op: backend must be None or one of "fast", "eager", got \'slow\'')
    with pytest.raises(ValueError, match=expected):
        choose("op", "slow", (FAST, EAGER), X)


def test_falling_back_warns_once():
    x = torch.ones(8, 1)
    with pytest.warns(UserWarning, match="op falls back to plain torch.*fast.*it holds 7 rows"):
        assert choose("op", None, (FAST, EAGER), x) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", None, (FAST, EAGER), x) == "eager"


def test_no_warning_where_nothing_faster_exists():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose("op", None, (FAR, EAGER), X) == "eager"
        assert choose("op", "eager", (FAST, EAGER), torch.ones(8, 1)) == "eager"


def test_the_interpreter_runs_by_name_only():
    interpreted = Backend("triton", ("cuda", "cpu"), always, "")
    assert choose("op", None, (interpreted, EAGER), X) == "eager"
    assert choose("op", "triton", (interpreted, EAGER), X) == "triton"


def test_reasons_of_triton(monkeypatch):
    monkeypatch.setattr(_dispatch, "_no_triton", None)
    monkeypatch.setattr(_dispatch, "INTERPRETED", True)
    assert _dispatch.triton_missing(X) is None
    expected = "its kernels compute in float32, and the input is float64"
    assert _dispatch.triton_missing(X.double()) == expected
    monkeypatch.setattr(_dispatch, "_no_triton", "the kernels are away")
    assert _dispatch.triton_missing(X) == "the kernels are away"


@pytest.mark.parametrize(
    ("version", "reason"),
    [
        ("3.6.0", None),
        ("3.10.1+git12", None),
        ("3.2.0", "its kernels need triton 3.6 or newer, and 3.2.0 is installed"),
        (None, 'triton is not installed (pip install "mmfast[triton]")'),
    ],
)
def test_the_triton_that_is_installed(monkeypatch, version, reason):
    monkeypatch.setattr(_dispatch, "find_spec", lambda name: version and object())
    monkeypatch.setattr(_dispatch.metadata, "version", lambda name: version)
    assert _dispatch._why_no_triton() == reason


def test_a_triton_of_unknown_version_may_run(monkeypatch):
    def unknown(name):
        raise _dispatch.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(_dispatch, "find_spec", lambda name: object())
    monkeypatch.setattr(_dispatch.metadata, "version", unknown)
    assert _dispatch._why_no_triton() is None


class OnCard:
    """Stands for a tensor on a card of compute capability `found`."""

    dtype, is_cuda, device = torch.float32, True, "cuda:0"

    def __init__(self, monkeypatch, found):
        card = SimpleNamespace(major=found[0], minor=found[1])
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)


def test_reasons_of_a_card(monkeypatch):
    monkeypatch.setattr(_dispatch, "_no_triton", None)
    monkeypatch.setattr(_dispatch, "INTERPRETED", False)
    monkeypatch.setattr(_dispatch, "core_error", None)
    core = SimpleNamespace(build_info=lambda: {"cuda": "13.0 for 80, 90a, 100a"})
    monkeypatch.setattr(_dispatch, "core", core, raising=False)
    for why_not in (_dispatch.triton_missing, _dispatch.cuda_missing):
        assert why_not(OnCard(monkeypatch, (8, 0))) is None
        assert why_not(OnCard(monkeypatch, (12, 1))) is None
        expected = "it needs compute capability >= 8.0, got 7.5"
        assert why_not(OnCard(monkeypatch, (7, 5))) == expected
    core.build_info = lambda: {"cuda": "no"}
    expected = "mmfast._C was built without CUDA: no nvcc from 11.8 on, or MMFAST_CUDA=OFF"
    assert _dispatch.cuda_missing(OnCard(monkeypatch, (9, 0))) == expected
    monkeypatch.setattr(_dispatch, "core_error", "the core is away")
    assert _dispatch.cuda_missing(OnCard(monkeypatch, (9, 0))) == "the core is away"


def test_missing_core_is_a_reason(monkeypatch):
    monkeypatch.setattr(_dispatch, "core_error", "the core is away")
    with pytest.warns(UserWarning, match="pairwise_lse falls back .* the core is away"):
        torch.testing.assert_close(_lse(None), torch.ones(1))
    with pytest.raises(RuntimeError, match='backend="cpp" cannot run here because the core is'):
        _lse("cpp")


def _lse(backend):
    import mmfast

    return mmfast.pairwise_lse(X, X, backend=backend)


def test_op_refuses_an_unknown_backend():
    with pytest.raises(ValueError, match="pairwise_lse_fwd has no backend 'eager'"):
        torch.ops.mmfast.pairwise_lse_fwd(X, X, X[0, 0], None, None, None, False, "eager")


def test_package_without_core_imports_and_computes():
    # a finder that knows no core stands for an install without it
    script = """
import sys, warnings
class NoCore:
    def find_spec(self, name, path=None, target=None):
        if name == "mmfast._C":
            raise ModuleNotFoundError("No module named 'mmfast._C'", name=name)
sys.meta_path.insert(0, NoCore())
import torch, mmfast
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        print(float(mmfast.pairwise_lse(torch.ones(1, 1), torch.ones(1, 1))))
print(len(caught), caught[0].message)
print(caught[0].filename)
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    first, second, caught, where = out.stdout.splitlines()
    assert first == second == "1.0"
    assert re.match("1 mmfast: pairwise_lse falls back .* mmfast._C is not installed", caught)
    # the warning points at the caller
    assert where == "<string>"


def test_a_broken_core_is_loud():
    script = """
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "mmfast._C":
            raise ImportError("undefined symbol", name=name)
sys.meta_path.insert(0, Broken())
import mmfast
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert out.returncode == 1
    assert "undefined symbol" in out.stderr


def test_import_is_light():
    script = "import sys, mmfast; print([m for m in ('triton', 'matplotlib') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
