"""DeBERTa-v2, and v3, which is the same."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

from token_pruning.families.base import HeadOutputs, ModelShape, split_heads, wanted
from token_pruning.families.deberta import Deberta


class DebertaV2(Deberta):
    """DeBERTa with other projections; farther relative positions share embeddings in buckets."""

    model_types = ("deberta-v2",)

    @classmethod
    def shape(cls, config: Any) -> ModelShape:
        return replace(super().shape(config), head_dim=getattr(config, "attention_head_size", None))

    @classmethod
    def unsupported(cls, config: Any) -> str | None:
        """A convolution over tokens that may be gone, and buckets that do not end or do not mirror."""
        kernel_size = getattr(config, "conv_kernel_size", 0)
        if kernel_size > 0:
            return f"conv_kernel_size {kernel_size}"
        buckets, most = getattr(config, "position_buckets", -1), super().span(config)
        if buckets > 0 and (buckets % 2 or most <= buckets // 2 + 1):
            return f"position_buckets {buckets} for max_relative_positions {most}"
        return None

    @classmethod
    def span(cls, config: Any) -> int:
        buckets: int = getattr(config, "position_buckets", -1)
        return buckets if buckets > 0 else super().span(config)

    def project(self, layer: Any, rows: Tensor, positions: Tensor, asking: Tensor | None) -> tuple[Tensor, ...]:
        """Three linear layers."""
        attention = layer.attention.self
        size = attention.attention_head_size
        return (
            split_heads(attention.query_proj(wanted(rows, asking)), size),
            split_heads(attention.key_proj(rows), size),
            split_heads(attention.value_proj(rows), size),
        )

    def scale(self, layer: Any) -> float:
        """All terms of the logits count."""
        terms = 1 + len(self.position_terms(self.config))
        return float((layer.attention.self.attention_head_size * terms) ** -0.5)

    def columns(self, device: torch.device) -> Tensor:
        span, most = self.span(self.config), super().span(self.config)
        if getattr(self.config, "position_buckets", -1) <= 0:
            return super().columns(device)
        distances = torch.arange(-2 * most, 2 * most + 1, device=device)
        buckets: Tensor = make_log_bucket_position(distances, span, most)
        return (buckets.long() + span).clamp(0, 2 * span - 1)

    def position_key(self, attention: Any) -> nn.Linear:
        linear: nn.Linear = attention.key_proj if attention.share_att_key else attention.pos_key_proj
        return linear

    def position_query(self, attention: Any) -> nn.Linear:
        linear: nn.Linear = attention.query_proj if attention.share_att_key else attention.pos_query_proj
        return linear

    def projections(self, attention: Any) -> tuple[nn.Linear | HeadOutputs, ...]:
        return attention.query_proj, attention.key_proj, attention.value_proj

    @property
    def norm_class(self) -> type[nn.Module]:
        return nn.LayerNorm
