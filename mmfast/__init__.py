"""Fast and small contrastive losses and measures for multimodal learning."""

# torch first: the compiled core then shares torch's OpenMP runtime
import torch  # noqa: F401

from mmfast import nn
from mmfast.losses.albef import itc_loss, itm_loss, mlm_loss
from mmfast.losses.clip import clip_loss, info_nce
from mmfast.losses.gmc import gmc_embedding, gmc_loss
from mmfast.losses.hcl import hcl_loss
from mmfast.losses.m3_mix import m3_mix_loss
from mmfast.losses.mixup import l_mix_loss, m2_mix_loss, v_mix_loss, vl_mix_loss
from mmfast.losses.moco import mct_loss, moco_loss, tagged_moco_loss
from mmfast.losses.siglip import siglip_loss
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.pairwise_softplus import pairwise_softplus
from mmfast.ops.sample_negatives import sample_negatives
from mmfast.ops.slerp import slerp
from mmfast.ops.sparsemax import sparsemax

__version__ = "0.1.0"

__all__ = [
    "clip_loss",
    "gmc_embedding",
    "gmc_loss",
    "hcl_loss",
    "info_nce",
    "itc_loss",
    "itm_loss",
    "l_mix_loss",
    "m2_mix_loss",
    "m3_mix_loss",
    "mct_loss",
    "mlm_loss",
    "moco_loss",
    "nn",
    "pairwise_lse",
    "pairwise_softplus",
    "sample_negatives",
    "siglip_loss",
    "slerp",
    "sparsemax",
    "tagged_moco_loss",
    "v_mix_loss",
    "vl_mix_loss",
]
