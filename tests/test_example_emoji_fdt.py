"""The demo of the codebook: words, tokens, a short training of both models, its pictures."""

import json
import sys
from pathlib import Path

import pytest
import torch

# the example is a folder of scripts that find each other beside themselves
sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "emoji"))

import data
import fdt
import pictures
from training import train

sys.path.pop(0)


@pytest.fixture(scope="module")
def vocabulary():
    return fdt.Vocabulary(data.load().take(torch.arange(96)).names)


@pytest.fixture(scope="module")
def few(vocabulary):
    """96 of the real pairs, as pixels and word numbers."""
    return fdt.as_tokens(data.load().take(torch.arange(96)), vocabulary)


def test_words_and_their_numbers():
    assert fdt.words_of("Flag: Côte d\u2019Ivoire #1") == [
        "flag", ":", "côte", "d\u2019ivoire", "#", "1",
    ]  # fmt: skip
    vocabulary = fdt.Vocabulary(["red cat", "cat"])
    assert vocabulary.words == ["", "?", "cat", "red"]
    assert vocabulary.numbers(["cat", "red dog", "cat cat red"]).tolist() == [
        [2, 0],
        [3, 1],
        [2, 2],
    ]


def test_pixels_stay_pictures(few, monkeypatch):
    assert few.image.shape == (96, 3, 32, 32)
    back = ((few.image + 1) * 127.5).round().permute(0, 2, 3, 1)
    assert torch.equal(back.to(torch.uint8), torch.from_numpy(few.thumbnails))
    assert few.image.max() == 1
    monkeypatch.setattr(torch, "randint", lambda *_: torch.tensor([3, 5]))
    # two pixels to the left, and white where nothing was
    moved = fdt.moved(few.image)
    assert torch.equal(moved[:, :, :, :-2], few.image[:, :, :, 2:])
    assert (moved[:, :, :, -2:] == 1).all()


@pytest.mark.parametrize("make", [fdt.OverCodes, fdt.OverMeans])
def test_training_learns_the_pairs(few, vocabulary, make):
    run = train(few, lambda: make(vocabulary, 40), label="test", epochs=20, batch=48)
    assert run.losses[-1] < 0.75 * run.losses[0]
    image, text = run.model.embed(few)
    ranks = (image @ text.T > (image * text).sum(1, keepdim=True)).sum(1)
    # by chance 0.1
    assert (ranks < 10).float().mean() > 0.4
    # a tenth of the steps at each of ten temperatures
    assert run.model.fdt.temperature == pytest.approx(300 * 0.7**9)


def test_padding_changes_nothing(few, vocabulary):
    longer = torch.nn.functional.pad(few.text[:, :-2], [0, 2])
    for make in (fdt.OverCodes, fdt.OverMeans):
        model = make(vocabulary, 10).eval()
        short = few.text[:, -2:].eq(fdt.PADDING).all(1)
        for a, b in zip(
            model.pooled(few.image[short], few.text[short]),
            model.pooled(few.image[short], longer[short]),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_meanings_are_the_best_patches_and_words(few, vocabulary):
    model = fdt.OverCodes(vocabulary, 10).eval()
    codes = torch.tensor([5, 0])
    (first, second) = fdt.meanings(model, few, codes, top=3)
    assert (first.code, second.code) == (5, 0)
    with torch.no_grad():
        patches, _ = model.towers.eval()(few.image, few.text)
        scores = model.fdt.image_query(patches) @ model.fdt.codebook[5]
    rows = [row for row, _, _ in first.patches]
    assert rows == scores.amax(1).argsort(descending=True)[:3].tolist()
    for row, y, x in first.patches:
        assert scores[row, 4 * y + x] == scores[row].max()
    assert len(set(first.words)) == 3
    for word in first.words:
        assert sum(word in fdt.words_of(name) for name in few.names) >= 3


def test_best_words_by_their_highest_score():
    pairs = data.Pairs(None, None, None, ["red cat", "big red cat", "dog"])
    scores = torch.tensor([[0.1, 0.5, 9.0], [0.2, 0.9, 0.3], [0.7, 9.0, 9.0]])
    assert fdt.best_words(scores, pairs, {"cat", "red", "dog", "cow"}) == ["red", "dog", "cat"]


def test_codes_agree_where_weights_go_together():
    image = torch.tensor([[0.9, 0.1, 0.5], [0.9, 0.8, 0.4]])
    text = torch.tensor([[0.9, 0.0, 0.1], [0.9, 0.9, 0.2]])
    # code 0 fires everywhere, 1 in the same pair, 2 against the pairs
    assert fdt.agreed(image, text, 2).tolist() == [1, 0]


def test_meanings_are_drawn(few, tmp_path):
    rows = [pictures.CodeMeaning(k, [(k, 0, 3), (4, 2, 1)], ["red", "$", "cat"]) for k in range(2)]
    file = pictures.code_meanings(tmp_path / "codes.png", rows, few, 8)
    assert file.stat().st_size > 10_000


def test_main_prints_both_and_leaves_pictures(tmp_path, monkeypatch, capsys):
    threads = str(torch.get_num_threads())
    options = ["--epochs", "1", "--threads", threads, "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["fdt.py", *options])
    fdt.main()
    printed = capsys.readouterr().out
    assert "300 held-out pairs" in printed
    assert "codes fire in one" in printed
    report = json.loads((tmp_path / "fdt.json").read_text())
    assert set(report["held_out"]) == set(report["losses"]) == {"means", "codes"}
    for name in ("codes.png", "usage.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
