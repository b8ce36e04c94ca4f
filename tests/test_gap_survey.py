"""A survey of blocks says what the measures of the whole say, and goes on after an interrupt."""

import errno
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmfast
from mmfast.gap.survey import Survey, passes, survey
from mmfast.gap.survey import state as keeping

# what blocks of 70 rows of width 24 take in float32
BUDGET = 40 * 24 * 24 + 70 * 24 * 4 * 8
EXACT = ("count", "nan", "min", "max", "argmin", "argmax", "below", "above")


def pairs(n=333, d=24, dtype=torch.float32):
    """Pairs with a gap; the least and the largest cosine of all belong to pairs."""
    g = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=g)
    y = x + torch.randn(n, d, generator=g) - 0.5
    y[11], y[200 % n] = -x[11], x[200 % n]
    return x.to(dtype), y.to(dtype)


def assert_stats(found, expected, rtol=0.0):
    for name in EXACT:
        assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=rtol), name
    assert torch.equal(found.histogram, expected.histogram)
    assert found.moments == pytest.approx(expected.moments, abs=1e-12)


def assert_histogram(stats, cosines, tolerance):
    """How many lie below each edge, but for those that lie on one within the tolerance."""
    cosines, edges = cosines.double().sort().values, stats.edges
    torch.testing.assert_close(edges, torch.linspace(-1, 1, 257, dtype=torch.float64))
    ends = stats.below + F.pad(stats.histogram.cumsum(0), (1, 0))
    assert (torch.searchsorted(cosines, edges - tolerance) <= ends).all()
    assert (ends <= torch.searchsorted(cosines, edges + tolerance)).all()
    assert ends[-1] + stats.above == len(cosines)


def facts(made):
    """All numbers but the time they took."""
    return {**made.to_json(), "seconds": None}


