"""Fast and small contrastive losses and measures for multimodal learning."""

# torch first: the compiled core then shares torch's OpenMP runtime
import torch  # noqa: F401

from mmfast import nn
from mmfast.losses.clip import clip_loss, info_nce
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.slerp import slerp

__version__ = "0.1.0"

__all__ = ["clip_loss", "info_nce", "nn", "pairwise_lse", "slerp"]
