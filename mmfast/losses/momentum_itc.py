"""ALBEF's contrast as a Module: the state that `itc_loss` needs between steps.

Source: Li et al., Align before Fuse: Vision and Language Representation Learning with Momentum
Distillation, NeurIPS 2021, and its code, github.com/salesforce/ALBEF.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmfast._ring import join
from mmfast.losses._momentum import KeyQueue, check_size, follow, random_keys, slow_copy
from mmfast.losses._terms import check_number, check_share
from mmfast.losses.albef import itc_loss

# an id of no image, as in the published code
NO_IMAGE = -100


class MomentumITC(nn.Module):
    """`itc_loss` with what it needs between steps: momentum encoders, queues, temperature, ramp.

        itc = MomentumITC(model, width=256)  # model: both encoders with their projections
        slow = itc.follow(model)
        with torch.no_grad():
            image_m, text_m = slow(batch)
        image, text = model(batch)
        loss = itc(image, text, image_m, text_m)

    A state_dict resumes all of it exactly.

    Args:
        model: any Module; `slow` becomes a deep copy of it. It stays the caller's: its parameters
            are none of this Module's, `temperature` is. Keep them in float32: bfloat16 has no room
            for 1 - momentum.
        width: of the features.
        queue_size: number of keys kept of each modality; any, also one that is no multiple of the
            batch, which the published code refuses.
        momentum: of `slow`, in [0, 1).
        temperature: at first; a parameter.
        limits: each training call first clamps the temperature between these two, as published
            for pre-training; None, as published for retrieval, does not.
        alpha: the teacher's share of the target, in [0, 1].
        ramp: the number of training calls over which that share grows from 0, evenly. Published:
            those of the first epoch.
        group: a process group whose ranks share the batch, as in `itc_loss`: the keys of all are
            enqueued, so that queues stay alike where they, and the encoders, start alike. None
            keeps each process to itself.

    Raises:
        ValueError, TypeError: a number that does not fit.
    """

    step: Tensor

    def __init__(
        self,
        model: nn.Module,
        width: int,
        queue_size: int = 65536,
        *,
        momentum: float = 0.995,
        temperature: float = 0.07,
        limits: tuple[float, float] | None = (0.001, 0.5),
        alpha: float = 0.4,
        ramp: int = 0,
        group: Any = None,
    ) -> None:
        super().__init__()
        who = "MomentumITC"
        check_size(who, "width", width)
        check_size(who, "queue_size", queue_size)
        check_share(who, "momentum", momentum)
        check_number(who, "temperature", temperature, positive=True)
        check_share(who, "alpha", alpha, whole=True)
        check_number(who, "ramp", ramp)
        if limits is not None and not 0 < limits[0] <= limits[1]:
            raise ValueError(f"{who}: limits must be two numbers, 0 < low <= high, got {limits}")
        self.slow = slow_copy(model)
        self.image_queue = KeyQueue(random_keys(queue_size, width))
        self.text_queue = KeyQueue(random_keys(queue_size, width))
        self.id_queue = KeyQueue(torch.full((queue_size,), NO_IMAGE))
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.register_buffer("step", torch.zeros((), dtype=torch.int64))
        self.momentum = momentum
        self.limits = limits
        self.alpha = alpha
        self.ramp = ramp
        self.group = group

    def follow(self, model: nn.Module) -> nn.Module:
        """`slow`, in training moved towards `model`: once a step, before it encodes the batch."""
        if self.training:
            follow(self.slow, model, self.momentum)
        return self.slow

    def share(self) -> float | Tensor:
        """The teacher's share now, for `mlm_loss`, too; while there is a ramp a tensor."""
        if not self.ramp:
            return self.alpha
        return self.alpha * (self.step.to(self.temperature.dtype) / self.ramp).clamp(max=1.0)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        image_m: Tensor,
        text_m: Tensor,
        image_ids: Tensor | None = None,
    ) -> Tensor:
        """The loss of features [B, width], which are normalised here; image_m, text_m by `slow`.

        In training the batch's keys are enqueued last, so that they meet the next batch first;
        in evaluation nothing is moved. `image_ids` int64 [B], from 0, as in `itc_loss`; keys of
        calls without them are nobody's further positives.
        """
        if self.training and self.limits is not None:
            with torch.no_grad():
                self.temperature.clamp_(*self.limits)
        image, text, image_m, text_m = (
            F.normalize(x, dim=1) for x in (image, text, image_m, text_m)
        )
        loss = itc_loss(
            image,
            text,
            image_m,
            text_m,
            self.image_queue.snapshot(image),
            self.text_queue.snapshot(image),
            self.temperature,
            self.share(),
            image_ids=image_ids,
            queue_ids=None if image_ids is None else self.id_queue.rows,
            group=self.group,
        )
        if self.training:
            nobody = torch.full((len(image),), NO_IMAGE, device=image.device)
            keys = (image_m, text_m, nobody if image_ids is None else image_ids)
            ring = join("MomentumITC", self.group, image_m)
            for queue, own in zip(
                (self.image_queue, self.text_queue, self.id_queue), keys, strict=True
            ):
                queue.push(own if ring is None else torch.cat(ring.gather("keys", own.detach())))
            self.step.add_(1)
        return loss
