"""A LightningModule with two heads on features of emoji and of their names.

python examples/trainers/lightning_train.py       needs pip install 'mmfast[lightning]'
"""

import sys
from pathlib import Path

import lightning
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import mmfast

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data
import heads

EPOCHS, BATCH = 1, 128


class TwoTowers(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.towers = heads.TwoHeads()
        self.scale = heads.Scale(1 / 0.07)
        self.losses: list[float] = []

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        image, text = self.towers(*batch)
        loss = mmfast.clip_loss(image, text, self.scale())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def main() -> list[float]:
    lightning.seed_everything(0, verbose=False)
    pairs = data.load()
    loader = DataLoader(TensorDataset(pairs.image, pairs.text), BATCH, shuffle=True)
    model = TwoTowers()
    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, loader)
    losses = model.losses
    print(f"lightning: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {EPOCHS} epoch")
    return losses


if __name__ == "__main__":
    main()
