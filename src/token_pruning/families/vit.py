"""ViT, and DeiT, whose second token is one more."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from token_pruning.errors import ConfigError
from token_pruning.families.base import Family, ModelShape, split_heads, wanted
from token_pruning.ragged import PackedTokens


class ViT(Family):
    """Pre-LN, over patches of images; these are embedded before they are packed."""

    model_types = ("vit", "deit")
    output_class = BaseModelOutputWithPooling
    first_token_heads = ("ForImageClassification",)

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        return replace(super().shape(config), max_positions=None, head_dim=getattr(config, "head_dim", None))

    def inputs(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """Pixels become embeddings."""
        pixels = options.get("pixel_values")
        if pixels is None:
            raise ConfigError("pixel_values is missing")
        embeddings = self.base.embeddings
        embedded = embeddings(
            pixels.to(embeddings.patch_embeddings.projection.weight.dtype),
            bool_masked_pos=options.get("bool_masked_pos"),
            interpolate_pos_encoding=bool(options.get("interpolate_pos_encoding")),
        )
        return {"inputs_embeds": embedded, "attention_mask": options.get("attention_mask")}

    @property
    def layers(self) -> Any:
        return self.base.layers

    def embed(self, tokens: PackedTokens) -> Tensor:
        """That was done when the images were whole."""
        assert tokens.embeds is not None
        return tokens.embeds

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """A LayerNorm and three linear layers."""
        attention, rows = layer.attention, layer.layernorm_before(rows)
        return (
            split_heads(attention.q_proj(wanted(rows, asking)), attention.head_dim),
            split_heads(attention.k_proj(rows), attention.head_dim),
            split_heads(attention.v_proj(rows), attention.head_dim),
        )

    def dropout(self, layer: Any) -> float:
        return float(layer.attention.attention_dropout)

    def join(self, layer: Any, context: Tensor, rows: Tensor) -> Tensor:
        joined: Tensor = layer.dropout(layer.attention.o_proj(context)) + rows
        return joined

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.dropout(layer.mlp(layer.layernorm_after(rows))) + rows
        return result

    def finish(self, rows: Tensor) -> Tensor:
        finished: Tensor = self.base.layernorm(rows)
        return finished
