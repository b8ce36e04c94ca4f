"""A batch of 1,024 pairs, with the activations of 128 of them at a time.

python examples/trainers/grad_cache.py
"""

import sys
from pathlib import Path

import torch

import mmfast

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data
import heads

STEPS, BATCH, CHUNK = 4, 1024, 128


def main() -> list[float]:
    torch.manual_seed(0)
    pairs = data.load()
    towers, scale = heads.TwoHeads(), heads.Scale(1 / 0.07)
    optimizer = torch.optim.AdamW([*towers.parameters(), *scale.parameters()], lr=1e-3)

    losses = []
    for _ in range(STEPS):
        batch = pairs.take(torch.randperm(len(pairs))[:BATCH])
        image = mmfast.cached(towers.image, batch.image, chunk=CHUNK)  # was: towers.image(...)
        text = mmfast.cached(towers.text, batch.text, chunk=CHUNK)
        loss = mmfast.clip_loss(image, text, scale())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"cached: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    return losses


if __name__ == "__main__":
    main()
