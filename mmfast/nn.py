"""The namespace of all Modules; each is defined beside its functions in `mmfast.losses`."""

from mmfast.losses._momentum import KeyQueue
from mmfast.losses.clip import ClipLoss
from mmfast.losses.fdt import FDT
from mmfast.losses.gmc import GMCLoss
from mmfast.losses.m3_mix import M2MixLoss, M3MixLoss
from mmfast.losses.moco import MoCoLoss
from mmfast.losses.momentum_itc import MomentumITC
from mmfast.losses.siglip import SigLipLoss

__all__ = [
    "FDT",
    "ClipLoss",
    "GMCLoss",
    "KeyQueue",
    "M2MixLoss",
    "M3MixLoss",
    "MoCoLoss",
    "MomentumITC",
    "SigLipLoss",
]
