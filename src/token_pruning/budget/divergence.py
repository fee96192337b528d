"""How much a pruned model's outputs differ from the dense model's, as its users would notice.

Embeddings: how each text ranks the others by cosine. A reranker's scores: the nDCG that each query's passages lose
against the dense order. Classes: the divergence of their probabilities. Other numbers: squared error ÷ variance.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from token_pruning.budget.examples import Batch
from token_pruning.ragged import layout_from_mask, pack
from token_pruning.runtime.prune import hugging_face_model, reads_of
from token_pruning.runtime.roles import first_segment

_NEIGHBOURS = 20
_SOFTNESS = 0.05  # of a ranking by cosines
_FAR = 1e4
_SMOOTHNESS = 0.5  # of ranks by scores, in their spreads

Kind = Literal["embedding", "ranking", "classes", "labels", "numbers"]


@dataclass(frozen=True)
class Divergence:
    """What is compared.

    Attributes:
        kind: how.
        groups: ``[examples]`` int64: the query that each example belongs to; all different unless it is a ranking.
    """

    kind: Kind
    groups: Tensor

    def between(self, dense: Tensor, pruned: Tensor, groups: Tensor) -> tuple[float, float]:
        """The mean over examples, or queries, and its standard error.

        Args:
            dense: ``[n, outputs]`` float32, what :func:`token_pruning.budget.fitting.outputs_of` gives.
            pruned: the same of the pruned model.
            groups: ``[n]``: those of these examples.
        """
        losses = self._losses(dense, pruned, groups)
        error = losses.double().std() / len(losses) ** 0.5 if len(losses) > 1 else torch.zeros(())
        return float(losses.double().mean()), float(error)

    def _losses(self, dense: Tensor, pruned: Tensor, groups: Tensor) -> Tensor:
        if self.kind == "embedding":
            return _neighbours_loss(dense, pruned)
        if self.kind == "ranking":
            return torch.stack(
                [_ranking_loss(dense[groups == group, 0], pruned[groups == group, 0]) for group in torch.unique(groups)]
            )
        if self.kind == "labels":  # each is there or not
            dense, pruned = (torch.stack([x, torch.zeros_like(x)], -1).reshape(-1, 2) for x in (dense, pruned))
        if self.kind == "numbers":
            return ((pruned - dense).square() / dense.var(0).clamp(min=1e-12)).mean(1)
        return kl_div(pruned.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="none").sum(1)


def _neighbours_loss(dense: Tensor, pruned: Tensor) -> Tensor:
    """How else each text ranks the others, ``[texts]``.

    The Kullback–Leibler divergence of the softmax of cosines ÷ 0.05, which counts near texts most: once as a dense
    query among pruned texts, once with both pruned. Cosines to the texts' own dense vectors were tried: they count what
    moves all vectors alike, which changes nobody's result.
    """
    before, after = normalize(dense, dim=1), normalize(pruned, dim=1)
    own = torch.eye(len(dense), dtype=torch.bool)
    wanted, searched, both = (
        ((x @ y.T) / _SOFTNESS).masked_fill(own, -_FAR).log_softmax(1)
        for x, y in ((before, before), (before, after), (after, after))
    )
    found = [kl_div(x, wanted, log_target=True, reduction="none").sum(1) for x in (searched, both)]
    return torch.stack(found).mean(0)


def neighbours_error(dense: Tensor, pruned: Tensor) -> float:
    """The mean squared change of the cosines of each text and those nearest to it.

    Args:
        dense: ``[texts, dim]`` float32.
        pruned: the same of the pruned model.
    """
    before, after = ((x @ x.T) for x in (normalize(dense, dim=1), normalize(pruned, dim=1)))
    before.fill_diagonal_(-torch.inf)
    nearest = before.topk(min(_NEIGHBOURS, len(dense) - 1), dim=1).indices
    return float((before.gather(1, nearest) - after.gather(1, nearest)).square().mean())


def divergence_of(model: Any, batch: Batch) -> Divergence:
    """How to compare a pruned model with the dense one.

    Args:
        model: with any head; pruned, so that it is known what its outputs read.
        batch: the examples.
    """
    inner = hugging_face_model(model)
    count = len(batch["input_ids"])
    groups = torch.arange(count, device="cpu")
    kind: Kind = "numbers"
    if inner is inner.base_model:
        if reads_of(model) != "all":
            kind = "embedding"
    elif type(inner).__name__.endswith("ForQuestionAnswering"):
        pass
    else:
        outputs, problem = inner.config.num_labels, getattr(inner.config, "problem_type", None)
        if problem == "multi_label_classification":
            kind = "labels"
        elif outputs > 1 and problem != "regression":
            kind = "classes"
        elif outputs == 1 and type(inner).__name__.endswith("ForSequenceClassification"):
            queries = _queries(batch)
            if 2 * len(torch.unique(queries)) <= count:  # each has several passages
                kind, groups = "ranking", queries
    return Divergence(kind, groups)


def _queries(batch: Batch) -> Tensor:
    """A number for each example's first text, ``[examples]`` int64; different ones for single texts."""
    layout = layout_from_mask(batch["attention_mask"].bool().cpu())
    ids = pack(batch["input_ids"].cpu(), layout)
    first = first_segment(ids, layout)
    numbers: dict[tuple[int, ...], int] = {}
    found = []
    for example, (tokens, inside) in enumerate(
        zip(torch.split(ids, layout.lengths), torch.split(first, layout.lengths), strict=True)
    ):
        key = tuple(tokens[inside].tolist()) if not inside.all() else (-1, example)
        found.append(numbers.setdefault(key, len(numbers)))
    return torch.tensor(found, device="cpu")


def _ranking_loss(dense: Tensor, pruned: Tensor) -> Tensor:
    """Of one query's passages, ``[passages]``: the nDCG that the pruned order loses against the dense one.

    A passage's gain is 1 ÷ the square of its dense rank: who reads a ranking reads its top. Ranks are made smooth by
    sigmoids of differences of scores (ApproxNDCG; Qin, Liu and Li, Information Retrieval 13, 2010), in units of each
    model's own spread, so that what keeps the order loses nothing. By 30 queries drawn at random it chose, among 11 to
    22 rules at .30, .45 and .60 of the FLOPs, such as lost 0.5, 0.2 and -0.1 MRR on 370 others; ListNet's divergence
    chose such as lost 1.3, 1.3 and 0.9.
    """
    order = dense.argsort(descending=True, stable=True)
    gains = torch.arange(1, len(dense) + 1, device="cpu").double() ** -2
    before, after = (_discounts(scores[order].double()) for scores in (dense, pruned))
    return (gains * (before - after)).sum() / gains.sum()


def _discounts(scores: Tensor) -> Tensor:
    """1 ÷ log₂(1 + smooth rank) of each passage."""
    spread = scores.std(unbiased=False).clamp(min=1e-6)
    above = torch.sigmoid((scores - scores[:, None]) / (_SMOOTHNESS * spread)).sum(1) - 0.5  # not above itself
    return 1 / torch.log2(2 + above)
