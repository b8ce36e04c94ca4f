"""Our loss in a LightningModule: the same two steps as the dense form's, and with `cached`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mmfast

pytestmark = pytest.mark.usefixtures("one_thread")


def dense(image, text, scale):
    logits, labels = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def whole(tower, rows):
    return tower(rows)


def in_chunks(tower, rows):
    return mmfast.cached(tower, rows, chunk=3)


@pytest.fixture
def fit(need):
    """Two steps of a two-tower model; its parameters."""
    lightning = need("lightning")

    class Model(lightning.LightningModule):
        def __init__(self, loss, encode):
            super().__init__()
            self.image, self.text = nn.Linear(6, 5), nn.Linear(4, 5)
            self.log_scale = nn.Parameter(torch.tensor(2.0))
            self.loss, self.encode = loss, encode

        def training_step(self, batch, _):
            image, text = (
                F.normalize(self.encode(tower, rows))
                for tower, rows in zip((self.image, self.text), batch, strict=True)
            )
            return self.loss(image, text, self.log_scale.exp())

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.5)

    def run(loss, encode):
        lightning.seed_everything(0, verbose=False)
        model = Model(loss, encode)
        data = torch.utils.data.TensorDataset(torch.randn(16, 6), torch.randn(16, 4))
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
        assert trainer.global_step == 2
        return [p.detach() for p in model.parameters()]

    return run


# lightning about torch, and about a loader without workers
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .train_dataloader. does not have many workers")
@pytest.mark.parametrize("encode", [whole, in_chunks])
def test_the_same_training(fit, encode):
    torch.testing.assert_close(fit(mmfast.clip_loss, encode), fit(dense, whole))
