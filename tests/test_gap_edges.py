"""The gap where there is almost nothing to measure, and where there is very much."""

import tracemalloc
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import mmfast
from mmfast.gap._sides import Side, grid, triangle
from mmfast.gap.files import Rows, open_rows
from mmfast.gap.report import pictures
from mmfast.gap.report.tables import as_text, tables
from mmfast.gap.report.words import _variance, answers, gap_share, number
from mmfast.gap.survey import passes, survey
from mmfast.gap.survey import state as keeping
from mmfast.ops._statistics import PairwiseStats

# blocks of 70 rows of width 24
BUDGET = 40 * 24 * 24 + 70 * 24 * 4 * 8


def sides(n=333, d=24):
    g = torch.Generator().manual_seed(n)
    return torch.randn(n, d, generator=g), torch.randn(n, d, generator=g) + 0.5


def test_equal_cosines_have_no_spread():
    for n in range(3, 20):
        others = survey(torch.eye(n), torch.eye(n)).others
        assert others.std == pytest.approx(0, abs=1e-7)
        assert min(others.moments[1], others.moments[3]) >= 0


def test_no_bin_holds_less_than_nothing():
    """Where rounding puts a pair into another bin than the sweep of all pairs."""
    of = {"nan": 0, "argmin": (0, 0), "argmax": (0, 0), "edges": torch.linspace(-1, 1, 3).double()}
    every = PairwiseStats(2, moments=(0.9, 0, 0, 0), min=0.8, max=1.0,
                          histogram=torch.tensor([0, 2]), **of)  # fmt: skip
    part = PairwiseStats(1, moments=(1.1, 0, 0, 0), min=1.1, max=1.1,
                         histogram=torch.tensor([1, 0]), below=1, above=1, **of)  # fmt: skip
    left = passes.without(every, part, (0.8, 0, 1), (0.8, 0, 1))
    assert left.histogram.tolist() == [0, 2]
    assert (left.count, left.below, left.above) == (1, 0, 0)


def test_a_loss_of_nothing_has_no_lower_one():
    labels = (torch.tensor([0, 1]), torch.tensor([0, 2]))
    found = survey(*sides(2), labels=labels, temperatures=[0.001])
    assert found.landscape.symmetric[found.rest] == 0
    (answer,) = (it for it in answers(found) if "narrower" in it.question)
    assert answer.figure == "no"
    assert pictures.plot_landscape(found).axes[0].lines


def test_all_rows_belong_together(tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "rendered", lambda figure, form: b"<svg><defs></defs></svg>")
    found = mmfast.gap_report(*sides(20), tmp_path, labels=torch.zeros(20, dtype=torch.int64))
    assert found.others.count == 0
    text = as_text(tables(found))
    assert "nan" not in text
    assert "inf" not in text
    (axes,) = pictures.plot_pairs(found).axes
    _, labels = axes.get_legend_handles_labels()
    assert [label.partition(":")[0] for label in labels] == ["pairs"]
    nothing = replace(found, pairs=None)
    assert not {"pairs.svg", "pairs.png"} & set(pictures.drawn(nothing))
    assert "cone.svg" in pictures.drawn(nothing)


def test_labels_with_gaps_between_them(tmp_path):
    table = torch.stack([torch.arange(333) // 2, torch.zeros(333, dtype=torch.int64)], 1)
    asked = {"budget": BUDGET, "state": tmp_path}
    found = survey(*sides(), labels=table[:, 0], **asked)
    # the same labels are the same state
    again = survey(*sides(), labels=table[:, 0].clone(), **asked)
    assert again.retrieval.x_to_y.recall == found.retrieval.x_to_y.recall


def test_nothing_is_identified_without_a_state():
    x, y = sides(5)
    asked = []
    rows = replace(open_rows(x), identify=lambda: asked.append(1))
    survey(rows, y)
    assert asked == []


def test_goes_on_at_a_block_without_partners(tmp_path, monkeypatch):
    """It costs nothing, and nobody knows yet how long the rest takes."""
    ids = torch.arange(333)
    asked = {"labels": (ids, ids + 210), "budget": BUDGET, "state": tmp_path}
    together = passes.together

    def stop(data, held, block):
        if block[0] == 140:
            raise KeyboardInterrupt
        return together(data, held, block)

    with monkeypatch.context() as patch:
        patch.setattr(passes, "together", stop)
        with pytest.raises(KeyboardInterrupt):
            survey(*sides(), **asked)
    told = []
    resumed = survey(*sides(), **asked, progress=lambda *it: told.append(it))
    assert resumed.paired == 123
    assert min(left for _, _, left in told) >= 0


def made(n, size):
    return Side(Rows("x", (n, 1), torch.float32, None, None), None, size, torch.float32)


@pytest.mark.parametrize("n", [1, 2, 3, 8, 29])
def test_pairs_of_blocks(n):
    side, other = made(n, 1), made(5, 2)
    assert list(other.blocks) == [(0, 2), (2, 4), (4, 5)]
    assert list(grid(side, other)) == [(i, j) for i in range(n) for j in range(3)]
    assert list(triangle(side)) == [(i, j) for i in range(n) for j in range(i, n)]


def test_pairs_of_very_many_blocks_are_not_held():
    tracemalloc.start()
    triangle(made(64000, 64)), grid(made(64000, 64), made(64000, 64))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    side = made(10**9, 64)
    n = 15625000
    assert len(side.blocks) == n
    pairs = triangle(side)
    assert len(pairs) == n * (n + 1) // 2
    assert [pairs[0], pairs[n - 1], pairs[n]] == [(0, 0), (0, n - 1), (1, 1)]
    assert pairs[len(pairs) - 1] == (n - 1, n - 1)
    assert grid(side, side)[n * n - 1] == (n - 1, n - 1)


def test_rows_of_zeros_count_in_the_mean_squared_distance():
    x, y = sides(40)
    x[:10], y[:5] = 0, 0
    found = survey(x, y)
    u, v = (F.normalize(side.double(), dim=1) for side in (x, y))
    squares = (u[:, None] - v).square().sum(2)
    gap = (u.mean(0) - v.mean(0)).square().sum()
    assert gap_share(found) == pytest.approx(float(gap / squares.mean()), abs=1e-9)
    for side, rows in ((found.x, u), (found.y, v)):
        spread = (rows - rows.mean(0)).square().sum(1).mean()
        assert _variance(side) == pytest.approx(float(spread), abs=1e-9)


def test_numbers_without_end_are_unknown():
    assert number(-float("inf")) == number(float("nan")) == "\N{EN DASH}"


def test_a_report_of_nothing_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone.npy cannot be read"):
        mmfast.gap_report(tmp_path / "gone.npy", tmp_path / "gone.npy", tmp_path / "out")
    message = "^gap_report: names must be two, one for each side, got 1$"
    with pytest.raises(ValueError, match=message):
        mmfast.gap_report(*sides(5), tmp_path / "out", names=("a",))
    assert list(tmp_path.iterdir()) == []


def test_an_error_without_words_has_a_name(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise AssertionError

    (tmp_path / "state.pt").touch()
    monkeypatch.setattr(keeping.torch, "load", fail)
    with pytest.raises(ValueError, match=r"state.pt is no state of survey \(AssertionError\): rem"):
        survey(*sides(5), state=tmp_path)
