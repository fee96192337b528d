"""ALBERT."""

from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, ModelShape, split_heads, wanted
from token_pruning.ragged import PackedTokens


class Albert(Family):
    """Post-LN like BERT; a few layers run again and again, and narrower embeddings are projected."""

    model_types = ("albert",)
    output_class = BaseModelOutputWithPooling
    native = True
    replaced = ("attention", "attention.attention_dropout")

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        """A group may hold more than one layer."""
        return replace(super().shape(config), num_layers=config.num_hidden_layers * config.inner_group_num)

    @property
    def layers(self) -> list[nn.Module]:
        groups, turns = self.base.encoder.albert_layer_groups, self.config.num_hidden_layers
        per_group = turns / self.config.num_hidden_groups
        return [layer for turn in range(turns) for layer in groups[int(turn / per_group)].albert_layers]

    def embed(self, tokens: PackedTokens) -> Tensor:
        """Embeddings, then the projection to the hidden size."""
        projected: Tensor = self.base.encoder.embedding_hidden_mapping_in(super().embed(tokens))
        return projected

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers."""
        attention = layer.attention
        size = attention.attention_head_size
        return (
            split_heads(attention.query(wanted(rows, asking)), size),
            split_heads(attention.key(rows), size),
            split_heads(attention.value(rows), size),
        )

    def dropout(self, layer: Any) -> float:
        return float(layer.attention.attention_dropout.p)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        """The end of AlbertAttention."""
        attention = layer.attention
        joined: Tensor = attention.LayerNorm(rows + attention.output_dropout(attention.dense(context)))
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.full_layer_layer_norm(layer.ff_chunk(rows) + rows)
        return result

    def pool(self, first: Tensor) -> Tensor | None:
        """The pooler is a linear layer without an activation of its own."""
        pooler = self.base.pooler
        return None if pooler is None else self.base.pooler_activation(pooler(first))

    def embedding_modules(self) -> EmbeddingModules:
        embeddings = self.base.embeddings
        return EmbeddingModules(
            word=embeddings.word_embeddings,
            position=embeddings.position_embeddings,
            token_type=embeddings.token_type_embeddings,
            norm=embeddings.LayerNorm,
            projection=self.base.encoder.embedding_hidden_mapping_in,
        )

    def layer_modules(self, layer: Any) -> LayerModules:
        attention = layer.attention
        return LayerModules(
            query=attention.query,
            key=attention.key,
            value=attention.value,
            attention_output=attention.dense,
            attention_norm=attention.LayerNorm,
            feed_forward_up=layer.ffn,
            feed_forward_down=layer.ffn_output,
            output_norm=layer.full_layer_layer_norm,
            activation=layer.activation,
        )
