"""cached: the gradients of the whole batch from chunks of it."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch
from torch import nn

import mmfast
from mmfast.testing import saved_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
B = 11  # chunks of 4 leave 3
# with the cache a weight's gradient would add up in bfloat16, and `cached` has none
CAST = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)


class Towers(nn.Module):
    """Both towers and the scale in one Module, with dropout in one of them."""

    def __init__(self, dropout=0.3, dtype=torch.float64):
        super().__init__()
        self.image = nn.Sequential(nn.Linear(6, 64), nn.Dropout(dropout), nn.GELU())
        self.text = nn.Embedding(9, 64)
        self.head = nn.Linear(64, 5)
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.bias = nn.Parameter(torch.tensor(-2.0))
        self.to(dtype)

    def forward(self, images, tokens):
        return self.embed_image(images), self.head(self.text(tokens).mean(1)), self.scale.exp()

    def embed_image(self, images):
        return self.head(self.image(images))

    def embed_text(self, tokens, drop=None):
        assert drop is None
        return {"text": self.head(self.text(tokens).mean(1))}


def batch(rows=B, dtype=torch.float64):
    return torch.randn(rows, 6, dtype=dtype), torch.randint(9, (rows, 3))


def in_pieces(model, images, tokens, chunk=4):
    """What `cached` stands for: every chunk with its graph, kept until the backward pass."""
    made = [model(*rows) for rows in zip(images.split(chunk), tokens.split(chunk), strict=True)]
    image, text, scales = zip(*made, strict=True)
    return torch.cat(image), torch.cat(text), scales[-1]


LOSSES = {
    "clip": lambda model, image, text, scale: mmfast.clip_loss(image, text, scale),
    # a parameter that reaches the loss past `cached`
    "siglip": lambda model, *rows: mmfast.siglip_loss(*rows, model.bias),
    "m2": lambda model, *rows: mmfast.m2_mix_loss(*rows, 0.3),
    "hard negatives, ids": lambda model, image, text, scale: mmfast.info_nce(
        image,
        text,
        scale,
        hard_negatives=torch.stack([image, text.flip(0)], 1),
        ids=torch.arange(B) // 2,
        same_id="positive",
    ),
}


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_gradients_are_those_of_one_graph(loss):
    model, (images, tokens) = Towers(), batch()
    state = torch.get_rng_state()
    expected = gradients(model, loss(model, *in_pieces(model, images, tokens)))
    torch.set_rng_state(state)
    got = gradients(model, loss(model, *mmfast.cached(model, images, tokens, chunk=4)))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)
    assert len(got) >= 7


@pytest.mark.parametrize("chunk", [1, 4, 11, 50])
def test_towers_of_their_own_and_any_chunk(chunk):
    model, (images, tokens) = Towers(dropout=0.0), batch()
    expected = gradients(model, mmfast.clip_loss(*model(images, tokens)))
    image = mmfast.cached(model.embed_image, images, chunk=chunk)
    # a dict goes in by name and a dict comes out; rows may be a list, or None
    text = mmfast.cached(lambda tokens, drop: model.embed_text(torch.stack(tokens), drop),
                         tokens=list(tokens), drop=None, chunk=chunk)["text"]  # fmt: skip
    got = gradients(model, mmfast.clip_loss(image, text, model.scale.exp()))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backward_inside", [False, True])
def test_autocast_counts_as_at_the_call(backward_inside):
    model, (images, tokens) = Towers(dtype=torch.float32), batch(dtype=torch.float32)

    def run(encode):
        torch.manual_seed(1)
        with CAST():
            rows = encode(model, images, tokens, chunk=4)
            loss = mmfast.clip_loss(*rows)
        assert rows[0].dtype == torch.bfloat16
        with CAST() if backward_inside else nullcontext():
            return gradients(model, loss)

    torch.testing.assert_close(run(mmfast.cached), run(in_pieces), rtol=1e-5, atol=1e-6)


def test_what_is_drawn_later_is_not_disturbed():
    model, (images, tokens) = Towers(), batch()
    loss = mmfast.clip_loss(*mmfast.cached(model, images, tokens, chunk=4))
    torch.randn(3)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_no_activations_are_kept():
    model, (images, tokens) = Towers(), batch(64)
    with saved_bytes(images, tokens, *model.parameters()) as plain:
        model(images, tokens)
    with saved_bytes(images, tokens, *model.parameters()) as saved:
        mmfast.cached(model, images, tokens, chunk=4)
    assert plain.bytes > 3 * 64 * 64 * 8
    assert saved.bytes == 0


def test_only_what_learns_is_encoded_again():
    model, (images, tokens) = Towers(), batch()
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        rows = mmfast.cached(model, images, tokens, chunk=4)
    assert not any(part.requires_grad for part in rows)
    model.requires_grad_(False)
    image, text, scale = mmfast.cached(model, images, tokens, chunk=4)
    assert not image.requires_grad
    assert len(calls) == 6
    model.scale.requires_grad_()
    image, text, scale = mmfast.cached(model, images, tokens, chunk=4)
    mmfast.clip_loss(image, text, scale).backward()
    assert model.scale.grad is not None
    assert len(calls) == 12


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # dynamo, about itself
@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_with_the_same_dropout_in_both_passes(fullgraph):
    encoder, rows = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.5)), torch.randn(B, 6)
    step = torch.compile(lambda rows: mmfast.cached(encoder, rows, chunk=4), fullgraph=fullgraph)
    image = step(rows)
    image.sum().backward()
    torch.testing.assert_close(encoder[0].bias.grad, 2.0 * (image != 0).sum(0))


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        ([torch.ones(4, 2)], {"chunk": 0}, ValueError, "chunk must be from 1, got 0"),
        ([torch.ones(4, 2)], {"chunk": 2.0}, TypeError, "chunk must be an int, got float"),
        ([], {"chunk": 2}, ValueError, "same number of rows, not 0; got none"),
        ([torch.ones(0, 2)], {"chunk": 2}, ValueError, "not 0; got 0 in input 0"),
        (
            [torch.ones(4, 2)],
            {"x": torch.ones(3), "chunk": 2},
            ValueError,
            "same number of rows, not 0; got 4 in input 0, 3 in input x",
        ),
        ([{"a": torch.ones(4)}], {"chunk": 2}, TypeError, "input 0 must have rows, got dict"),
        ([0.5], {"chunk": 2}, TypeError, "input 0 must have rows, got float"),
        ([torch.tensor(1.0)], {"chunk": 2}, TypeError, "input 0 must have rows, got Tensor"),
        (
            [torch.ones(4, 2, requires_grad=True)],
            {"chunk": 2},
            ValueError,
            "input 0 must not require grad; what made it belongs to the encoder",
        ),
        (
            [[torch.ones(2, requires_grad=True)]],
            {"chunk": 2},
            ValueError,
            "input 0 must not require grad",
        ),
    ],
)
def test_inputs_that_do_not_fit(inputs, options, error, message):
    with pytest.raises(error, match=f"^cached: .*{message}"):
        mmfast.cached(nn.Linear(2, 2), *inputs, **options)


@pytest.mark.parametrize(
    ("encoder", "error", "message"),
    [
        (lambda x: x.sum(0), ValueError, r"a row for each of 2 rows, or a 0-dim tensor, got \[5\]"),
        (lambda x: (x, None), TypeError, "encoder must return tensors, got NoneType"),
        (lambda x: x.sum(), ValueError, "must be the same for every chunk, got from 5 to 25"),
        (
            lambda x: (x,) * (1 + int(x[0, 0])),
            ValueError,
            "as many tensors for every chunk, got 3 after 1",
        ),
    ],
)
def test_outputs_that_do_not_fit(encoder, error, message):
    with pytest.raises(error, match=f"^cached: .*{message}"):
        mmfast.cached(encoder, torch.arange(20.0).reshape(4, 5) // 5, chunk=2)


def test_scale_that_is_nan_flows_through():
    image, scale = mmfast.cached(lambda x: (x, torch.tensor(torch.nan)), torch.ones(4, 2), chunk=2)
    assert scale.isnan()
    assert image.shape == (4, 2)
