"""How far a model's answers are those of the dense model: in place of a metric where there are no labels."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

Kind = Literal["classes", "labels", "scores", "ranking", "embedding", "tokens", "span", "states"]

_NEIGHBOURS = 10

EXPLAINED: dict[Kind, str] = {
    "classes": "the share of texts with the same class",
    "labels": "the share of texts with the same labels",
    "scores": "Pearson’s correlation of the scores",
    "ranking": "of all two passages of one query, the share that stand in the same order (and of queries, the share "
    "with the same best passage)",
    "embedding": "the share of each text’s ten nearest others, by cosine, that are the same (and the mean cosine of a "
    "text’s two vectors)",
    "tokens": "the share of tokens with the same label; a token that was cut off has none",
    "span": "the share of texts with the same answer",
    "states": "the mean cosine of a token’s two states; 0 for a token that was cut off",
}
"""What the first figure of :func:`agreement` is, for a reader."""


def agreement(kind: Kind, dense: Sequence[Tensor], other: Sequence[Tensor], groups: Sequence[int]) -> dict[str, float]:
    """What two models say of the same texts, compared.

    Args:
        kind: what they say.
        dense: for each text logits ``[labels]`` or scores ``[outputs]``; an embedding ``[dim]``; labels of its tokens
            ``[tokens]``, or the first and last token of an answer ``[2]``, int64; states ``[tokens, dim]``.
        other: the same; it may have seen fewer tokens of a text, the first ones and the last.
        groups: the query that each text belongs to, for a ranking.

    Returns:
        Figures of at most 1, 1 for no difference, by name; the first is the one to look at.
    """
    if kind in ("tokens", "states"):
        return {"same label" if kind == "tokens" else "cosine": _token_by_token(dense, other)}
    one, two = torch.stack(list(dense)), torch.stack(list(other))
    if kind == "classes":
        return {"same class": _share(one.argmax(1) == two.argmax(1))}
    if kind == "labels":
        return {"same labels": _share(((one > 0) == (two > 0)).all(1))}
    if kind == "span":
        return {"same answer": _share((one == two).all(1))}
    if kind == "scores":
        both = torch.stack([one.flatten(), two.flatten()]).double()
        return {"correlation": float(torch.corrcoef(both)[0, 1].nan_to_num())}
    if kind == "ranking":
        return _same_order(one.flatten(), two.flatten(), torch.tensor(list(groups)))
    return _same_neighbours(one, two)


def _share(same: Tensor) -> float:
    return float(same.double().mean())


def _same_order(dense: Tensor, other: Tensor, groups: Tensor) -> dict[str, float]:
    same, best = [], []
    for group in torch.unique(groups):
        one, two = dense[groups == group], other[groups == group]
        order, found = ((x[:, None] - x).sign() for x in (one, two))
        told = order.triu(1) != 0  # two equal scores have no order
        if bool(told.any()):
            same.append((order == found)[told].double().mean())
            best.append((one.argmax() == two.argmax()).double())
    nothing_told = torch.ones(1, dtype=torch.float64)
    return {
        "same order": float((torch.stack(same) if same else nothing_told).mean()),
        "same best": float((torch.stack(best) if best else nothing_told).mean()),
    }


def _same_neighbours(dense: Tensor, other: Tensor) -> dict[str, float]:
    count = min(_NEIGHBOURS, len(dense) - 1)
    nearest = []
    for vectors in (dense, other):
        unit = normalize(vectors.float(), dim=1)
        nearest.append((unit @ unit.T).fill_diagonal_(-torch.inf).topk(count, dim=1).indices)
    shared = (nearest[0][:, :, None] == nearest[1][:, None]).any(2)
    return {"shared neighbours": _share(shared), "cosine": _share(cosine_similarity(dense, other, dim=1))}


def _token_by_token(dense: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """The mean over texts; the last token, a separator wherever the text was cut, is left out."""
    shares = []
    for one, two in zip(dense, other, strict=True):
        total, both = max(1, len(one) - 1), max(1, min(len(one), len(two)) - 1)
        same = one[:both] == two[:both] if one.dim() == 1 else cosine_similarity(one[:both], two[:both], dim=1)
        shares.append(same.double().sum() / total)
    return float(torch.stack(shares).mean())
