"""What the package has to know about a model family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class ModelShape:
    """The sizes that decide a model's arithmetic.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: width of the hidden states.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward's inner layer.
        ffn_matrices: matrix products in the feed-forward, each ``hidden_size × intermediate_size``: 2, or 3 if gated.
        max_positions: longest sequence the position embeddings allow, in tokens.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    ffn_matrices: int
    max_positions: int


@dataclass(frozen=True)
class Family:
    """Where to attach to a post-LN encoder of the family.

    Attributes:
        model_types: values of ``config.model_type``.
        encoder: from the base model to the module whose first input (or ``hidden_states``) is the embedded batch and
            whose output carries ``last_hidden_state``.
        layers: from the encoder to its layers, first layer first.
        attention: from a layer to the module that calls the attention function.
        attention_output: from a layer to the module whose output enters the feed-forward; rows are dropped there.
        shape: from the model's config to its sizes.
    """

    model_types: tuple[str, ...]
    encoder: Callable[[Any], nn.Module]
    layers: Callable[[Any], Sequence[nn.Module]]
    attention: Callable[[Any], nn.Module]
    attention_output: Callable[[Any], nn.Module]
    shape: Callable[[Any], ModelShape]
