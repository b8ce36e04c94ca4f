"""Teach patches and words one codebook, see what its codes mean, and compare with plain means.

Two towers from scratch: 8x8 patches of the thumbnails, and the words of the names. Once their
tokens are pooled over a codebook of finite discrete tokens (Chen et al., CVPR 2023), once they are
averaged; all else is alike. Prints the held-out recall of both and which codes fire, and leaves
pictures of what codes mean.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from functools import partial
from pathlib import Path

import pictures
import tables
import torch
import torch.nn.functional as F
from data import Pairs, load, split
from heads import Scale
from metrics import measure
from torch import Tensor, nn
from training import train

from mmfast.codes import code_usage, plot_codes
from mmfast.losses.fdt import fdt_temperature
from mmfast.nn import FDT, ClipLoss

SIDE, PATCH, BATCH = 32, 8, 256
TOKEN, WIDTH, CODES = 64, 128, 256
PADDING, UNKNOWN = 0, 1
# pictures are moved by so many pixels in training
MOVE = 3
# soft at first, so that every code learns; then few of them are left in a sample
COOLING = {"first": 300.0, "decay": 0.7, "least": 1.0}


def words_of(name: str) -> list[str]:
    """The words of a name, and each sign in it as a word of its own."""
    return re.findall(r"[\w\u2019'&.]+|[^\w\s]", name.lower())


class Vocabulary:
    """Numbers for the words of some names; a word that is in none of them is UNKNOWN."""

    def __init__(self, names: list[str]):
        counts = Counter(word for name in names for word in words_of(name))
        self.words = ["", "?", *sorted(counts)]
        self.number = {word: i for i, word in enumerate(self.words)}
        self.longest = max(len(words_of(name)) for name in names)

    def numbers(self, names: list[str]) -> Tensor:
        """int64 [N, longest], padded by PADDING; words past the longest are left out."""
        rows = torch.full((len(names), self.longest), PADDING)
        for row, name in zip(rows, names, strict=True):
            for place, word in enumerate(words_of(name)[: self.longest]):
                row[place] = self.number.get(word, UNKNOWN)
        return rows


def as_tokens(pairs: Pairs, vocabulary: Vocabulary) -> Pairs:
    """The pairs with pixels [N, 3, 32, 32] in [-1, 1] for images, word numbers for texts."""
    pixels = torch.from_numpy(pairs.thumbnails).permute(0, 3, 1, 2).float() / 127.5 - 1
    return Pairs(pixels, vocabulary.numbers(pairs.names), pairs.thumbnails, pairs.names)


def moved(pixels: Tensor) -> Tensor:
    """The pictures of a batch, moved together by up to MOVE pixels; white comes in."""
    x, y = torch.randint(0, 2 * MOVE + 1, (2,)).tolist()
    return F.pad(pixels, [MOVE] * 4, value=1.0)[:, :, x : x + SIDE, y : y + SIDE]


class Towers(nn.Module):
    """Tokens of both modalities: a linear map of the patch or word, and its place."""

    def __init__(self, words: int, longest: int):
        super().__init__()
        self.patch = nn.Linear(3 * PATCH**2, TOKEN)
        self.patch_place = nn.Parameter(0.02 * torch.randn((SIDE // PATCH) ** 2, TOKEN))
        self.word = nn.Embedding(words, TOKEN, padding_idx=PADDING)
        self.word_place = nn.Parameter(0.02 * torch.randn(longest, TOKEN))
        self.drop = nn.Dropout(0.2)

    def forward(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens [B, 16, TOKEN] and [B, longest, TOKEN]."""
        patches = F.unfold(pixels, PATCH, stride=PATCH).transpose(1, 2)
        image = self.patch(patches) + self.patch_place
        return self.drop(image), self.drop(self.word(words) + self.word_place)


