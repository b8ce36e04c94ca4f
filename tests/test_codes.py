"""code_usage and its picture: counts by hand, merging, messages."""

import math

import pytest
import torch

from mmfast.codes import CodeUsage, code_usage, plot_codes

WEIGHTS = torch.tensor(
    [
        [0.5, 0.5, 0.0, 0.0],
        [1.0, 0.0, 0.0, 0.0],
        [0.5, 0.25, 0.0, 0.25],
    ]
)


def test_counts_by_hand():
    usage = code_usage(WEIGHTS)
    assert usage.samples == 3
    assert usage.fired.tolist() == [3, 2, 0, 1]
    assert usage.mass.tolist() == [2.0, 0.75, 0.0, 0.25]
    assert usage.sizes.tolist() == [0, 1, 1, 1, 0]
    assert usage.dead.tolist() == [2]
    assert usage.codes_per_sample == 2
    assert usage.most_used(3).tolist() == [0, 1, 3]
    p = (2 / 3, 1 / 4, 1 / 12)
    assert usage.entropy == pytest.approx(-sum(x * math.log(x) for x in p))
    assert usage.effective_codes == pytest.approx(math.exp(usage.entropy))


def test_bounds_of_the_entropy():
    assert code_usage(torch.eye(5)).entropy == pytest.approx(math.log(5))
    assert code_usage(torch.eye(5)).effective_codes == pytest.approx(5)
    one = torch.zeros(7, 5)
    one[:, 2] = 1
    assert code_usage(one).entropy == 0


def test_parts_add_up_to_the_whole():
    weights = torch.rand(50, 9).softmax(1)
    weights[weights < 0.1] = 0
    whole = code_usage(weights)
    parts = code_usage(weights[:13]) + code_usage(weights[13:14]) + code_usage(weights[14:])
    assert parts.samples == whole.samples
    for name in ("fired", "sizes"):
        assert torch.equal(getattr(parts, name), getattr(whole, name))
    torch.testing.assert_close(parts.mass, whole.mass)
    # every sample is counted once, with as many codes as fire in it
    assert whole.sizes.sum() == 50
    assert (whole.sizes * torch.arange(10)).sum() == whole.fired.sum()


def test_threshold_and_low_precision_sums():
    usage = code_usage(torch.full((3000, 2), 0.5, dtype=torch.bfloat16), threshold=0.5)
    assert usage.fired.tolist() == [0, 0]
    assert usage.sizes.tolist() == [3000, 0, 0]
    # a sum in bfloat16 would stop at 128
    assert usage.mass.tolist() == [1500, 1500]


def test_usage_keeps_no_graph_and_no_matrix():
    usage = code_usage(WEIGHTS.clone().requires_grad_())
    for x in (usage.fired, usage.mass, usage.sizes):
        assert not x.requires_grad
        assert x.untyped_storage().nbytes() <= 8 * 5


def test_picture(tmp_path):
    figure = plot_codes(WEIGHTS, names=["a", "$b", "c"], most=3)
    axes = figure.axes[0]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["0", "1", "3"]
    assert [y.get_text() for y in axes.get_yticklabels()] == ["a", "$b", "c"]
    assert axes.images[0].get_array().tolist() == WEIGHTS[:, [0, 1, 3]].tolist()
    assert axes.get_xlabel() == "code, 3 of 4"
    figure.savefig(tmp_path / "codes.png")
    assert (tmp_path / "codes.png").stat().st_size > 5_000
    chosen = plot_codes(WEIGHTS.requires_grad_(), codes=torch.tensor([2, 1])).axes[0]
    assert chosen.images[0].get_array().tolist() == WEIGHTS[:, [2, 1]].tolist()
    assert chosen.get_ylabel() == "sample"


def test_messages():
    with pytest.raises(TypeError, match=r"code_usage: weights must be a torch\.Tensor, got list"):
        code_usage([[1.0]])
    with pytest.raises(ValueError, match=r"code_usage: weights must be 2-D \[B, C\], got \[3\]"):
        code_usage(torch.zeros(3))
    with pytest.raises(ValueError, match="can only add usages of 4 codes, got one of 5"):
        code_usage(WEIGHTS) + code_usage(torch.eye(5))
    with pytest.raises(ValueError, match="plot_codes: names must be B=3 words, got 1"):
        plot_codes(WEIGHTS, names=["a"])
    assert isinstance(code_usage(WEIGHTS), CodeUsage)
