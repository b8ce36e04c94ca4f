"""SentenceTransformerTrainer: the first half of an emoji's name finds the second; the import of
the loss is what changed.

python examples/trainers/sentence_transformers_train.py
needs pip install 'mmfast[sentence-transformers]'
"""

import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers

# was: from sentence_transformers.losses import MultipleNegativesRankingLoss
from mmfast.integrations.sentence_transformers import MultipleNegativesRankingLoss

sys.path.insert(0, str(Path(__file__).parents[1] / "emoji"))
import data

STEPS, BATCH = 40, 64


def main() -> list[float]:
    names = [name.split() for name in data.load().names]
    words = sorted({word for name in names for word in name})
    halves = [(name[: len(name) // 2], name[len(name) // 2 :]) for name in names if len(name) > 1]
    rows = [{"anchor": " ".join(a), "positive": " ".join(b)} for a, b in halves]

    # vectors of words: a model that needs no download
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model = SentenceTransformer(
        modules=[StaticEmbedding(tokenizer, embedding_dim=64)], device="cpu"
    )
    with tempfile.TemporaryDirectory() as folder:
        options = SentenceTransformerTrainingArguments(
            folder, max_steps=STEPS, per_device_train_batch_size=BATCH, learning_rate=0.1,
            logging_steps=STEPS // 4, report_to=[], save_strategy="no", disable_tqdm=True,
            use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        loss = MultipleNegativesRankingLoss(model)
        trainer = SentenceTransformerTrainer(model, options, Dataset.from_list(rows), loss=loss)
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"sentence-transformers: loss {losses[0]:.3f} -> {losses[-1]:.3f} in {STEPS} steps")
    return losses


if __name__ == "__main__":
    main()