class OverCodes(nn.Module):
    """The towers, and their tokens pooled over a codebook that both modalities share."""

    learning_rate = 1e-3

    def __init__(self, vocabulary: Vocabulary, steps: int):
        super().__init__()
        self.towers = Towers(len(vocabulary.words), vocabulary.longest)
        self.fdt = FDT(TOKEN, TOKEN, CODES, WIDTH)
        self.scale = Scale(1 / 0.07)
        self.criterion = ClipLoss()
        self.steps, self.step = steps, 0

    def pooled(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, WIDTH] of both modalities."""
        patches, tokens = self.towers(pixels, words)
        (image, _), (text, _) = self.fdt(patches, tokens, text_mask=words != PADDING)
        return image, text

    def loss(self, pixels: Tensor, words: Tensor) -> Tensor:
        """The loss of a batch; takes one step of the temperature's schedule."""
        self.fdt.temperature = fdt_temperature(self.step, every=max(1, self.steps // 10), **COOLING)
        self.step += 1
        image, text = self.pooled(moved(pixels), words)
        return self.criterion(F.normalize(image), F.normalize(text), self.scale())

    @torch.no_grad()
    def embed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Unit rows of both modalities of these pairs, without dropout."""
        self.eval()
        image, text = self.pooled(pairs.image, pairs.text)
        self.train()
        return F.normalize(image), F.normalize(text)


class OverMeans(OverCodes):
    """The same towers and query maps; tokens are averaged, and the codebook lies idle."""

    def pooled(self, pixels: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        patches, tokens = self.towers(pixels, words)
        there = (words != PADDING).unsqueeze(2)
        text = (self.fdt.text_query(tokens) * there).sum(1) / there.sum(1)
        return self.fdt.image_query(patches).mean(1), text


@torch.no_grad()
def weights_of(model: OverCodes, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """Weights [N, CODES] of the pictures and of the names."""
    model.eval()
    patches, words = model.towers(pairs.image, pairs.text)
    (_, image), (_, text) = model.fdt(patches, words, text_mask=pairs.text != PADDING)
    model.train()
    return image, text


@torch.no_grad()
def meanings(
    model: OverCodes, pairs: Pairs, codes: Tensor, top: int = 6
) -> list[pictures.CodeMeaning]:
    """For each code the patches and the words that score highest.

    Each picture and each word once, and of the words those in three names or more: what a word of
    one name fires is learned by heart.
    """
    model.eval()
    patches, words = model.towers(pairs.image, pairs.text)
    directions = model.fdt.codebook[codes].T
    of_patches = model.fdt.image_query(patches) @ directions
    of_words = model.fdt.text_query(words) @ directions
    of_words.masked_fill_((pairs.text == PADDING).unsqueeze(2), -torch.inf)
    model.train()
    counts = Counter(word for name in pairs.names for word in words_of(name))
    common = {word for word, count in counts.items() if count >= 3}
    found = []
    for k, code in enumerate(codes.tolist()):
        best, patch = of_patches[:, :, k].max(1)
        rows = best.argsort(descending=True)[:top].tolist()
        where = [(row, *divmod(patch[row].item(), SIDE // PATCH)) for row in rows]
        words = best_words(of_words[:, :, k], pairs, common)[:top]
        found.append(pictures.CodeMeaning(code, where, words))
    return found


def best_words(scores: Tensor, pairs: Pairs, wanted: set[str]) -> list[str]:
    """The wanted words, each once, by the highest of their scores [N, longest]."""
    best: dict[str, float] = {}
    for row, name in zip(scores.tolist(), pairs.names, strict=True):
        for score, word in zip(row, words_of(name), strict=False):
            best[word] = max(score, best.get(word, score))
    return sorted(wanted & best.keys(), key=best.__getitem__, reverse=True)


def agreed(image: Tensor, text: Tensor, count: int) -> Tensor:
    """The codes whose weights [N, C] in a picture and in its own name go together most."""
    return ((image - image.mean(0)) * text).sum(0).argsort(descending=True)[:count]


def usage_lines(name: str, weights: Tensor) -> str:
    """One line of what a modality does with the codes."""
    usage = code_usage(weights)
    return (
        f"{name:10}{usage.codes_per_sample:6.1f} codes fire in one, {len(usage.dead)} of {CODES} "
        f"in none; used like {usage.effective_codes:.1f} even ones"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("out"))
    parser.add_argument("--epochs", type=int, default=120, help="of six steps each")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and dropout")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    training, held_out = split(load())
    vocabulary = Vocabulary(training.names)
    training, held_out = (as_tokens(pairs, vocabulary) for pairs in (training, held_out))
    steps = args.epochs * (len(training) // BATCH)
    options = {"epochs": args.epochs, "seed": args.seed, "batch": BATCH}
    runs = {
        name: train(training, partial(make, vocabulary, steps), label=name, **options)
        for name, make in (("means", OverMeans), ("codes", OverCodes))
    }
    learned = {name: measure(*run.model.embed(held_out)) for name, run in runs.items()}
    model = runs["codes"].model
    image, text = weights_of(model, held_out)
    shared = agreed(image, text, 8)
    files = [
        pictures.code_meanings(
            args.out / "codes.png", meanings(model, training, shared), training, PATCH
        ),
        pictures.save(
            plot_codes(image[:40], names=held_out.names[:40], most=60), args.out / "usage.png"
        ),
        args.out / "fdt.json",
    ]
    report = {
        "seed": args.seed,
        "threads": args.threads,
        "training_seconds": {name: run.seconds for name, run in runs.items()},
        "held_out": learned,
        "losses": {name: run.losses for name, run in runs.items()},
    }
    files[-1].write_text(json.dumps(report, indent=1) + "\n")
    print(f"\n{tables.learned(learned, len(held_out))}\n")
    print(usage_lines("pictures", image))
    print(usage_lines("names", text))
    print("See " + "\n    ".join(str(file) for file in files))


if __name__ == "__main__":
    main()
