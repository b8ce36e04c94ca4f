"""What an analyst calls: how the embeddings of two modalities lie to each other."""

from mmfast.gap.arithmetic import Arithmetic, embedding_arithmetic
from mmfast.gap.blending import (
    gradient_blending_weights,
    gradient_blending_weights_of_gradients,
)
from mmfast.gap.calibration import Calibration, calibration_error, retrieval_calibration_error
from mmfast.gap.cone import Cone, MLPCone, cone_effect, mlp_cone
from mmfast.gap.files import Rows, open_rows
from mmfast.gap.measures import (
    Gap,
    Procrustes,
    alignment,
    cosine_stats,
    modality_gap,
    procrustes,
    relative_alignment,
    uniformity,
)
from mmfast.gap.mismatch import Mismatch, mismatch_simulation
from mmfast.gap.report import gap_report
from mmfast.gap.retrieval import Recall, retrieval_recall
from mmfast.gap.survey import Survey, survey

__all__ = [
    "Arithmetic",
    "Calibration",
    "Cone",
    "Gap",
    "MLPCone",
    "Mismatch",
    "Procrustes",
    "Recall",
    "Rows",
    "Survey",
    "alignment",
    "calibration_error",
    "cone_effect",
    "cosine_stats",
    "embedding_arithmetic",
    "gap_report",
    "gradient_blending_weights",
    "gradient_blending_weights_of_gradients",
    "mismatch_simulation",
    "mlp_cone",
    "modality_gap",
    "open_rows",
    "procrustes",
    "relative_alignment",
    "retrieval_calibration_error",
    "retrieval_recall",
    "survey",
    "uniformity",
]
