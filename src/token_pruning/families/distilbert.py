"""DistilBERT."""

from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput

from token_pruning.families.base import EmbeddingModules, Family, LayerModules, ModelShape, split_heads, wanted
from token_pruning.ragged import PackedTokens


class DistilBert(Family):
    """Post-LN like BERT, under other names."""

    model_types = ("distilbert",)
    output_class = BaseModelOutput
    native = True
    replaced = ("attention", "attention.dropout", "ffn")

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        return ModelShape(
            num_layers=config.n_layers,
            hidden_size=config.dim,
            num_heads=config.n_heads,
            intermediate_size=config.hidden_dim,
            max_positions=config.max_position_embeddings,
        )

    @property
    def layers(self) -> Any:
        return self.base.transformer.layer

    def embed(self, tokens: PackedTokens) -> Tensor:
        """Without token types."""
        ids = None if tokens.ids is None else tokens.ids[None]
        embeds = None if tokens.embeds is None else tokens.embeds[None]
        embedded: Tensor = self.base.embeddings(ids, embeds, tokens.positions[None])
        return embedded[0]

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers."""
        attention = layer.attention
        size = attention.attention_head_size
        return (
            split_heads(attention.q_lin(wanted(rows, asking)), size),
            split_heads(attention.k_lin(rows), size),
            split_heads(attention.v_lin(rows), size),
        )

    def dropout(self, layer: Any) -> float:
        return float(layer.attention.dropout.p)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        joined: Tensor = layer.sa_layer_norm(layer.attention.out_lin(context) + rows)
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.output_layer_norm(layer.ffn.ff_chunk(rows) + rows)
        return result

    def embedding_modules(self) -> EmbeddingModules:
        embeddings = self.base.embeddings
        return EmbeddingModules(
            word=embeddings.word_embeddings,
            position=embeddings.position_embeddings,
            token_type=None,
            norm=embeddings.LayerNorm,
            projection=None,
        )

    def layer_modules(self, layer: Any) -> LayerModules:
        return LayerModules(
            query=layer.attention.q_lin,
            key=layer.attention.k_lin,
            value=layer.attention.v_lin,
            attention_output=layer.attention.out_lin,
            attention_norm=layer.sa_layer_norm,
            feed_forward_up=layer.ffn.lin1,
            feed_forward_down=layer.ffn.lin2,
            output_norm=layer.output_layer_norm,
            activation=layer.ffn.activation,
        )

    @property
    def activation(self) -> str:
        return str(self.config.activation)
