"""The losses of the literature in their published dense forms, each with mmfast's signature.

Written from the formulas, in the plain way of the published code: every matrix of scores stands in
memory, logits in the type of the features. Sources are those of the mmfast functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import mmfast
from bench import peers
from bench.measure import Contender, Unavailable

LAM = 0.3
TEMPERATURE = 1 / peers.SCALE
ALPHA = 0.4  # the teacher's share in the published ITC
SHARED = 0.001  # of the queue that has the tags of a row


@dataclass(frozen=True)
class Case:
    """One loss.

    inputs: (n, queue, d, dtype) -> the arguments of both forms.
    products: of [n, d] with [d, keys] that mmfast's forward and backward take; dense forms keep
        their scores and take fewer.
    sweeps_batch: the keys are those of the batch and of the queue; else of the one that is there.
    """

    dense: Callable[..., Tensor]
    inputs: Callable[[int, int, int, str], tuple[Any, ...]]
    products: int
    sweeps_batch: bool = False

    def flops(self, n: int, queue: int, d: int) -> int:
        keys = queue + n if self.sweeps_batch else queue or n
        return peers.products(self.products, n, d, keys)


def find(name: str, contender: str) -> Callable[..., Tensor] | Unavailable:
    """The loss `name`, "dense" or "mmfast"."""
    if contender == "dense":
        return CASES[name].dense
    # this bench measures older commits, too
    loss: Callable[..., Tensor] | None = getattr(mmfast, f"{name}_loss", None)
    return loss or Unavailable(f"this mmfast has no {name}_loss")


def drawing(contender: str) -> Callable[..., Tensor] | Unavailable:
    """What draws one negative a row, "softmax + multinomial" or "mmfast"."""
    if contender == "softmax + multinomial":
        return softmax_multinomial
    draw: Callable[..., Tensor] | None = getattr(mmfast, "sample_negatives", None)
    return draw or Unavailable("this mmfast has no sample_negatives")


def contender(
    name: str, which: str, n: int, queue: int, d: int, dtype: str
) -> Contender | Unavailable:
    """Forward and backward of one loss; `queue` is 0 for a loss without one."""
    loss = find(name, which)
    if isinstance(loss, Unavailable):
        return loss
    inputs = CASES[name].inputs(n, queue, d, dtype)
    return Contender(partial(peers.value_and_grads, loss, *inputs))


def slerp(a: Tensor, b: Tensor, lam: float) -> Tensor:
    """The formula in the type of the rows."""
    theta = (a * b).sum(1, keepdim=True).acos()
    return (lam * theta).sin() / theta.sin() * a + ((1 - lam) * theta).sin() / theta.sin() * b


def m2_mix(image: Tensor, text: Tensor, scale: float, lam: float) -> Tensor:
    mixed, own = slerp(image, text, lam), scale * (image * text).sum(1)
    target = torch.arange(len(image))
    rows, columns = (
        F.cross_entropy((scale * x @ mixed.T).diagonal_scatter(own), target) for x in (image, text)
    )
    return rows + columns


def uni_mix(kind: str, image: Tensor, text: Tensor, scale: float, lam: float) -> Tensor:
    """V-Mix, L-Mix and VL-Mix; the targets of the last add up to 2."""
    q = slerp(image, image.flip(0), lam) if "v" in kind else image
    k = slerp(text, text.flip(0), lam) if "l" in kind else text
    own = torch.eye(len(q), dtype=q.dtype)
    target = own + own.flip(0) if kind == "vl" else lam * own + (1 - lam) * own.flip(0)
    logits = scale * q @ k.T
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target.T)) / 2


def hcl(image: Tensor, text: Tensor) -> Tensor:
    scale, tau_plus, beta, n = 2.0, 0.1, 1.0, len(image) - 1
    scores = scale * image @ text.T
    own = torch.eye(len(image), dtype=torch.bool)
    positive, negatives = scores.diagonal().exp(), scores.exp().masked_fill(own, 0)
    weights = (beta * scores).exp().masked_fill(own, 0)
    reweighed = n * (weights * negatives).sum(1) / weights.sum(1)
    rest = (reweighed - tau_plus * n * positive) / (1 - tau_plus)
    rest = rest.clamp(min=n * torch.tensor(-scale).exp())
    return -(positive / (positive + rest)).log().mean()


def gmc(modalities: Tensor, joint: Tensor, temperature: float) -> Tensor:
    """Every modality beside the joint embedding: a matrix over the 2B rows of both."""
    own = torch.eye(2 * len(joint), dtype=torch.bool)
    terms = []
    for z in modalities:
        both = torch.cat([joint, z])
        scores = (both @ both.T / temperature).exp().masked_fill(own, 0)
        positive = ((joint * z).sum(1) / temperature).exp()
        terms.append(-(positive.repeat(2) / scores.sum(1)).log().mean())
    return torch.stack(terms).sum()


def moco_logits(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    own = (query * key).sum(1, keepdim=True)
    return torch.cat([own, query @ queue.T], dim=1) / temperature


def moco(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    logits = moco_logits(query, key, queue, temperature)
    return F.cross_entropy(logits, torch.zeros(len(query), dtype=torch.int64))


def tagged_moco(
    query: Tensor, key: Tensor, queue: Tensor, positives: Tensor, temperature: float
) -> Tensor:
    log_p = moco_logits(query, key, queue, temperature).log_softmax(1)
    return -((log_p * positives).sum(1) / positives.sum(1)).mean()


def itc(
    image: Tensor,
    text: Tensor,
    image_m: Tensor,
    text_m: Tensor,
    image_queue: Tensor,
    text_queue: Tensor,
    temperature: Tensor,
    alpha: float,
) -> Tensor:
    def toward(query: Tensor, teacher: Tensor, key: Tensor, queue: Tensor) -> Tensor:
        keys = torch.cat([key, queue])
        with torch.no_grad():
            own = torch.eye(len(query), len(keys), dtype=query.dtype)
            taught = (teacher @ keys.T / temperature).softmax(1)
            target = alpha * taught + (1 - alpha) * own
        log_p = (query @ keys.T / temperature).log_softmax(1)
        return -(log_p * target).sum(1).mean()

    of_image = toward(image, image_m, text_m, text_queue)
    return (of_image + toward(text, text_m, image_m, image_queue)) / 2


def shift_landscape(
    image: Tensor, text: Tensor, shifts: Sequence[float], temperatures: Sequence[float]
) -> Tensor:
    """The loop of the paper's code over one batch of all rows: [shifts, temperatures]."""
    image, text = F.normalize(image, dim=1), F.normalize(text, dim=1)
    direction = F.normalize(image.mean(0) - text.mean(0), dim=0)
    losses = []
    for shift in shifts:
        x = F.normalize(image - shift / 2 * direction, dim=1)
        y = F.normalize(text + shift / 2 * direction, dim=1)
        losses += [peers.dense_one_product(x, y, torch.tensor(1 / t)) for t in temperatures]
    return torch.stack(losses).view(len(shifts), len(temperatures))


