"""open_clip's model and loop on emoji and their names; the loss is the one line that changed.

python examples/trainers/open_clip_loop.py       needs pip install 'mmfast[open-clip]'

In open_clip's own script (open_clip_train/main.py) it is the line `loss = create_loss(args)`.
"""

import sys
from pathlib import Path

import open_clip
import torch

import mmfast

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data

STEPS, PAIRS, LENGTH = 15, 32, 24


def main() -> list[float]:
    torch.manual_seed(0)
    pairs = data.load().take(torch.arange(PAIRS))
    images = torch.from_numpy(pairs.thumbnails).permute(0, 3, 1, 2) / 255
    tokens = open_clip.SimpleTokenizer(context_length=LENGTH)(pairs.names)
    model = open_clip.CLIP(
        embed_dim=64,
        vision_cfg={"image_size": 32, "patch_size": 8, "width": 64, "head_width": 32, "layers": 1},
        text_cfg={"context_length": LENGTH, "width": 64, "heads": 2, "layers": 1},
        output_dict=True,
    )
    loss = mmfast.nn.ClipLoss()  # was: open_clip.ClipLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    losses = []
    for _ in range(STEPS):
        output = model(images, tokens)
        total = sum(loss(**output, output_dict=True).values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    print(f"open_clip: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    return losses


if __name__ == "__main__":
    main()
