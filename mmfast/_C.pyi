"""The compiled core: arrays come in by DLPack, outputs are preallocated by the caller.

Errors are ValueError and TypeError; an interrupt ends a long call as KeyboardInterrupt.
"""

from torch import Tensor

def isa() -> str:
    """The instruction-set level in use: generic, avx2, avx512, avx512_bf16 or amx."""

def isa_levels() -> list[str]:
    """The levels this machine can run, lowest first."""

def set_isa(level: str) -> None:
    """Use `level` from now on; ValueError if this machine lacks it."""

def build_info() -> dict[str, str]:
    """How the core was built: compiler, version, cuda ("no", or its version and its cards)."""

def tile_rate(dtype: str, seconds: float, threads: int) -> float:
    """GFLOP/s of the register tile on data in cache, for "float32", "float64" or "bfloat16"."""

def multiply_add_rate(seconds: float, threads: int) -> float:
    """GFLOP/s of float32 multiply-adds whose operands stay in registers."""

def pairwise_lse_forward(
    q: Tensor,
    k: Tensor,
    scale: float,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    threads: int,
) -> None:
    """Write rows [N] and columns [M] of q [N, D] and k [M, D]; either may be None."""

def pairwise_lse_backward(
    g_rows: Tensor | None,
    g_columns: Tensor | None,
    q: Tensor,
    k: Tensor,
    scale: float,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    rows: Tensor | None,
    columns: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    need_scale: bool,
    threads: int,
) -> float:
    """Write dq and dk, each unless None, and return d/dscale (0.0 if not asked for)."""

def pairwise_lse_mean(
    q: Tensor,
    k: Tensor,
    scale: float,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    mask: Tensor | None,
    rows: Tensor,
    mean: Tensor,
    threads: int,
) -> None:
    """Write rows [N], and mean [N, D]: of k under the softmax of each row."""

def pairwise_softplus(
    q: Tensor,
    k: Tensor,
    scale: float,
    bias: float,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    dq: Tensor | None,
    dk: Tensor | None,
    need_scale: bool,
    need_bias: bool,
    threads: int,
) -> tuple[float, float, float]:
    """Write dq [N, D] and dk [M, D], each unless None, in float32 (float64 for float64 inputs).

    Return the sum, d/dscale and d/dbias (0.0 if not asked for).
    """

def sample_negatives(
    q: Tensor,
    k: Tensor,
    scale: float,
    seed: int,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    indices: Tensor,
    threads: int,
) -> None:
    """Write indices [N], the column of k [M, D] drawn for each row of q [N, D], or -1."""

def fdt_pool_forward(
    tokens: Tensor,
    codebook: Tensor,
    scale: float,
    mask: Tensor | None,
    normalize: str,
    padded_score: float,
    pooled: Tensor,
    weights: Tensor,
    winners: Tensor,
    threads: int,
) -> None:
    """Write pooled [B, D], weights [B, C] and winners [B, C] (int32) of tokens [B, N * D]."""

def fdt_pool_backward(
    g_pooled: Tensor | None,
    g_weights: Tensor | None,
    tokens: Tensor,
    codebook: Tensor,
    scale: float,
    normalize: str,
    weights: Tensor,
    winners: Tensor,
    d_tokens: Tensor | None,
    d_codebook: Tensor | None,
    need_scale: bool,
    threads: int,
) -> float:
    """Write d_tokens [B, N * D] and d_codebook [C, D], each unless None; return d/dscale."""

def pairwise_stats(
    x: Tensor,
    y: Tensor | None,
    edges: Tensor | None,
    pivot: float,
    counts: Tensor,
    threads: int,
) -> tuple[tuple[float, float, float, float], tuple[float, int, int], tuple[float, int, int]]:
    """Write counts: below, in and above the bins, or of all products.

    Return the sums of the first four powers about the pivot, and the least and the largest product
    with its row and column (-1 of none), over all pairs or, where y is None, those i < j of x.
    """

def pairwise_rank(
    q: Tensor,
    k: Tensor,
    threshold: Tensor | None,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    largest: Tensor,
    index: Tensor,
    above: Tensor,
    threads: int,
) -> None:
    """Write, for each row of q [N, D], its largest product, the column and how many exceed."""

def shift_landscape(
    x: Tensor,
    x_inverse: Tensor,
    x_offsets: Tensor,
    x_factors: Tensor,
    y: Tensor,
    y_inverse: Tensor,
    y_offsets: Tensor,
    y_factors: Tensor,
    scales: list[float],
    chunk: int,
    rows: Tensor,
    columns: Tensor,
    threads: int,
) -> None:
    """Write rows and columns [L * T, N] for x and y [N, D], as mmfast.ops.shift_landscape says.

    inverse: one over the lengths of the rows [N]. offsets, factors: [L, N].
    """

def slerp_forward(a: Tensor, b: Tensor, lam: Tensor, out: Tensor, threads: int) -> None:
    """Write out [N, D], the mix of the rows of a and b [N, D]; lam is [N], or [1] for all rows."""

def slerp_backward(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    lam: Tensor,
    da: Tensor | None,
    db: Tensor | None,
    dlam: Tensor | None,
    threads: int,
) -> None:
    """Write da, db [N, D] and dlam [N], each unless None, for the upstream gradient g [N, D]."""

def sparsemax_forward(x: Tensor, out: Tensor, threads: int) -> None:
    """Write out [N, M], the weights of the rows of x [N, M]."""

def sparsemax_backward(g: Tensor, p: Tensor, dx: Tensor, threads: int) -> None:
    """Write dx [N, M] for the upstream gradient g of the weights p [N, M]."""

def sparsemax_cuda_forward(x: Tensor, out: Tensor, stream: int) -> None:
    """`sparsemax_forward` on the card, as `slerp_cuda_forward` does it."""

def sparsemax_cuda_backward(g: Tensor, p: Tensor, dx: Tensor, stream: int) -> None:
    """`sparsemax_backward` on the card, as `slerp_cuda_forward` does it."""

def slerp_cuda_forward(a: Tensor, b: Tensor, lam: Tensor, out: Tensor, stream: int) -> None:
    """`slerp_forward` on the card that holds the arrays, queued on `stream` (a cudaStream_t).

    RuntimeError if this build has no CUDA or the kernel cannot be launched.
    """

def slerp_cuda_backward(
    g: Tensor,
    a: Tensor,
    b: Tensor,
    lam: Tensor,
    da: Tensor | None,
    db: Tensor | None,
    dlam: Tensor | None,
    stream: int,
) -> None:
    """`slerp_backward` on the card, as `slerp_cuda_forward` does it."""
