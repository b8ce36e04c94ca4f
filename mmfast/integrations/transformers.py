"""transformers' contrastive models with mmfast's loss: change the import, train as before.

    from mmfast.integrations.transformers import CLIPModel    # instead of: from transformers

    model = CLIPModel.from_pretrained(...)                    # or CLIPModel(config)

With return_loss=True, which contrastive training passes, the model has the value and gradients of
its parent and never makes the matrix of logits: `logits_per_image` and `logits_per_text` are None.
Without it the model is its parent, logits included. Parameters, checkpoints and everything else
are the parent's.

Where the parents differ: in bfloat16 they round every logit to bfloat16.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPOutput
from transformers.models.siglip.modeling_siglip import SiglipOutput
from transformers.models.siglip2.modeling_siglip2 import Siglip2Output
from transformers.utils.generic import can_return_tuple

from mmfast.losses.clip import clip_loss
from mmfast.losses.siglip import siglip_loss


def _without_logits(parent: Any, output: Any, loss: Callable[..., Tensor]) -> Callable[..., Any]:
    """`parent.forward`, where a loss is asked for by loss(model, image, text) of unit rows."""
    names, image_names, text_names = (
        list(inspect.signature(function).parameters)[1:-1]  # without self and **kwargs
        for function in (parent.forward, parent.get_image_features, parent.get_text_features)
    )

    @can_return_tuple  # type: ignore[untyped-decorator]
    def with_loss(model: Any, named: dict[str, Any]) -> Any:
        image, text = (
            encode(**_select(named, own, names), return_dict=True)
            for encode, own in (
                (model.get_image_features, image_names),
                (model.get_text_features, text_names),
            )
        )
        image_rows, text_rows = F.normalize(image.pooler_output), F.normalize(text.pooler_output)
        return output(
            loss=loss(model, image_rows, text_rows),
            text_embeds=text_rows,
            image_embeds=image_rows,
            text_model_output=text,
            vision_model_output=image,
        )

    # the parent's signature: a trainer drops columns of a data set that forward does not name
    @wraps(parent.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        named = dict(**dict(zip(names[: len(args)], args, strict=True)), **kwargs)
        if not named.pop("return_loss", None):
            return parent.forward(self, *args, **kwargs)
        options = {"return_dict": named.pop("return_dict")} if "return_dict" in named else {}
        return with_loss(self, named, **options)

    return forward


def _select(named: dict[str, Any], own: list[str], known: list[str]) -> dict[str, Any]:
    # what forward does not name goes to both towers
    return {name: x for name, x in named.items() if name in own or name not in known}


def _clip(model: Any, image: Tensor, text: Tensor) -> Tensor:
    return clip_loss(image, text, model.logit_scale.exp())


def _siglip(model: Any, image: Tensor, text: Tensor) -> Tensor:
    return siglip_loss(image, text, model.logit_scale.exp(), model.logit_bias)


class CLIPModel(transformers.CLIPModel):  # type: ignore[misc]
    """transformers' CLIPModel, its loss by `clip_loss`."""

    forward = _without_logits(transformers.CLIPModel, CLIPOutput, _clip)


class SiglipModel(transformers.SiglipModel):  # type: ignore[misc]
    """transformers' SiglipModel, its loss by `siglip_loss`."""

    forward = _without_logits(transformers.SiglipModel, SiglipOutput, _siglip)


class Siglip2Model(transformers.Siglip2Model):  # type: ignore[misc]
    """transformers' Siglip2Model, its loss by `siglip_loss`."""

    forward = _without_logits(transformers.Siglip2Model, Siglip2Output, _siglip)
