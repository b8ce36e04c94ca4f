"""The examples of trainers run and learn."""

import runpy
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")
FOLDER = Path(__file__).resolve().parents[1] / "examples" / "trainers"
NEEDS = {
    "open_clip_loop": "open_clip",
    "hf_trainer": "accelerate",
    "sentence_transformers_train": "datasets",
    "lightning_train": "lightning",
    "grad_cache": "torch",
}


@pytest.mark.filterwarnings("ignore")  # of packages about each other
@pytest.mark.parametrize("name", NEEDS)
def test_example_learns(need, name, capsys, monkeypatch):
    need(NEEDS[name])
    # in this process, which has imported the package already
    monkeypatch.syspath_prepend(FOLDER)
    losses = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]()
    assert losses[-1] < 0.95 * losses[0]
    assert f"{losses[-1]:.3f} in" in capsys.readouterr().out


def test_ddp_example_learns():
    ran = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", FOLDER / "ddp.py"],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert ran.returncode == 0, ran.stderr
    first, last = (float(word) for word in ran.stdout.split()[2:5:2])
    assert last < 0.95 * first
