"""What an install puts where, and what it says when it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def setup(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "setup.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_missing_compiler_is_one_sentence(tmp_path):
    done = setup("build_ext", "--build-lib", tmp_path, "--build-temp", tmp_path, CXX="no-such-c++")
    assert done.returncode != 0
    message = done.stderr.strip().splitlines()[-1]
    assert message == (
        "mmfast: no C++ compiler found (no-such-c++); install one (g++ 12, say), name it in CXX, "
        "or set MMFAST_NO_EXT=1 to install without the compiled core."
    )


@pytest.fixture(scope="module")
def without_core(tmp_path_factory):
    folder = tmp_path_factory.mktemp("without_core")
    done = setup("build", "--build-base", folder, "--build-lib", folder / "lib", MMFAST_NO_EXT="1")
    assert done.returncode == 0, done.stderr
    return folder / "lib"


def test_kernels_are_a_part_of_mmfast(without_core):
    assert (without_core / "mmfast" / "kernels" / "__init__.py").exists()
    assert (without_core / "mmfast" / "py.typed").exists()
    assert (without_core / "mmfast" / "integrations" / "transformers.py").exists()
    assert [path.name for path in without_core.iterdir()] == ["mmfast"]
    assert not list((without_core / "mmfast").glob("_C*.so"))


def test_works_without_the_core(without_core, tmp_path):
    program = (
        "import sys, warnings, torch, mmfast, mmfast.cli\n"
        "optional = {'mmfast.gap', 'mmfast.integrations', 'matplotlib', 'scipy', 'transformers'}\n"
        "assert not optional & set(sys.modules)\n"
        "assert 'uniformity' in dir(mmfast)\n"
        "x = torch.randn(4, 3, requires_grad=True)\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    mmfast.clip_loss(x, x.detach(), 2.0).backward()\n"
        "    mmfast.clip_loss(x, x.detach(), 2.0)\n"
        "assert x.grad.isfinite().all()\n"
        "assert [str(w.message) for w in said if 'MMFAST_NO_EXT' in str(w.message)][1:] == []\n"
        "assert 'MMFAST_NO_EXT' in str(said[0].message)\n"
        "assert mmfast.uniformity(x).isfinite()\n"
        "mmfast.cli.main(['info'])\n"
    )
    # -S: an editable install of this tree would lend its core
    packages = Path(torch.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": f"{without_core}{os.pathsep}{packages}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "the compiled core mmfast._C is not installed" in done.stdout
