"""The rules of what leaves, and of what counts for it, in plain Python, one text at a time, for models of any family.

States come from the masked loop on a single text without padding; all that is made of them is written again here.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import token_pruning as tp
from tests.tiny import keep_by_the_book, pruned
from token_pruning.families import family_of

SPAN = 8


def spans_by_hand(ids: list[int], most: int) -> list[int]:
    """Positions of the tokens of a longer text that enter: its first, spans of eight, its last; of a pair see below."""
    prefix = ids.index(ids[-1]) + 1
    if 1 < prefix < len(ids) and most - prefix - 1 >= SPAN:
        return pair_by_hand(ids, most, prefix)
    prefix = 1
    chosen = [0, len(ids) - 1]
    count = 0
    while len(chosen) + SPAN * (count + 1) <= most:
        count += 1
    for span in range(count):
        room = len(ids) - 1 - prefix - SPAN  # where the last one starts, after the prefix
        start = prefix + (room * span // (count - 1) if count > 1 else 0)
        chosen += range(start, start + SPAN)
    assert len(set(chosen)) == len(chosen) <= most
    return sorted(chosen)


def windows_by_hand(length: int, most: int) -> list[list[int]]:
    """Positions of the tokens of each window; as few windows as there can be, as equal as can be."""
    inner = list(range(1, length - 1))
    count = 1
    while count * (most - 2) < len(inner):
        count += 1
    cuts = [len(inner) * part // count for part in range(count + 1)]
    return [[0, *inner[a:b], length - 1] for a, b in pairwise(cuts)]


def pair_by_hand(ids: list[int], most: int, prefix: int) -> list[int]:
    """The first text, spans of the second that have its tokens or stand beside such, some others, the last token."""
    asked, body = ids[1 : prefix - 1], ids[prefix:-1]
    spans = [range(start, min(start + SPAN, len(body))) for start in range(0, len(body), SPAN)]
    own = [sum(1 / body.count(body[i]) for i in span if body[i] in asked) for span in spans]
    near = [own[k] + (sum(own[k - 1 : k]) + sum(own[k + 1 : k + 2])) / 2 for k in range(len(own))]
    wanted = (most - prefix - 1) // SPAN
    ranked = sorted((k for k in range(len(own)) if near[k] > 0), key=lambda k: (-round(near[k], 5), k))
    found = ranked[: int(0.75 * wanted)]
    left = [k for k in range(len(own)) if k not in found]
    even = wanted - len(found)
    found += [left[k * (len(left) - 1) // max(1, even - 1)] for k in range(even)]
    return [*range(prefix), *(prefix + i for k in sorted(found) for i in spans[k]), len(ids) - 1]


def asking_by_hand(ids: list[int], received_from: str) -> list[bool]:
    """Whose attention counts, were all tokens there."""
    if received_from == "all":
        return [True] * len(ids)
    if received_from == "first":
        return [i == 0 for i in range(len(ids))]
    end = ids.index(ids[-1])
    return [0 < i < end for i in range(len(ids))]


def protected_by_hand(ids: list[int], protect: Any) -> list[bool]:
    end = ids.index(ids[-1])
    return [
        i == 0 or ("separators" in protect and x == ids[-1]) or ("first_segment" in protect and i <= end < len(ids) - 1)
        for i, x in enumerate(ids)
    ]


@contextmanager
def unfinished(family: type, joined: list[Tensor]) -> Iterator[None]:
    """States without the norm that comes after the last layer; what attention blocks give is put into a list."""
    finish, join = family.finish, family.join  # type: ignore[attr-defined]

    def watched(self: Any, *args: Any) -> Tensor:
        joined.append(join(self, *args))
        return joined[-1]

    family.finish, family.join = lambda self, rows: rows, watched  # type: ignore[attr-defined]
    try:
        yield
    finally:
        family.finish, family.join = finish, join  # type: ignore[attr-defined]


@dataclass
class Text:
    """One text's pass.

    Attributes:
        raw: last states, unfinished, of the tokens that were valid, ``[tokens, dim]``.
        finished: the same after the norm that comes after the last layer.
        left_at: per token, as in :class:`token_pruning.runtime.departed.LastStates`.
    """

    raw: Tensor
    finished: Tensor
    left_at: list[int]
    margin: float


def text_by_hand(model: Any, pruner: tp.Pruner, inputs: dict[str, Tensor]) -> Text:
    """Run one text, ``[1, tokens]`` and all valid, and hold each decision against the rule.

    Args:
        model: a base model that is not pruned.
        pruner: the method, whose decisions are compared.
        inputs: its arguments, without a mask.
    """
    ids = inputs["input_ids"][0].tolist()
    plain = replace(pruner, departed="state", max_tokens=None, chunks=False, correction=None, maps=None)
    joined: list[Tensor] = []
    family = family_of(model.config)
    with (
        pruned(model, plain, "masked"),
        unfinished(family, joined),
        torch.no_grad(),
        tp.record(model) as trace,
    ):
        output = model(**inputs, output_attentions=True)
    done = trace.passes[0]
    layers = len(done.layers)
    stays = protected_by_hand(ids, pruner.protect)
    gate = pruner.vocabulary
    alive = [i for i, x in enumerate(ids) if stays[i] or gate is None or gate.scores[x] >= gate.threshold]
    assert done.entering.indices.tolist() == alive
    entered = len(alive)
    asks = asking_by_hand(ids, pruner.received_from)
    left_at = [0] * len(ids)
    margin = 1.0
    for layer, record in sorted(done.layers.items()):
        row = pruner.probes.row(layer) if pruner.probes else None
        if record.scores is not None:
            if row is not None and pruner.probes is not None:
                weights = pruner.probes.weights[row].double()
                scores = [float(joined[layer - 1][i].double() @ weights[:-1] + weights[-1]) for i in alive]
            else:
                attention = output.attentions[layer - 1][0].double().mean(0)
                rows = [i for i in alive if asks[i]] or alive
                received = [sum(float(attention[j, i]) for j in rows) / len(rows) * len(alive) for i in alive]
                assert abs(sum(received) / len(alive) - 1) < 1e-5
                divisor = {"mean": pruner.max_seq_length, "mean_norm": len(alive), "relative": 1}[pruner.scoring_mode]
                scores = [value / divisor for value in received]
            torch.testing.assert_close(record.scores.double(), torch.tensor(scores).double(), rtol=2e-5, atol=2e-5)
            keep, near = keep_by_hand(pruner, layer, layers, record.scores.tolist(), entered)
            margin = min(margin, near)
            for i, stay in zip(alive, keep, strict=True):
                if not stay and not stays[i]:
                    left_at[i] = layer
            alive = [i for i, stay in zip(alive, keep, strict=True) if stay or stays[i]]
        assert record.leaving.indices.tolist() == alive
    for i in alive:
        left_at[i] = layers + 1
    raw = output.last_hidden_state[0]
    with torch.no_grad():
        return Text(raw, family(model).finish(raw), left_at, margin)


def keep_by_hand(
    pruner: tp.Pruner, layer: int, layers: int, scores: list[float], entered: int
) -> tuple[list[bool], float]:
    """Beside the largest score others are small only if it is above zero, which a probe need not say of any."""
    if isinstance(pruner, tp.RelativeThreshold) and max(scores) <= 0:
        return [i == 0 for i in range(len(scores))], -max(scores)
    return keep_by_the_book(pruner, layer, layers, scores, entered)


def _affine(weights: Tensor, row: Tensor) -> Tensor:
    return weights[:, :-1].double() @ row.double() + weights[:, -1].double()


def counts_as(pruner: tp.Pruner, text: Text, i: int) -> Tensor | None:
    """What a token counts as, ``[dim]`` float64; None for nothing."""
    if text.left_at[i] == max(text.left_at) or pruner.departed == "state":  # the first token is always a survivor
        return text.finished[i].double()
    if pruner.departed == "survivors":
        return None
    assert pruner.maps is not None
    return _affine(pruner.maps.weights[list(pruner.maps.layers).index(text.left_at[i])], text.raw[i])


def pooled_by_hand(pruner: tp.Pruner, parts: list[Text]) -> Tensor:
    """The pooled vector of one text, of all its windows, ``[dim]`` float64."""
    counted = [counts_as(pruner, part, i) for part in parts for i in range(len(part.left_at))]
    vector = torch.stack([x for x in counted if x is not None]).mean(0)
    lost = any(at < max(part.left_at) for part in parts for at in part.left_at)
    return _affine(pruner.correction.weights, vector) if lost and pruner.correction is not None else vector


def mean_of(output: Any, mask: Tensor) -> Tensor:
    """The mean over the attention mask ``[batch, width]``, as pooling outside the model has it."""
    pooled: Tensor = (output.last_hidden_state * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return pooled
