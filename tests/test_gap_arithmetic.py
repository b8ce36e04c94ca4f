"""Embedding arithmetic and gradient blending against golden vectors and dense definitions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmfast import (
    embedding_arithmetic,
    gradient_blending_weights,
    gradient_blending_weights_of_gradients,
)
from mmfast.testing import unit_rows

FOLDER = Path(__file__).parent / "golden"
SIMAT, BLEND = (np.load(FOLDER / f"{name}.npz") for name in ("simat", "gblend"))


@pytest.mark.parametrize("i", range(8))
def test_simat_golden(i, level_backend):
    made = {name: SIMAT[f"simat.{name}"] for name in ("word_from", "word_to", "oracle")}
    found = embedding_arithmetic(
        SIMAT["simat.image_raw"],
        SIMAT["simat.word_raw"],
        query=SIMAT["simat.query_image"],
        target=SIMAT["simat.target_id"],
        weights=SIMAT["simat.norm2"] ** -0.5,
        lam=SIMAT["simat.lambdas"][i].item(),
        backend=level_backend,
        **made,
    )
    assert found.picked.tolist() == SIMAT["simat.picked"][i].tolist()
    assert found.score == pytest.approx(SIMAT["simat.score"][i].item(), abs=1e-12)


@given(
    n=st.integers(2, 9),
    d=st.integers(1, 5),
    T=st.integers(1, 6),
    seed=st.integers(0, 10_000),
    lam=st.floats(0, 3),
)
def test_simat_is_the_dense_form(n, d, T, seed, lam):
    random = torch.Generator().manual_seed(seed)
    images, words = 3 * unit_rows(n, d, seed=seed), unit_rows(4, d, seed=seed + 1)
    query = torch.randint(0, n, (T,), generator=random)
    word_from, word_to, target = (torch.randint(0, 4, (T,), generator=random) for _ in range(3))
    oracle = torch.rand(n, 4, generator=random)
    found = embedding_arithmetic(
        images, words, query=query, word_from=word_from, word_to=word_to, target=target,
        oracle=oracle, lam=lam, threshold=0.3, normalize=False,
    )  # fmt: skip
    scores = (images[query] + lam * (words[word_to] - words[word_from])) @ images.T
    scores[torch.arange(T), query] = -torch.inf
    torch.testing.assert_close(scores.gather(1, found.picked[:, None])[:, 0], scores.amax(1))
    assert found.score == pytest.approx(
        100 * (oracle[found.picked, target] > 0.3).double().mean().item()
    )


def test_blending_golden():
    names = ("train_before", "val_before", "train_after", "val_after")
    losses = [BLEND[f"gblend.{name}"] for name in names]
    for made in (losses, [x.tolist() for x in losses], [torch.from_numpy(x) for x in losses]):
        weights = gradient_blending_weights(*made)
        np.testing.assert_allclose(weights, BLEND["gblend.weights"], rtol=0, atol=1e-12)


def test_blending_of_gradients_golden():
    made = [BLEND[f"gradient_form.{name}"] for name in ("grad_val", "grad_train_samples", "v")]
    weights = gradient_blending_weights_of_gradients(*made)
    np.testing.assert_allclose(weights, BLEND["gradient_form.weights_sum1"], rtol=0, atol=1e-12)


def test_a_head_that_grew_worse_weighs_less_than_nothing():
    weights = gradient_blending_weights([2.0, 2.0], [2.0, 2.0], [1.0, 1.0], [1.5, 2.1])
    # learned 0.5 and -0.1, overfit by 0.5 and 1.1
    shares = torch.tensor([0.5 / 0.25, -0.1 / 1.21], dtype=torch.float64)
    torch.testing.assert_close(weights, shares / shares.sum())


PAIR, ONES = torch.arange(2), torch.ones(2, 2)


def simat(**changes):
    made = {"query": PAIR, "word_from": PAIR, "word_to": PAIR, "target": PAIR, "oracle": ONES}
    return embedding_arithmetic(changes.pop("images", ONES), ONES, **{**made, **changes})


def of_gradients(gradient=(1.0, 2.0), samples=((1.0, 0.0),), estimates=((1.0, 0.0),)):
    return gradient_blending_weights_of_gradients(
        *(torch.tensor(x) for x in (gradient, samples, estimates))
    )


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: simat(images=ONES[:1]), ValueError,
         "embedding_arithmetic: images must have 2 rows or more, got 1"),
        (lambda: simat(oracle=ONES[:1]), ValueError,
         r"embedding_arithmetic: oracle must be \[2, C\], got \[1, 2\]"),
        (lambda: simat(query=[0, 1]), TypeError,
         "query must be a tensor or a numpy array, got list"),
        (lambda: simat(query=PAIR + 1), ValueError, "query must be from 0 to 1, and 1 are not"),
        (lambda: simat(target=PAIR - 1), ValueError, "target must be from 0 to 1, and 1 are not"),
        (lambda: simat(word_to=PAIR[:1]), ValueError, r"word_to must be \[2\], one per row of q"),
        (lambda: simat(weights=torch.ones(3)), ValueError, r"weights must be \[2\], got \[3\]"),
        (lambda: simat(lam="1"), TypeError, "lam must be a number, got str"),
        (lambda: gradient_blending_weights([], [], [], []), ValueError,
         r"train_before must be \[K\], got \[0\]"),
        (lambda: gradient_blending_weights([1], [1, 2], [1], [1]), ValueError,
         r"held_out_before must be \[1\] like train_before, got \[2\]"),
        (lambda: gradient_blending_weights([2.0], [2.0], [1.0], [1.0]), ValueError,
         r"gradient_blending_weights: \[0\] overfit by nothing"),
        (lambda: gradient_blending_weights([2.0], [2.0], [1.0], [2.0]), ValueError,
         "there is no progress to share, it sums to 0.0"),
        (lambda: of_gradients(gradient=((1.0,),)), ValueError, r"gradient must be \[P\]"),
        (lambda: of_gradients(samples=((1.0,),)), ValueError,
         r"samples must be \[.., 2\], got \[1, 1\]"),
        (lambda: of_gradients(estimates=(1.0, 2.0)), ValueError, r"estimates must be \[.., 2\]"),
    ],
)  # fmt: skip
def test_messages(call, error, message):
    with pytest.raises(error, match=message):
        call()