@pytest.mark.parametrize(
    ("dtypes", "budget"),
    [
        ((torch.float32, torch.float32), BUDGET),
        ((torch.float32, torch.float32), 1 << 30),
        ((torch.float16, torch.float16), BUDGET),
        ((torch.float64, torch.float32), 2 * BUDGET),
    ],
    ids=["blocks", "whole", "half", "mixed"],
)
def test_survey_is_that_of_the_whole(dtypes, budget):
    x, y = (side.to(dtype) for side, dtype in zip(pairs(), dtypes, strict=True))
    found = survey(x, y, budget=budget)
    wide = torch.promote_types(torch.promote_types(*dtypes), torch.float32)
    x, y = x.to(wide), y.to(wide)
    tolerance = 1e-12 if wide == torch.float64 else 2e-6

    def near(a, b):
        assert float(a) == pytest.approx(float(b), abs=tolerance)

    assert (found.x.rows, found.y.width, found.paired) == (333, 24, 333)
    assert (found.x.nan_rows, found.x.zero_rows, found.x.alone) == (0, 0, 0)
    assert (found.labelled, found.notes) == (False, ())
    assert_stats(found.x.cosines, mmfast.cosine_stats(x))
    assert_stats(found.y.cosines, mmfast.cosine_stats(y))
    assert found.pairs is not None
    both = found.pairs + found.others
    assert_stats(both, mmfast.cosine_stats(x, y))
    # the extremes of all are pairs, those of the others are not
    assert (both.argmin, both.argmax) == ((11, 11), (200, 200))
    u, v = F.normalize(x, dim=1), F.normalize(y, dim=1)
    s = u.double() @ v.double().T
    own = s.diagonal()
    wrong = s[~torch.eye(333, dtype=torch.bool)]
    for stats, cosines in ((found.pairs, own), (found.others, wrong)):
        assert stats.count == len(cosines)
        assert (stats.mean, stats.std) == pytest.approx(
            (float(cosines.mean()), float(cosines.std())), abs=1e-8
        )
        assert_histogram(stats, cosines, tolerance)
        near(stats.moments[2], ((cosines - cosines.mean()) ** 3).mean())
        near(stats.moments[3], ((cosines - cosines.mean()) ** 4).mean())
        for place, value, best in (
            (stats.argmin, stats.min, cosines.min()),
            (stats.argmax, stats.max, cosines.max()),
        ):
            near(value, best)
            near(s[place], best)
            assert (place[0] == place[1]) == (stats is found.pairs)
    gap = mmfast.modality_gap(x, y)
    torch.testing.assert_close(found.gap.vector, gap.vector.double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(found.x.mean, u.double().mean(0), rtol=0, atol=1e-7)
    near(found.alignment, mmfast.alignment(x, y))
    near(found.x.uniformity, mmfast.uniformity(x))
    near(found.y.uniformity, mmfast.uniformity(y))
    near(found.uniformity, mmfast.uniformity(torch.cat([x, y])))
    near(found.relative_alignment.x_to_y, mmfast.relative_alignment(x, y))
    near(found.relative_alignment.y_to_x, mmfast.relative_alignment(y, x))
    near(found.symmetric_loss, mmfast.clip_loss(u, v, 100.0))
    near(found.loss.x_to_y, mmfast.losses.clip.info_nce(u, v, 100.0))
    recall = mmfast.retrieval_recall(x, y)
    for way, shares, ranks in (
        (found.retrieval.x_to_y, recall.x_to_y, recall.x_ranks),
        (found.retrieval.y_to_x, recall.y_to_x, recall.y_ranks),
    ):
        assert way is not None
        assert (way.recall, way.queries, way.candidates) == (shares, 333, 333)
        assert way.median_rank == np.median(ranks) + 1
        assert (int(way.ks[0]), int(way.ks[-1]), int(way.found[-1])) == (1, 333, 333)
        assert way.found.tolist() == [int((ranks < k).sum()) for k in way.ks]
    land = mmfast.shift_landscape(
        x, y, np.arange(-5, 5, 0.25), [1 / it for it in (100, 50, 30, 20, 10, 1)], chunk=50
    )
    assert found.landscape is not None
    assert found.rest == 20
    for name in ("shifts", "temperatures", "image_to_text", "text_to_image", "distance"):
        got, expected = (getattr(it, name).double() for it in (found.landscape, land))
        torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, msg=name)


def test_pca():
    x, y = pairs()
    found = survey(x, y, budget=BUDGET).pca
    rows = torch.cat([F.normalize(x.double()), F.normalize(y.double())])
    rows = rows - rows.mean(0)
    _, values, axes = torch.linalg.svd(rows, full_matrices=False)
    ratio = values.square() / values.square().sum()
    torch.testing.assert_close(found.variance_ratio, ratio[:6], rtol=1e-9, atol=0)
    torch.testing.assert_close((found.axes @ axes[:2].T).abs(), torch.eye(2).double())
    drawn = torch.cat([found.x_points, found.y_points])
    torch.testing.assert_close(drawn, rows @ found.axes.T, rtol=0, atol=1e-6)
    assert found.x_points[:, 0].mean() > found.y_points[:, 0].mean()
    many = torch.randn(2500, 1)
    found = survey(many, many + 3).pca
    assert found.x_points.shape == (2000, 2)
    assert found.axes[1].count_nonzero() == 0
    assert found.variance_ratio.shape == (1,)