def softmax_multinomial(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """One negative a row: own pairs are left out after the softmax; all rows in one call, where the
    published loop draws row by row."""
    weights = (scale * q @ k.T).softmax(1).fill_diagonal_(0)
    return torch.multinomial(weights, 1).squeeze(1)


def _pair(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    return peers.features(n, d, dtype)[:2]


def _mixed(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    return *_pair(n, queue, d, dtype), peers.SCALE, LAM


def _sigmoid(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    bias = torch.tensor(peers.SIGMOID_BIAS, requires_grad=True)
    return *peers.features(n, d, dtype), bias


def _modalities(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    image, text = (x.detach() for x in _pair(n, queue, d, dtype))
    joint = F.normalize(image + text, dim=1)
    return torch.stack([image, text]).requires_grad_(), joint.requires_grad_(), 0.1


def _queue(size: int, d: int, dtype: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(size, d, generator=generator), dim=1).to(getattr(torch, dtype))


def _momentum(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    query, key = _pair(n, queue, d, dtype)
    return query, key.detach(), _queue(queue, d, dtype, 1), TEMPERATURE


def _tagged(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    *keys, temperature = _momentum(n, queue, d, dtype)
    positives = torch.rand(n, 1 + queue, generator=torch.Generator().manual_seed(2)) < SHARED
    positives[:, 0] = True
    return *keys, positives, temperature


def _taught(n: int, queue: int, d: int, dtype: str) -> tuple[Any, ...]:
    image, text = _pair(n, queue, d, dtype)
    # momentum twins: alike, not equal
    noise = _queue(n, d, dtype, 3)
    twins = [F.normalize(x.detach() + 0.1 * noise, dim=1) for x in (image, text)]
    queues = [_queue(queue, d, dtype, seed) for seed in (1, 2)]
    return image, text, *twins, *queues, torch.tensor(TEMPERATURE, requires_grad=True), ALPHA


# a sweep is scored once forward and once backward, and each side that learns takes a product more;
# where keys are constants the one product more is made forward, and none is scored again
CASES = {
    # [image; text] against the mixtures
    "m2_mix": Case(m2_mix, _mixed, 8),
    # rows and columns of one sweep
    "v_mix": Case(partial(uni_mix, "v"), _mixed, 4),
    "l_mix": Case(partial(uni_mix, "l"), _mixed, 4),
    "vl_mix": Case(partial(uni_mix, "vl"), _mixed, 4),
    # a sweep for each of its two scales
    "hcl": Case(hcl, _pair, 8),
    # the joint embedding with itself; each of two modalities with it and with itself
    "gmc": Case(gmc, _modalities, 20),
    # gradients are made with the value
    "siglip": Case(peers.sigmoid, _sigmoid, 3),
    # keys do not learn
    "moco": Case(moco, _momentum, 2),
    # as moco, and the means of positives
    "tagged_moco": Case(tagged_moco, _tagged, 3),
    # in each of two directions a student as moco, and a teacher: scores and the mean of keys
    "itc": Case(itc, _taught, 8, sweeps_batch=True),
}
