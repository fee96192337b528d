"""MegatronBERT."""

from typing import Any

from torch import Tensor, nn

from token_pruning.families.bert import Bert


class MegatronBert(Bert):
    """BERT as pre-LN: no norm of embeddings, one before attention, before the feed-forward, and after all layers."""

    model_types = ("megatron-bert",)
    norm_first = True
    pooler_in_tuple = True

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        return super().project(layer, layer.attention.ln(rows), positions, asking)

    def feed_forward(self, layer: Any, rows: Tensor) -> Tensor:
        result: Tensor = layer.output(layer.intermediate(layer.ln(rows)), rows)
        return result

    @property
    def last_norm(self) -> nn.Module:
        norm: nn.Module = self.base.encoder.ln
        return norm

    def norms(self, layer: Any) -> tuple[nn.Module, nn.Module]:
        return layer.attention.ln, layer.ln
