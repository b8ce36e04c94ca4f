"""Fast and small contrastive losses and measures for multimodal learning."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# torch first: the compiled core then shares torch's OpenMP runtime
import torch  # noqa: F401

from mmfast import nn
from mmfast.grad_cache import cached
from mmfast.losses.albef import itc_loss, itm_loss, mlm_loss
from mmfast.losses.clip import clip_loss, info_nce
from mmfast.losses.fdt import fdt_loss, fdt_temperature
from mmfast.losses.gmc import gmc_embedding, gmc_loss
from mmfast.losses.hcl import hcl_loss
from mmfast.losses.m3_mix import m3_mix_loss
from mmfast.losses.mixup import l_mix_loss, m2_mix_loss, v_mix_loss, vl_mix_loss
from mmfast.losses.moco import mct_loss, moco_loss, tagged_moco_loss
from mmfast.losses.siglip import siglip_loss
from mmfast.ops._statistics import PairwiseStats
from mmfast.ops.fdt_pool import fdt_pool
from mmfast.ops.pairwise_lse import pairwise_lse
from mmfast.ops.pairwise_rank import pairwise_rank
from mmfast.ops.pairwise_softplus import pairwise_softplus
from mmfast.ops.pairwise_stats import pairwise_stats
from mmfast.ops.sample_negatives import sample_negatives
from mmfast.ops.shift_landscape import Landscape, shift_landscape
from mmfast.ops.slerp import slerp
from mmfast.ops.sparsemax import sparsemax

if TYPE_CHECKING:
    from mmfast.gap import (
        alignment,
        calibration_error,
        cone_effect,
        cosine_stats,
        embedding_arithmetic,
        gap_report,
        gradient_blending_weights,
        gradient_blending_weights_of_gradients,
        mismatch_simulation,
        mlp_cone,
        modality_gap,
        open_rows,
        procrustes,
        relative_alignment,
        retrieval_calibration_error,
        retrieval_recall,
        uniformity,
    )
    from mmfast.gap.survey import survey

__version__ = "0.1.0"

__all__ = [
    "Landscape",
    "PairwiseStats",
    "alignment",
    "cached",
    "calibration_error",
    "clip_loss",
    "cone_effect",
    "cosine_stats",
    "embedding_arithmetic",
    "fdt_loss",
    "fdt_pool",
    "fdt_temperature",
    "gap_report",
    "gmc_embedding",
    "gmc_loss",
    "gradient_blending_weights",
    "gradient_blending_weights_of_gradients",
    "hcl_loss",
    "info_nce",
    "itc_loss",
    "itm_loss",
    "l_mix_loss",
    "m2_mix_loss",
    "m3_mix_loss",
    "mct_loss",
    "mismatch_simulation",
    "mlm_loss",
    "mlp_cone",
    "moco_loss",
    "modality_gap",
    "nn",
    "open_rows",
    "pairwise_lse",
    "pairwise_rank",
    "pairwise_softplus",
    "pairwise_stats",
    "procrustes",
    "relative_alignment",
    "retrieval_calibration_error",
    "retrieval_recall",
    "sample_negatives",
    "shift_landscape",
    "siglip_loss",
    "slerp",
    "sparsemax",
    "survey",
    "tagged_moco_loss",
    "uniformity",
    "v_mix_loss",
    "vl_mix_loss",
]


def __getattr__(name: str) -> Any:
    # what only measures is imported at its first use
    if name not in __all__:
        raise AttributeError(f"module 'mmfast' has no attribute {name!r}")
    value = getattr(import_module("mmfast.gap"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
