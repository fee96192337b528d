"""How much a pruned model's outputs differ from the dense model's, as its users would notice.

Embeddings: how much worse pieces of a text find it among the others, and how each text ranks the others by cosine. A
reranker's scores: the nDCG that each query's passages lose against the dense order, or, after training to give these
scores, the divergence of their softmax. Classes: the divergence of their probabilities. Other numbers: squared error ÷
variance.
"""

import random
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import kl_div, normalize

from token_pruning.budget.examples import Batch, as_batch
from token_pruning.ragged import layout_from_mask, pack
from token_pruning.runtime.prune import hugging_face_model, reads_of
from token_pruning.runtime.roles import first_segment

_SPANS, _SPAN_TOKENS = 4, 16  # of a text, and of a span at most; at most half of the text
_SOFTNESS = 0.05  # of a ranking by cosines
_RANKED = 0.25  # what it counts how texts rank each other, beside how spans find them
_FAR = 1e4
_SMOOTHNESS = 0.5  # of ranks by scores, in their spreads

Kind = Literal["embedding", "ranking", "scores", "classes", "labels", "numbers"]


@dataclass(frozen=True)
class Spans:
    """Pieces of texts, each to find its own.

    Attributes:
        vectors: of the dense model, ``[spans, dim]`` float32.
        owners: ``[spans]`` int64: the examples that they are of.
    """

    vectors: Tensor
    owners: Tensor


@dataclass(frozen=True)
class Divergence:
    """What is compared.

    Attributes:
        kind: how.
        groups: ``[examples]`` int64: the query that each example belongs to; all different unless it is a ranking.
        spans: of embedded texts; without them texts are compared by how they rank each other.
    """

    kind: Kind
    groups: Tensor
    spans: Spans | None = None

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
            ranked = _neighbours_loss(dense, pruned)
            if self.spans is None:
                return ranked
            missed = _finding_loss(dense, pruned, groups, self.spans)
            return missed * (missed.mean() > 0) + _RANKED * ranked
        if self.kind in ("ranking", "scores"):
            if self.kind == "scores":
                scale = dense.std().clamp(min=1e-6)
                dense, pruned = dense / scale, pruned / scale
            loss = _ranking_loss if self.kind == "ranking" else scores_divergence
            return torch.stack(
                [loss(dense[groups == group, 0], pruned[groups == group, 0]) for group in torch.unique(groups)]
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


def _finding_loss(dense: Tensor, pruned: Tensor, groups: Tensor, spans: Spans) -> Tensor:
    """How much worse a text is found among the others by spans of it, ``[texts]``; 0 where it has none.

    The log-probability that a span's softmax of cosines ÷ 0.05 gives its own text, dense, less the same with pruned
    texts; the mean over a text's spans. What ranks texts as the dense model does, by :func:`_neighbours_loss`, is not
    always what serves best: of 18 rules for paragraphs at .70 of the FLOPs it took one that loses 1.3 points of
    nDCG@10, with this one that loses 0.2. Where spans find their texts better than they did, more of it is no gain: of
    ten rules for STS-B at .74 those that they liked best were the worst.
    """
    place = torch.full((int(max(groups.max(), spans.owners.max())) + 1,), -1, device="cpu")
    place[groups] = torch.arange(len(groups), device="cpu")
    own = place[spans.owners]
    queries, own = normalize(spans.vectors[own >= 0], dim=1), own[own >= 0]
    before, after = (
        ((queries @ normalize(x, dim=1).T) / _SOFTNESS).log_softmax(1).gather(1, own[:, None])[:, 0].double()
        for x in (dense, pruned)
    )
    losses = torch.zeros(len(groups), dtype=torch.float64, device="cpu").index_add(0, own, before - after)
    return losses / torch.bincount(own, minlength=len(groups)).clamp(min=1)


def drawn_spans(batch: Batch, rows: Tensor, padding: int, seed: int) -> tuple[dict[str, Tensor], Tensor] | None:
    """Some tokens in a row of texts, each between its text's first and last token, as a batch of their own.

    Args:
        batch: the texts, padded.
        rows: the texts to draw from.
        padding: the id of the padding token.
        seed: of what is drawn.

    Returns:
        The spans, and whose they are, ``[spans]`` int64; None where no text has more than two tokens.
    """
    rng = random.Random(seed)
    names = [name for name in ("input_ids", "token_type_ids") if name in batch]
    found, owners = [], []
    for row in rows.tolist():
        places = batch["attention_mask"][row].nonzero()[:, 0]
        inside = len(places) - 2
        length = min(_SPAN_TOKENS, (inside + 1) // 2)
        for _ in range(_SPANS if inside > 0 else 0):
            start = rng.randint(1, 1 + inside - length)
            chosen = torch.cat([places[:1], places[start : start + length], places[-1:]])
            found.append({name: batch[name][row, chosen] for name in names})
            owners.append(row)
    return (as_batch(found, padding), torch.tensor(owners, device="cpu")) if found else None


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


def scores_divergence(dense: Tensor, pruned: Tensor) -> Tensor:
    """Of one query's passages, ``[passages]``: the Kullback–Leibler divergence of the softmax of their scores.

    Both are in units of the dense scores' spread over all pairs. That is what training makes smaller, and rankings got
    better with it, where :func:`_ranking_loss` said that they got worse: that is lower than 0 for a model that sets the
    first passage further apart than the dense one does.
    """
    return kl_div(pruned.log_softmax(0), dense.log_softmax(0), log_target=True, reduction="sum")


def _discounts(scores: Tensor) -> Tensor:
    """1 ÷ log₂(1 + smooth rank) of each passage."""
    spread = scores.std(unbiased=False).clamp(min=1e-6)
    above = torch.sigmoid((scores - scores[:, None]) / (_SMOOTHNESS * spread)).sum(1) - 0.5  # not above itself
    return 1 / torch.log2(2 + above)