def test_labels_are_the_definitions():
    """Several captions an image, in any order, and rows of both sides that nothing belongs to."""
    g = torch.Generator().manual_seed(1)
    x_ids = torch.randint(0, 60, (150,), generator=g)
    y_ids = torch.randint(5, 70, (201,), generator=g)
    centres = torch.randn(70, 24, generator=g)
    x, y = (centres[ids] + 0.7 * torch.randn(len(ids), 24, generator=g) for ids in (x_ids, y_ids))
    found = survey(x, y.double(), labels=(x_ids.numpy(), y_ids.int()), budget=3 * BUDGET)
    u, v = F.normalize(x.double()), F.normalize(y.double())
    s, right = u @ v.T, x_ids[:, None] == y_ids
    assert found.labelled
    assert found.pairs is not None
    alone = [int((~right.any(dim)).sum()) for dim in (1, 0)]
    assert [found.x.alone, found.y.alone] == alone
    assert min(alone) > 0
    assert found.others.count == int((~right).sum())
    assert found.others.min == pytest.approx(float(s[~right].min()), abs=1e-12)
    assert found.others.max == pytest.approx(float(s[~right].max()), abs=1e-12)
    assert found.others.mean == pytest.approx(float(s[~right].mean()), abs=1e-12)
    assert found.others.histogram is not None
    assert (found.others.histogram >= 0).all()
    for name, dist, mine in (("x_to_y", s, right), ("y_to_x", s.T, right.T)):
        way, loss, relative = (
            getattr(it, name) for it in (found.retrieval, found.loss, found.relative_alignment)
        )
        has = mine.any(1)
        mine, dist = mine[has], dist[has]
        first = mine.int().argmax(1, keepdim=True)
        wrong = (100 * dist).masked_fill(mine, -math.inf)
        expected = F.softplus(wrong.logsumexp(1) - 100 * dist.gather(1, first)[:, 0]).mean()
        assert loss == pytest.approx(float(expected), abs=1e-9)
        best = (100 * dist).masked_fill(~mine, -math.inf).amax(1, keepdim=True)
        ranks = (wrong > best).sum(1)
        assert way is not None
        assert way.queries == int(has.sum())
        assert way.recall == {k: float((ranks < k).double().mean()) for k in (1, 5, 10)}
        nearest = 2 - 2 * dist.masked_fill(mine, -math.inf).amax(1)
        expected = ((2 - 2 * dist.gather(1, first)[:, 0]) - nearest).mean()
        assert relative == pytest.approx(float(expected), abs=1e-9)
    has = right.any(1)
    partner = right.int().argmax(1)[has]
    own = s[has].gather(1, partner[:, None])
    assert found.paired == found.pairs.count == int(has.sum())
    assert found.pairs.mean == pytest.approx(float(own.mean()), abs=1e-12)
    assert found.pairs.argmin == (int(has.nonzero()[own.argmin()]), int(partner[own.argmin()]))
    assert found.alignment == pytest.approx(float((2 - 2 * own).mean()), abs=1e-9)
    expected = mmfast.shift_landscape(
        x.double()[has], y.double()[partner], [0.5], [0.01], direction=found.gap.direction, chunk=50
    )
    assert found.landscape is not None
    assert float(found.landscape.symmetric[22, 0]) == pytest.approx(
        float(expected.symmetric), abs=1e-9
    )
    assert found.notes == (
        f"array: {alone[0]} rows have a label the other side lacks, and are left out of all that "
        "is said of pairs.",
        f"array: {alone[1]} rows have a label the other side lacks, and are left out of all that "
        "is said of pairs.",
    )


def test_no_pair_at_all():
    x, y = pairs(70)
    found = survey(
        x, y, labels=(torch.zeros(70, dtype=torch.int64), torch.ones(70, dtype=torch.int64))
    )
    assert found.paired == 0
    assert found.pairs is found.landscape is found.rest is found.retrieval.x_to_y is None
    assert all(
        map(math.isnan, (found.alignment, found.symmetric_loss, found.relative_alignment.x_to_y))
    )
    assert_stats(found.others, mmfast.cosine_stats(x, y))
    assert (
        found.notes[-1] == "No loss landscape: no pair of rows that are not zeros belongs together."
    )
    same = survey(x, x, labels=torch.zeros(70, dtype=torch.int64))
    assert same.others.count == 0
    assert same.others.argmin == same.others.argmax == (-1, -1)
    assert same.notes == (
        "No loss landscape: both means are the same, there is no gap to shift along.",
    )
    assert same.retrieval.x_to_y is not None
    assert same.retrieval.x_to_y.recall[1] == 1.0
    assert Survey.from_json(json.loads(json.dumps(found.to_json()))).to_json() == found.to_json()


