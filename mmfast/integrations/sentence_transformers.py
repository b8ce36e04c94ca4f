"""MultipleNegativesRankingLoss of sentence-transformers without its matrices of similarities.

    from mmfast.integrations.sentence_transformers import MultipleNegativesRankingLoss

    trainer = SentenceTransformerTrainer(..., loss=MultipleNegativesRankingLoss(model))

The options, value and gradients of the original: for query i and the scores s of its document,

    loss_i = log of the sum over chosen pairs of exp(s) - s_ii,

where "joint" sums over all `directions`, and "per_direction" is the mean of a loss for each. The
own document is left out of the sums, loss_i = softplus(sum of the others - s_ii), which keeps the
accuracy of losses near 0.

Source: Henderson et al., Efficient Natural Language Response Suggestion for Smart Reply, 2017
(arXiv 1705.00652); further directions from Li et al., 2023 (arXiv 2308.03281); hardness from Lan et
al., 2025 (arXiv 2503.04812), equation 5.
"""

from typing import Any

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import all_gather_with_grad, cos_sim, dot_score, get_rank
from torch import Tensor

from mmfast.losses._terms import log_sum_exp, row_scores, softplus
from mmfast.ops.pairwise_lse import pairwise_lse


class MultipleNegativesRankingLoss(losses.MultipleNegativesRankingLoss):  # type: ignore[misc]
    """The class of that name in sentence-transformers: same arguments, same columns of data.

    gather_across_devices gathers embeddings as the original does, O(all rows * D) on each device.

    Raises:
        ValueError: similarity_fct is neither cos_sim nor dot_score, or what the original refuses.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.similarity_fct not in (cos_sim, dot_score):
            name = getattr(self.similarity_fct, "__name__", self.similarity_fct)
            raise ValueError(
                "MultipleNegativesRankingLoss: similarity_fct must be cos_sim or dot_score of "
                f"sentence_transformers.util, got {name}"
            )

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Any) -> Tensor:
        """The loss of embeddings [B, D]: queries, their documents, then any hard negatives."""
        if len(embeddings) < 2:
            raise ValueError(
                "MultipleNegativesRankingLoss: a batch must have 2 columns of texts or more, "
                f"got {len(embeddings)}"
            )
        if self.similarity_fct is cos_sim:
            embeddings = [F.normalize(x, dim=1) for x in embeddings]
        (query, document, *_), first = embeddings, 0
        if self.gather_across_devices:
            embeddings = [all_gather_with_grad(x) for x in embeddings]
            first = get_rank() * len(query)
        own = torch.arange(first, first + len(query), device=query.device)

        positive = row_scores(query, document, self.scale)
        terms = [self._others(query, document, own, embeddings, side) for side in self.directions]
        if self.partition_mode == "per_direction":
            return torch.stack([softplus(others - positive) for others in terms]).mean()
        if "doc_to_query" in self.directions:
            # a joint sum holds the own pair once from each side
            terms.append(positive)
        return softplus(log_sum_exp(torch.stack(terms), 0) - positive).mean()

    def _others(
        self, query: Tensor, document: Tensor, own: Tensor, embeddings: list[Tensor], side: str
    ) -> Tensor:
        """Log-sum-exp [B] of one direction, without the own pair; `own` are numbers of rows."""
        queries, *columns = embeddings
        numbers = torch.arange(len(queries), device=own.device)
        documents, of_query = torch.cat(columns), numbers.repeat(len(columns))
        if side == "query_to_query":
            return pairwise_lse(query, queries, self.scale, q_ids=own, k_ids=numbers)
        if side == "doc_to_query":
            return pairwise_lse(document, queries, self.scale, q_ids=own, k_ids=numbers)
        if side == "doc_to_doc":
            return pairwise_lse(document, documents, self.scale, q_ids=own, k_ids=of_query)

        in_batch, hard = self._hardness()
        factor = self.scale / (self.scale + in_batch)
        others = pairwise_lse(
            _slowed(query, factor),
            _slowed(documents, factor),
            self.scale + in_batch,
            q_ids=own,
            k_ids=of_query,
        )
        if len(columns) == 1:
            return others
        negatives = torch.stack([column[own] for column in columns[1:]], 1)
        scores = row_scores(query.unsqueeze(1), negatives, 1.0)
        scores = self.scale * scores + hard * scores.detach()
        return torch.logaddexp(others, log_sum_exp(scores, 1))

    def _hardness(self) -> tuple[float, float]:
        """What is added to the scale of others' documents, and of own hard negatives."""
        mode, strength = self.hardness_mode, self.hardness_strength
        return (
            strength if mode in ("in_batch_negatives", "all_negatives") else 0.0,
            strength if mode in ("hard_negatives", "all_negatives") else 0.0,
        )


def _slowed(x: Tensor, factor: float) -> Tensor:
    """x, its gradient times factor: hardness raises the scale but sends no gradient."""
    return x if factor == 1 else factor * x + (1 - factor) * x.detach()
