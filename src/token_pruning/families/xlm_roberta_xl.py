"""XLM-R-XL."""

from typing import Any

from torch import Tensor

from token_pruning.families.roberta import Roberta


class XlmRobertaXl(Roberta):
    """XLM-R as pre-LN: a norm before attention, one before the feed-forward, one after the last layer."""

    model_types = ("xlm-roberta-xl",)
    native = False

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        return super().project(layer, layer.attention.self_attn_layer_norm(rows), positions, asking)

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.output(layer.intermediate(layer.LayerNorm(rows)), rows)
        return result

    def finish(self, rows: Tensor) -> Tensor:
        finished: Tensor = self.base.encoder.LayerNorm(rows)
        return finished
