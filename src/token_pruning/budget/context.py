"""Codes of tokens that leave, and the keys and values that are made of them: reduced-rank regression, in closed form.

Keys and values of all layers are regressed on what enters the first layer, and the regression is cut to the rank that
explains most of them (Izenman, 1975), every layer's keys and values counting alike. Codes of tokens that leave later
are regressed from their states there.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from token_pruning.budget.examples import Batch, part_of
from token_pruning.budget.observation import Watching, watched
from token_pruning.budget.ridge import Ridge
from token_pruning.pruners import LinearContext
from token_pruning.runtime.prune import attachment_of

_PENALTY = 1e-3
_TOKENS = 12_000  # more say no more
_PASS_TOKENS = 2048
_SMALLEST = 1e-6  # times the largest variance: what varies less is not divided by
_RANK_STEP = 64


def rank_for(hidden_size: int) -> int:
    """The rank of a model's context: a third of its width, in steps that kernels like where it is that wide."""
    third = max(1, hidden_size // 3)
    return third if third < _RANK_STEP else third // _RANK_STEP * _RANK_STEP


def can_have_context(model: Any) -> bool:
    """Whether a pruned model's keys can be guessed from where a token left."""
    return attachment_of(model).family.can_guess_keys


def fit_context(model: Any, batch: Batch, layers: Sequence[int]) -> LinearContext:
    """The context of tokens that leave before the first layer or after some.

    Args:
        model: pruned by thresholds of zero, in evaluation mode.
        batch: padded tensors.
        layers: after which tokens may leave (1-based, rising).
    """
    pruner = attachment_of(model).token_pruner.pruner
    some = _sample(batch, None if pruner.chunks else pruner.max_tokens)
    entry = _Sums()
    for states, given in _passes(model, some, ()):
        entry.add(states[0], given)
    rank = rank_for(attachment_of(model).shape.hidden_size)
    down, up, codes_of = entry.reduced(rank)
    later = {layer: Ridge() for layer in layers}
    if later:
        for states, given in _passes(model, some, layers):
            codes = codes_of(given)
            for layer, ridge in later.items():
                ridge.add(states[layer], codes)
    downs = [down, *(ridge.solve(_PENALTY) for ridge in later.values())]
    return LinearContext((0, *layers), torch.stack(downs), up.view(attachment_of(model).shape.num_layers, -1, rank + 1))


class _Giving(Watching):
    """Keeps each layer's keys, as they are before they turn with their positions, and values, too."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.given: list[Tensor] = []

    def attend(self, number: int, layer: Any, query: Tensor, key: Tensor, value: Tensor, asking: Any) -> Any:
        total, family = self.tokens.layout.total, self.family
        shared = key[0].numel() // family.shape(family.config).key_size  # query heads that share a key's
        own, values = key[:total, ::shared], value[:total, ::shared]
        if family.turns:
            own = family.turned(layer, own, self.tokens.positions, back=True)
        self.given.append(torch.stack([own.flatten(1), values.flatten(1)], 1))
        return super().attend(number, layer, query, key, value, asking)


class _Sums:
    """What a reduced-rank regression of all layers' keys and values on states needs."""

    def __init__(self) -> None:
        self._ridge = Ridge()
        self._squares: Tensor | None = None

    def add(self, states: Tensor, given: Tensor) -> None:
        """Take in some tokens' states ``[tokens, hidden]`` and keys and values ``[tokens, layers, 2, key_size]``."""
        self._ridge.add(states, given.flatten(1))
        squares = given.double().square().sum(0)
        self._squares = squares if self._squares is None else self._squares + squares

    def reduced(self, rank: int) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Cut the regression to a rank.

        Returns:
            From states to codes ``[rank, hidden + 1]``, from codes to keys and values ``[layers · 2 · key_size,
            rank + 1]``; and a function from these to the codes that give them best.
        """
        assert self._squares is not None
        mean_x, mean_y, covariance = self._ridge.moments()
        variances = self._squares / self._ridge.rows - mean_y.view_as(self._squares).square()
        deviation = variances.mean(-1, keepdim=True).clamp(min=1e-12).sqrt()
        scale = deviation.expand_as(variances).flatten()[:, None]
        size, directions = torch.linalg.eigh(covariance)
        size = size.clamp(min=_SMALLEST * float(size.max()) + 1e-12).sqrt()
        root, inverse = directions * size @ directions.T, directions / size @ directions.T
        weights = self._ridge.solve(_PENALTY)[:, :-1].double() / scale @ root
        most = torch.linalg.eigh(weights.T @ weights).eigenvectors.flip(1)[:, :rank]
        down, up = most.T @ inverse, weights @ most
        shares = up.square().sum(0).clamp(min=1e-12)

        def codes_of(given: Tensor) -> Tensor:
            centred = (given.flatten(1).double() - mean_y) / scale.squeeze(1)
            codes: Tensor = centred @ up / shares
            return codes.float()

        return (
            torch.cat([down, -(down @ mean_x)[:, None]], 1).float(),
            torch.cat([up * scale, mean_y[:, None]], 1).float(),
            codes_of,
        )


def _sample(batch: Batch, most: int | None = None) -> dict[str, Tensor]:
    """Examples of all lengths, so many tokens together; of each no more than ``most`` enter."""
    lengths = batch["attention_mask"].sum(1)
    lengths = lengths if most is None else lengths.clamp(max=most)
    order = lengths.argsort(stable=True)
    step = max(1, -(-int(lengths.sum()) // _TOKENS))
    return part_of(batch, order[min(step // 2, len(order) - 1) :: step])


def _passes(model: Any, batch: Batch, layers: Sequence[int]) -> Iterator[tuple[dict[int, Tensor], Tensor]]:
    """Tokens' states where they enter and after some layers' attention, and all layers' keys and values."""
    for loop in watched(model, batch, _PASS_TOKENS, _Giving):
        yield {layer: loop.joined[layer] for layer in (0, *layers)}, torch.stack(loop.given, 1)
