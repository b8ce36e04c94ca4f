"""nn.FDT and fdt_loss: golden vectors, the published parameter names, the schedule, messages."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmfast import clip_loss
from mmfast.losses.fdt import fdt_loss, fdt_temperature
from mmfast.nn import FDT
from mmfast.ops.fdt_pool import fdt_pool
from mmfast.testing import leaf

GOLDEN = np.load(Path(__file__).parent / "golden" / "fdt.npz")
# the cases that begin at the tokens, before the query map
MAPPED = sorted(key.rpartition(".")[0] for key in GOLDEN.files if "qmap_0_weight" in key)
OP = "fdt_pool"
STEP = "contrastive_B7_Ni11_Nt5_D13_C37"


def golden(case, name):
    return torch.from_numpy(GOLDEN[f"{case}.{name}"])


def assert_golden(got, case, name, atol=1e-10):
    np.testing.assert_allclose(
        got.detach().numpy(), GOLDEN[f"{case}.{name}"], rtol=0, atol=atol, err_msg=name
    )


def published(image_dim=3, text_dim=5, codes=6, dim=4, dtype=torch.float32):
    """A state_dict as the published trainer saves it, towers and scales included."""
    random = torch.Generator().manual_seed(1)
    shapes = {
        "space_dict": (codes, dim),
        "logit_scale": (1,),
        "logit_scale_sd": (1,),
        "visual.conv1.weight": (2, 3, 4, 4),
        "encode_text.positional_embedding": (8, 2),
    }
    for model, width in (("img_query_model", image_dim), ("txt_query_model", text_dim)):
        shapes |= {
            f"{model}.q_map.0.weight": (width,),
            f"{model}.q_map.0.bias": (width,),
            f"{model}.q_map.1.weight": (dim, width),
            f"{model}.q_map.1.bias": (dim,),
            f"{model}.q_map.3.weight": (dim,),
            f"{model}.q_map.3.bias": (dim,),
            f"{model}.q_map.4.weight": (dim, dim),
            f"{model}.q_map.4.bias": (dim,),
        }
    return {
        name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
        for name, shape in shapes.items()
    }


@pytest.mark.parametrize("case", MAPPED)
def test_golden_from_tokens_to_features(case, backend):
    codes = golden(case, "sd")
    width = len(golden(case, "qmap_0_weight"))
    state = published(width, width, *codes.shape, torch.float64) | {"space_dict": codes}
    for layer in (0, 1, 3, 4):
        for kind in ("weight", "bias"):
            for model in ("img_query_model", "txt_query_model"):
                state[f"{model}.q_map.{layer}.{kind}"] = golden(case, f"qmap_{layer}_{kind}")
    fdt = FDT.from_published(state, temperature=golden(case, "temperature").item(), backend=backend)
    tokens = leaf(golden(case, "ft"))
    for encode in (fdt.encode_image, fdt.encode_text):
        features, weights = encode(tokens)
        assert_golden(features, case, "att_ft")
        assert_golden(weights, case, "att_weight")
        gradients = torch.autograd.grad(features, (tokens, fdt.codebook), golden(case, "upstream"))
        assert_golden(gradients[0], case, "grad_ft")
        assert_golden(gradients[1], case, "grad_sd")


def test_golden_contrastive_step(backend):
    image, text, codes, log_scale = (
        leaf(golden(STEP, name)) for name in ("q_img", "q_txt", "sd", "logit_scale_log")
    )
    options = {"padded_score": 0.0, "backend": backend}
    image_features, image_weights = fdt_pool(image, codes, **options)
    text_features, text_weights = fdt_pool(text, codes, mask=golden(STEP, "valid"), **options)
    assert_golden(image_weights, STEP, "w_img")
    assert_golden(text_weights, STEP, "w_txt")
    assert_golden(F.normalize(image_features), STEP, "f_img", atol=1e-9)
    loss = fdt_loss(image_features, text_features, log_scale, backend=backend)
    assert loss.item() == pytest.approx(golden(STEP, "loss").item(), abs=1e-12)
    names = ("q_img", "q_txt", "sd", "logit_scale_log")
    inputs = (image, text, codes, log_scale)
    for name, got in zip(names, torch.autograd.grad(loss, inputs), strict=True):
        assert_golden(got, STEP, f"grad_{name}")


def test_left_out_padding_is_the_other_form(backend):
    text, codes, valid = (golden(STEP, name) for name in ("q_txt", "sd", "valid"))
    _, weights = fdt_pool(text, codes, mask=valid, backend=backend)
    assert_golden(weights, STEP, "w_txt_if_inf_masked")


def test_the_cut_scale_has_an_uncut_gradient():
    # two unit pairs: d loss / d scale is known, so the scale and what it sends back are seen
    image, text = torch.eye(2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    log_scale = leaf(golden("scale_clamp", "log_scale"))
    loss = fdt_loss(image, 0.9 * text + 0.1 * text.flip(0), log_scale)
    off = torch.tensor([0.9, 0.1], dtype=torch.float64)
    off /= off.norm()
    margin = (off[0] - off[1]).item()
    cut = golden("scale_clamp", "value_after_clamp").item()
    assert loss.item() == pytest.approx(math.log1p(math.exp(-cut * margin)), rel=1e-9)
    (got,) = torch.autograd.grad(loss, log_scale)
    upstream = -margin / (1 + math.exp(cut * margin))
    # per unit of upstream the published gradient, exp of the uncut parameter
    factor = golden("scale_clamp", "grad_log_scale").item() / golden("scale_clamp", "upstream")
    assert factor == pytest.approx(200)
    assert got.item() == pytest.approx(upstream * factor.item(), rel=1e-6)


def test_below_the_cut_it_is_clip_loss_of_unit_rows(backend):
    image, text = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    log_scale = leaf(torch.tensor(1.5, dtype=torch.float64))
    ids = torch.tensor([0, 1, 2, 0, 3, 4])
    options = {"ids": ids, "same_id": "positive", "reduction": "none", "backend": backend}
    got = fdt_loss(image, text, log_scale, **options)
    expected = clip_loss(F.normalize(image), F.normalize(text), log_scale.exp(), **options)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
    a, b = (torch.autograd.grad(x.sum(), log_scale)[0] for x in (got, expected))
    torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)
    lower = fdt_loss(image, text, log_scale, largest_scale=2.0)
    torch.testing.assert_close(lower, fdt_loss(image, text, math.log(2)))


def test_zero_rows_have_a_loss_and_gradients():
    image = leaf(torch.zeros(3, 4))
    loss = fdt_loss(image, torch.eye(3, 4), 0.0)
    assert loss.item() == pytest.approx(math.log(3))
    assert torch.autograd.grad(loss, image)[0].isfinite().all()


def test_forward_is_both_encoders_and_masks_hide_padding(backend):
    fdt = FDT(3, 5, codes=20, dim=8, temperature=0.5, backend=backend)
    patches, words = torch.randn(4, 6, 3), torch.randn(4, 7, 5)
    valid = torch.arange(7) < torch.tensor([7, 3, 1, 5])[:, None]
    (image, image_weights), (text, text_weights) = fdt(patches, words, text_mask=valid)
    assert image.shape == text.shape == (4, 8)
    assert image_weights.shape == text_weights.shape == (4, 20)
    torch.testing.assert_close(image_weights.sum(1), torch.ones(4))
    for row, n in enumerate((7, 3, 1, 5)):
        alone = fdt.encode_text(words[row : row + 1, :n])[0]
        torch.testing.assert_close(alone, text[row : row + 1])
    shown = valid.new_ones(4, 6)
    assert torch.equal(fdt(patches, words, image_mask=shown)[0][0], image)
    loss = fdt_loss(image, text, 1.0)
    loss.backward()
    for name, parameter in fdt.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("pool", ["mean", "sum"])
def test_options_reach_the_pool(pool):
    options = {"pool": pool, "normalize": "softmax", "padded_score": 0.0}
    fdt = FDT(3, 5, codes=6, dim=4, temperature=0.5, **options, backend="eager")
    words, mask = torch.randn(2, 3, 5), torch.tensor([[True, True, False]]).expand(2, 3)
    queries = fdt.text_query(words)
    expected = fdt_pool(queries, fdt.codebook, 0.5, mask=mask, **options, backend="eager")
    for a, b in zip(fdt.encode_text(words, mask), expected, strict=True):
        assert torch.equal(a, b)


def test_autocast_runs():
    fdt = FDT(3, 5, codes=16, dim=8, temperature=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        (image, _), (text, _) = fdt(torch.randn(4, 6, 3), torch.randn(4, 7, 5))
        loss = fdt_loss(image, text, 1.0)
    loss.backward()
    assert loss.dtype == torch.float32
    assert fdt.codebook.grad.isfinite().all()


def test_compiles_whole():
    torch._dynamo.reset()
    fdt = FDT(3, 5, codes=12, dim=4, temperature=0.5)
    patches, words = torch.randn(4, 6, 3), torch.randn(4, 7, 5)

    def run(patches, words):
        (image, _), (text, _) = fdt(patches, words)
        return fdt_loss(image, text, 1.0)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for fdt.temperature in (0.5, 0.25):
        got, expected = compiled(patches, words), run(patches, words)
        torch.testing.assert_close(got, expected)
        a, b = (torch.autograd.grad(x, fdt.codebook)[0] for x in (got, expected))
        torch.testing.assert_close(a, b)


def test_state_dict_holds_the_temperature():
    a, b = (FDT(3, 5, codes=6, dim=4) for _ in range(2))
    a.temperature = 0.1
    b.load_state_dict(a.state_dict())
    assert b.temperature == 0.1
    tokens = torch.randn(2, 3, 5)
    assert torch.equal(a.encode_text(tokens)[0], b.encode_text(tokens)[0])
    assert set(dict(a.named_parameters())) == {
        "codebook",
        *(
            f"{query}.{layer}.{kind}"
            for query in ("image_query", "text_query")
            for layer in (0, 1, 3, 4)
            for kind in ("weight", "bias")
        ),
    }
    assert "codes=6, dim=4, temperature=0.1" in repr(a)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_published_names_find_their_places(prefix):
    state = published()
    fdt = FDT.from_published({prefix + name: x for name, x in state.items()}, temperature=7.0)
    assert (fdt.temperature, fdt.padded_score) == (7.0, 0.0)
    assert (fdt.image_dim, fdt.text_dim) == (3, 5)
    assert torch.equal(fdt.codebook, state["space_dict"])
    for ours, theirs in (("image", "img"), ("text", "txt")):
        expected = {
            name.removeprefix(f"{theirs}_query_model.q_map."): x
            for name, x in state.items()
            if name.startswith(theirs)
        }
        got = getattr(fdt, f"{ours}_query").state_dict()
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], x) for name, x in expected.items())
    # a copy, which trains
    with torch.no_grad():
        fdt.codebook += 1
    assert not torch.equal(fdt.codebook, state["space_dict"])
    assert all(parameter.requires_grad for parameter in fdt.parameters())


def test_published_options_and_types():
    state = published(dtype=torch.float64)
    fdt = FDT.from_published(state, padded_score=-1.0, normalize="softmax")
    assert (fdt.padded_score, fdt.normalize) == (-1.0, "softmax")
    assert {x.dtype for x in fdt.parameters()} == {torch.float64}


def test_from_published_refuses_what_does_not_fit():
    state = published()
    with pytest.raises(ValueError, match=r"got unknown names: projector\.bn1\.bias, step$"):
        FDT.from_published(state | {"projector.bn1.bias": torch.zeros(1), "step": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"checkpoint\['model'\]\), got unknown names: model$"):
        FDT.from_published({"model": state})
    del state["txt_query_model.q_map.4.bias"]
    with pytest.raises(ValueError, match=r"got missing names: txt_query_model\.q_map\.4\.bias$"):
        FDT.from_published(state)
    state = published() | {"img_query_model.q_map.1.weight": torch.zeros(4, 2)}
    expected = r"img_query_model\.q_map\.1\.weight must be \[4, 3\] beside .*, got \[4, 2\]"
    with pytest.raises(ValueError, match=expected):
        FDT.from_published(state)


def test_temperature_schedule():
    assert fdt_temperature(0) == fdt_temperature(1_000_000) == 1000
    steps = [0, 2699, 2700, 5399, 5400, 13_500, 2_700_000]
    got = [fdt_temperature(step, decay=0.3) for step in steps]
    assert got == pytest.approx([1000, 1000, 300, 300, 90, 2.43, 0.01])
    assert fdt_temperature(7, first=4, decay=0.5, every=2, least=1.5) == 1.5
    assert fdt_temperature(3, first=4, decay=0.5, every=2, least=1.5) == 2


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": -1}, ValueError, "step must be positive or 0, got -1"),
        ({"step": "1"}, TypeError, "step must be a number, got str"),
        ({"every": 0}, ValueError, "every must be a number from 1, got 0"),
        ({"first": 0.0}, ValueError, "first must be positive, got 0.0"),
        ({"decay": 1.5}, ValueError, r"decay must be in \(0, 1\], got 1.5"),
        ({"decay": 0}, ValueError, "decay must be positive, got 0"),
        ({"first": 1.0, "least": 2.0}, ValueError, "least must be at most first=1.0, got 2.0"),
    ],
)
def test_temperature_messages(options, error, message):
    with pytest.raises(error, match=f"fdt_temperature: {message}"):
        fdt_temperature(**{"step": 1} | options)


@pytest.mark.parametrize("name", ["image_dim", "text_dim", "codes", "dim"])
def test_size_messages(name):
    with pytest.raises(ValueError, match=f"FDT: {name} must be a number from 1, got 0"):
        FDT(**{"image_dim": 3, "text_dim": 4, "codes": 5, "dim": 6} | {name: 0})


def test_other_messages():
    with pytest.raises(ValueError, match="FDT: temperature must be positive, got 0"):
        FDT(3, 5, codes=4, dim=2, temperature=0)
    fdt = FDT(3, 5, codes=4, dim=2)
    with pytest.raises(ValueError, match=r"image tokens must be \[B, N, 3\], got \[2, 4, 5\]"):
        fdt.encode_image(torch.zeros(2, 4, 5))
    with pytest.raises(ValueError, match=r"text tokens must be \[B, N, 5\], got \[4, 5\]"):
        fdt.encode_text(torch.zeros(4, 5))
    rows = torch.eye(3)
    with pytest.raises(ValueError, match="fdt_loss: largest_scale must be positive, got 0"):
        fdt_loss(rows, rows, 1.0, largest_scale=0)
    with pytest.raises(ValueError, match="fdt_loss: log_scale must have one element"):
        fdt_loss(rows, rows, torch.zeros(2))
    with pytest.raises(ValueError, match=r"fdt_loss: text must be \[3, 3\] like image"):
        fdt_loss(rows, rows[:2], 1.0)