@pytest.mark.parametrize("labelled", [False, True])
def test_rows_that_are_not_finite(labelled):
    x, y = pairs()
    broken = [5, 69, 70, 71, 300], [0, 70, 200]
    bad_x, bad_y = x.clone(), y.clone()
    bad_x[broken[0], 3], bad_y[broken[1], 0] = math.nan, math.inf
    labels = torch.arange(333) if labelled else None
    with pytest.raises(
        ValueError,
        match=r"^array: 5 of 333 rows hold NaN or infinity \(rows 5, 69, 70, 71, 300\); on_nan=",
    ):
        survey(bad_x, bad_y, labels=labels)
    with pytest.raises(
        ValueError, match=r"^array: 14 of 333 .* \(rows 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, \.\.\.\)"
    ):
        survey(torch.cat([x[:14] * math.nan, x[14:]]), bad_y)
    found = survey(bad_x, bad_y, labels=labels, on_nan="skip", budget=BUDGET)
    gone = [broken[0], broken[1]] if labelled else [[*broken[0], *broken[1]]] * 2
    kept = [torch.tensor(sorted({*range(333)} - {*numbers})) for numbers in gone]
    expected = survey(
        x[kept[0]], y[kept[1]], labels=None if labels is None else tuple(kept), budget=BUDGET
    )
    for name in ("x", "y"):
        side, clean = getattr(found, name), getattr(expected, name)
        assert side.first_nan_rows == tuple(broken[name == "y"])
        assert (side.nan_rows, side.rows) == (len(side.first_nan_rows), len(kept[name == "y"]))
        assert side.alone == clean.alone
        assert torch.equal(side.cosines.histogram, clean.cosines.histogram)
    assert found.symmetric_loss == expected.symmetric_loss
    assert found.alignment == expected.alignment
    assert torch.equal(found.landscape.symmetric, expected.landscape.symmetric)
    # places are those in the file
    assert found.pairs.argmin == (11, 11)
    assert found.others.argmax == tuple(
        int(k[at]) for k, at in zip(kept, expected.others.argmax, strict=True)
    )
    partners = "" if labelled else " and their partners"
    assert found.notes[0] == f"array: 5 rows with NaN or infinity{partners} are left out."
    with pytest.raises(ValueError, match="array must have 2 rows or more without NaN or infinity"):
        survey(x * math.nan, y, on_nan="skip")


def test_rows_of_zeros_are_kept():
    x, y = pairs()
    x[7], y[300] = 0, 0
    found = survey(x, y, budget=BUDGET)
    assert (found.x.zero_rows, found.y.zero_rows) == (1, 1)
    assert_stats(found.x.cosines, mmfast.cosine_stats(x))
    kept = [i for i in range(333) if i not in (7, 300)]
    land = mmfast.shift_landscape(
        x[kept], y[kept], [0], [0.01], direction=found.gap.direction, chunk=50
    )
    assert float(found.landscape.symmetric[20, 0]) == pytest.approx(float(land.symmetric), rel=2e-6)
    assert found.notes[0] == (
        "array: 1 rows of zeros are kept, with cosine 0 to all, but not in the loss landscape."
    )


def write(folder):
    x, y = pairs()
    np.save(folder / "x.npy", x.numpy())
    np.save(folder / "y.npy", y.half().numpy())
    return {"x": folder / "x.npy", "y": folder / "y.npy", "budget": BUDGET}


