"""MPNet."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.families.base import LayerModules, split_heads, wanted
from token_pruning.families.roberta import Roberta
from token_pruning.ragged import LogitTerms

_FAR = 128  # all greater distances share the outermost buckets


class MPNet(Roberta):
    """Post-LN like BERT; logits get a bias by the distance of two tokens, the same in every layer."""

    model_types = ("mpnet",)
    output_class = BaseModelOutputWithPooling
    pooler_in_tuple = True
    replaced = ("attention", "attention.attn", "attention.attn.dropout")

    @classmethod
    def padding(cls, config: Any) -> int:
        """Whatever the config says."""
        return 1

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers."""
        attention = layer.attention.attn
        size = attention.attention_head_size
        return (
            split_heads(attention.q(wanted(rows, asking)), size),
            split_heads(attention.k(rows), size),
            split_heads(attention.v(rows), size),
        )

    def dropout(self, layer: Any) -> float:
        return float(layer.attention.attn.dropout.p)

    def terms(self, layer: Any) -> LogitTerms:
        """The bias, from a table with a row per distance."""
        table = self._table()

        def bias(query: Tensor, key: Tensor, query_positions: Tensor, key_positions: Tensor) -> Tensor:
            distance = query_positions[:, :, None] - key_positions[:, None, :]
            return embedding(distance.clamp(-_FAR, _FAR) + _FAR, table).permute(0, 3, 1, 2)

        return LogitTerms(bias=bias)

    def _table(self) -> Tensor:
        """``[distances, heads]``, for a query's place less a key's from ``-_FAR`` to ``_FAR``."""
        encoder = self.base.encoder
        distances = torch.arange(-_FAR, _FAR + 1, device=encoder.relative_attention_bias.weight.device)
        table: Tensor = encoder.relative_attention_bias(encoder.relative_position_bucket(-distances))
        return table

    def distance_bias(self) -> Tensor:
        return self._table().T

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        """The end of MPNetAttention."""
        attention = layer.attention
        joined: Tensor = attention.LayerNorm(attention.dropout(attention.attn.o(context)) + rows)
        return joined

    def layer_modules(self, layer: Any) -> LayerModules:
        attention = layer.attention
        return LayerModules(
            query=attention.attn.q,
            key=attention.attn.k,
            value=attention.attn.v,
            attention_output=attention.attn.o,
            attention_norm=attention.LayerNorm,
            feed_forward_up=layer.intermediate.dense,
            feed_forward_down=layer.output.dense,
            output_norm=layer.output.LayerNorm,
            activation=layer.intermediate.intermediate_act_fn,
        )
