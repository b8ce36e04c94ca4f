"""The primitives, one file each: contract, reference, backends, autograd, public function."""

from mmfast._dispatch import Backend
from mmfast.ops import fdt_pool as _fdt_pool
from mmfast.ops import pairwise_lse as _pairwise_lse
from mmfast.ops import pairwise_rank as _pairwise_rank
from mmfast.ops import pairwise_softplus as _pairwise_softplus
from mmfast.ops import pairwise_stats as _pairwise_stats
from mmfast.ops import sample_negatives as _sample_negatives
from mmfast.ops import shift_landscape as _shift_landscape
from mmfast.ops import slerp as _slerp
from mmfast.ops import sparsemax as _sparsemax

# every op's backends, fastest first; what `mmfast info` and the tests go through
BACKENDS: dict[str, tuple[Backend, ...]] = {
    "fdt_pool": _fdt_pool.BACKENDS,
    "pairwise_lse": _pairwise_lse.BACKENDS,
    "pairwise_rank": _pairwise_rank.BACKENDS,
    "pairwise_softplus": _pairwise_softplus.BACKENDS,
    "pairwise_stats": _pairwise_stats.BACKENDS,
    "sample_negatives": _sample_negatives.BACKENDS,
    "shift_landscape": _shift_landscape.BACKENDS,
    "slerp": _slerp.BACKENDS,
    "sparsemax": _sparsemax.BACKENDS,
}
