"""DeBERTa."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.deberta.modeling_deberta import DebertaLayerNorm

from token_pruning.errors import UnsupportedModelError
from token_pruning.families.base import (
    DistanceModules,
    EmbeddingModules,
    HeadOutputs,
    LayerModules,
    ModelShape,
    split_heads,
)
from token_pruning.families.bert import Bert
from token_pruning.ragged import NO_TERMS, LogitTerms


class Deberta(Bert):
    """Post-LN like BERT; logits also get products of queries and keys with embeddings of relative positions.

    These are ``query · position_key`` ("c2p") and ``key · position_query`` ("p2c"), at the distance of the two tokens.
    """

    model_types = ("deberta",)
    output_class = BaseModelOutput

    def __init__(self, base: Any) -> None:
        super().__init__(base)
        if base.z_steps > 1:
            raise UnsupportedModelError(f"a {type(base).__name__} with z_steps {base.z_steps} cannot be pruned")

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """Without embeddings of absolute positions a text may be of any length."""
        types = cls.position_terms(config) if getattr(config, "relative_attention", False) else ()
        return replace(
            super().shape(config),
            max_positions=config.max_position_embeddings if config.position_biased_input else None,
            position_columns=2 * cls.span(config) * len(types),
        )

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """Heads that mix each other's logits."""
        return "talking_head True" if getattr(config, "talking_head", False) else None

    @classmethod
    def position_terms(cls, config: Any) -> list[str]:
        """Which of "c2p" and "p2c" there are."""
        return [name for name in ("c2p", "p2c") if name in (config.pos_att_type or ())]

    @classmethod
    def span(cls, config: Any) -> int:
        """Distances from here on, of either sign, share an embedding."""
        most: int = getattr(config, "max_relative_positions", -1)
        return most if most >= 1 else int(config.max_position_embeddings)

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """One linear layer without bias; queries and values have one of their own."""
        attention = layer.attention.self
        size = attention.attention_head_size
        query, key, value = split_heads(attention.in_proj(rows), 3 * size).chunk(3, -1)
        query = query if asking is None else query[asking]
        return query + attention.q_bias.view(-1, size), key, value + attention.v_bias.view(-1, size)

    def scale(self, layer: Any) -> float:
        """All terms of the logits count."""
        return float((layer.attention.self.attention_head_size * (1 + len(self.config.pos_att_type or ()))) ** -0.5)

    def terms(self, layer: Any) -> LogitTerms:
        """See the class."""
        attention, types = layer.attention.self, self.position_terms(self.config)
        if not attention.relative_attention or not types:
            return NO_TERMS
        embeddings = attention.pos_dropout(self.base.encoder.get_rel_embedding())
        size = attention.attention_head_size
        position_key = position_query = None  # [heads, 2 · span, head_dim]
        if "c2p" in types:
            position_key = split_heads(self.position_key(attention)(embeddings), size).transpose(0, 1)
        if "p2c" in types:
            position_query = split_heads(self.position_query(attention)(embeddings), size).transpose(0, 1)
            position_query = position_query * self.scale(layer)
        table = self.columns(embeddings.device)
        far = table.numel() // 2

        def bias(query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
            distance = query_positions[:, :, None] - key_positions[:, None, :]
            column = table[distance.clamp(-far, far) + far][:, None]
            added: Tensor | None = None
            if position_key is not None:
                products = query @ position_key.to(query.dtype).transpose(1, 2)
                added = products.gather(-1, column.expand(-1, query.shape[1], -1, -1))
            if position_query is not None:
                # One product per key, not with all columns; a graph that is traced must do for more queries.
                if query.shape[2] == 1 and not torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
                    at_key = position_query.to(key.dtype)[:, column[:, 0, 0]].transpose(0, 1)
                    other = (key * at_key).sum(-1)[:, :, None]
                else:
                    products = key @ position_query.to(key.dtype).transpose(1, 2)
                    index = column.transpose(2, 3).expand(-1, key.shape[1], -1, -1)
                    other = products.gather(-1, index).transpose(2, 3)
                added = other if added is None else added + other
            assert added is not None
            return added

        return LogitTerms(bias=bias)

    def columns(self, device: torch.device) -> Tensor:
        """For every distance of a query from a key, from some ``-far`` to ``far``, the row of the embeddings."""
        span = self.span(self.config)
        return torch.arange(2 * span + 1, device=device).clamp(max=2 * span - 1)

    def position_key(self, attention: Any) -> nn.Linear:
        """What makes keys of relative positions of their embeddings."""
        linear: nn.Linear = attention.pos_proj
        return linear

    def position_query(self, attention: Any) -> nn.Linear:
        """What makes queries of them."""
        linear: nn.Linear = attention.pos_q_proj
        return linear

    def distance_modules(self, layer: Any) -> DistanceModules | None:
        attention, encoder, types = layer.attention.self, self.base.encoder, self.position_terms(self.config)
        if not attention.relative_attention or not types:
            return None
        return DistanceModules(
            embeddings=encoder.rel_embeddings,
            norm=getattr(encoder, "LayerNorm", None),
            key=self.position_key(attention) if "c2p" in types else None,
            query=self.position_query(attention) if "p2c" in types else None,
            columns=self.columns(torch.device("cpu")),
        )

    def embedding_modules(self) -> EmbeddingModules:
        """With a projection, the norm comes after it."""
        modules, projection = super().embedding_modules(), self.base.embeddings.embed_proj
        if projection is None:
            return modules
        return replace(modules, norm=None, projection=projection, projected_norm=modules.norm)

    def projections(self, attention: Any) -> tuple[nn.Linear | HeadOutputs, ...]:
        """Of queries, keys and values."""
        biases = attention.q_bias, None, attention.v_bias
        return tuple(
            HeadOutputs(attention.in_proj, which, 3, attention.attention_head_size, bias)
            for which, bias in enumerate(biases)
        )

    def layer_modules(self, layer: Any) -> LayerModules:
        query, key, value = self.projections(layer.attention.self)
        attention_norm, output_norm = self.norms(layer)
        return LayerModules(
            query=query,
            key=key,
            value=value,
            attention_output=layer.attention.output.dense,
            attention_norm=attention_norm,
            feed_forward_up=layer.intermediate.dense,
            feed_forward_down=layer.output.dense,
            output_norm=output_norm,
            activation=layer.intermediate.intermediate_act_fn,
        )

    @property
    def norm_class(self) -> type[nn.Module]:
        norm: type[nn.Module] = DebertaLayerNorm
        return norm
