"""Linear settings of a method, fitted in closed form: probes, maps and context of what left, a correction of what is
pooled.

Each is one or more affine maps. They are kept as ``[…, in + 1]``: the last column is what is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, get_args

import torch
from torch import Tensor

from token_pruning.checks import whole_number
from token_pruning.errors import ConfigError

Departed = Literal["state", "survivors", "map"]
DEPARTED: tuple[str, ...] = get_args(Departed)
Protected = Literal["separators", "first_segment"]
PROTECTED: tuple[str, ...] = get_args(Protected)
ReceivedFrom = Literal["all", "first_segment", "first"]
RECEIVED_FROM: tuple[str, ...] = get_args(ReceivedFrom)

_MOST_LAYERS = 1000


@dataclass(frozen=True, eq=False, repr=False)
class Probes:
    """What predicts a token's importance from its state after a layer's attention block.

    In these layers ``weights[:-1] · state + weights[-1]`` is compared with the threshold in place of attention
    received. The unit is that of whatever the probe was fitted to: no ``scoring_mode`` divides it.

    Attributes:
        layers: 1-based, rising.
        weights: ``[len(layers), hidden + 1]`` floating point.

    Raises:
        ConfigError: for layers that do not rise from 1, or weights of another shape.
    """

    layers: Sequence[int]
    weights: Tensor

    def __post_init__(self) -> None:
        """Check the setting."""
        object.__setattr__(self, "layers", _rising("probe_layers", self.layers, lowest=1))
        _check_weights("probe weights", self.weights, len(self.layers))

    def row(self, layer: int) -> int | None:
        """The row of ``weights`` for a layer; None for a layer without a probe."""
        return self.layers.index(layer) if layer in self.layers else None

    def __repr__(self) -> str:
        return f"Probes(layers={list(self.layers)})"


@dataclass(frozen=True, eq=False, repr=False)
class DepartureMaps:
    """What a token that left counts as: an affine map of its last state to a guess of the dense model's last state.

    Attributes:
        layers: after whose attention the tokens left, rising; 0 for those that never entered the first layer.
        weights: ``[len(layers), hidden, hidden + 1]`` floating point.

    Raises:
        ConfigError: for layers that do not rise from 0, or weights of another shape.
    """

    layers: Sequence[int]
    weights: Tensor

    def __post_init__(self) -> None:
        """Check the setting."""
        object.__setattr__(self, "layers", _rising("map_layers", self.layers, lowest=0))
        _check_weights("map weights", self.weights, len(self.layers), square=True)

    def __repr__(self) -> str:
        return f"DepartureMaps(layers={list(self.layers)})"


@dataclass(frozen=True, eq=False, repr=False)
class LinearContext:
    """Keys and values that tokens go on giving after they left, so that those that stay can still attend to them.

    A token's state where it left becomes a short code, ``code = down · state``, and in every later layer ``up · code``
    is its key and its value. That costs a few hundredths of what a token costs that stays.

    Attributes:
        layers: after whose attention tokens leave and become context, rising; 0 for those that never entered the first
            layer. Tokens that leave elsewhere are gone.
        down: ``[len(layers), rank, hidden + 1]`` floating point.
        up: ``[num_layers, 2 · key_size, rank + 1]`` floating point: all heads' keys, then all heads' values.

    Raises:
        ConfigError: for layers that do not rise from 0, or weights of another shape.
    """

    layers: Sequence[int]
    down: Tensor
    up: Tensor

    def __post_init__(self) -> None:
        """Check the setting."""
        object.__setattr__(self, "layers", _rising("context_layers", self.layers, lowest=0))
        for name, wanted in (("down", "[context_layers, rank, hidden + 1]"), ("up", "[layers, 2 · keys, rank + 1]")):
            weights = getattr(self, name)
            if not isinstance(weights, Tensor) or not weights.is_floating_point() or weights.dim() != 3:
                _wrong_weights(f"context {name} weights", weights, wanted)
        if len(self.down) != len(self.layers) or not self.down.shape[1]:
            _wrong_weights("context down weights", self.down, f"[{len(self.layers)}, rank, hidden + 1]")
        rank = self.down.shape[1]
        if self.up.shape[2] != rank + 1 or self.up.shape[1] % 2:
            _wrong_weights("context up weights", self.up, f"[layers, 2 · keys, {rank + 1}]")

    def lengths(self, lost: Tensor) -> Tensor:
        """Context tokens in each layer's attention, ``[layers, batch]``.

        Args:
            lost: ``[layers + 1, batch]``: tokens that never entered, then those that left after each layer.
        """
        counted = torch.zeros_like(lost)
        cuts = [layer for layer in self.layers if layer < len(lost)]
        counted[cuts] = lost[cuts]
        return counted.cumsum(0)[:-1]

    def products(self, lost: Tensor) -> Tensor:
        """Multiply–accumulates that codes, keys and values take, ``[batch]``; arguments as for :meth:`lengths`."""
        lengths = self.lengths(lost)
        _, rank, inputs = self.down.shape
        return lengths[-1] * (rank * (inputs - 1)) + lengths.sum(0) * (self.up.shape[1] * rank)

    def __repr__(self) -> str:
        return f"LinearContext(layers={list(self.layers)}, rank={self.down.shape[1]})"


@dataclass(frozen=True, eq=False, repr=False)
class Correction:
    """An affine map of the pooled vector of a text that lost tokens to a guess of the dense model's.

    Attributes:
        weights: ``[hidden, hidden + 1]`` floating point.

    Raises:
        ConfigError: for weights of another shape.
    """

    weights: Tensor

    def __post_init__(self) -> None:
        """Check the setting."""
        _check_weights("correction weights", self.weights, square=True)

    def __repr__(self) -> str:
        return "Correction()"


def apply_affine(rows: Tensor, weights: Tensor) -> Tensor:
    """``[n, in]`` to ``[n, out]`` by weights ``[out, in + 1]``, in float32 whatever autocast says."""
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows.float(), weights[:, :-1], weights[:, -1])


def _rising(name: str, layers: Any, lowest: int) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ConfigError(f"{name} is {layers!r}; it must be a list of layers that rises from {lowest} or more")
    found = tuple(whole_number(f"{name}[{i}]", x, low=lowest, high=_MOST_LAYERS) for i, x in enumerate(layers))
    if sorted(set(found)) != list(found):
        raise ConfigError(f"{name} is {list(layers)}; it must be a list of layers that rises from {lowest} or more")
    return found


def _check_weights(name: str, weights: Any, *leading: int, square: bool = False) -> None:
    """Raises ConfigError unless it is a floating-point tensor of affine maps, to the hidden size again if square."""
    wanted = [*map(str, leading), *["hidden"] * square, "hidden + 1"]
    if isinstance(weights, Tensor) and weights.is_floating_point() and weights.dim() == len(wanted):
        *outer, last = weights.shape
        if outer == [*leading, *[last - 1] * square]:
            return
    _wrong_weights(name, weights, f"[{', '.join(wanted)}]")


def _wrong_weights(name: str, weights: Any, wanted: str) -> NoReturn:
    found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
    raise ConfigError(f"{name} are {found}; they must be floating-point numbers of shape {wanted}")
