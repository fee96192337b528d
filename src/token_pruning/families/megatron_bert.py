"""MegatronBERT."""

from typing import Any

from torch import Tensor

from token_pruning.families.bert import Bert


class MegatronBert(Bert):
    """BERT as pre-LN: no norm of embeddings, one before attention, before the feed-forward, and after all layers."""

    model_types = ("megatron-bert",)
    native = False
    pooler_in_tuple = True

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        return super().project(layer, layer.attention.ln(rows), positions, asking)

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.output(layer.intermediate(layer.ln(rows)), rows)
        return result

    def finish(self, rows: Tensor) -> Tensor:
        finished: Tensor = self.base.encoder.ln(rows)
        return finished
