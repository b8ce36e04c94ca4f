import json
import os
import signal
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import settings
from torch.utils._python_dispatch import TorchDispatchMode

if not torch.cuda.is_available():
    # triton reads this when it is imported: without a card its kernels run in the interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from mmfast import _dispatch
from mmfast.ops import BACKENDS
from mmfast.testing import cpu_level, import_trainer, poisoned_memory

# the same examples on every machine, and no failure because a machine is busy
settings.register_profile("mmfast", deadline=None, derandomize=True, max_examples=30)
settings.load_profile("mmfast")

# a shell has what it starts in the background ignore Ctrl-C, and tests send it
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

PROBE = torch.ones(1, 1)
LEVELS = [] if _dispatch.core_error else _dispatch.core.isa_levels()


def pytest_configure(config):
    # what torch.compile itself does with other parts of torch
    for message in (".torch.jit.", ".* should not be instantiated. Methods on autograd functions"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}:DeprecationWarning")
    if _dispatch.core_error:
        # an install without the core is tested too, and its one warning has its own test
        config.addinivalue_line("filterwarnings", "ignore:mmfast. .* falls back to plain torch")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The interpreter needs seconds a case: half types take the quick ones, the rest is slow."""
    for item in items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        half = params.get("dtype") in (torch.bfloat16, torch.float16)
        if (
            "triton" in item.name
            and half
            and "quick" not in getattr(params.get("case"), "tags", ())
        ):
            item.add_marker(pytest.mark.slow)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test of float64 is none for a backend that refuses it (`test_triton_refuses_float64`)."""
    try:
        return (yield)
    except RuntimeError as error:
        if "triton" in item.name and "the input is float64" in str(error):
            pytest.skip("float64, which triton refuses")
        raise


def backends(op="pairwise_lse"):
    """The names of the backends that can run here."""
    return [row.name for row in BACKENDS[op] if row.refusal(PROBE, PROBE) is None]


def pytest_generate_tests(metafunc):
    """Backends are those of the op that a file names as OP, unless a test names its own."""
    names = backends(getattr(metafunc.module, "OP", "pairwise_lse"))
    params = {
        "backend": names,
        "compiled_backend": [name for name in names if name != "eager"] or ["none"],
        "level_backend": [x for x in names if x != "cpp"] + [f"cpp-{level}" for level in LEVELS],
    }
    own = [mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")]
    for fixture in metafunc.fixturenames:
        if fixture in params and not any(fixture == x or fixture in tuple(x) for x in own):
            metafunc.parametrize(fixture, params[fixture], indirect=True)


@pytest.fixture
def backend(request):
    return request.param


@pytest.fixture
def compiled_backend(request):
    """Every backend that goes through the torch ops."""
    if request.param == "none":
        pytest.skip("no compiled backend here: " + str(_dispatch.core_error))
    return request.param


@pytest.fixture
def level_backend(request):
    """Every backend, and the C++ one at every level of this machine."""
    name, _, level = request.param.partition("-")
    if not level:
        yield name
        return
    with cpu_level(level):
        yield name


class LargestTensor(TorchDispatchMode):
    """`bytes` of the largest tensor that torch makes inside the block, forward or backward."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(x, torch.Tensor) and not function.is_view:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return made


@pytest.fixture
def largest_tensor():
    return LargestTensor()


@pytest.fixture(scope="session")
def need():
    """Gives a trainer's package, imported at its first use: some take seconds."""

    def package(name):
        try:
            with warnings.catch_warnings(action="ignore"):  # of packages about each other
                return import_trainer(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, name.partition(".")[0]):
                raise
            pytest.skip(f"needs {name}, which is not installed")

    return package


@pytest.fixture
def one_thread():
    """For models so small that threads wait for each other longer than they compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    with poisoned_memory():
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(scope="module")
def as_script(request):
    """What the test's own file prints, as JSON, when it is run: its worlds of processes."""
    ran = subprocess.run(
        [sys.executable, request.module.__file__],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)
