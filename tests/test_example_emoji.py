"""The demo's parts: data, measures, short trainings, costs, tables and pictures."""

import json
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import mmfast

# the example is a folder of scripts that find each other beside themselves
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji"))

import compare
import contest
import data
import metrics
import pictures
import recipes
import tables
import train
from recipes import RECIPES, Scaled

sys.path.pop(0)


@pytest.fixture(scope="module")
def few():
    """96 of the real pairs."""
    return data.load().take(torch.arange(96))


def test_split_keeps_pairs_together_and_apart():
    pairs = data.load()
    training, held_out = data.split(pairs)
    assert (len(pairs), len(training), len(held_out)) == (1886, 1586, 300)
    assert set(training.names).isdisjoint(held_out.names)
    assert set(training.names) | set(held_out.names) == set(pairs.names)
    row = pairs.names.index(held_out.names[7])
    assert torch.equal(held_out.image[7], pairs.image[row])
    assert torch.equal(held_out.text[7], pairs.text[row])
    assert (held_out.thumbnails[7] == pairs.thumbnails[row]).all()


def test_measures_on_points_of_the_circle():
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    text = torch.tensor([[0.0, 1.0], [0.6, 0.8]])
    measured = metrics.measure(image, text)
    # image 0 is nearer to text 1, image 1 to text 0; texts both to image 1
    assert measured["recall@1 image to text"] == 0
    assert measured["recall@1 text to image"] == 0.5
    assert measured["recall@10 text to image"] == 1
    # squared distances: of the pairs 2 and 0.4, of images 2, of texts 0.4
    assert measured["alignment"] == pytest.approx(1.2)
    assert measured["uniformity of images"] == pytest.approx(-4)
    assert measured["uniformity of texts"] == pytest.approx(-0.8)
    # the means are (0.5, 0.5) and (0.3, 0.9)
    assert measured["gap"] == pytest.approx(0.2**0.5)


@pytest.mark.parametrize("loss", compare.LOSSES.values(), ids=compare.LOSSES)
def test_training_learns_the_pairs(few, loss):
    torch.manual_seed(0)
    before = metrics.measure(*Scaled(loss).embed(few))
    run = train.train(few, partial(Scaled, loss), label="test", epochs=6, batch=48)
    after = metrics.measure(*run.model.embed(few))
    assert len(run.losses) == 12
    assert run.epochs == 6
    assert run.losses[-1] < 0.7 * run.losses[0]
    assert after["recall@10 image to text"] > before["recall@10 image to text"] + 0.2
    assert after["alignment"] < before["alignment"]


