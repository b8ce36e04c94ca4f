"""m3_mix_loss and its Modules: what they add up, when, and with which lam."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from mmfast import clip_loss, l_mix_loss, m2_mix_loss, m3_mix_loss, v_mix_loss, vl_mix_loss
from mmfast.losses import m3_mix
from mmfast.nn import M2MixLoss, M3MixLoss
from mmfast.testing import leaf, saved_bytes, unit_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "m2mix.npz")
MIXES = {"v": v_mix_loss, "l": l_mix_loss, "vl": vl_mix_loss, "m2": m2_mix_loss}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def beta(alphas, seed):
    """lam for each of `alphas` as the loss draws them."""
    concentration = torch.tensor(alphas)[:, None].expand(-1, 2)
    return torch._sample_dirichlet(concentration, seeded(seed))[:, 0]


@pytest.fixture
def batch():
    return [leaf(unit_rows(9, 6, seed=seed)) for seed in (1, 2)]


def test_golden_total(monkeypatch):
    get = {k.rpartition(".")[2]: v for k, v in GOLDEN.items() if k.startswith("total_")}
    monkeypatch.setattr(m3_mix, "_draw", lambda *_: [torch.tensor(get["lam"])])
    x, y = (leaf(torch.from_numpy(get[name])) for name in "xy")
    module = M2MixLoss(weight=get["weight"].item(), m2_logit_scale=1 / get["tau2"].item())
    module.epoch = int(get["epoch"])
    u, v = (a / a.norm(dim=1, keepdim=True) for a in (x, y))
    loss = module(u, v, 1 / get["tau1"].item())
    assert loss.item() == pytest.approx(get["loss"].item(), abs=1e-12)
    for name, gradient in zip("xy", torch.autograd.grad(loss, (x, y)), strict=True):
        np.testing.assert_allclose(gradient.numpy(), get[f"grad_{name}"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("same_id", ["exclude", "positive"])
@pytest.mark.parametrize("epoch", [None, 0, 3])
def test_is_the_sum_of_its_parts(batch, epoch, same_id, backend):
    ids = torch.arange(9) // 2
    weights = {"v": 0.3, "l": 0.2, "vl": 0.7, "m2": 0.4}
    options = {"ids": ids, "reduction": "none", "backend": backend}
    got = m3_mix_loss(
        *batch, 20.0, m2_logit_scale=9.0, weights=weights, epoch=epoch, same_id=same_id,
        generator=seeded(4), **options,
    )  # fmt: skip
    expected = clip_loss(*batch, 20.0, same_id=same_id, **options)
    for (kind, mix), lam in zip(MIXES.items(), beta([0.5, 0.5, 0.5, 0.2], 4), strict=True):
        scale = 9.0 if kind == "m2" else 20.0
        part = mix(*batch, scale, lam, **options)
        expected = expected + weights[kind] / (1 if epoch is None else epoch + 1) * part
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_defaults_are_the_published_scripts(batch):
    got = m3_mix_loss(*batch, 100.0, generator=seeded(1))
    written = m3_mix_loss(
        *batch, 100.0, generator=seeded(1), m2_logit_scale=1 / 0.07,
        weights={"v": 0.05, "l": 0.05, "vl": 0.1, "m2": 0.01},
        alphas={"v": 0.5, "l": 0.5, "vl": 0.5, "m2": 0.2},
    )  # fmt: skip
    assert torch.equal(got, written)


def test_the_draw_follows_from_the_generator(batch):
    one, again, other = (m3_mix_loss(*batch, 10.0, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.isclose(one, other)
    # without one it is torch's own
    torch.manual_seed(3)
    from_default = m3_mix_loss(*batch, 10.0)
    torch.manual_seed(3)
    assert torch.equal(m3_mix_loss(*batch, 10.0), from_default)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 3.0])
def test_lam_is_beta_distributed(alpha):
    drawn = torch.stack(m3_mix._draw([alpha] * 4000, torch.zeros(1), seeded(0)))
    assert (drawn >= 0).all()
    assert (drawn <= 1).all()
    # five standard errors
    assert drawn.mean().item() == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(4000))
    assert drawn.var().item() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)


def test_a_kind_without_weight_is_neither_drawn_nor_computed(batch):
    random = seeded(5)
    before = random.get_state()
    got = m3_mix_loss(*batch, 10.0, weights={"v": 0.0}, generator=random)
    assert torch.equal(random.get_state(), before)
    assert torch.equal(got, clip_loss(*batch, 10.0))


def test_original_negatives_reach_the_mixes(batch):
    options = {"weights": {"v": 1.0}, "generator": seeded(1)}
    got = m3_mix_loss(*batch, 10.0, original_neg=True, **options)
    (lam,) = beta([0.5], 1)
    mix = v_mix_loss(*batch, 10.0, lam, original_neg=True)
    torch.testing.assert_close(got, clip_loss(*batch, 10.0) + mix)
    assert not torch.isclose(mix, v_mix_loss(*batch, 10.0, lam))


def test_modules_call_the_function(batch):
    module = M3MixLoss(weights={"vl": 0.5}, alphas={"vl": 2.0}, generator=seeded(1))
    module.epoch = 1
    losses = module(
        image_features=batch[0], text_features=batch[1], logit_scale=30.0, output_dict=True
    )
    expected = m3_mix_loss(
        *batch, 30.0, weights={"vl": 0.5}, alphas={"vl": 2.0}, epoch=1, generator=seeded(1)
    )
    assert list(losses) == ["contrastive_loss"]
    assert torch.equal(losses["contrastive_loss"], expected)
    m2 = M2MixLoss(generator=seeded(1))(*batch, 30.0)
    expected = m3_mix_loss(
        *batch, 30.0, weights={"m2": 0.01}, alphas={"m2": 0.5}, generator=seeded(1)
    )
    assert torch.equal(m2, expected)
    assert not module.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pair_alone(dtype, backend):
    image, text = (leaf(unit_rows(1, 4, seed=seed, dtype=dtype)) for seed in (1, 2))
    loss = m3_mix_loss(image, text, 100.0, backend=backend)
    assert loss.item() == 0
    for gradient in torch.autograd.grad(loss, (image, text)):
        assert not gradient.any()


def test_compiles_whole(batch, compiled_backend):
    torch._dynamo.reset()
    compiled = torch.compile(m3_mix_loss, fullgraph=True, backend="aot_eager")
    scale = torch.tensor(10.0)
    torch.manual_seed(1)
    got = compiled(*batch, scale, backend=compiled_backend)
    torch.manual_seed(1)
    expected = m3_mix_loss(*batch, scale, backend=compiled_backend)
    torch.testing.assert_close(got, expected)
    for a, b in zip(
        torch.autograd.grad(got, batch), torch.autograd.grad(expected, batch), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_no_matrix_is_made(compiled_backend, largest_tensor):
    n = 1024
    image, text = (leaf(unit_rows(n, 4, seed=seed, dtype=torch.float32)) for seed in (1, 2))
    # five sweeps keep their rows; one bool for each pair would already be more
    with largest_tensor, saved_bytes(image, text) as saved:
        m3_mix_loss(image, text, 10.0, backend=compiled_backend).backward()
    assert saved.bytes < n * n
    assert largest_tensor.bytes <= 2 * n * 4 * 4


Q = torch.zeros(5, 8)


@pytest.mark.parametrize(
    ("options", "kind", "sentence"),
    [
        ({"weights": {"w": 1}}, ValueError, "weights must be of 'v', 'l', 'vl' and 'm2', got 'w'"),
        ({"alphas": {"w": 1}}, ValueError, "alphas must be of 'v', 'l', 'vl' and 'm2', got 'w'"),
        ({"weights": {"v": -1}}, ValueError, "weights['v'] must be positive or 0, got -1"),
        ({"alphas": {"m2": 0}}, ValueError, "alphas['m2'] must be positive, got 0"),
        ({"alphas": {"m2": "1"}}, TypeError, "alphas['m2'] must be a number, got str"),
        ({"weights": {"v": math.inf}}, ValueError, "weights['v'] must be finite, got inf"),
        ({"epoch": -1}, ValueError, "epoch must be None or a number from 0, got -1"),
        ({"epoch": 0.5}, ValueError, "epoch must be None or a number from 0, got 0.5"),
        (
            {"m2_logit_scale": "1"},
            TypeError,
            "m2_logit_scale must be a number or a tensor, got str",
        ),
        ({"same_id": "drop"}, ValueError, "same_id must be 'exclude' or 'positive', got 'drop'"),
    ],
)
def test_errors(options, kind, sentence):
    with pytest.raises(kind) as raised:
        m3_mix_loss(Q, Q, 1.0, **options)
    assert str(raised.value) == f"m3_mix_loss: {sentence}"
