"""DistributedDataParallel: each rank has a share of the batch, and sees all of it as negatives.

torchrun --nproc-per-node=2 examples/trainers/ddp.py
"""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import mmfast

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data
import heads

STEPS, BATCH = 12, 128  # pairs of each rank


class Model(nn.Module):
    """The heads and the scale: what forward returns, DDP waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.heads, self.scale = heads.TwoHeads(), heads.Scale(1 / 0.07)

    def forward(self, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return *self.heads(image, text), self.scale()


def main() -> list[float]:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)
    model = DistributedDataParallel(Model())
    pairs = data.load()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for _ in range(STEPS):
        # one permutation on all ranks, of which each takes its share
        rows = torch.randperm(len(pairs))[: BATCH * dist.get_world_size()]
        batch = pairs.take(rows[dist.get_rank() :: dist.get_world_size()])
        output = model(batch.image, batch.text)
        loss = mmfast.clip_loss(*output, group=dist.group.WORLD)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if dist.get_rank() == 0:
        print(f"ddp: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    dist.destroy_process_group()
    return losses


if __name__ == "__main__":
    main()