def test_both_losses_train_alike(few):
    curves = [
        train.train(few, partial(Scaled, loss), label="test", epochs=3, batch=48, seed=5).losses
        for loss in (mmfast.clip_loss, compare.dense_clip_loss)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_learns_the_pairs(few, name, monkeypatch):
    # no multiple of the batch, and too short for a key to meet its own sample again
    monkeypatch.setattr(recipes, "QUEUE", 40)
    epochs = 24 if name == "siglip" else 8  # its learning rate is a third
    run = train.train(few, RECIPES[name], label="test", epochs=epochs, batch=48)
    assert run.losses[-1] < 0.9 * run.losses[2]
    after = metrics.measure(*run.model.embed(few))
    # by chance 0.1
    assert min(after["recall@10 image to text"], after["recall@10 text to image"]) > 0.3
    if name == "gmc":
        missing = contest.with_one_missing(run.model, few)
        assert missing["picture alone to whole"]["recall@10"] > 0.5
        assert missing["name alone to whole"]["recall@10"] > 0.5
        found = after["recall@10 image to text"]
        assert missing["picture alone to name alone"]["recall@10"] == found


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_measured_without_its_heads(name):
    loss, inputs = compare.subject(name, 24)
    assert [x.shape for x in inputs] == [(24, 256), (24, 256)]
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    assert all(g.isfinite().all() and g.any() for g in gradients)


def test_what_is_measured_of_clip_is_its_loss():
    loss, inputs = compare.subject("clip", 24)
    assert loss(*inputs).item() == pytest.approx(mmfast.clip_loss(*inputs, 1 / 0.07).item())


def test_training_stops_when_its_seconds_are_over(few):
    run = train.train(few, RECIPES["clip"], label="test", epochs=50, seconds=0, batch=48)
    assert run.epochs == 1
    assert len(run.losses) == 2


def test_saved_bytes_counts_what_only_the_loss_keeps():
    inputs = compare.loss_inputs(32)
    square = compare.saved_bytes(lambda image, text, scale: (image @ text.T).exp().sum(), inputs)
    # exp keeps its result, 32 by 32 floats; the product keeps inputs only
    assert square == 4 * 32 * 32


def test_peak_memory_is_measured_in_processes_of_their_own():
    peaks = compare.peak_bytes(["dense", "clip"], 1024, threads=1)
    if peaks["dense"] is None:
        pytest.skip("needs Linux's /proc/self/clear_refs")
    # two matrices of logits in float32 at the least, and two gradients
    assert peaks["dense"] > 2 * 4 * 1024**2
    assert peaks["dense"] > peaks["clip"] > 2 * 4 * 1024 * 256


def test_tables_hold_every_number():
    text = tables.learned({"before": {"recall@10 image to text": 0.125, "gap": 1.5}}, held_out=40)
    assert [line.split()[-2:] for line in text.splitlines()[1:]] == [
        ["0.125", "0.250"],
        ["gap", "1.500"],
    ]
    cost = {"loss_ms": 1.0, "step_ms": 2.0, "saved_bytes": 3e6, "peak_bytes": None}
    cells = [line.split()[-1] for line in tables.costs({512: {"mmfast": cost}}).splitlines()]
    assert cells == ["512", "mmfast", "1.0", "2.0", "3.00", "unknown"]


def test_contest_table_fits_and_says_what_is_unknown():
    row = dict.fromkeys([key for _, _, key, _, _ in tables.CONTEST], -1.2345)
    lines = tables.contest({"siglip": row | {"peak_bytes": None}}, held_out=40).splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[2].split() == ["siglip", *["-1.234"] * 7, "-1.2", "unknown"]
    assert lines[3].split() == ["by", "chance", "0.025", "0.025", "0.250", "0.250"]


def test_labels_stand_apart_and_near_their_points():
    heights = np.array([0.0, 0.1, 0.1, 0.15, 5.0])
    assert pictures.apart(heights, 1.0) == pytest.approx([0, 1, 2, 3, 5])


def test_pictures_are_written(few, tmp_path):
    image, text = RECIPES["clip"]().embed(few)
    files = [
        pictures.loss_curves(tmp_path / "loss.png", [3.0, 2.0, 1.0], [3.0, 2.1, 1.0]),
        pictures.joint_space(tmp_path / "gap.png", (image, text), (text, image)),
        pictures.nearest_captions(tmp_path / "captions.png", few, image, text, count=3),
        pictures.uniformity_and_alignment(
            tmp_path / "losses.png",
            {name: contest.learned(RECIPES["clip"](), few) for name in "ab"},
        ),
    ]
    for file in files:
        assert file.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert file.stat().st_size > 10_000


def test_images_stand_left_of_texts_in_the_principal_plane(few):
    image, text = RECIPES["clip"]().embed(few)
    x, y = pictures.principal_plane(image, text)
    assert x.shape == y.shape == (96, 2)
    assert (x.mean(0) <= y.mean(0)).all()


def test_main_refuses_a_training_that_learned_too_little(tmp_path, monkeypatch, capsys):
    cost = {"loss_ms": 1.0, "step_ms": 1.0, "saved_bytes": 1, "peak_bytes": 1}
    monkeypatch.setattr(train, "costs", lambda *_: dict.fromkeys(compare.LOSSES, cost))
    threads = str(torch.get_num_threads())
    arguments = ["--epochs", "1", "--threads", threads, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    drawing = "mmfast.gap.report.pictures.rendered"
    monkeypatch.setattr(drawing, lambda figure, form: b"<svg><defs></defs></svg>")
    with pytest.raises(SystemExit, match=r"recall@1 is 0\..* but 0.25 is expected"):
        train.main()
    out = capsys.readouterr().out
    assert "recall@1 image to text" in out
    assert str(tmp_path / "gap" / "report.html") in out
    assert "pictures and names" in (tmp_path / "gap" / "report.html").read_text()
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["epochs"] == 1
    assert report["largest_loss_difference"] < 1e-3
    assert {"loss.png", "gap.png", "captions.png"} <= {file.name for file in tmp_path.iterdir()}


def test_main_compares_losses(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "peak_bytes", lambda names, *_: dict.fromkeys(names, 2e6))
    monkeypatch.setattr(contest, "step_ms", lambda _, names: dict.fromkeys(names, 7.0))
    threads = str(torch.get_num_threads())
    options = ["--epochs", "1", "--threads", threads, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train.py", "--loss", "gmc", "clip", *options])
    train.main()
    lines = capsys.readouterr().out.splitlines()
    # in the order of the recipes
    assert [line.split()[0] for line in lines if line.endswith("2.0")] == ["clip", "gmc"]
    head = next(line for line in lines if line.startswith("gmc, a modality missing"))
    assert head.split()[-2:] == ["recall@1", "recall@10"]
    report = json.loads((tmp_path / "losses.json").read_text())
    assert set(report["results"]) == set(report["losses"]) == {"clip", "gmc"}
    assert report["results"]["gmc"]["step_ms"] == 7
    assert (tmp_path / "losses.png").stat().st_size > 10_000


def test_step_ms_times_every_loss(few, monkeypatch):
    monkeypatch.setattr(contest, "BATCH", 8)
    times = contest.step_ms(few, ["clip", "m2"])
    assert set(times) == {"clip", "m2"}
    assert min(times.values()) > 0
