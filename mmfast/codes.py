"""Looking inside a codebook: which codes fire, in how many samples, and which never do.

For any weights of samples over codes: those of `fdt_pool`, of a softmax, one-hot rows of a
quantiser. That is why it stands beside the losses, and not in one of them.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmfast.ops._inputs import check_matrix, check_tensor

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class CodeUsage:
    """How samples use C codes, in O(C) memory; `+` joins the usages of two sets of samples.

    Attributes:
        samples: their number.
        fired: int64 [C], in how many samples each code fires.
        mass: float64 [C], the sum of its weights over all samples.
        sizes: int64 [C + 1], at k the number of samples in which k codes fire.
    """

    samples: int
    fired: Tensor
    mass: Tensor
    sizes: Tensor

    def __add__(self, other: "CodeUsage") -> "CodeUsage":
        """The usage of the samples of both; ValueError unless both have the same codes."""
        if len(self.fired) != len(other.fired):
            raise ValueError(
                f"CodeUsage: can only add usages of {len(self.fired)} codes, got one of "
                f"{len(other.fired)}"
            )
        return CodeUsage(
            self.samples + other.samples,
            self.fired + other.fired,
            self.mass + other.mass,
            self.sizes + other.sizes,
        )

    @property
    def dead(self) -> Tensor:
        """int64 [K], the codes that fire in no sample."""
        return (self.fired == 0).nonzero().squeeze(1)

    @property
    def codes_per_sample(self) -> float:
        """How many codes fire in a sample, on average."""
        return float(self.fired.sum()) / self.samples

    @property
    def entropy(self) -> float:
        """Of the average usage mass / sum(mass), in nats: log C if even, 0 of a single code."""
        p = self.mass / self.mass.sum()
        return float(torch.special.entr(p).sum())

    @property
    def effective_codes(self) -> float:
        """exp(entropy), the perplexity: as many codes, evenly used, have the same entropy."""
        return math.exp(self.entropy)

    def most_used(self, count: int) -> Tensor:
        """int64 [count], the codes of most mass, most first; fewer if there are fewer."""
        return self.mass.argsort(descending=True, stable=True)[:count]


@torch.no_grad()
def code_usage(weights: Tensor, *, threshold: float = 0.0) -> CodeUsage:
    """The usage of codes in a batch; add those of further batches to it.

    Args:
        weights: [B, C], not negative: of sample b on code c. A NaN fires nothing and is seen in
            `mass`.
        threshold: a code fires in a sample where its weight is above this. 0 suits sparsemax; a
            softmax or a sigmoid leaves no weight at 0 and needs one, such as 1 / C.

    Returns:
        A CodeUsage on the device of `weights`.

    Raises:
        TypeError: weights that are no floating tensor.
        ValueError: weights that are not [B, C], or empty.
    """
    check_tensor("code_usage", "weights", weights)
    check_matrix("code_usage", "weights", weights, "B, C")
    fires = weights > threshold
    samples, codes = weights.shape
    sizes = torch.zeros(codes + 1, dtype=torch.int64, device=weights.device)
    sizes.index_add_(0, fires.sum(1), sizes.new_ones(samples))
    return CodeUsage(samples, fires.sum(0), weights.sum(0, dtype=torch.float64), sizes)


def plot_codes(
    weights: Tensor,
    *,
    codes: Tensor | None = None,
    names: list[str] | None = None,
    most: int = 64,
) -> "Figure":
    """A picture of codes against samples, darker where a code weighs more. Needs matplotlib.

    Args:
        weights: [B, C], as in `code_usage`; a row each, so give tens of samples, not thousands.
        codes: int64 [K], the columns to show; by default the `most` that weigh most.
        names: B words, one beside each row.
        most: a number of columns.

    Returns:
        A Figure: `figure.savefig(path)`.

    Raises:
        TypeError, ValueError: as `code_usage`; names that are not B.
        ModuleNotFoundError: matplotlib is not there.
    """
    from matplotlib.figure import Figure

    usage = code_usage(weights)
    if names is not None and len(names) != len(weights):
        raise ValueError(f"plot_codes: names must be B={len(weights)} words, got {len(names)}")
    codes = usage.most_used(most) if codes is None else codes
    shown = weights.detach()[:, codes].double().cpu()
    rows, columns = shown.shape
    figure = Figure(figsize=(2.5 + 0.16 * columns, 1.3 + 0.16 * rows), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shown.numpy(), cmap="Blues", aspect="auto", interpolation="none", vmin=0)
    figure.colorbar(image, label="weight")
    small: dict[str, Any] = {"fontsize": 7}
    axes.set_xticks(range(columns), [str(c) for c in codes.tolist()], rotation=90, **small)
    if names is None:
        axes.set_ylabel("sample")
    else:
        # names come from outside: a dollar in one of them is no formula
        axes.set_yticks(range(rows), names, parse_math=False, **small)
    axes.set_xlabel(f"code, {columns} of {weights.shape[1]}")
    return figure