@pytest.mark.parametrize("name", ["look", "moments", "together", "within", "between", "landscape"])
def test_goes_on_after_an_interrupt(tmp_path, monkeypatch, name):
    """To the same bits, and no block is done twice."""
    ask = write(tmp_path)
    straight = survey(**ask)
    step, calls = getattr(passes, name), 0

    def interrupted(*args):
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(passes, name, interrupted)
    with pytest.raises(KeyboardInterrupt):
        survey(**ask, state=tmp_path / "state")
    assert [it.name for it in (tmp_path / "state").iterdir()] == ["state.pt"]
    told = []
    resumed = survey(**ask, state=tmp_path / "state", progress=lambda *it: told.append(it))
    blocks = 7 if name == "landscape" else 5
    units = {"together": blocks, "within": 2 * 15, "between": 25, "landscape": blocks}.get(name, 10)
    assert calls == units + 1
    assert facts(resumed) == facts(straight)
    done, totals, left = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert len(set(totals)) == 1
    assert 0 < done[0] < done[-1] == totals[0]
    assert done[-2] == pytest.approx(totals[0], rel=1e-9)
    assert min(left) >= 0
    again = survey(**ask, state=tmp_path / "state")
    assert calls == units + 1
    assert facts(again) == facts(straight)


def test_state_is_written_now_and_then(tmp_path, monkeypatch):
    """What a killed process leaves is enough to go on."""
    ask = write(tmp_path)
    monkeypatch.setattr(keeping, "_EVERY", -1.0)
    monkeypatch.setattr(keeping, "_SHARE", math.inf)
    done, kept = 0, tmp_path / "kept"
    kept.mkdir()

    def tell(*_):
        nonlocal done
        done += 1
        if done == 30:
            (kept / "state.pt").write_bytes((tmp_path / "state" / "state.pt").read_bytes())

    straight = survey(**ask, state=tmp_path / "state", progress=tell)
    everything, done = done, 0
    assert facts(survey(**ask, state=kept, progress=tell)) == facts(straight)
    assert done in (everything - 29, everything - 30)


def test_rows_refused_at_first_can_be_skipped_in_the_same_state(tmp_path):
    x, y = pairs()
    x[3] = math.nan
    with pytest.raises(ValueError, match="hold NaN or infinity"):
        survey(x, y, state=tmp_path)
    assert (tmp_path / "state.pt").exists()
    assert survey(x, y, state=tmp_path, on_nan="skip").options["on_nan"] == "skip"


