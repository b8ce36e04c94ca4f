"""transformers' models with our loss: outputs, gradients, no logits, Trainer."""

import inspect

import pytest
import torch

pytestmark = pytest.mark.usefixtures("one_thread")
B = 6
TEXT = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "bos_token_id": 62,
    "eos_token_id": 63,
    "pad_token_id": 0,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
NAMES = ["CLIPModel", "SiglipModel", "Siglip2Model"]


@pytest.fixture
def transformers(need):
    return need("transformers")


@pytest.fixture
def ours(need, transformers):
    return need("mmfast.integrations.transformers")


def pair(transformers, ours, name):
    """Our model and theirs, of the same parameters."""
    torch.manual_seed(0)
    vision = dict(VISION)
    options = {"projection_dim": 24} if name == "CLIPModel" else {}
    if name == "Siglip2Model":
        vision["num_patches"] = 4
        del vision["image_size"]
    config = getattr(transformers, name.replace("Model", "Config"))(
        text_config=dict(TEXT), vision_config=vision, **options
    )
    theirs = getattr(transformers, name)(config)
    model = getattr(ours, name)(config)
    model.load_state_dict(theirs.state_dict())
    return model, theirs


def batch(name):
    tokens = torch.randint(1, 62, (B, 8))
    tokens[:, -1] = 63
    if name == "Siglip2Model":
        return {
            "input_ids": tokens,
            "pixel_values": torch.randn(B, 4, 192),
            "pixel_attention_mask": torch.ones(B, 4, dtype=torch.int64),
            "spatial_shapes": torch.full((B, 2), 2),
        }
    return {"input_ids": tokens, "pixel_values": torch.randn(B, 3, 16, 16)}


@pytest.mark.parametrize("name", NAMES)
def test_value_gradients_and_outputs(transformers, ours, name):
    inputs = batch(name)
    inputs["pixel_values"] = inputs["pixel_values"].double()
    found = []
    for model in pair(transformers, ours, name):
        out = model.double()(**inputs, return_loss=True, output_hidden_states=True)
        out.loss.backward()
        found.append((out, {key: p.grad for key, p in model.named_parameters()}))
    (got, gradients), (expected, their_gradients) = found
    torch.testing.assert_close(got.loss, expected.loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, their_gradients, rtol=1e-9, atol=1e-12)
    assert sum(gradient is not None for gradient in gradients.values()) > 20
    assert type(got) is type(expected)
    assert got.logits_per_image is None
    assert got.logits_per_text is None
    torch.testing.assert_close(got.image_embeds, expected.image_embeds)
    torch.testing.assert_close(got.text_embeds, expected.text_embeds)
    assert len(got.vision_model_output.hidden_states) == 2
    torch.testing.assert_close(
        got.text_model_output.pooler_output, expected.text_model_output.pooler_output
    )


@pytest.mark.parametrize("name", NAMES)
def test_without_a_loss_it_is_the_parent(transformers, ours, name):
    inputs = batch(name)
    model, theirs = pair(transformers, ours, name)
    got, expected = model(**inputs), theirs(**inputs)
    torch.testing.assert_close(got.to_tuple(), expected.to_tuple())
    assert got.logits_per_image.shape == (B, B)
    assert inspect.signature(model.forward) == inspect.signature(theirs.forward)


def test_arguments_by_place_and_results_as_a_tuple(transformers, ours):
    model, _ = pair(transformers, ours, "CLIPModel")
    inputs = batch("CLIPModel")
    named = model(**inputs, return_loss=True)
    mask = torch.ones_like(inputs["input_ids"])
    placed = model(inputs["input_ids"], inputs["pixel_values"], mask, None, True, return_dict=False)
    assert isinstance(placed, tuple)
    with pytest.raises(TypeError, match="multiple values for keyword argument 'input_ids'"):
        model(inputs["input_ids"], **inputs, return_loss=True)
    torch.testing.assert_close(placed[0], named.loss)
    model.config.return_dict = False
    assert torch.equal(model(**inputs, return_loss=True)[0], named.loss)


def test_nothing_grows_with_the_square_of_the_batch(transformers, ours, largest_tensor):
    model, _ = pair(transformers, ours, "CLIPModel")
    rows = 1024
    features = torch.randn(rows, 24)

    def encode(*args, **kwargs):
        weight = model.logit_scale * 0 + 1
        return transformers.modeling_outputs.BaseModelOutputWithPooling(
            pooler_output=features * weight
        )

    model.get_image_features = model.get_text_features = encode
    with largest_tensor:
        model(**batch("CLIPModel"), return_loss=True).loss.backward()
    assert largest_tensor.bytes < rows * rows * 4 / 4


class Pairs(torch.utils.data.Dataset):
    """Pictures and captions, with a column that no model knows."""

    def __len__(self):
        return 2 * B

    def __getitem__(self, row):
        inputs = batch("CLIPModel")
        return {key: x[0] for key, x in inputs.items()} | {"caption": row}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_trainer_takes_the_same_two_steps(need, transformers, ours, tmp_path, dtype):
    need("accelerate")
    logs = []
    for model in pair(transformers, ours, "CLIPModel"):
        torch.manual_seed(1)
        options = transformers.TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=2,
            per_device_train_batch_size=B,
            learning_rate=1e-3,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
            bf16=dtype == "bfloat16",
            dataloader_pin_memory=False,
        )
        trainer = transformers.Trainer(
            model=model,
            args=options,
            train_dataset=Pairs(),
            data_collator=lambda rows: {
                **transformers.default_data_collator(rows),
                "return_loss": True,
            },
        )
        trainer.train()
        logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    ours_loss, their_loss = logs
    assert len(ours_loss) == 2
    assert ours_loss == pytest.approx(their_loss, rel=2e-2 if dtype == "bfloat16" else 1e-5)


def test_checkpoints_are_the_parents(transformers, ours, tmp_path):
    model, _ = pair(transformers, ours, "CLIPModel")
    model.save_pretrained(tmp_path)
    inputs = batch("CLIPModel")
    expected = model(**inputs, return_loss=True).loss
    for made in (ours.CLIPModel, transformers.AutoModel):
        again = made.from_pretrained(tmp_path)
        torch.testing.assert_close(again(**inputs, return_loss=True).loss, expected)
