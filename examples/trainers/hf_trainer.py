"""transformers' CLIPModel in its Trainer, on emoji and their names; the import is what changed.

python examples/trainers/hf_trainer.py       needs pip install 'mmfast[transformers]'
"""

import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import TensorDataset
from transformers import CLIPConfig, Trainer, TrainingArguments

from mmfast.integrations.transformers import CLIPModel  # was: from transformers import CLIPModel

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data

STEPS, PAIRS, LENGTH, END = 15, 32, 24, 1
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}
SIZES["num_attention_heads"] = 2
TEXT = {"vocab_size": 256, "max_position_embeddings": LENGTH, "eos_token_id": END}
VISION = {"image_size": 32, "patch_size": 8}


def collate(rows: list[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, object]:
    images, tokens = (torch.stack(column) for column in zip(*rows, strict=True))
    return {"pixel_values": images, "input_ids": tokens, "return_loss": True}


def bytes_of(name: str) -> list[int]:
    """A tokenizer that needs no download: bytes, then the end, then padding."""
    text = list(name.encode()[: LENGTH - 1])
    return text + [END] + [0] * (LENGTH - 1 - len(text))


def main() -> list[float]:
    pairs = data.load().take(torch.arange(PAIRS))
    images = torch.from_numpy(pairs.thumbnails).permute(0, 3, 1, 2) / 255
    tokens = torch.tensor([bytes_of(name) for name in pairs.names])
    torch.manual_seed(0)
    config = CLIPConfig(text_config=SIZES | TEXT, vision_config=SIZES | VISION, projection_dim=64)
    with tempfile.TemporaryDirectory() as folder:
        options = TrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=PAIRS, learning_rate=1e-3,
            logging_steps=1, report_to=[], save_strategy="no", disable_tqdm=True, use_cpu=True,
            dataloader_pin_memory=False, lr_scheduler_type="constant",
        )  # fmt: skip
        trainer = Trainer(
            CLIPModel(config), options, collate, train_dataset=TensorDataset(images, tokens)
        )
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"transformers: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    return losses


if __name__ == "__main__":
    main()
