"""What a wheel must do where nothing but its dependencies is: no compiler, no source, no triton.

`python -I tests/smoke.py` from anywhere; exits with a reason, or prints what it found.
"""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

import mmfast

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    home = Path(mmfast.__file__).resolve().parent
    assert home != ROOT / "mmfast", f"this is the source tree, {home}, and no installed package"
    compilers = [name for name in ("c++", "g++", "clang++", "nvcc", "cmake") if shutil.which(name)]
    assert not compilers, f"{', '.join(compilers)} would hide that a wheel needs none"
    for needed in ("py.typed", "_C.pyi", "kernels/fdt_pool.py"):
        assert (home / needed).exists(), f"{needed} is not in the wheel"

    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(96, 33, generator=generator), dim=1).requires_grad_()
        for _ in range(2)
    )
    scale = torch.tensor(50.0, requires_grad=True)
    leaves = image, text, scale
    loss = mmfast.clip_loss(image, text, scale)
    logits = scale * image @ text.T
    labels = torch.arange(len(image))
    dense = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    torch.testing.assert_close(loss, dense)
    for ours, theirs in zip(
        torch.autograd.grad(loss, leaves), torch.autograd.grad(dense, leaves), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    command = Path(sys.executable).with_name("mmfast")
    said = subprocess.run([command, "info"], capture_output=True, text=True, check=True).stdout
    assert "cpp     available" in said, said
    print(f"mmfast {mmfast.__version__} with torch {torch.__version__} from {home}: works")


if __name__ == "__main__":
    main()
