"""What the package has to know about a model family: how its layers map rows to rows.

A family is a class with the parts of one layer's step, written with the model's own submodules, so that adapters,
dropout, quantised layers and hooks on them keep working. Rows are ``[tokens, dim]``, packed, without padding; every
part but attention works on each row by itself. Subclassing registers the family for its ``model_types``.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPoolingAndCrossAttentions

from token_pruning.errors import UnsupportedModelError
from token_pruning.ragged import NO_TERMS, LogitTerms, PackedTokens
from token_pruning.ragged.layout import computed_once

Reads = Literal["first", "mean", "all"]


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The sizes that decide a model's arithmetic.

    Attributes:
        num_layers: Transformer layers.
        hidden_size: width of the hidden states.
        num_heads: attention heads.
        intermediate_size: width of the feed-forward's inner layer.
        ffn_matrices: matrix products in the feed-forward, each ``hidden_size × intermediate_size``: 2, or 3 if gated.
        max_positions: longest sequence the position embeddings allow, in tokens; None where there is no limit.
        head_dim: width of a head; ``hidden_size / num_heads`` unless given.
        num_kv_heads: heads of keys and values; ``num_heads`` unless given.
        windows: per layer, the greatest distance of tokens that attend to each other; None for any. Empty for none.
        position_columns: columns of a product of every query (or key) with embeddings of relative positions.
    """

    num_layers: int
    hidden_size: int
    num_heads: int
    intermediate_size: int
    ffn_matrices: int = 2
    max_positions: int | None = None
    head_dim: int | None = None
    num_kv_heads: int | None = None
    windows: tuple[int | None, ...] = ()
    position_columns: int = 0

    @property
    def query_size(self) -> int:
        """Width of all heads' queries together."""
        return self.num_heads * (self.head_dim or self.hidden_size // self.num_heads)

    @property
    def key_size(self) -> int:
        """Width of all heads' keys together, and of their values."""
        return self.query_size // self.num_heads * (self.num_kv_heads or self.num_heads)


@dataclass(frozen=True)
class EmbeddingModules:
    """The modules of the embeddings, for the native engine; None for what there is not.

    They are ``projected_norm(projection(norm(word + type + position)))``.

    Attributes:
        word: token embeddings.
        position: position embeddings.
        token_type: segment embeddings.
        norm: norm of the sum.
        projection: to the hidden size.
        projected_norm: norm of what is projected.
    """

    word: nn.Embedding
    position: nn.Embedding | None = None
    token_type: nn.Embedding | None = None
    norm: nn.Module | None = None
    projection: nn.Linear | None = None
    projected_norm: nn.Module | None = None


class Outputs(NamedTuple):
    """Some outputs ``[begin, end)`` of a linear layer that computes several things at once."""

    linear: nn.Linear
    begin: int
    end: int

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        bias = self.linear.bias
        return self.linear.weight[self.begin : self.end], None if bias is None else bias[self.begin : self.end]


class HeadOutputs(NamedTuple):
    """One of several things that a linear layer without bias computes for each head in turn.

    Attributes:
        linear: its outputs are ``[heads, things, head_dim]``.
        which: the thing's number.
        things: how many there are.
        head_dim: width of a head.
        bias: ``[heads · head_dim]``, of this thing alone; None for none.
    """

    linear: nn.Linear
    which: int
    things: int
    head_dim: int
    bias: Tensor | None

    def numbers(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias."""
        weight = self.linear.weight.reshape(-1, self.things, self.head_dim, self.linear.in_features)
        return weight[:, self.which].flatten(0, 1), self.bias


@dataclass(frozen=True, kw_only=True)
class LayerModules:
    """The modules of one layer for the native engine.

    Attributes:
        query: to all heads' queries.
        key: to all heads' keys, of which there may be fewer.
        value: as ``key``.
        attention_output: from all heads' contexts.
        attention_norm: after attention's residual, or before attention where the norm comes first; None for none there.
        feed_forward_up: to the inner size.
        feed_forward_gate: the same where the feed-forward is gated: what is activated, and then multiplied with the
            other; None where ``feed_forward_up`` is activated.
        feed_forward_down: back from the inner size.
        output_norm: after the feed-forward's residual, or before the feed-forward.
        activation: the activation.
    """

    query: nn.Linear | Outputs | HeadOutputs
    key: nn.Linear | Outputs | HeadOutputs
    value: nn.Linear | Outputs | HeadOutputs
    attention_output: nn.Linear
    attention_norm: nn.Module | None
    feed_forward_up: nn.Linear | Outputs
    feed_forward_gate: nn.Linear | Outputs | None = None
    feed_forward_down: nn.Linear
    output_norm: nn.Module
    activation: nn.Module


class DistanceModules(NamedTuple):
    """The modules of what disentangled attention adds to a layer's logits.

    That is ``query · key(e) + key · query(e)``, times the scale of the logits, ``e`` being the norm of the embedding of
    the distance. Of ``key`` and ``query`` one may be None.

    Attributes:
        embeddings: of distances.
        norm: of them; None for none.
        key: what queries are multiplied with.
        query: what keys are multiplied with.
        columns: ``[2 · far + 1]`` integers that rise: the row of ``embeddings`` for every distance of a query's place
            from a key's, from ``-far`` on; greater distances count as the outermost.
    """

    embeddings: nn.Embedding
    norm: nn.Module | None
    key: nn.Linear | None
    query: nn.Linear | None
    columns: Tensor


class Rotation(NamedTuple):
    """Rotary positions of a layer's queries and keys.

    Attributes:
        frequencies: ``[head_dim / 2]``: columns ``i`` and ``i + head_dim / 2`` are turned by ``position · frequency``.
        factor: of the result.
    """

    frequencies: Tensor
    factor: float


class Family(ABC):
    """One family's layers, bound to a base model.

    Attributes:
        model_types: values of ``config.model_type``.
        output_class: what the base model returns.
        first_token_heads: endings of the names of transformers' own classes whose outputs depend on the first token's
            last state alone.
        native: whether the native engine has this family's layers: then ``embedding_modules``, ``layer_modules`` and
            what follows them are right.
        norm_first: whether norms come before attention and feed-forward, inside their residuals, instead of after them.
        rms_norm: whether norms take no mean off.
        refused_inputs: arguments of the base model's forward that cannot be given to a pruned one.
        pooler_in_tuple: whether the base model's output as a tuple has None in the place of a pooler it has not; its
            heads count on that.
        replaced: modules within a layer, such as ``"attention"``, that are not called: the family's own parts compute
            what these would. So is the layer itself, and all that is around it.
    """

    model_types: ClassVar[tuple[str, ...]]
    output_class: ClassVar[type[BaseModelOutput]] = BaseModelOutputWithPoolingAndCrossAttentions
    first_token_heads: ClassVar[tuple[str, ...]] = (
        "ForSequenceClassification",
        "ForMultipleChoice",
        "ForNextSentencePrediction",
    )
    native: ClassVar[bool] = False
    norm_first: ClassVar[bool] = False
    rms_norm: ClassVar[bool] = False
    refused_inputs: ClassVar[tuple[str, ...]] = ("encoder_hidden_states", "past_key_values")
    replaced: ClassVar[tuple[str, ...]] = ("attention",)
    pooler_in_tuple: ClassVar[bool] = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Register the family."""
        super().__init_subclass__(**kwargs)
        for model_type in cls.__dict__.get("model_types", ()):  # a subclass that states none takes over none
            _FAMILIES[model_type] = cls

    def __init__(self, base: Any) -> None:
        """Bind to ``base``, a Hugging Face base model (``model.base_model``)."""
        self.base = base
        self.config = base.config

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """The sizes in a model's config."""
        return ModelShape(
            num_layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            num_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_positions=getattr(config, "max_position_embeddings", None),
        )

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """What a model's config has that cannot be pruned, such as ``"conv_kernel_size 3"``; None for nothing."""
        return None

    @classmethod
    def reads(cls, model: nn.Module) -> Reads:
        """Which last hidden states a model's outputs depend on.

        That is known of the classes of transformers itself; one of another's may read what it likes.
        """
        name, home = type(model).__name__, type(model).__module__
        known = home.startswith("transformers.models.") and name.endswith(cls.first_token_heads)
        return "first" if known else "all"

    def inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """From arguments of the base model's forward, by name, to those of ``pack_inputs``."""
        names = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")
        return {name: options.get(name) for name in names}

    @computed_once
    def max_positions(self) -> int | None:
        """Of the model's shape, which takes a while to read from a config."""
        return self.shape(self.config).max_positions

    @property
    def layers(self) -> Sequence[nn.Module]:
        """The layers in the order they run; a shared one stands there as often as it runs."""
        layers: Sequence[nn.Module] = self.base.encoder.layer
        return layers

    def positions(self, input_ids: Tensor | None, mask: Tensor) -> Tensor:
        """Position ids where the caller gives none: a sequence's first valid token is 0, wherever padding stands.

        Args:
            input_ids: ``[batch, width]`` integers, or None where embeddings were given.
            mask: ``[batch, width]`` bool, True for a valid token.

        Returns:
            ``[batch, width]`` int64; without meaning where there is padding, but never negative.
        """
        columns = torch.arange(mask.shape[1], device=mask.device)
        return (columns - mask.int().argmax(1)[:, None]).clamp(min=0)

    def embed(self, tokens: PackedTokens) -> Tensor:
        """What enters the first layer: ``[tokens, dim]``."""
        types = torch.zeros_like(tokens.positions) if tokens.token_types is None else tokens.token_types
        embedded: Tensor = self.base.embeddings(
            input_ids=None if tokens.ids is None else tokens.ids[None],
            position_ids=tokens.positions[None],
            token_type_ids=types[None],
            inputs_embeds=None if tokens.embeds is None else tokens.embeds[None],
        )
        return embedded[0]

    @abstractmethod
    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Queries, keys and values.

        Args:
            layer: one of ``layers``.
            rows: ``[tokens, dim]``.
            positions: ``[tokens]`` integers, the position ids.
            asking: the rows whose queries are wanted, int64; None for all.

        Returns:
            ``[asking, heads, head_dim]`` and twice ``[tokens, heads, head_dim]``.
        """

    def scale(self, layer: Any) -> float:
        """What multiplies ``query · key``."""
        shape = self.shape(self.config)
        return float((shape.query_size // shape.num_heads) ** -0.5)

    @abstractmethod
    def dropout(self, layer: Any) -> float:
        """Probability of zeroing an attention probability in training."""

    def terms(self, layer: Any) -> LogitTerms:
        """What is added to the attention logits."""
        return NO_TERMS

    @abstractmethod
    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        """The attention block's result: output projection, residual, and LayerNorm where that comes after.

        Args:
            layer: one of ``layers``.
            context: ``[tokens, heads · head_dim]``.
            rows: ``[tokens, dim]``, what entered the layer.
        """

    @abstractmethod
    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        """The layer's second half, ``[tokens, dim]`` to the same, residual and LayerNorm included."""

    def finish(self, rows: Tensor) -> Tensor:
        """What comes after the last layer."""
        norm = self.last_norm
        return rows if norm is None else norm(rows)

    @property
    def last_norm(self) -> nn.Module | None:
        """The norm after the last layer, which pre-LN models have."""
        return None

    def pool(self, first: Tensor) -> Tensor | None:
        """``pooler_output`` from first tokens' last states ``[batch, dim]``; None for a model without."""
        pooler = getattr(self.base, "pooler", None)
        return None if pooler is None else pooler(first[:, None])

    def output(self, last_hidden_state: Tensor, first: Tensor, **fields: Any) -> BaseModelOutput:
        """The base model's output.

        Args:
            last_hidden_state: ``[batch, width, dim]``.
            first: ``[batch, dim]``, those of first tokens.
            fields: hidden states and attentions, where they are asked for.
        """
        pooled = self.pool(first)
        return self.output_class(
            last_hidden_state=last_hidden_state, **({} if pooled is None else {"pooler_output": pooled}), **fields
        )

    def as_tuple(self, output: BaseModelOutput) -> tuple[Any, ...]:
        """The base model's output for ``return_dict=False``."""
        values: tuple[Any, ...] = output.to_tuple()
        if self.pooler_in_tuple and "pooler_output" not in output:
            return values[0], None, *values[1:]
        return values

    # What the native engine packs; only where ``native``.

    def embedding_modules(self) -> EmbeddingModules:
        """The embeddings' parts."""
        raise UnsupportedModelError(f"{type(self).__name__} has no native layers")

    def layer_modules(self, layer: Any) -> LayerModules:
        """A layer's parts."""
        raise UnsupportedModelError(f"{type(self).__name__} has no native layers")

    def rotation(self, layer: Any) -> Rotation | None:
        """The layer's rotary positions; None for none."""
        return None

    def turned(self, layer: Any, keys: Tensor, positions: Tensor, *, back: bool = False) -> Tensor:
        """Keys as the layer turns them by rotary positions; unless overridden as they are.

        Args:
            layer: the module.
            keys: ``[tokens, heads, head_dim]``.
            positions: ``[tokens]`` integers.
            back: whether they are turned already, and wanted as they were.
        """
        return keys

    @property
    def turns(self) -> bool:
        """Whether it is said how keys turn."""
        return type(self).turned is not Family.turned

    @property
    def can_guess_keys(self) -> bool:
        """Whether keys can be had from a token's state by a linear map, and by its position where they turn."""
        return self.turns or all(self.rotation(layer) is None for layer in self.layers)

    def distance_bias(self) -> Tensor | None:
        """What every layer adds to the logits, if nothing but a bias by distance is added: ``[heads, 2 · far + 1]``.

        Column ``i`` is for a query's place less a key's of ``i - far``; greater distances count as the outermost.
        """
        return None

    def distance_modules(self, layer: Any) -> DistanceModules | None:
        """Disentangled attention, where nothing else is added to the logits; None for none."""
        return None

    @property
    def norm_class(self) -> type[nn.Module]:
        """The class of all norms."""
        return nn.LayerNorm

    @property
    def activation(self) -> str:
        """The name of the feed-forward's activation."""
        return str(self.config.hidden_act)


def split_heads(x: Tensor, head_dim: int) -> Tensor:
    """``[tokens, heads · head_dim]`` to ``[tokens, heads, head_dim]``."""
    return x.view(x.shape[0], x.shape[1] // head_dim, head_dim)


def wanted(rows: Tensor, asking: Tensor | None) -> Tensor:
    """The rows that are asked for; all for None."""
    return rows if asking is None else rows[asking]


_FAMILIES: dict[str, type[Family]] = {}


def supported_model_types() -> list[str]:
    """The values of ``config.model_type`` that can be pruned, sorted."""
    return sorted(_FAMILIES)


def family_of(config: Any) -> type[Family]:
    """The family of a model's config.

    Raises:
        UnsupportedModelError: if there is none, the model is a decoder, or has a setting that cannot be pruned.
    """
    model_type = getattr(config, "model_type", None)
    family = _FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"model type {model_type!r} is not supported; supported are {', '.join(supported_model_types())}"
        )
    if getattr(config, "is_decoder", False):
        raise UnsupportedModelError(f"model type {model_type!r} as a decoder cannot be pruned; only encoders can")
    unsupported = family.unsupported(config)
    if unsupported:
        raise UnsupportedModelError(f"model type {model_type!r} with {unsupported} cannot be pruned")
    return family


def shape_of(config: Any) -> ModelShape:
    """A model's sizes from its config.

    Raises:
        UnsupportedModelError: see :func:`family_of`.
    """
    return family_of(config).shape(config)


def padding_id(config: Any) -> int:
    """The id to pad a model's batches with, or 0 where its config names none; padding is masked, so any would do."""
    return getattr(config, "pad_token_id", None) or 0
