"""How each loss is put into a trainer: a recipe holds the heads and gives the loss of a batch.

A trainer needs `recipe.loss(image, text)` and `recipe.parameters()`. Most losses are called as that
of CLIP is, so one recipe, `Scaled`, serves them; the others hold more than heads and a scale.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from data import Pairs
from heads import IMAGE_WIDTH, TEXT_WIDTH, WIDTH, MakeHead, Scale, TwoHeads, small_head
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import mmfast

TEMPERATURE = 0.07
# slow heads that follow faster (0.9) let MoCo collapse; a longer queue meets an epoch's pairs twice
MOMENTUM, QUEUE = 0.99, 700


class Recipe(nn.Module, ABC):
    """Fresh heads, and what else a loss needs to train them."""

    learning_rate = 1e-3

    def __init__(self, make_head: MakeHead = small_head):
        super().__init__()
        self.heads = TwoHeads(make_head)

    @abstractmethod
    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        """The loss of a batch of features [B, 1280] and [B, 384]."""

    @torch.no_grad()
    def embed(self, pairs: Pairs) -> tuple[Tensor, Tensor]:
        """Unit rows of both modalities of these pairs, without dropout."""
        self.eval()
        image, text = self.heads(pairs.image, pairs.text)
        self.train()
        return image, text


class Scaled(Recipe):
    """Any loss of (image, text, scale): that of CLIP, those that mix, HCL."""

    def __init__(self, criterion: Callable[..., Tensor], make_head: MakeHead = small_head):
        super().__init__(make_head)
        self.criterion = criterion
        self.scale = Scale(1 / TEMPERATURE)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.heads(image, text)
        return self.criterion(image, text, self.scale())


def hcl_both_ways(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """HCL from images to texts and back."""
    # no two emoji are of one class, so next to no negative is a positive in disguise
    options = {"logit_scale": scale, "tau_plus": 0.001, "beta": 0.5}
    return (mmfast.hcl_loss(image, text, **options) + mmfast.hcl_loss(text, image, **options)) / 2


class SigLip(Recipe):
    """Every pair is a decision of its own: beside the scale a bias is learned."""

    # no row's sum holds the pull on pairs in check: faster, all rows first fall into one direction
    learning_rate = 3e-4

    def __init__(self, make_head: MakeHead = small_head):
        super().__init__(make_head)
        self.criterion = mmfast.nn.SigLipLoss()
        self.scale = Scale(10)
        self.bias = nn.Parameter(torch.tensor(-10.0))

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        image, text = self.heads(image, text)
        return self.criterion(image, text, self.scale(), self.bias)


class Itc(Recipe):
    """ALBEF's contrast: slow heads make the keys and soften the targets. It holds the state."""

    def __init__(self, make_head: MakeHead = small_head):
        super().__init__(make_head)
        self.criterion = mmfast.nn.MomentumITC(self.heads, WIDTH, QUEUE, momentum=MOMENTUM)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        with torch.no_grad():
            image_key, text_key = self.criterion.follow(self.heads)(image, text)
        image, text = self.heads(image, text)
        return self.criterion(image, text, image_key, text_key)


class Queued(Recipe):
    """Losses of queries against keys and queues, with the slow heads and the queues they need."""

    def __init__(self, criterion: Callable[..., Tensor], make_head: MakeHead = small_head):
        super().__init__(make_head)
        self.criterion = criterion
        average = get_ema_multi_avg_fn(MOMENTUM)
        self.slow = AveragedModel(self.heads, multi_avg_fn=average).requires_grad_(False)
        self.image_queue, self.text_queue = (
            mmfast.nn.KeyQueue(F.normalize(torch.randn(QUEUE, WIDTH))) for _ in range(2)
        )

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        self.slow.update_parameters(self.heads)
        with torch.no_grad():
            image_key, text_key = self.slow(image, text)
        image, text = self.heads(image, text)
        images = image_key, self.image_queue.snapshot(image)
        texts = text_key, self.text_queue.snapshot(text)
        loss = self.criterion(image, text, images, texts)
        self.image_queue.push(image_key)
        self.text_queue.push(text_key)
        return loss


Keys = tuple[Tensor, Tensor]


def moco_across(image: Tensor, text: Tensor, images: Keys, texts: Keys) -> Tensor:
    """MoCo from images to texts and back; images, texts are keys and queue."""
    to_text = mmfast.moco_loss(image, *texts, TEMPERATURE)
    return (to_text + mmfast.moco_loss(text, *images, TEMPERATURE)) / 2


def mct(image: Tensor, text: Tensor, images: Keys, texts: Keys) -> Tensor:
    """Across as `moco_across`, and inside each modality: dropout makes of a sample two views.

    Published are heads of their own for each path. Below frozen encoders the paths inside would
    then teach the paths across nothing: here they share heads.
    """
    inside = (image, *images), (text, *texts)
    return mmfast.mct_loss(*inside, (image, *texts), (text, *images), TEMPERATURE)


class Gmc(Recipe):
    """Each modality against a joint embedding of both, which has a head of its own."""

    def __init__(self, make_head: MakeHead = small_head):
        super().__init__(make_head)
        self.joint = make_head(IMAGE_WIDTH + TEXT_WIDTH, WIDTH)
        self.criterion = mmfast.nn.GMCLoss(temperature=0.1)

    def loss(self, image: Tensor, text: Tensor) -> Tensor:
        joint = self.joint(torch.cat([image, text], 1))
        return self.criterion(self.heads(image, text), joint)

    @torch.no_grad()
    def embed_joint(self, pairs: Pairs) -> Tensor:
        """Unit rows of these pairs, of which nothing is missing, without dropout."""
        self.eval()
        joint = self.joint(torch.cat([pairs.image, pairs.text], 1))
        self.train()
        return joint


M3 = mmfast.nn.M3MixLoss

RECIPES: dict[str, Callable[..., Recipe]] = {
    "clip": partial(Scaled, mmfast.clip_loss),
    # each mix is added to CLIP's loss, with the weights of the published scripts
    "v": partial(Scaled, M3(weights={"v": 0.05})),
    "l": partial(Scaled, M3(weights={"l": 0.05})),
    "vl": partial(Scaled, M3(weights={"vl": 0.1})),
    "m2": partial(Scaled, mmfast.nn.M2MixLoss(weight=0.01)),
    "m3": partial(Scaled, M3()),
    "hcl": partial(Scaled, hcl_both_ways),
    "siglip": SigLip,
    "itc": Itc,
    "moco": partial(Queued, moco_across),
    "mct": partial(Queued, mct),
    "gmc": Gmc,
}
