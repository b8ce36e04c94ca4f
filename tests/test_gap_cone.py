"""The cone of random networks against the published run and theory; mismatched pairs."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmfast import cone_effect, mismatch_simulation, mlp_cone
from mmfast.gap.cone import _ACTIVATIONS, mlp_layers, predicted_cosines
from mmfast.gap.mismatch import NINE_PAIRS, NINE_TARGETS
from mmfast.testing import unit_rows

GOLDEN = np.load(Path(__file__).parent / "golden" / "modality_gap.npz")
PUBLISHED = torch.from_numpy(GOLDEN["cone_mlp_relu.notebook_single_run_incl_diagonal"])


def test_relu_run_is_the_published_one():
    found = mlp_cone()
    assert found.measured.shape == (1, 26)
    assert (found.measured[0] - PUBLISHED).abs().max() < 0.02
    assert (found.predicted - PUBLISHED).abs().max() < 0.0125
    for n, name in ((math.inf, "offdiag"), (1024, "incl_diagonal_n1024")):
        c = torch.tensor(predicted_cosines("relu", 25, 512), dtype=torch.float64)
        expected = GOLDEN[f"cone_mlp_relu.closed_form_{name}"]
        np.testing.assert_allclose(c + (1 - c) / n, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["leaky_relu", "linear", "maxout", "sigmoid", "tanh"])
def test_activations_follow_their_theory(activation):
    found = mlp_cone(activation, depth=6, rows=200, seeds=(0, 1))
    # one network strays, more of them less
    assert (found.measured.mean(0) - found.predicted).abs().max() < 0.03
    assert found.predicted[0] == pytest.approx(1 / 200)


def test_depth_narrows_the_cone_as_published():
    assert predicted_cosines("sigmoid", 2, 512)[2] > 0.99
    assert max(predicted_cosines("linear", 25, 512)) < 0.05
    assert 0.5 < predicted_cosines("tanh", 25, 512)[25] < 0.6
    assert predicted_cosines("relu", 500, 512)[-1] == pytest.approx(1)


@pytest.mark.parametrize("activation", ["relu", "leaky_relu", "maxout", "sigmoid"])
def test_predictions_are_those_of_sampled_units(activation):
    # two fixed inputs at cosine 0.3, one layer so wide that its mean is the expectation
    h = torch.zeros(2, 8)
    h[0, 0], h[1, :2] = 2.0, torch.tensor([0.6, math.sqrt(4 - 0.36)])
    function, maps, moments = _ACTIVATIONS[activation]
    random = torch.Generator().manual_seed(0)
    made = [torch.randn(9, 200_000, generator=random) for _ in range(maps)]
    x = function(*(torch.addmm(w[-1], h, w[:-1]) for w in made)).double()
    variance, rho = 5.0, (4 * 0.3 + 1) / 5
    for got, expected in (
        (x.square().mean(), moments(variance, 1.0)),
        ((x[0] * x[1]).mean(), moments(variance, rho)),
    ):
        assert float(got) == pytest.approx(expected, rel=0.02)


def test_cone_effect_of_rows_and_of_encoders():
    rows = unit_rows(20, 6) + 0.4
    one = cone_effect(rows.numpy())
    cosines = F.normalize(rows, dim=1) @ F.normalize(rows, dim=1).T
    off = cosines[~torch.eye(20, dtype=torch.bool)]
    assert one.mean == pytest.approx(off.mean().item())
    assert one.min == pytest.approx(off.min().item())
    assert one.axes.square().sum().item() == pytest.approx(cosines.mean().item())
    assert math.isnan(one.std_of_means)
    assert math.isnan(one.initialization_share)
    asked = []

    def encoder(seed):
        asked.append(seed)
        return rows if seed else unit_rows(20, 6, seed=5)

    two = cone_effect(encoder, (0, 3))
    assert asked == [0, 3]
    assert two.stats[1].mean == one.mean
    assert two.mean == pytest.approx((two.stats[0].mean + one.mean) / 2)
    assert two.min == min(two.stats[0].min, one.min)
    assert two.std_of_means == pytest.approx(abs(two.stats[0].mean - one.mean) / math.sqrt(2))


def test_initialization_explains_what_theorem_2_says():
    width, depth = 128, 4

    def hidden(seed):
        return list(mlp_layers("relu", depth, 200, width, seed))[-1]

    def encoder(seed):
        random = torch.Generator().manual_seed(1000 + seed)
        return hidden(seed) @ torch.randn(width, width, generator=random)

    seeds = range(12)
    assert cone_effect(encoder, seeds).initialization_share > cone_effect(hidden, seeds).mean - 0.01
    # the same network every time explains nothing
    same = cone_effect(lambda seed: hidden(0), (0, 1, 2))
    assert same.initialization_share == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("mismatched", [False, True])
def test_six_pairs_golden(mismatched):
    found = mismatch_simulation(swap=(0, 1) if mismatched else None)
    np.testing.assert_array_equal(found.elevations, GOLDEN["sim6.angle_deg"])
    np.testing.assert_allclose(found.loss, GOLDEN["sim6.loss"][int(mismatched)], atol=1e-12)
    distance = GOLDEN["sim6.signed_distance"][int(mismatched)]
    np.testing.assert_allclose(found.distance, distance, rtol=0, atol=1e-12)
    best = found.elevations[found.loss.argmin(0)].abs().tolist()
    assert best == ([0, 0, 53, 65, 78] if mismatched else [0] * 5)


HEIGHTS = np.linspace(-1, 1, 100)


def nine_pairs(**options):
    elevations = np.degrees(np.arcsin(HEIGHTS))
    scales = (1, 5, 10, 50, 100, 500, 1000)
    return mismatch_simulation(
        NINE_PAIRS, elevations=elevations, logit_scales=scales, both_move=True, **options
    )


@pytest.mark.parametrize(
    ("options", "best"),
    [
        # as published
        ({"swap": None, "targets": NINE_TARGETS}, [0.01, 0.01, 0.01, 0.556, 0.818, 0.96, 0.98]),
        # what it meant
        ({"swap": (3, 8)}, [0.01, 0.01, 0.01, 0.717, 0.859, 0.98, 0.98]),
        ({"swap": None}, [0.01] * 7),
    ],
)
def test_nine_pairs_that_all_move(options, best):
    found = nine_pairs(**options)
    # heights +-z
    np.testing.assert_allclose(found.distance, 2 * HEIGHTS, atol=1e-12)
    height = np.abs(HEIGHTS[found.loss.argmin(0)])
    np.testing.assert_allclose(height, best, atol=5e-4)


def test_a_swap_of_texts_is_one_of_targets():
    targets = [0, 1, 2, 8, 4, 5, 6, 7, 3]
    np.testing.assert_allclose(
        nine_pairs(swap=(3, 8)).loss, nine_pairs(swap=None, targets=targets).loss, atol=1e-12
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cone_effect(unit_rows(1, 3)),
         "cone_effect: rows must have 2 rows or more, got 1"),
        (lambda: cone_effect(lambda seed: unit_rows(3, 3), ()),
         "cone_effect: seeds must hold one or more, got none"),
        (lambda: mlp_cone("swish"), "mlp_cone: activation must be one of 'relu', .*, got 'swish'"),
        (lambda: mlp_cone(depth=0), "mlp_cone: depth must be 1 or more, got 0"),
        (lambda: mlp_cone(seeds=()), "mlp_cone: seeds must be 1 or more, got 0"),
        (lambda: mismatch_simulation(azimuths=()),
         "mismatch_simulation: azimuths must hold one or more, got none"),
        (lambda: mismatch_simulation(swap=(0, 6)),
         r"swap must be two of the pairs 0 to 5, got \(0, 6\)"),
        (lambda: mismatch_simulation(targets=(0, 1, 2, 3, 4, 6)),
         r"targets must be 6 of the pairs 0 to 5, got \(0, 1, 2, 3, 4, 6\)"),
    ],
)  # fmt: skip
def test_messages(call, message):
    with pytest.raises(ValueError, match=message):
        call()
