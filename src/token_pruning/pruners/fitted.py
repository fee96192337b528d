"""Linear settings of a method, fitted in closed form: probes, maps of what left, and a correction of what is pooled.

Each is one or more affine maps of a row of the hidden size. They are kept as ``[…, hidden + 1]``: the last column is
what is added.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

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
    found = f"{weights.dtype} {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__
    raise ConfigError(f"{name} are {found}; they must be floating-point numbers of shape [{', '.join(wanted)}]")
