"""What the package has to know about a model family."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


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
class EmbeddingModules:
    """The modules that turn ids into the first layer's input: ``norm(word + type + position)``, then the projection.

    Attributes:
        word: token embeddings.
        position: position embeddings.
        token_type: segment embeddings, or None.
        norm: LayerNorm of the sum.
        projection: to the hidden size, where embeddings have another width; else None.
    """

    word: nn.Embedding
    position: nn.Embedding
    token_type: nn.Embedding | None
    norm: nn.LayerNorm
    projection: nn.Linear | None


@dataclass(frozen=True)
class LayerModules:
    """The modules of one post-LN layer, in the order they run."""

    query: nn.Linear
    key: nn.Linear
    value: nn.Linear
    attention_output: nn.Linear
    attention_norm: nn.LayerNorm
    feed_forward_up: nn.Linear
    feed_forward_down: nn.Linear
    output_norm: nn.LayerNorm


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
        embedding_modules: from the base model to its embeddings.
        layer_modules: from a layer to its parts.
        activation: from the config to the name of the feed-forward's activation.
        positions: from ``input_ids`` (``[batch, width]``, or one sequence without padding as ``[1, length]``) and the
            config to the position ids the model gives them, int64 of the same shape.
    """

    model_types: tuple[str, ...]
    encoder: Callable[[Any], nn.Module]
    layers: Callable[[Any], Sequence[nn.Module]]
    attention: Callable[[Any], nn.Module]
    attention_output: Callable[[Any], nn.Module]
    shape: Callable[[Any], ModelShape]
    embedding_modules: Callable[[Any], EmbeddingModules]
    layer_modules: Callable[[Any], LayerModules]
    activation: Callable[[Any], str]
    positions: Callable[[Tensor, Any], Tensor]


def column_positions(input_ids: Tensor, config: Any) -> Tensor:
    """Positions that count a padded batch's columns from 0."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)


def reads_first_token_only(model: nn.Module) -> bool:
    """Whether the model's outputs depend on the last hidden state of each sequence's first token alone.

    That is known of the classes of transformers itself; one of another's may read what it likes.
    """
    cls = type(model)
    return cls.__module__.startswith("transformers.models.") and cls.__name__.endswith("ForSequenceClassification")
