"""Contrastive losses: plain torch over `mmfast.ops`, one file per system."""

from mmfast.losses.albef import itc_loss, itm_loss, mlm_loss
from mmfast.losses.clip import ClipLoss, clip_loss, info_nce
from mmfast.losses.fdt import FDT, fdt_loss, fdt_temperature
from mmfast.losses.gmc import GMCLoss, gmc_embedding, gmc_loss
from mmfast.losses.hcl import hcl_loss
from mmfast.losses.m3_mix import M2MixLoss, M3MixLoss, m3_mix_loss
from mmfast.losses.mixup import l_mix_loss, m2_mix_loss, v_mix_loss, vl_mix_loss
from mmfast.losses.moco import MoCoLoss, mct_loss, moco_loss, tagged_moco_loss
from mmfast.losses.momentum_itc import MomentumITC
from mmfast.losses.siglip import SigLipLoss, siglip_loss

__all__ = [
    "FDT",
    "ClipLoss",
    "GMCLoss",
    "M2MixLoss",
    "M3MixLoss",
    "MoCoLoss",
    "MomentumITC",
    "SigLipLoss",
    "clip_loss",
    "fdt_loss",
    "fdt_temperature",
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
    "siglip_loss",
    "tagged_moco_loss",
    "v_mix_loss",
    "vl_mix_loss",
]
