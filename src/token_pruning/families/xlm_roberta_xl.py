"""XLM-R-XL."""

from typing import Any

from torch import Tensor, nn

from token_pruning.families.roberta import Roberta


class XlmRobertaXl(Roberta):
    """XLM-R as pre-LN: a norm before attention, one before the feed-forward, one after the last layer."""

    model_types = ("xlm-roberta-xl",)
    norm_first = True

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        return super().project(layer, layer.attention.self_attn_layer_norm(rows), positions, asking)

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.output(layer.intermediate(layer.LayerNorm(rows)), rows)
        return result

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.base.encoder.LayerNorm
        return norm

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.attention.self_attn_layer_norm, layer.LayerNorm