def test_changes_are_refused(tmp_path, monkeypatch):
    ask = write(tmp_path) | {"state": tmp_path / "state"}
    survey(**ask)
    own = torch.arange(333)
    for change, message in (
        (
            {"logit_scale": 50.0},
            "was made with logit_scale 100.0, not 50.0: remove it to begin again",
        ),
        ({"bins": 10}, "was made with bins 256, not 10"),
        ({"temperatures": [1]}, r"was made with temperatures \[0.01, .*, not \[1.0\]"),
        ({"labels": own}, "was made with labels of x as it was before it changed"),
        ({"x": tmp_path / "y.npy"}, "was made with x.npy, not y.npy"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            survey(**{**ask, **change})
        assert str(caught.value).startswith(f"{tmp_path / 'state' / 'state.pt'} was made with")
    with monkeypatch.context() as patch:
        patch.setattr(mmfast, "__version__", "0.0")
        with pytest.raises(ValueError, match=r"was made with mmfast '0\.1\.0', not '0\.0': remove"):
            survey(**ask)
    os.utime(ask["y"], ns=(1, 1))
    with pytest.raises(
        ValueError, match=r"was made with y.npy as it was before it changed: remove"
    ):
        survey(**ask)
    (tmp_path / "state" / "state.pt").write_bytes(b"junk")
    with pytest.raises(ValueError, match=r"state.pt is no state of survey \(.*\): remove it$"):
        survey(**ask)


def test_a_full_disk(tmp_path, monkeypatch):
    ask, folder = write(tmp_path), tmp_path / "state"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"state.pt cannot be written: No space left on device$"):
            survey(**ask, state=folder)
    assert list(folder.iterdir()) == []
    good = survey(**ask, state=folder)
    before = (folder / "state.pt").read_bytes()
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        keeping.write_whole(folder / "state.pt", b"half")
    assert (folder / "state.pt").read_bytes() == before
    assert facts(survey(**ask, state=folder)) == facts(good)


def test_a_folder_that_cannot_be_is_said_at_once(tmp_path):
    told = []
    with pytest.raises(FileExistsError, match=r"x.npy/state.pt cannot be written: File exists"):
        survey(**write(tmp_path), state=tmp_path / "x.npy", progress=lambda *it: told.append(it))
    assert told == []


def test_json_has_it_all():
    found = survey(*pairs(70), shifts=[1, 0.1], temperatures=[0.1])
    assert found.landscape is not None
    assert found.landscape.shifts.tolist() == [0, 0.1, 1]
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    back = Survey.from_json(plain)
    assert back.to_json() == plain
    assert back.rest == found.rest == 0
    assert back.retrieval.x_to_y.recall == found.retrieval.x_to_y.recall
    assert back.others.quantile(0.5) == found.others.quantile(0.5)
    torch.testing.assert_close(back.pca.x_points, found.pca.x_points, rtol=0, atol=0)
    torch.testing.assert_close(back.landscape.symmetric, found.landscape.symmetric, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"y": torch.ones(333, 7)}, ValueError, "^array: rows must be 24 wide like those of"),
        ({"y": torch.ones(5, 24)}, ValueError, "^array has 5 rows and array has 333: without"),
        ({"x": torch.ones(1, 24), "y": torch.ones(1, 24)}, ValueError, "array must have 2 rows or"),
        ({"labels": torch.arange(5)}, ValueError, r"labels must be \[333\], one per row of array"),
        ({"labels": torch.ones(333)}, TypeError, "survey: labels must be int64, got float32"),
        ({"labels": "labels.npy"}, TypeError, "labels must be a tensor or a numpy array, got str"),
        ({"on_nan": "drop"}, ValueError, "on_nan must be 'refuse' or 'skip', got 'drop'"),
        ({"logit_scale": 0}, ValueError, "survey: logit_scale must be positive, got 0"),
        ({"bins": -1}, ValueError, "bins must be from 0 to 65536, got -1"),
        ({"budget": 100}, ValueError, "survey: budget must be 72192 bytes or more for"),
        ({"budget": "1G"}, TypeError, "survey: budget must be an int, got str"),
        ({"shifts": [math.nan]}, ValueError, "survey: shifts must be finite, got nan"),
        ({"temperatures": [0]}, ValueError, "survey: temperatures must be positive, got 0.0"),
        ({"temperatures": []}, ValueError, "survey: temperatures must hold at least one number"),
    ],
)  # fmt: skip
def test_messages(change, error, message):
    x, y = pairs()
    with pytest.raises(error, match=message):
        survey(**{"x": x, "y": y, **change})


# 512 rows of width 256, and 150 bytes for each row of both sides
GROWTH = """
import resource, sys
from mmfast.gap.survey import survey
size = 40 * 256**2 + 512 * 256 * 32
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
survey("small.npy", "small.npy", budget=size)
before = peak()
survey("large.npy", "large.npy", budget=size)
print((peak() - before) / (size + 150 * 2 * 6000))
"""


def test_memory_stays_within_the_budget(tmp_path):
    """Two sides of 6 MB each, whose unit rows would be as large, in 7 MB of blocks."""
    for name, n in (("small", 600), ("large", 6000)):
        x = np.random.default_rng(0).standard_normal((n, 256), dtype=np.float32)
        np.save(tmp_path / f"{name}.npy", x)
    run = subprocess.run(
        [sys.executable, "-c", GROWTH], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert float(run.stdout) < 1, run.stdout
